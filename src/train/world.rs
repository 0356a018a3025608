//! A run in a world of several processes. Each process holds the whole model and optimizer,
//! computes its share of every step's blocks, and makes the same update.
//!
//! The blocks of a step are those of one process with N times the accumulation: `micro_batch_size *
//! grad_accum_steps * N` when the run begins, in the order that depends on the seed and epoch
//! alone. A run that is resumed keeps the number, whatever the size of its world.
//!
//! The blocks are shared by what they cost beyond the positions that all have alike, in
//! multiplications of the forward pass:
//!
//! ```text
//! label tokens * vocabulary * width  +  layers * width * sum over documents of length^2
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use tch::Tensor;

use super::{Trainer, optim, plan};
use crate::config::{self, AdapterSource, BaseSource, Config, DeviceChoice, Validation};
use crate::data::{BlockId, TokenDataset};
use crate::dist::shard::shares;
use crate::dist::{Fact, World};
use crate::ffi;
use crate::model::decoder::spec::DecoderSpec;

impl Trainer {
    /// Makes this process's run a part of that of a world, before the first step. All processes
    /// must call this with the same run.
    ///
    /// # Errors
    /// If the processes differ in their version, config, base, data, weights or position.
    pub fn enter(&mut self, world: &Arc<World>) -> Result<()> {
        if world.is_single() {
            return Ok(());
        }
        let device = self.model.device();
        world.use_device(device)?;
        if self.is_new {
            let of_one = plan::blocks_per_step(&self.config);
            self.state.blocks_per_step = Some(of_one * world.size());
        }
        self.num_steps =
            plan::num_steps_of(&self.config, &self.data.train, self.blocks_per_step())?;
        world.agree(&self.facts()?)?;
        if !world.is_first() {
            let (seed, step) = (self.config.run.seed, self.state.step);
            tch::manual_seed(seed_of(seed, world.dist_rank(), step));
        }
        if let Some(saved) = self.saved_generators.take() {
            optim::load_rng_states(&saved, device, world.dist_rank())?;
        }
        self.stepper.enter(world);
        self.world = Arc::clone(world);
        Ok(())
    }

    /// The world that the run belongs to.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// Number of blocks in a step of the whole world.
    pub(super) fn blocks_per_step(&self) -> usize {
        self.state.blocks_per_step.unwrap_or(plan::blocks_per_step(&self.config))
    }

    /// This process's share of a step's blocks.
    pub(super) fn own_share(&self, blocks: &[BlockId]) -> Vec<BlockId> {
        if self.world.is_single() {
            return blocks.to_vec();
        }
        let spec = &self.model.base().spec;
        let cost = |&block: &BlockId| cost(&self.data.train, block, spec);
        let costs: Vec<f64> = blocks.iter().map(cost).collect();
        let own = &shares(&costs, self.world.size())[self.world.dist_rank()];
        own.iter().map(|&index| blocks[index]).collect()
    }

    /// Whether to save and stop after the step just done, since somebody has asked for it. If the
    /// next step may be in flight already, the run stops after that one. After an evaluation,
    /// during which somebody may have asked as well, the processes ask each other.
    pub(super) fn must_stop(&self, interrupt: &AtomicBool) -> Result<bool> {
        match self.world.is_single() {
            true => Ok(self.in_flight.is_none() && interrupt.load(Ordering::Relaxed)),
            false if self.evaluates_after(self.state.step) => {
                self.world.any(self.stops || interrupt.load(Ordering::Relaxed))
            }
            // not `in_flight`, in which processes may differ
            false => Ok(self.stops && !self.goes_on),
        }
    }

    /// What all processes must have alike.
    fn facts(&self) -> Result<Vec<Fact>> {
        let version =
            format!("{} with libtorch {}", env!("CARGO_PKG_VERSION"), ffi::torch_version());
        Ok(vec![
            ("version", version),
            ("config", comparable(&self.config)),
            ("training data", self.data.train.fingerprint()),
            ("validation data", self.data.validation.content_fingerprint()),
            ("base", self.frozen_hash.clone().unwrap_or_default()),
            ("position", format!("{:?} after step {}", self.state.position, self.state.step)),
            ("number of steps", self.num_steps.to_string()),
            ("weights", self.weights_hash()?),
        ])
    }

    /// BLAKE3 of what is trained.
    fn weights_hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for parameter in &self.trained.parameters {
            let tensor = parameter.tensor.to_device(tch::Device::Cpu).contiguous();
            hasher.update(parameter.name.as_bytes());
            ffi::with_bytes(&tensor, |bytes| {
                hasher.update(bytes);
            });
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The generator states of all processes, for a checkpoint. Checks on the way that their
    /// weights have stayed the same.
    pub(super) fn all_generators(&self) -> Result<BTreeMap<String, Tensor>> {
        let own = optim::rng_states(self.model.device(), self.world.dist_rank())?;
        if self.world.is_single() {
            return Ok(own);
        }
        self.world.agree(&[("weights", self.weights_hash()?)])?;
        let own: BTreeMap<&String, Vec<u8>> = own
            .iter()
            .map(|(name, state)| Ok((name, Vec::<u8>::try_from(state)?)))
            .collect::<Result<_>>()?;
        let mut all = BTreeMap::new();
        for states in self.world.exchange(&serde_json::to_vec(&own)?)? {
            let states: BTreeMap<String, Vec<u8>> =
                serde_json::from_slice(&states).context("a process gave no generator state")?;
            all.extend(states.into_iter().map(|(name, s)| (name, Tensor::from_slice(&s))));
        }
        Ok(all)
    }
}

/// What a block costs beyond what all blocks cost alike.
fn cost(dataset: &TokenDataset, block: BlockId, spec: &DecoderSpec) -> f64 {
    let squares: u64 = dataset.block_lengths(block).map(|length| length * length).sum();
    let of_labels = dataset.label_tokens(block) as f64 * (spec.vocab_size * spec.width) as f64;
    of_labels + squares as f64 * (spec.num_layers * spec.width) as f64
}

/// The config without what may differ between the processes of a run: their devices, and where
/// their files are, whose contents are compared instead.
fn comparable(config: &Config) -> String {
    let mut config = config.clone();
    (config.run.dir, config.run.device) = (PathBuf::new(), DeviceChoice::Auto);
    if let BaseSource::Path(path) = &mut config.base.source {
        *path = PathBuf::new();
    }
    (config.base.tokenizer, config.base.chat_template) = (None, None);
    for domain in &mut config.data.domains {
        domain.train = vec![];
        if let Some(Validation::Files(files)) = &mut domain.validation {
            *files = vec![];
        }
    }
    for expert in &mut config.lora.experts {
        if let Some(AdapterSource::Path(path)) = &mut expert.source {
            *path = PathBuf::new();
        }
    }
    config::load::to_toml(&config)
}

/// The seed of a process that has no saved state of its generators.
fn seed_of(seed: u64, dist_rank: usize, step: u64) -> i64 {
    let hash = blake3::hash(format!("{seed} {dist_rank} {step}").as_bytes());
    let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
    // libtorch takes seeds from 0 on
    i64::from_le_bytes(*first) & i64::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_by_process_and_step() {
        let seeds = [(1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 1, 5)];
        let mut seeds: Vec<i64> = seeds.iter().map(|&(s, r, step)| seed_of(s, r, step)).collect();
        assert!(seeds.iter().all(|&seed| seed >= 0));
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 4);
    }
}
