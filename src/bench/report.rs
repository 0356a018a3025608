//! What `dylora bench --json` prints: one line for what all rows share, then one line for each row.
//!
//! ```json
//! {"kind":"header","dylora_version":"0.1.0","libtorch_version":"2.11.0","device":"cpu",...}
//! {"kind":"row","row":"one_pass","micro_batch_size":8,"tokens_per_sec":1234.5,...,"error":null}
//! {"kind":"row","row":"n_passes","micro_batch_size":8,"error":"out of memory"}
//! ```
//!
//! The keys have the order of the structs' fields. `scripts/compare_peft.py` reads the lines.

use serde::{Serialize, Serializer, ser::Error};
use serde_json::Value;

use super::rows::Row;
use crate::config::{Dtype, LoraConfig, OptimizerConfig, RouterConfig, TrainConfig};

/// What holds for all rows.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename = "header")]
pub struct Header {
    /// This crate's version.
    pub dylora_version: &'static str,
    /// The version of the libtorch that is loaded.
    pub libtorch_version: &'static str,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// The device's name as its maker gives it.
    pub device_model: String,
    /// Number of processes that share the rows, each with a device of its own.
    pub processes: usize,
    /// Number of threads of libtorch's operations on the CPU.
    pub threads: i32,
    /// The base's name for people.
    pub base: String,
    /// The base's shape, as its `config.json` has it.
    pub shape: Value,
    /// The dtype that the base computes in.
    pub dtype: Dtype,
    /// Length of a block, in tokens.
    pub seq_len: usize,
    /// Median length of packed documents, in tokens; `None` if each block is one document.
    pub document_median: Option<f64>,
    /// Standard deviation of the logarithm of the lengths of packed documents.
    pub document_sigma: Option<f64>,
    /// Number of steps before those that count.
    pub warmup: usize,
    /// Number of steps that count.
    pub steps: usize,
    /// The seed of weights, tokens and dropout.
    pub seed: u64,
    /// The device's peak, in TFLOP/s, if it is known.
    pub peak_tflops: Option<f64>,
    /// [`super::flops::FORMULA`].
    pub mfu_formula: &'static str,
    /// `[lora]` of the mixture.
    pub lora: LoraConfig,
    /// `[router]` of the mixture.
    pub router: RouterConfig,
    /// `[train]` of the mixture, without `micro_batch_size`, because each row has its own.
    #[serde(serialize_with = "without_micro_batch_size")]
    pub train: TrainConfig,
    /// `[optimizer]` of the mixture.
    pub optimizer: OptimizerConfig,
}

/// A row at one batch size.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename = "row")]
pub struct RowReport {
    /// Which row.
    pub row: Row,
    /// Sequences in one forward pass.
    pub micro_batch_size: usize,
    /// The figures, or the message of the error that kept the row from having any.
    #[serde(flatten, serialize_with = "figures_and_error")]
    pub outcome: Result<Figures, String>,
}

/// What the steps of a row measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Positions of a step divided by the median time of a step.
    pub tokens_per_sec: f64,
    /// The median time of the steps that count, in milliseconds.
    pub step_ms: f64,
    /// The time of the fastest of them, in milliseconds.
    pub min_step_ms: f64,
    /// The time of the slowest of them, in milliseconds.
    pub max_step_ms: f64,
    /// Positions of a step in all processes, padding included.
    pub tokens_per_step: usize,
    /// Peak memory of the first process: of the process on the CPU, of the allocator on CUDA.
    pub peak_memory_bytes: Option<u64>,
    /// Peak memory less what was in use before the row, which included the base.
    pub extra_memory_bytes: Option<u64>,
    /// Floating-point operations for each token, by [`super::flops`].
    pub flops_per_token: i64,
    /// Model FLOPs utilisation: the share of the device's peak, if the peak is known.
    pub mfu: Option<f64>,
    /// Time to build the row's model on the base, `compile_ms` included, in milliseconds.
    pub build_ms: f64,
    /// Time to compile and load the CUDA kernels, in milliseconds; 0 if an earlier row did that.
    pub compile_ms: f64,
    /// Time of the first step, in milliseconds. On CUDA it includes the choice of algorithms for
    /// the matrix products.
    pub first_step_ms: f64,
    /// When the first step ended, in seconds since 1970.
    pub first_step_unix_secs: f64,
    /// Time to capture steps as CUDA graphs, in milliseconds. A step of each shape is captured
    /// once; the first capture is in the third step.
    pub capture_ms: f64,
    /// The times of the steps that do not count, in milliseconds.
    pub warmup_ms: Vec<f64>,
    /// Mean loss of the first step, in nats.
    pub first_loss: f64,
    /// Mean loss of the last step, in nats.
    pub last_loss: f64,
}

fn without_micro_batch_size<S: Serializer>(
    train: &TrainConfig,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut train = serde_json::to_value(train).map_err(S::Error::custom)?;
    let keys = train.as_object_mut().expect("a struct is an object");
    keys.shift_remove("micro_batch_size").expect("`[train]` has a micro-batch size");
    train.serialize(serializer)
}

/// Writes the keys of the figures, if there are any, and then `error`, which is null if there are
/// figures.
fn figures_and_error<S: Serializer>(
    outcome: &Result<Figures, String>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Keys<'a> {
        #[serde(flatten)]
        figures: Option<&'a Figures>,
        error: Option<&'a String>,
    }
    Keys { figures: outcome.as_ref().ok(), error: outcome.as_ref().err() }.serialize(serializer)
}
