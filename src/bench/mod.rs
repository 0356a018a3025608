//! How fast the mixture is on a device, and what it costs beside a single LoRA and beside other ways
//! to compute it: `dylora bench`.
//!
//! A [`Row`] is measured by whole steps on random tokens: forward, loss, backward, clipping and AdamW
//! on experts and router, by the code that [`crate::train`] runs ([`rows`] says which rows differ). The
//! device is waited for at the end of each step. Each row has a model of its own on the same base, and
//! the same tokens in the same order.
//!
//! ```text
//! tokens/s = micro_batch_size * grad_accum_steps * seq_len / median step     (padding counts)
//! MFU      = tokens/s * FLOPs a token / peak FLOP/s                          (flops)
//! ```

pub mod data;
pub mod flops;
pub mod passes;
pub mod rows;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use serde::Serialize;
use tch::Device;

use crate::checkpoint::Position;
use crate::config::Config;
use crate::data::TokenDataset;
use crate::ffi;
use crate::model::decoder::Decoder;
use crate::model::kind_of;
use crate::train::plan::BlockStream;
use flops::FlopsPerToken;
pub use rows::Row;
use rows::Subject;

/// Steps before the data comes again.
const DISTINCT_STEPS: usize = 8;

/// What is measured, for every row.
#[derive(Debug, Clone)]
pub struct BenchSettings {
    /// The mixture's config; a row changes what makes it that row.
    pub config: Config,
    /// Steps that are run and not counted.
    pub warmup: usize,
    /// Steps that are counted, at least 1.
    pub steps: usize,
    /// Median length of packed documents, positions; none = each block is one document.
    pub document_median: Option<f64>,
    /// The device's peak, FLOP/s; none = no MFU.
    pub peak_flops: Option<f64>,
}

/// A row at one batch size: its figures, or why it has none.
#[derive(Debug, Clone, Serialize)]
pub struct RowReport {
    /// [`Row::name`].
    pub row: &'static str,
    /// Sequences of a forward.
    pub micro_batch_size: usize,
    /// The figures.
    #[serde(flatten)]
    pub figures: Option<Figures>,
    /// What went wrong.
    pub error: Option<String>,
}

/// What the steps of a row measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Positions of a step over its median time.
    pub tokens_per_sec: f64,
    /// The median of the counted steps, milliseconds.
    pub step_ms: f64,
    /// The fastest of them.
    pub min_step_ms: f64,
    /// The slowest of them.
    pub max_step_ms: f64,
    /// Positions of a step, padding included.
    pub tokens_per_step: usize,
    /// The most memory in use, bytes: of the process on the CPU, of the allocator on CUDA.
    pub peak_memory_bytes: Option<u64>,
    /// The same over what was in use before the row, when the base was there already.
    pub extra_memory_bytes: Option<u64>,
    /// Operations a token, by [`flops`].
    pub flops_per_token: i64,
    /// Share of the device's peak.
    pub mfu: Option<f64>,
    /// From nothing but the base to a model, milliseconds, with `compile_ms`.
    pub build_ms: f64,
    /// Compiling and loading the CUDA kernels, milliseconds; 0 where an earlier row did that.
    pub compile_ms: f64,
    /// The first step, in which on CUDA the algorithms of the products are timed, milliseconds.
    pub first_step_ms: f64,
    /// When it ended, seconds since 1970.
    pub first_step_unix_secs: f64,
    /// Capturing steps as CUDA graphs, milliseconds, in all: one shape of step in the third step.
    pub capture_ms: f64,
    /// The steps that are not counted, milliseconds.
    pub warmup_ms: Vec<f64>,
    /// Mean loss of the first step, nats.
    pub first_loss: f64,
    /// Of the last.
    pub last_loss: f64,
}

/// The bench: settings, and a base on the device.
#[derive(Debug)]
pub struct Bench {
    settings: BenchSettings,
    base: Decoder,
    device: Device,
}

impl Bench {
    /// A bench on `base`, which is brought to `device` in the config's dtype.
    pub fn new(settings: BenchSettings, base: &Decoder, device: Device) -> Self {
        let base = base.to(device, kind_of(settings.config.base.dtype));
        Self { settings, base, device }
    }

    /// Measures one row at one micro-batch size. What fails, such as memory that runs out, is told in
    /// the report, so that others can follow.
    pub fn measure(&self, row: Row, micro_batch_size: usize) -> RowReport {
        let measured = catch_unwind(AssertUnwindSafe(|| self.figures(row, micro_batch_size)));
        // libtorch reports through tch's panics what it cannot do, such as allocate
        let measured = measured
            .unwrap_or_else(|panic| Err(anyhow!("{}", ffi::panic_message(panic.as_ref()).trim())));
        let (figures, error) = match measured {
            Ok(figures) => (Some(figures), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        RowReport { row: row.name(), micro_batch_size, figures, error }
    }

    fn figures(&self, row: Row, micro_batch_size: usize) -> Result<Figures> {
        let BenchSettings { warmup, steps, .. } = self.settings;
        let mut config = row.config(&self.settings.config)?;
        config.train.micro_batch_size = micro_batch_size;
        let per_step = micro_batch_size * config.train.grad_accum_steps;
        let dataset = self.dataset(per_step);
        let mut stream = BlockStream::new(&dataset, &config, Position::default());
        let flops = FlopsPerToken::new(
            &self.base.spec,
            &row.experts(&config, &self.base)?,
            dataset.seq_len,
        );
        let can_reset = ffi::reset_peak_memory(self.device).is_ok();
        let before = ffi::memory_bytes(self.device)?;
        let (started, kernels_took) = (Instant::now(), ffi::cuda::kernels_took());
        let mut subject = Subject::new(row, config, &self.base, self.device)?;
        ffi::synchronize(self.device)?;
        let build_ms = ms_since(started);
        let compile_ms = to_ms(ffi::cuda::kernels_took() - kernels_took);
        let (mut all_ms, mut losses, mut first_step_unix_secs) = (vec![], vec![], 0.0);
        for _ in 0..warmup + steps {
            let blocks = stream.take(&dataset, per_step);
            let started = Instant::now();
            losses.push(subject.step(&dataset, &blocks)?);
            ffi::synchronize(self.device)?;
            all_ms.push(ms_since(started));
            if all_ms.len() == 1 {
                first_step_unix_secs = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
            }
        }
        let peak = ffi::peak_memory_bytes(self.device).ok().filter(|_| can_reset);
        let mut sorted = all_ms[warmup..].to_vec();
        sorted.sort_by(f64::total_cmp);
        let step_ms = median(&sorted);
        let tokens_per_step = per_step * dataset.seq_len;
        let tokens_per_sec = tokens_per_step as f64 / step_ms * 1e3;
        let flops_per_token = match row {
            Row::Eval => flops.evaluation(),
            _ => flops.training(),
        };
        let peak_flops = self.settings.peak_flops;
        Ok(Figures {
            tokens_per_sec,
            step_ms,
            min_step_ms: sorted[0],
            max_step_ms: sorted[sorted.len() - 1],
            tokens_per_step,
            peak_memory_bytes: peak,
            extra_memory_bytes: peak.map(|peak| peak.saturating_sub(before)),
            flops_per_token,
            mfu: peak_flops.map(|peak| tokens_per_sec * flops_per_token as f64 / peak),
            build_ms,
            compile_ms,
            first_step_ms: all_ms[0],
            first_step_unix_secs,
            capture_ms: to_ms(subject.capture_time()),
            warmup_ms: all_ms[..warmup].to_vec(),
            first_loss: losses[0],
            last_loss: losses[losses.len() - 1],
        })
    }

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

fn ms_since(start: Instant) -> f64 {
    to_ms(start.elapsed())
}

fn to_ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The median of sorted numbers, of which there is one at least.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}
