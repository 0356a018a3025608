//! The trainer's next step: its data, its learning rate and routing rule, the state that it leaves,
//! and its metrics.
//!
//! ```text
//! host     launch | prepare the next | wait, record, report | launch | ..
//! device          |     the step     |        idle          |        | ..
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Result;

use super::metrics::StepMetrics;
use super::prepared::StepCounts;
use super::step::{Prepared, StepResult};
use super::{Trainer, schedule};
use crate::checkpoint::Position;
use crate::checkpoint::routing_state::StepRule;
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

/// What is known of a step once it has been launched.
#[derive(Debug)]
struct Launched {
    started: Instant,
    host_secs: f64,
    temperature: f64,
    learning_rates: BTreeMap<String, f64>,
}

impl Trainer {
    /// Runs the next step, and prepares the data of the one after it while the device works.
    ///
    /// - `interrupt`: whether this process was asked to stop
    pub(super) fn step(&mut self, interrupt: &AtomicBool) -> Result<StepMetrics> {
        let started = Instant::now();
        let step = self.state.step + 1;
        let mut ready = match self.ready.take() {
            Some(ready) => ready,
            None => self.prepare(step),
        };
        let router = &self.config.router;
        let rule = self.state.routing.rule(router, step);
        self.model.set_rule(rule.temperature, rule.top_k);
        let rate = match &self.config.growth {
            Some(growth) if ready.data.seeding.is_none() => growth.consolidation_rate,
            _ => 1.0,
        };
        let (schedule, num_steps) = (self.config.schedule, self.num_steps);
        let lr_factor = |own| rate * schedule::factor(schedule, own, step, num_steps);
        let update = self.stepper.optimizer.scalars(&lr_factor);
        let learning_rates = self.stepper.optimizer.learning_rates(&update);
        let (model, trained) = (&self.model, &self.trained);
        ready.data.stops = interrupt.load(Ordering::Relaxed);
        let pending = self.stepper.launch(model, trained, &self.config, &ready.data, &update)?;
        let idle = pending.busy_from.duration_since(self.idle_since.unwrap_or(started));
        let host_secs = idle.as_secs_f64();
        // the phase of the next step is not known while the column may be opened after this one
        if step < self.num_steps && !self.opens_column_after(step) {
            self.ready = Some(self.prepare(step + 1));
        }
        let result = self.stepper.wait(pending)?;
        self.stops = result.stops;
        self.idle_since = Some(Instant::now());
        let state = &mut self.state;
        let expert_losses = result.expert_losses.as_deref();
        state.routing.note(&self.config.router, step, &result.routing, expert_losses);
        state.step = step;
        state.tokens_seen += result.label_tokens;
        state.position = ready.position;
        for block in &ready.blocks {
            state.domain_blocks[block.domain as usize] += 1;
        }
        let StepRule { temperature, top_k } = self.state.routing.rule(&self.config.router, step);
        self.model.set_rule(temperature, top_k);
        let launched = Launched { started, host_secs, temperature, learning_rates };
        self.step_metrics(&ready, result, launched)
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
        ready: &PreparedStep,
        result: StepResult,
        launched: Launched,
    ) -> Result<StepMetrics> {
        let losses = RouterLosses::new(&result.routing);
        let routing = RoutingReport::new(&result.routing, None, self.config.router.dead_share);
        let domains = self.data.train.domains.iter().zip(&result.domain_losses);
        let accuracies: Vec<f64> = result.supervision.iter().map(|site| site.accuracy).collect();
        let step_secs = launched.started.elapsed().as_secs_f64();
        let tokens = (ready.blocks.len() * self.data.train.seq_len) as f64;
        Ok(StepMetrics {
            step: self.state.step,
            epoch: ready.epoch,
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
            temperature: losses.map(|_| launched.temperature),
            grad_norm: result.grad_norm,
            learning_rates: launched.learning_rates,
            label_tokens: result.label_tokens,
            step_secs,
            host_secs: launched.host_secs,
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
