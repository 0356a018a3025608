//! One step: forward passes, gradients, clipping, AdamW, and what is measured with them.
//!
//! [`Stepper::launch`] puts a step in the device's queue, and [`Stepper::wait`] fetches its results
//! in one transfer. In between, the host is free to prepare the next step's data. The step itself
//! never waits for the host: if a loss or gradient is not finite, the update is skipped on the
//! device, and `wait` returns an error.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::balance::balance_biases;
use super::gradients::gradients_of;
pub use super::gradients::{StepGradients, gradients};
use super::graph::{Capture, Graphs, Key};
use super::optim::Optimizer;
use super::output::{Parts, StepOutput};
use super::prepared::StepTensors;
pub use super::prepared::{Prepared, SeedingPhase};
use crate::config::Config;
use crate::data::Batch;
use crate::eval::routing::{self, SiteExperts, SiteSupervision, SiteTotals};
use crate::model::routing::totals::RoutingTotals;
use crate::model::{RoutedModel, Trained};

/// The measurements of one step.
#[derive(Debug)]
pub struct StepResult {
    /// Mean loss over the step's label tokens, nats, without label smoothing.
    pub loss: f64,
    /// The same for each domain, in the dataset's order; `None` for a domain without label tokens
    /// in the step.
    pub domain_losses: Vec<Option<f64>>,
    /// Label tokens of the step.
    pub label_tokens: u64,
    /// L2 norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// The routing totals of each site.
    pub routing: Vec<SiteTotals>,
    /// As [`StepGradients::expert_losses`].
    pub expert_losses: Option<Vec<f64>>,
    /// The domain supervision at each site; empty without it.
    pub supervision: Vec<SiteSupervision>,
    /// As [`StepGradients::orthogonality`].
    pub orthogonality: Option<f64>,
}

/// Runs the steps of one model. It holds the optimizer and the graphs captured so far.
#[derive(Debug)]
pub struct Stepper {
    /// The optimizer of the trained parameters.
    pub optimizer: Optimizer,
    graphs: Graphs,
}

/// A step in the device's queue.
#[derive(Debug)]
pub struct StepInFlight {
    output: StepOutput,
    label_counts: Vec<u64>,
    supervised_tokens: u64,
    /// The time from which the device has had work. With a graph, it is taken once the whole step
    /// is in the queue; without one, before the first kernel is.
    pub busy_from: Instant,
}

impl Stepper {
    /// A stepper on `device`.
    pub fn new(optimizer: Optimizer, capture: Capture, device: Device) -> Self {
        Self { optimizer, graphs: Graphs::new(capture, device) }
    }

    /// Time that captures of CUDA graphs have taken so far.
    pub fn capture_time(&self) -> Duration {
        self.graphs.capture_time
    }

    /// Lays out a step's data. This may be done while the previous step is in the queue.
    pub fn prepare(
        &mut self,
        model: &RoutedModel,
        config: &Config,
        batches: &[Batch],
        seeding: Option<SeedingPhase>,
        num_domains: usize,
    ) -> Prepared {
        let is_rounded = self.graphs.can_capture(model, config);
        Prepared::new(model, config, batches, seeding, num_domains, is_rounded)
    }

    /// Puts a step in the device's queue.
    ///
    /// - `update`: the numbers of [`Optimizer::scalars`]
    pub fn launch(
        &mut self,
        model: &RoutedModel,
        trained: &Trained,
        config: &Config,
        step: &Prepared,
        update: &[f64],
    ) -> Result<StepInFlight> {
        let mut busy_from = Instant::now();
        let num_replays = self.graphs.num_replays;
        let optimizer = &self.optimizer;
        let scalars = step.scalars(update);
        let run = |flats: &[Tensor], scalars: &Tensor| {
            on_device(model, trained, optimizer, config, &step.tensors(flats, scalars))
        };
        // if a hybrid rule has become sparse since the data was rounded, the step cannot be
        // captured
        let output = if step.is_rounded && self.graphs.can_capture(model, config) {
            let top_k = model.router_spec().top_k;
            let key = Key { layouts: step.layouts(), top_k, seeding: step.seeding };
            self.graphs.run(key, step.flats(), scalars, &run)?
        } else {
            run(&step.flats(), &scalars)?
        };
        if self.graphs.num_replays > num_replays {
            busy_from = Instant::now();
        }
        let (label_counts, supervised_tokens) = (step.label_counts.clone(), step.supervised_tokens);
        Ok(StepInFlight { output, label_counts, supervised_tokens, busy_from })
    }

    /// Waits for a step and fetches its results.
    ///
    /// # Errors
    /// Fails with [`NotFinite`] if a loss or gradient is NaN or infinite. The parameters, the
    /// optimizer and the selection biases are then as before the step.
    pub fn wait(&mut self, pending: StepInFlight) -> Result<StepResult> {
        let StepInFlight { output, label_counts, supervised_tokens, .. } = pending;
        let StepOutput { numbers, parts } = output;
        let mut numbers = Vec::<f64>::try_from(numbers)?.into_iter();
        let mut take = |n: usize| -> Vec<f64> { numbers.by_ref().take(n).collect() };
        let grad_norm = take(1)[0];
        let domain_sums = take(label_counts.len());
        let label_tokens: u64 = label_counts.iter().sum();
        let loss = domain_sums.iter().sum::<f64>() / label_tokens as f64;
        check_finite(loss, grad_norm)?;
        self.optimizer.count_update();
        let of_domain = |(sum, &count)| (count > 0).then(|| sum / count as f64);
        let orthogonality = parts.has_orthogonality.then(|| take(1)[0]);
        let expert_losses = (parts.expert_losses > 0).then(|| take(parts.expert_losses));
        let supervision = take(2 * parts.supervised_sites);
        Ok(StepResult {
            loss,
            domain_losses: domain_sums.into_iter().zip(&label_counts).map(of_domain).collect(),
            label_tokens,
            grad_norm,
            routing: routing::of_numbers(parts.sites, label_counts.len(), &mut numbers),
            expert_losses,
            supervision: SiteSupervision::of_sums(&supervision, supervised_tokens),
            orthogonality,
        })
    }
}

/// The whole step on the device. The host reads none of its numbers and waits for nothing.
fn on_device(
    model: &RoutedModel,
    trained: &Trained,
    optimizer: &Optimizer,
    config: &Config,
    step: &StepTensors,
) -> Result<StepOutput> {
    let StepGradients { grads, domain_sums, routing, expert_losses, supervision, orthogonality } =
        gradients_of(model, trained, config, step)?;
    let grad_norm = optimizer.clip(&grads)?;
    let is_finite = domain_sums.sum(Kind::Double).isfinite().logical_and(&grad_norm.isfinite());
    optimizer.update(&grads, &step.update, &is_finite)?;
    if config.router.balance_bias_rate > 0.0 && step.seeding.is_none() {
        let old_rate = config.growth.as_ref().map(|growth| growth.old_columns_rate);
        let rate = config.router.balance_bias_rate;
        balance_biases(model, &routing, rate, old_rate, &is_finite);
    }
    let parts = Parts {
        has_orthogonality: orthogonality.is_some(),
        expert_losses: expert_losses.as_ref().map_or(0, |losses| losses.size()[0] as usize),
        supervised_sites: supervision.as_ref().map_or(0, |sums| sums.size()[0] as usize),
        sites: if routing.is_empty() { vec![] } else { SiteExperts::of(model) },
    };
    let mut numbers = vec![grad_norm, domain_sums];
    numbers.extend(orthogonality);
    numbers.extend(expert_losses);
    numbers.extend(supervision);
    numbers.extend(routing.iter().map(RoutingTotals::flat));
    let flat = numbers.iter().map(|x| x.to_kind(Kind::Double).reshape([-1]));
    Ok(StepOutput { numbers: Tensor::cat(&flat.collect::<Vec<_>>(), 0), parts })
}

/// A step whose loss or gradient is NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NotFinite {
    /// Mean loss over the step's label tokens, nats.
    pub loss: f64,
    /// L2 norm of all gradients together.
    pub grad_norm: f64,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { loss, grad_norm } = self;
        write!(
            f,
            "the loss is {loss} and the gradient norm {grad_norm}\nhint: try a smaller \
             `optimizer.*.learning_rate`, a `schedule.warmup_steps` or `optimizer.max_grad_norm`"
        )
    }
}

impl std::error::Error for NotFinite {}

fn check_finite(loss: f64, grad_norm: f64) -> Result<(), NotFinite> {
    match loss.is_finite() && grad_norm.is_finite() {
        true => Ok(()),
        false => Err(NotFinite { loss, grad_norm }),
    }
}
