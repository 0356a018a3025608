//! The state of routing that the trainer keeps from step to step: the maturity of experts, and the
//! totals of the window after which routing is reported and checked. With the config, it gives the
//! temperature and `top_k` of each step.

use serde::{Deserialize, Serialize};

use crate::config::{Config, Maturity, Plateau, RouterConfig};
use crate::eval::routing::{self, SiteTotals};
use crate::model::routing::router::RouterSpec;

/// The state of routing, as kept in a checkpoint's `state.json`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingState {
    /// Number of steps in the present window.
    pub window_steps: u64,
    /// The window's totals at each site.
    pub window: Vec<SiteTotals>,
    /// Whether the routing had collapsed in the last window.
    pub collapsed: bool,
    /// Each expert's progress towards maturity; empty unless `router.hybrid` is set.
    pub experts: Vec<ExpertMaturity>,
}

/// The part of the routing rule that changes from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRule {
    /// The temperature that divides the scores.
    pub temperature: f64,
    /// How many experts a token keeps; `None` for all.
    pub top_k: Option<i64>,
}

impl StepRule {
    /// The settings of a config's routers under this rule.
    pub fn router_spec(self, config: &Config) -> RouterSpec {
        let Self { temperature, top_k } = self;
        RouterSpec { temperature, top_k, ..RouterSpec::of_config(config) }
    }
}

/// An expert's progress towards maturity.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertMaturity {
    /// Whether the expert is mature. A mature expert stays mature.
    pub is_mature: bool,
    /// Label tokens routed to the expert, each counted by its routing weight.
    pub tokens: f64,
    /// Sum of the expert's routing weights over the present window of `plateau.window_steps` steps.
    pub window_weight: f64,
    /// Sum over the same window of each token's loss, nats, times its routing weight.
    pub window_loss: f64,
    /// Weighted mean loss over the previous window, nats.
    pub last_loss: Option<f64>,
}

impl RoutingState {
    /// The state at the start of a run.
    pub fn new(config: &RouterConfig, num_experts: i64) -> Self {
        let hybrid = config.hybrid.is_some() && num_experts > 1;
        let num_tracked = if hybrid { num_experts as usize } else { 0 };
        Self { experts: vec![ExpertMaturity::default(); num_tracked], ..Self::default() }
    }

    /// How many experts a token keeps in the next step; `None` for all.
    fn top_k(&self, config: &RouterConfig) -> Option<i64> {
        let is_mature = self.experts.iter().all(|expert| expert.is_mature);
        config.top_k.filter(|_| is_mature)
    }

    /// The temperature and top-k by which step `step`, from 1, routes.
    pub fn rule(&self, config: &RouterConfig, step: u64) -> StepRule {
        StepRule { temperature: temperature(config, step), top_k: self.top_k(config) }
    }

    /// How many experts are mature; `None` unless `router.hybrid` is set.
    pub fn mature_experts(&self) -> Option<u64> {
        let count = self.experts.iter().filter(|expert| expert.is_mature).count() as u64;
        (!self.experts.is_empty()).then_some(count)
    }

    /// Adds the results of step `step` to the state.
    ///
    /// - `totals`: the totals of each site
    /// - `expert_losses`: for each expert, the sum of the losses times its routing weights, nats;
    ///   only with a plateau as the criterion of maturity
    pub fn note(
        &mut self,
        config: &RouterConfig,
        step: u64,
        totals: &[SiteTotals],
        expert_losses: Option<&[f64]>,
    ) {
        routing::add(&mut self.window, totals);
        self.window_steps += 1;
        for (e, expert) in self.experts.iter_mut().enumerate() {
            let weight = routed_tokens(totals, e);
            expert.tokens += weight;
            match config.hybrid {
                Some(Maturity::Tokens(tokens)) => {
                    expert.is_mature |= expert.tokens >= tokens as f64;
                }
                Some(Maturity::Plateau(plateau)) => {
                    expert.window_weight += weight;
                    expert.window_loss += expert_losses.map_or(0.0, |losses| losses[e]);
                    if step.is_multiple_of(plateau.window_steps) {
                        expert.close_window(plateau);
                    }
                }
                None => {}
            }
        }
    }

    /// Takes the number of steps and the totals of the window, and begins the next window.
    pub(crate) fn take_window(&mut self) -> (u64, Vec<SiteTotals>) {
        (std::mem::take(&mut self.window_steps), std::mem::take(&mut self.window))
    }
}

impl ExpertMaturity {
    fn close_window(&mut self, plateau: Plateau) {
        if self.window_weight > 0.0 {
            let loss = self.window_loss / self.window_weight;
            self.is_mature |= self.last_loss.is_some_and(|last| loss > last - plateau.min_delta);
            self.last_loss = Some(loss);
        }
        (self.window_weight, self.window_loss) = (0.0, 0.0);
    }
}

/// Label tokens, each counted by its routing weight for an expert, as a mean over the sites that
/// have the expert.
fn routed_tokens(totals: &[SiteTotals], expert: usize) -> f64 {
    let of_site = |site: &SiteTotals| {
        let at = site.experts.iter().position(|e| *e == expert)?;
        Some(site.weights.iter().map(|row| row[at]).sum::<f64>())
    };
    let sums: Vec<f64> = totals.iter().filter_map(of_site).collect();
    sums.iter().sum::<f64>() / sums.len().max(1) as f64
}

/// The temperature of step `step`, from 1.
fn temperature(config: &RouterConfig, step: u64) -> f64 {
    match config.temperature_schedule {
        Some(schedule) if step <= schedule.steps => {
            let progress = step.saturating_sub(1) as f64 / schedule.steps as f64;
            schedule.start * (config.temperature / schedule.start).powf(progress)
        }
        _ => config.temperature,
    }
}
