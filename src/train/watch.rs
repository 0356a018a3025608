//! How a run is observed: windows of steps, whose routing is checked, and evaluations.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};

use super::files::MetricsWriter;
use super::metrics::{Metrics, MixShare, ValidationMetrics, WindowMetrics};
use super::{Event, Trainer};
use crate::checkpoint::Best;
use crate::config::{OnCollapse, RoutingChoice};
use crate::data::{Domain, TokenDataset};
use crate::eval::routing::SiteTotals;
use crate::eval::{EvalReport, EvalSettings, RoutingReport, evaluate};
use crate::model::RoutingSource;

/// Numbers for each expert, by a domain's name.
type ByName = BTreeMap<String, Vec<f64>>;

impl Trainer {
    /// Reports the window that the step just done ends, if it ends one. Returns whether the run
    /// must stop because its routing has collapsed.
    pub(super) fn close_window(
        &mut self,
        writer: &mut MetricsWriter,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool> {
        let (config, step) = (&self.config.router, self.state.step);
        if !self.window_ends_after(step) {
            return Ok(false);
        }
        let (num_steps, totals) = self.state.routing.take_window();
        let report = RoutingReport::new(&totals, None, config.dead_share);
        let routed = self.config.train.routing == RoutingChoice::Router;
        let collapse = match &report {
            // while a new expert is seeded, the router decides for only some of the tokens
            Some(report) if routed && self.seeding_phase(step).is_none() => report.collapse(config),
            _ => vec![],
        };
        let (domain_routing_weights, site_routing_weights) = self.weights_by_domain(&totals);
        let metrics = WindowMetrics {
            step,
            window_steps: num_steps,
            mix: self.mix(),
            domain_routing_weights,
            site_routing_weights,
            routing: report,
            collapse,
        };
        let is_collapsed = !metrics.collapse.is_empty();
        if is_collapsed && !self.state.routing.collapsed {
            tracing::warn!(
                "the routing has collapsed by step {step}: {}",
                metrics.collapse.join("; ")
            );
        }
        self.state.routing.collapsed = is_collapsed;
        observe(Event::Window(&metrics));
        writer.write(&Metrics::Window(metrics))?;
        Ok(is_collapsed && self.config.router.on_collapse == OnCollapse::Stop)
    }

    /// Whether step `step` is the last one of a window.
    pub(super) fn window_ends_after(&self, step: u64) -> bool {
        let seeding_ends =
            self.seeding_phase(step).is_some() && self.seeding_phase(step + 1).is_none();
        step.is_multiple_of(self.config.router.window_steps)
            || step == self.num_steps
            || seeding_ends
    }

    /// The mean routing weights on each domain's tokens, over all sites and at each one.
    fn weights_by_domain(&self, totals: &[SiteTotals]) -> (ByName, BTreeMap<String, ByName>) {
        let (mut all, mut by_site) = (ByName::new(), BTreeMap::<String, ByName>::new());
        for (index, domain) in self.data.train.domains.iter().enumerate() {
            let dead_share = self.config.router.dead_share;
            let Some(report) = RoutingReport::new(totals, Some(index), dead_share) else {
                continue;
            };
            all.insert(domain.name.clone(), report.mean_routing_weights);
            for site in report.sites {
                let of_site = by_site.entry(site.site).or_default();
                of_site.insert(domain.name.clone(), site.mean_routing_weights);
            }
        }
        (all, by_site)
    }

    /// Each domain's share of the blocks so far, and the share that `data.mixing` asks for.
    fn mix(&self) -> BTreeMap<String, MixShare> {
        let total: u64 = self.state.domain_blocks.iter().sum();
        let domains = self.data.train.domains.iter().zip(&self.state.domain_blocks);
        let asked = self.data.train.mix();
        let share = |((domain, &blocks), asked): ((&Domain, &u64), f64)| {
            let realised = blocks as f64 / total.max(1) as f64;
            (domain.name.clone(), MixShare { asked, realised })
        };
        domains.zip(asked).map(share).collect()
    }

    /// Whether enough evaluations in a row have brought no improvement. The seeding phase is never
    /// cut short.
    pub(super) fn stops_early(&self) -> bool {
        let stopping = self.config.train.early_stopping;
        let seeds = self.seeding_phase(self.state.step + 1).is_some();
        stopping.is_some_and(|s| self.state.evals_without_improvement >= s.patience) && !seeds
    }

    /// Whether an evaluation follows step `step`.
    pub(super) fn evaluates_after(&self, step: u64) -> bool {
        let due = self.config.train.eval_every_steps.is_some_and(|n| step.is_multiple_of(n));
        self.data.validation.num_blocks() > 0 && (due || step == self.num_steps)
    }

    /// Evaluates on the validation sets, and updates the best loss, the early-stopping counter and
    /// the stage's losses.
    pub(super) fn validate(
        &mut self,
        writer: &mut MetricsWriter,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        let started = Instant::now();
        let report = {
            let observe = std::cell::RefCell::new(&mut *observe);
            let progress = |done, all| (observe.borrow_mut())(Event::Evaluating(done, all));
            self.evaluate(&self.data.validation, &progress)?
        };
        if !report.loss.is_finite() {
            bail!("the validation loss of step {} is {}", self.state.step, report.loss);
        }
        let metrics = self.validation_metrics(&report, started.elapsed().as_secs_f64());
        if let Some(stage) = self.state.stages.last_mut() {
            stage.step = self.state.step;
            stage.losses.clone_from(&metrics.domain_losses);
        }
        observe(Event::Validation(&metrics));
        writer.write_evaluation(metrics, &report)?;
        // like transformers' EarlyStoppingCallback: a fall of at most `min_delta` is a new best,
        // but no improvement
        let min_delta = self.config.train.early_stopping.map_or(0.0, |s| s.min_delta);
        let falls_by = |delta| self.state.best.is_none_or(|best| report.loss < best.loss - delta);
        let (is_best, improves) = (falls_by(0.0), falls_by(min_delta));
        if is_best {
            self.state.best = Some(Best { step: self.state.step, loss: report.loss });
        }
        self.state.evals_without_improvement =
            if improves { 0 } else { self.state.evals_without_improvement + 1 };
        Ok(())
    }

    /// Evaluates the model in its present state.
    pub fn evaluate(
        &self,
        dataset: &TokenDataset,
        progress: &dyn Fn(u64, u64),
    ) -> Result<EvalReport> {
        let settings = EvalSettings {
            world: Arc::clone(&self.world),
            weight_histograms: self.config.run.tensorboard,
            ..EvalSettings::of_run(&self.config, &self.model, dataset)
        };
        let source = RoutingSource::from(self.config.train.routing);
        evaluate(&self.model, dataset, &source, settings, progress)
    }

    fn validation_metrics(&self, report: &EvalReport, eval_secs: f64) -> ValidationMetrics {
        let routing = report.routing.as_ref();
        let sites = routing.map(|routing| routing.sites.as_slice()).unwrap_or_default();
        let accuracies: Vec<f64> = sites.iter().filter_map(|site| site.domain_accuracy).collect();
        ValidationMetrics {
            step: self.state.step,
            tokens_seen: self.state.tokens_seen,
            loss: report.loss,
            token_loss: report.token_loss,
            domain_losses: report.domain_losses(),
            routing_entropy: routing.map(|routing| routing.routing_entropy),
            expert_load: routing.map(|routing| routing.expert_load.clone()),
            mutual_information: routing.and_then(|routing| routing.mutual_information),
            domain_supervision: report.domain_supervision,
            domain_accuracy: self.accuracy_by_router(&accuracies),
            accuracy_by_domain: report.domain_accuracies(),
            domain_routing_weights: report.domain_routing_weights(),
            eval_secs,
        }
    }
}
