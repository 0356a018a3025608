//! Measures how fast a mixture is on a device, and compares it with a single LoRA and with other
//! ways to compute it: `dylora bench`.
//!
//! A [`Row`] is measured by whole steps on random tokens. A step is forward pass, loss, backward
//! pass, clipping, and AdamW on experts and router, by the code of [`crate::train`]; [`rows`] says
//! which rows differ. A step lasts until the host has its results. In rows that launch steps ahead,
//! it begins with the results of the step before. Each row has a model of its own on
//! the same base, and sees the same tokens in the same order. In a world of several processes, they
//! share the blocks of each step, and add up their gradients as in a run; the times are those of
//! the first process.
//!
//! ```text
//! tokens/s = processes * micro_batch_size * grad_accum_steps * seq_len / median step
//!                                                                           (padding counts)
//! tokens/s = micro_batch_size / median step                                  (generation)
//! MFU      = tokens/s * FLOPs a token / peak FLOP/s                          (flops)
//! ```

pub mod data;
pub mod flops;
pub mod generation;
pub mod passes;
pub mod report;
pub mod rows;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use tch::Device;

use crate::checkpoint::Position;
use crate::config::Config;
use crate::data::TokenDataset;
use crate::dist::World;
use crate::ffi;
use crate::model::decoder::Decoder;
use crate::model::{RoutedModel, kind_of};
use crate::train::plan::BlockStream;
use flops::FlopsPerToken;
pub use report::{Figures, Header, RowReport};
pub use rows::Row;
use rows::{StepBlocks, Subject};

/// Number of steps after which the data repeats.
const DISTINCT_STEPS: usize = 8;

/// The settings that all rows share.
#[derive(Debug, Clone)]
pub struct BenchSettings {
    /// The mixture's config, from which each row's own is made.
    pub config: Config,
    /// Number of steps before those that count.
    pub warmup: usize,
    /// Number of steps that count, at least 1.
    pub steps: usize,
    /// Median length of packed documents, in positions; with `None` each block is one document.
    pub document_median: Option<f64>,
    /// The device's peak, in FLOP/s; with `None` there is no MFU.
    pub peak_flops: Option<f64>,
}

/// The settings, and a base on the device, with which rows are measured.
#[derive(Debug)]
pub struct Bench {
    settings: BenchSettings,
    base: Decoder,
    device: Device,
    world: Arc<World>,
}

impl Bench {
    /// A bench on `base`, which is moved to `device` and converted to the config's dtype. All
    /// processes of `world` must call this, each with a device of its own if they are GPUs.
    ///
    /// # Errors
    /// If the processes of the world cannot add up gradients on their devices.
    pub fn new(
        settings: BenchSettings,
        base: &Decoder,
        device: Device,
        world: &Arc<World>,
    ) -> Result<Self> {
        world.use_device(device)?;
        let base = base.to(device, kind_of(settings.config.base.dtype));
        Ok(Self { settings, base, device, world: Arc::clone(world) })
    }

    /// Measures one row at one micro-batch size. An error, such as a lack of memory, goes into the
    /// report, so that other rows can follow.
    ///
    /// # Errors
    /// In a world of several processes, an error is returned instead, because the others wait for
    /// this one.
    pub fn measure(&self, row: Row, micro_batch_size: usize) -> Result<RowReport> {
        let measured = ffi::caught(|| self.figures(row, micro_batch_size));
        let outcome = match measured {
            Err(error) if !self.world.is_single() => return Err(error),
            measured => measured.map_err(|error| format!("{error:#}")),
        };
        Ok(RowReport { row, micro_batch_size, outcome })
    }

    fn figures(&self, row: Row, micro_batch_size: usize) -> Result<Figures> {
        let mut config = row.config(&self.settings.config)?;
        config.train.micro_batch_size = micro_batch_size;
        let per_step = micro_batch_size * config.train.grad_accum_steps * self.world.size();
        let dataset = self.dataset(per_step);
        let stream = BlockStream::new(&dataset, &config, Position::default());
        let specs = row.experts(&config, &self.base)?;
        let flops = FlopsPerToken::new(&self.base.spec, &specs, dataset.seq_len);
        let flops_per_token = match row {
            Row::Eval | Row::Generate | Row::GenerateBase => flops.evaluation(),
            _ => flops.training(),
        };
        let can_reset = ffi::reset_peak_memory(self.device).is_ok();
        let bytes_before = ffi::memory_bytes(self.device)?;
        let (started, kernels_took) = (Instant::now(), ffi::cuda::kernels_took());
        let mut subject = Subject::new(row, config, &self.base, self.device)?;
        subject.enter(&self.world);
        ffi::synchronize(self.device)?;
        let build_ms = ms_since(started);
        let compile_ms = to_ms(ffi::cuda::kernels_took() - kernels_took);
        let steps = match row.generates() {
            true => self.generate(subject.model(), &dataset, micro_batch_size)?,
            false => self.run_steps(&mut subject, &dataset, stream, per_step)?,
        };
        let peak_bytes = ffi::peak_memory_bytes(self.device).ok().filter(|_| can_reset);
        let (warmup_ms, counted_ms) = steps.ms.split_at(self.settings.warmup);
        let mut sorted_ms = counted_ms.to_vec();
        sorted_ms.sort_by(f64::total_cmp);
        let step_ms = median(&sorted_ms);
        let tokens_per_step = match row.generates() {
            true => micro_batch_size,
            false => per_step * dataset.seq_len,
        };
        let tokens_per_sec = tokens_per_step as f64 / step_ms * 1e3;
        let mfu_of = |peak: f64| tokens_per_sec * flops_per_token as f64 / peak;
        Ok(Figures {
            tokens_per_sec,
            step_ms,
            min_step_ms: sorted_ms[0],
            max_step_ms: sorted_ms[sorted_ms.len() - 1],
            tokens_per_step,
            peak_memory_bytes: peak_bytes,
            extra_memory_bytes: peak_bytes.map(|peak| peak.saturating_sub(bytes_before)),
            flops_per_token,
            mfu: self.settings.peak_flops.map(mfu_of),
            build_ms,
            compile_ms,
            first_step_ms: steps.ms[0],
            first_step_unix_secs: steps.first_unix_secs,
            capture_ms: to_ms(subject.capture_time()),
            warmup_ms: warmup_ms.to_vec(),
            first_loss: steps.losses[0],
            last_loss: steps.losses[steps.losses.len() - 1],
        })
    }

    /// Runs the steps of a row with `per_step` blocks in each, which the processes share evenly.
    fn run_steps(
        &self,
        subject: &mut Subject,
        dataset: &TokenDataset,
        mut stream: BlockStream,
        per_step: usize,
    ) -> Result<Steps> {
        let own = per_step / self.world.size();
        let first = own * self.world.dist_rank();
        let mut take =
            || StepBlocks { whole: stream.take(dataset, per_step), own: first..first + own };
        let mut next = take();
        self.time(|is_followed| {
            let now = std::mem::replace(&mut next, take());
            subject.step(dataset, &now, is_followed.then_some(&next))
        })
    }

    /// Generates texts behind the first of the random tokens of `num_texts` blocks. The loss of a
    /// step is the mean of the new tokens' negative log-probabilities.
    fn generate(
        &self,
        model: &RoutedModel,
        dataset: &TokenDataset,
        num_texts: usize,
    ) -> Result<Steps> {
        let num_new = self.settings.warmup + self.settings.steps;
        let mut engine = generation::engine(model, dataset, num_texts, num_new)?;
        self.time(|_| {
            let events = engine.step();
            let losses = events.iter().map(|event| -event.token.log_prob);
            Ok(losses.sum::<f64>() / events.len() as f64)
        })
    }

    /// Times the steps that `step` takes. It gets whether another step follows, and returns the
    /// loss once the host knows it.
    fn time(&self, mut step: impl FnMut(bool) -> Result<f64>) -> Result<Steps> {
        let mut steps = Steps { ms: vec![], losses: vec![], first_unix_secs: 0.0 };
        let num_steps = self.settings.warmup + self.settings.steps;
        for i in 0..num_steps {
            let started = Instant::now();
            steps.losses.push(step(i + 1 < num_steps)?);
            steps.ms.push(ms_since(started));
            if i == 0 {
                steps.first_unix_secs = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
            }
        }
        Ok(steps)
    }

    /// The random tokens of a row whose step has `per_step` blocks.
    fn dataset(&self, per_step: usize) -> TokenDataset {
        let BenchSettings { config, warmup, steps, document_median, .. } = &self.settings;
        let num_blocks = per_step * (warmup + steps).min(DISTINCT_STEPS);
        let vocab_size = self.base.spec.vocab_size;
        data::random_tokens(
            config.data.seq_len,
            num_blocks,
            vocab_size,
            *document_median,
            config.run.seed,
        )
    }
}

/// The times and losses of the steps of a row, warm-up included.
struct Steps {
    ms: Vec<f64>,
    losses: Vec<f64>,
    /// When the first step ended, in seconds since 1970.
    first_unix_secs: f64,
}

fn ms_since(start: Instant) -> f64 {
    to_ms(start.elapsed())
}

fn to_ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The median of sorted numbers. There must be at least one.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}
