//! What the trainer keeps about routing from step to step: the temperature, the maturity of experts, the
//! selection biases, and the window after which routing is told about and checked.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::config::{Maturity, Plateau, RouterConfig};
use crate::eval::routing::{self, SiteTotals};
use crate::model::RoutedModel;
use crate::model::routing::totals::RoutingTotals;

/// What is kept, in a checkpoint's `state.json`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingState {
    /// Steps of the present window.
    pub window_steps: u64,
    /// Their totals at each place where routing is decided.
    pub window: Vec<SiteTotals>,
    /// Whether the last whole window was found to have collapsed.
    pub collapsed: bool,
    /// Each expert's way to maturity; empty unless the rule is hybrid.
    pub experts: Vec<ExpertMaturity>,
}

/// An expert's way to maturity.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertMaturity {
    /// Once mature, it stays so.
    pub is_mature: bool,
    /// Label tokens routed to it, each counted by its routing weight.
    pub tokens: f64,
    /// Sum over the present window of its routing weights.
    pub window_weight: f64,
    /// Sum over the present window of the losses, nats, each times its routing weight.
    pub window_loss: f64,
    /// Mean loss over the window before.
    pub last_loss: Option<f64>,
}

impl RoutingState {
    /// At the start of a run.
    pub fn new(config: &RouterConfig, num_experts: i64) -> Self {
        let hybrid = config.hybrid.is_some() && num_experts > 1;
        let num_tracked = if hybrid { num_experts as usize } else { 0 };
        Self { experts: vec![ExpertMaturity::default(); num_tracked], ..Self::default() }
    }

    /// How many experts a token keeps in the next step; none = all.
    pub fn top_k(&self, config: &RouterConfig) -> Option<i64> {
        let is_mature = self.experts.iter().all(|expert| expert.is_mature);
        config.top_k.filter(|_| is_mature)
    }

    /// How many experts are mature; none unless the rule is hybrid.
    pub fn mature_experts(&self) -> Option<u64> {
        let count = self.experts.iter().filter(|expert| expert.is_mature).count() as u64;
        (!self.experts.is_empty()).then_some(count)
    }

    /// Takes note of step `step`: what each site did, and, where a plateau is looked for, the sum of the
    /// losses weighted by each expert's routing weights.
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

    /// The steps and totals of the window; the next one is begun.
    pub fn take_window(&mut self) -> (u64, Vec<SiteTotals>) {
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

/// Label tokens by their routing weight for an expert, the mean over the sites that have it.
fn routed_tokens(totals: &[SiteTotals], expert: usize) -> f64 {
    let of_site = |site: &SiteTotals| {
        let at = site.experts.iter().position(|e| *e == expert)?;
        Some(site.weights.iter().map(|row| row[at]).sum::<f64>())
    };
    let sums: Vec<f64> = totals.iter().filter_map(of_site).collect();
    sums.iter().sum::<f64>() / sums.len().max(1) as f64
}

/// The temperature of step `step`, from 1.
pub fn temperature(config: &RouterConfig, step: u64) -> f64 {
    match config.temperature_schedule {
        Some(schedule) if step <= schedule.steps => {
            let progress = step.saturating_sub(1) as f64 / schedule.steps as f64;
            schedule.start * (config.temperature / schedule.start).powf(progress)
        }
        _ => config.temperature,
    }
}

/// Moves each router's selection bias by `rate` towards the experts that had less than their share of
/// the step's assignments (arXiv:2408.15664, algorithm 1: `b_i + u sign(mean load - load_i)`). With
/// `old_rate`, those of all experts but the last move by that part of it.
pub fn balance_biases(
    model: &RoutedModel,
    totals: &[RoutingTotals],
    rate: f64,
    old_rate: Option<f64>,
) {
    balance_biases_if(None, model, totals, rate, old_rate);
}

/// The same where `is_finite`, 0-dim, is true; else nothing moves.
pub fn balance_biases_if(
    is_finite: Option<&Tensor>,
    model: &RoutedModel,
    totals: &[RoutingTotals],
    rate: f64,
    old_rate: Option<f64>,
) {
    let _no_grad = tch::no_grad_guard();
    let biases = model.routers().iter().map(|router| router.selection_bias.as_ref());
    let mut surplus: Vec<Option<Tensor>> =
        biases.map(|bias| bias.map(|bias| bias.to_kind(Kind::Double).zeros_like())).collect();
    for (site, totals) in model.sites().into_iter().zip(totals) {
        // where all experts are chosen, as before they are mature, none has more than its share
        let Some(sum) = surplus[site.router].as_mut().filter(|_| !totals.is_dense()) else {
            continue;
        };
        let share = totals.expert_load() - 1.0 / totals.num_experts() as f64;
        *sum = match model.present_at(site) {
            None => &*sum + share,
            Some(experts) => sum.index_add(0, experts, &share),
        };
    }
    for (router, surplus) in model.routers().iter().zip(surplus) {
        let (Some(bias), Some(surplus)) = (&router.selection_bias, surplus) else { continue };
        // loads are quotients of whole numbers: what is even but for rounding stays
        let direction = surplus.sign() * surplus.abs().ge(1e-12).to_kind(Kind::Double);
        if let Some(old_rate) = old_rate {
            let _ = direction.narrow(0, 0, model.num_experts() - 1).multiply_scalar_(old_rate);
        }
        let mut moved = bias - (direction * rate).to_kind(bias.kind());
        if let Some(is_finite) = is_finite {
            moved = moved.where_self(is_finite, bias);
        }
        bias.shallow_clone().copy_(&moved);
    }
}
