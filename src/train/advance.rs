//! The trainer's next step: its data, its learning rate and routing rule, the state that it leaves,
//! and its metrics.
//!
//! ```text
//! host     launch | prepare the next | wait, record, report | launch | ..
//! device          |     the step     |        idle          |        | ..
//! ```
//!
//! Where steps are replayed as CUDA graphs, the next step is launched before the host waits for
//! the present one, so that the device is not idle in between:
//!
//! ```text
//! host     launch 1 | prepare 2 | launch 2 | wait for 1, report | prepare 3 | launch 3 | ..
//! device            |          step 1             |              step 2                | ..
//! ```
//!
//! The host waits first if something between the two steps may read the model or end the run: an
//! evaluation, a checkpoint, the opening of a router's column, a request to stop, a check of the
//! routing that may stop the run, or a rule that depends on the experts' progress.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::metrics::StepMetrics;
use super::prepared::StepCounts;
use super::step::{Marks, Prepared, StepInFlight, StepResult};
use super::{Trainer, schedule};
use crate::checkpoint::Position;
use crate::checkpoint::routing_state::StepRule;
use crate::config::OnCollapse;
use crate::data::{Batch, BlockId};
use crate::eval::RoutingReport;
use crate::eval::routing::{RouterLosses, SiteSupervision};
use crate::ffi;

/// The data of a step, and the position of the stream of blocks after it.
#[derive(Debug)]
pub(super) struct PreparedStep {
    blocks: Vec<BlockId>,
    data: Prepared,
    position: Position,
    epoch: f64,
}

/// A step that has been launched.
#[derive(Debug)]
pub(super) struct Launched {
    prepared: PreparedStep,
    pending: StepInFlight,
    queued: Queued,
    temperature: f64,
    learning_rates: BTreeMap<String, f64>,
}

/// How a step came into the device's queue.
#[derive(Debug, Clone, Copy)]
enum Queued {
    /// When nothing else was in it. The host began at `started`, and the device had nothing to do
    /// for `idle`.
    Alone { started: Instant, idle: Duration },
    /// Behind a step for which the host had not waited yet.
    Behind,
}

/// The end of the last step.
#[derive(Debug)]
pub(super) struct StepEnd {
    /// When the host had its results.
    at: Instant,
    marks: Option<Marks>,
}

/// The times of a step, in seconds.
#[derive(Debug, Clone, Copy)]
struct StepTimes {
    step_secs: f64,
    host_secs: f64,
}

impl Trainer {
    /// Ends the next step, which is launched first if it is not in flight. While the device works,
    /// the data of the step after it is prepared, and that step is launched if nothing comes in
    /// between.
    ///
    /// - `interrupt`: whether this process was asked to stop
    pub(super) fn step(&mut self, interrupt: &AtomicBool) -> Result<StepMetrics> {
        let step = self.state.step + 1;
        let Launched { prepared, mut pending, queued, temperature, learning_rates } =
            match self.in_flight.take() {
                Some(launched) => launched?,
                None => self.launch(step, interrupt, false)?,
            };
        // the phase of the next step is not known while the column may be opened after this one
        if step < self.num_steps && !self.opens_column_after(step) {
            self.ready = Some(self.prepare(step + 1));
        }
        self.goes_on = self.may_launch_after(step, interrupt);
        if self.goes_on && pending.is_replay() {
            self.in_flight = Some(ffi::caught(|| self.launch(step + 1, interrupt, true)));
        }
        let marks = pending.marks.take();
        let result = self.stepper.wait(pending).map_err(|error| match &self.in_flight {
            Some(Err(next)) => error.context(format!("the next step was not launched: {next:#}")),
            _ => error,
        })?;
        self.stops = result.stops;
        let before = self.last_end.replace(StepEnd { at: Instant::now(), marks });
        let state = &mut self.state;
        let expert_losses = result.expert_losses.as_deref();
        state.routing.note(&self.config.router, step, &result.routing, expert_losses);
        state.step = step;
        state.tokens_seen += result.label_tokens;
        state.position = prepared.position;
        for block in &prepared.blocks {
            state.domain_blocks[block.domain as usize] += 1;
        }
        if self.in_flight.is_none() {
            self.set_rule(step);
        }
        let times = self.times(queued, before)?;
        self.step_metrics(&prepared, result, times, temperature, learning_rates)
    }

    /// Puts step `step` into the device's queue.
    ///
    /// - `is_behind`: whether the step before it is still there
    fn launch(&mut self, step: u64, interrupt: &AtomicBool, is_behind: bool) -> Result<Launched> {
        let started = Instant::now();
        let mut prepared = match self.ready.take() {
            Some(ready) => ready,
            None => self.prepare(step),
        };
        let temperature = self.set_rule(step);
        let rate = match &self.config.growth {
            Some(growth) if prepared.data.seeding.is_none() => growth.consolidation_rate,
            _ => 1.0,
        };
        let (schedule, num_steps) = (self.config.schedule, self.num_steps);
        let lr_factor = |own| rate * schedule::factor(schedule, own, step, num_steps);
        let update = self.stepper.optimizer.scalars(&lr_factor);
        let learning_rates = self.stepper.optimizer.learning_rates(&update);
        let (model, trained) = (&self.model, &self.trained);
        prepared.data.stops = interrupt.load(Ordering::Relaxed);
        let pending = self.stepper.launch(model, trained, &self.config, &prepared.data, &update)?;
        let idle_since = self.last_end.as_ref().map_or(started, |end| end.at);
        let queued = match is_behind {
            true => Queued::Behind,
            false => Queued::Alone { started, idle: pending.busy_from.duration_since(idle_since) },
        };
        Ok(Launched { prepared, pending, queued, temperature, learning_rates })
    }

    /// Makes the model route by the rule of step `step`. Returns its temperature.
    fn set_rule(&mut self, step: u64) -> f64 {
        let StepRule { temperature, top_k } = self.state.routing.rule(&self.config.router, step);
        self.model.set_rule(temperature, top_k);
        temperature
    }

    /// Whether the step after step `step` may be launched before the results of step `step` are
    /// known, because nothing reads the model in between, and only an error can end the run there.
    /// All processes of a world decide alike, though some may not launch it: whether a step is
    /// replayed depends on the shapes that a process has seen.
    fn may_launch_after(&self, step: u64, interrupt: &AtomicBool) -> bool {
        let must_stop = match self.world.is_single() {
            true => interrupt.load(Ordering::Relaxed),
            false => self.stops,
        };
        let router = &self.config.router;
        let may_collapse = router.on_collapse == OnCollapse::Stop && self.window_ends_after(step);
        self.stepper.may_capture()
            && self.ready.is_some()
            && !must_stop
            && !may_collapse
            && !self.saves_after(step)
            && router.hybrid.is_none()
    }

    /// The times of the last step.
    ///
    /// - `before`: the end of the step before it
    fn times(&self, queued: Queued, before: Option<StepEnd>) -> Result<StepTimes> {
        match (queued, before, &self.last_end) {
            (Queued::Alone { started, idle }, _, Some(end)) => Ok(StepTimes {
                step_secs: end.at.duration_since(started).as_secs_f64(),
                host_secs: idle.as_secs_f64(),
            }),
            (Queued::Behind, Some(before), Some(end)) => {
                let marks = end.marks.as_ref().zip(before.marks.as_ref());
                let idle = marks.map(|(marks, before)| marks.begin.secs_since(&before.end));
                Ok(StepTimes {
                    step_secs: end.at.duration_since(before.at).as_secs_f64(),
                    host_secs: idle.transpose()?.unwrap_or(0.0),
                })
            }
            _ => unreachable!("this step has ended, and a step that is behind another follows it"),
        }
    }

    /// Takes the next blocks of the stream as the data of step `step`, of which this process lays
    /// out its share. A process without a block takes part with a row of padding.
    fn prepare(&mut self, step: u64) -> PreparedStep {
        let per_step = self.blocks_per_step();
        let dataset = &self.data.train;
        let blocks = self.stream.take(dataset, per_step);
        let own = self.own_share(&blocks);
        let chunks = own.chunks(self.config.train.micro_batch_size);
        let mut batches: Vec<_> = chunks.map(|chunk| dataset.batch(chunk)).collect();
        if batches.is_empty() {
            batches.push(Batch::padding(dataset.seq_len));
        }
        let seeding = self.seeding_phase(step);
        let num_domains = dataset.domains.len();
        let counts = StepCounts::new(&self.config, dataset, &blocks);
        let data = self.stepper.prepare(&self.model, &self.config, &batches, seeding, num_domains);
        let data = data.part_of(counts);
        PreparedStep { blocks, data, position: self.stream.position(), epoch: self.stream.epoch() }
    }

    /// The metrics of the step just done.
    fn step_metrics(
        &self,
        prepared: &PreparedStep,
        result: StepResult,
        StepTimes { step_secs, host_secs }: StepTimes,
        temperature: f64,
        learning_rates: BTreeMap<String, f64>,
    ) -> Result<StepMetrics> {
        let losses = RouterLosses::new(&result.routing);
        let routing = RoutingReport::new(&result.routing, None, self.config.router.dead_share);
        let domains = self.data.train.domains.iter().zip(&result.domain_losses);
        let accuracies: Vec<f64> = result.supervision.iter().map(|site| site.accuracy).collect();
        let tokens = (prepared.blocks.len() * self.data.train.seq_len) as f64;
        Ok(StepMetrics {
            step: self.state.step,
            epoch: prepared.epoch,
            tokens_seen: self.state.tokens_seen,
            loss: result.loss,
            domain_losses: domains
                .filter_map(|(d, loss)| Some((d.name.clone(), (*loss)?)))
                .collect(),
            load_balancing_loss: losses.map(|losses| losses.load_balancing_loss),
            uniform_mse: losses.map(|losses| losses.uniform_mse),
            router_z_loss: losses.map(|losses| losses.router_z_loss),
            routing_entropy: losses.map(|losses| losses.routing_entropy),
            domain_supervision: SiteSupervision::mean(&result.supervision).map(|mean| mean.loss),
            domain_accuracy: self.accuracy_by_router(&accuracies),
            orthogonality: result.orthogonality,
            expert_load: routing.map(|routing| routing.expert_load),
            mature_experts: self.state.routing.mature_experts(),
            temperature: losses.map(|_| temperature),
            grad_norm: result.grad_norm,
            learning_rates,
            label_tokens: result.label_tokens,
            step_secs,
            host_secs,
            tokens_per_sec: tokens / step_secs,
            peak_memory_bytes: ffi::peak_memory_bytes(self.model.device())?,
        })
    }

    /// The accuracy of each router, as a mean over its sites, by the router's name.
    ///
    /// - `accuracies`: the share of tokens that each site gives to an expert of their domain; empty
    ///   if it is not known
    pub(super) fn accuracy_by_router(&self, accuracies: &[f64]) -> BTreeMap<String, f64> {
        let names = self.model.router_names();
        let mut of: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for (site, accuracy) in self.model.sites().into_iter().zip(accuracies) {
            let (sum, count) = of.entry(names[site.router].clone()).or_default();
            *sum += accuracy;
            *count += 1.0;
        }
        of.into_iter().map(|(name, (sum, count))| (name, sum / count)).collect()
    }
}
