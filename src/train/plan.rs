//! The plan of a run, known before any weight is read: its parameters, steps, memory and blocks.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use serde::Serialize;
use tch::Device;

use crate::checkpoint::Position;
use crate::config::{BaseProducts, Config, Duration, Kernels, Method, RouterScope, RoutingChoice};
use crate::data::{BlockId, TokenDataset};
use crate::model::decoder::mlp::Activation;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::{ExpertSpec, num_routed};
use crate::model::kind_of;
use crate::model::routing::router::RouterSpec;

/// The passes over the training set and the smallest number of steps of [`Duration::Auto`].
const AUTO_EPOCHS: u64 = 3;
const AUTO_STEPS: u64 = 100;
/// Most passes over the training set of [`Duration::Tokens`], whose steps are counted one by one.
const MAX_TOKEN_EPOCHS: u64 = 10_000;

/// Numbers of parameters of the model's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ParameterCounts {
    /// The base, in which a tied head counts once.
    pub base: i64,
    /// All experts' down-projections.
    pub lora_a: i64,
    /// All experts' up-projections.
    pub lora_b: i64,
    /// All experts' magnitudes (DoRA).
    pub magnitude: i64,
    /// The routers; 0 with one expert.
    pub router: i64,
    /// All parameters that are trained.
    pub trained: i64,
}

impl ParameterCounts {
    /// The counts for a config and its experts on a base.
    pub fn new(config: &Config, specs: &[ExpertSpec], base: &DecoderSpec) -> Self {
        let mut counts = Self {
            base: base.num_parameters(),
            lora_a: 0,
            lora_b: 0,
            magnitude: 0,
            router: 0,
            trained: 0,
        };
        if config.method == Method::Full {
            return Self { trained: counts.base, ..counts };
        }
        for (expert, spec) in specs.iter().enumerate() {
            let (lora_a, lora_b, magnitude) = spec.num_parameters(base);
            counts.lora_a += lora_a;
            counts.lora_b += lora_b;
            counts.magnitude += magnitude;
            let is_reached = match config.train.routing {
                RoutingChoice::Expert(only) => only == expert as i64 || spec.shared,
                _ => true,
            };
            if spec.trainable && is_reached {
                counts.trained += lora_a + lora_b + magnitude;
            }
        }
        // the router columns of the last expert
        let mut new_columns = 0;
        let num_experts = num_routed(specs);
        if num_experts > 1 {
            let spec = RouterSpec::of_config(config);
            let widths: Vec<i64> = match config.router.scope {
                RouterScope::Shared => vec![base.width],
                RouterScope::Layer => vec![base.width; base.num_layers as usize],
                RouterScope::Module => {
                    let modules: BTreeSet<_> =
                        specs.iter().flat_map(|s| s.modules.keys()).collect();
                    modules.into_iter().map(|path| spec.input_width(path.module, base)).collect()
                }
            };
            let of = |e: usize| -> i64 {
                widths.iter().map(|&d| spec.num_parameters(e as i64, d)).sum()
            };
            counts.router = of(num_experts);
            new_columns = counts.router - of(num_experts - 1);
        }
        if config.train.routing == RoutingChoice::Router && config.router.trainable {
            counts.trained += match &config.growth {
                Some(growth) if growth.old_columns_rate == 0.0 && num_experts > 2 => new_columns,
                _ => counts.router,
            };
        }
        counts
    }

    /// The memory of the trained parameters other than the base's, and of the gradients and two
    /// moments of all trained parameters, in bytes of f32.
    pub fn training_bytes(&self, method: Method) -> i64 {
        self.trained * if method == Method::Full { 12 } else { 16 }
    }

    /// The trained parameters as a share of all parameters.
    pub(crate) fn trainable_share(&self) -> f64 {
        let adapters = self.lora_a + self.lora_b + self.magnitude;
        self.trained as f64 / (self.base + adapters + self.router) as f64
    }
}

/// An estimate of a step's memory in bytes. It counts tensors, but neither libtorch itself (some
/// hundred MB) nor the allocator's slack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The base's parameters, and its quantised weights with `train.base_products = "fp8"`.
    pub base: i64,
    /// Trained parameters other than the base's, and the gradients and two moments of all trained
    /// parameters, f32.
    pub training: i64,
    /// The activations that the forward pass keeps for the backward pass.
    pub activations: i64,
    /// The logits of one chunk and their gradient.
    pub logits: i64,
}

impl MemoryEstimate {
    /// The estimate for one micro-batch of a config on a base, on `device`.
    pub fn new(
        config: &Config,
        specs: &[ExpertSpec],
        base: &DecoderSpec,
        counts: &ParameterCounts,
        device: Device,
    ) -> Self {
        let element = kind_of(config.base.dtype).elt_size_in_bytes() as i64;
        let full = config.method == Method::Full;
        let tokens = (config.train.micro_batch_size * config.data.seq_len) as i64;
        let ranks = specs.iter().flat_map(|spec| spec.modules.values()).map(|size| size.rank);
        // the average block's ranks twice: before and after the routing weights
        let (d, layers) = (base.width, base.num_layers);
        let is_fused =
            !full && config.train.kernels == Kernels::Auto && base.has_fused_blocks(device);
        let block = kept_by_block(base, is_fused) + 2 * ranks.sum::<i64>() / layers;
        let kept = match config.train.gradient_checkpointing {
            true => layers * d + block,
            false => layers * block,
        };
        let chunk = config.train.loss_chunk_tokens.min(tokens);
        Self {
            base: counts.base * if full { 4 } else { element } + quantised_bytes(config, base),
            training: counts.training_bytes(config.method),
            activations: tokens * kept * element,
            logits: chunk * base.vocab_size * (8 + element),
        }
    }

    /// The sum of all parts.
    pub fn total(&self) -> i64 {
        self.base + self.training + self.activations + self.logits
    }
}

/// The memory of the base's quantised weights, in bytes.
pub fn quantised_bytes(config: &Config, base: &DecoderSpec) -> i64 {
    match config.train.base_products {
        BaseProducts::Exact => 0,
        BaseProducts::Fp8 => 2 * base.num_linear_weights(),
    }
}

/// The numbers that a block keeps for each token, without those of experts.
fn kept_by_block(base: &DecoderSpec, is_fused: bool) -> i64 {
    let (d, inner) = (base.width, base.inner_width);
    let (queries, keys) = (base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim);
    match (base.activation, is_fused) {
        // two residual sums, two norms, q, k and v, attention's output; before and after the GELU
        (Activation::GeluNew | Activation::Gelu, _) => 8 * d + 2 * inner,
        // two residual sums; q, k and v, attention's output; the gate and the other layer
        (Activation::Silu, true) => 2 * d + 2 * queries + 2 * keys + 2 * inner,
        // two residual sums, and of each RMSNorm the normalised input and the output; queries, keys
        // and values before and after the rotation or the repetition, and attention's output; the
        // gate before and after SiLU, the other layer, their product
        (Activation::Silu, false) => {
            let norms = if base.has_qk_norm { 2 * (queries + keys) } else { 0 };
            6 * d + 5 * queries + 2 * keys + norms + 4 * inner
        }
    }
}

/// The sequence of a run's training blocks, epoch after epoch, read from a position on.
#[derive(Debug)]
pub struct BlockStream {
    seed: u64,
    position: Position,
    order: Vec<BlockId>,
    /// The epoch before which the sequence ends; `None` if it is endless.
    end_epoch: Option<u64>,
}

impl BlockStream {
    /// The stream from `position` on. It ends with the last epoch if the duration is in epochs.
    pub fn new(dataset: &TokenDataset, config: &Config, position: Position) -> Self {
        let end_epoch = match config.train.duration {
            Duration::Epochs(epochs) => Some(epochs),
            Duration::Steps(_) | Duration::Tokens(_) | Duration::Auto => None,
        };
        let seed = config.run.seed;
        let order = dataset.epoch_order(seed, position.epoch);
        Self { seed, position, order, end_epoch }
    }

    /// The position of the next block.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The number of epochs done, with a fraction for the present one.
    pub fn epoch(&self) -> f64 {
        self.position.epoch as f64 + self.position.offset as f64 / self.order.len().max(1) as f64
    }

    /// Takes the next `n` blocks of `dataset`, or fewer at the end of the stream.
    pub fn take(&mut self, dataset: &TokenDataset, n: usize) -> Vec<BlockId> {
        let mut blocks = Vec::with_capacity(n.min(self.order.len()));
        while blocks.len() < n && Some(self.position.epoch) != self.end_epoch {
            let rest = &self.order[self.position.offset as usize..];
            let count = rest.len().min(n - blocks.len());
            blocks.extend_from_slice(&rest[..count]);
            self.position.offset += count as u64;
            if self.position.offset as usize == self.order.len() {
                self.position = Position { epoch: self.position.epoch + 1, offset: 0 };
                self.order = dataset.epoch_order(self.seed, self.position.epoch);
            }
        }
        blocks
    }
}

/// Number of blocks in a step of a process that is alone.
pub fn blocks_per_step(config: &Config) -> usize {
    config.train.micro_batch_size * config.train.grad_accum_steps
}

/// The number of steps of a run of a process that is alone.
///
/// # Errors
/// A duration in tokens that is absurdly long for the dataset.
pub fn num_steps(config: &Config, dataset: &TokenDataset) -> Result<u64> {
    num_steps_of(config, dataset, blocks_per_step(config))
}

/// The number of steps of a run.
///
/// - `per_step`: number of blocks in a step
///
/// # Errors
/// As for [`num_steps`].
pub fn num_steps_of(config: &Config, dataset: &TokenDataset, per_step: usize) -> Result<u64> {
    let of_epochs = |epochs: u64| {
        let blocks: u64 = (0..epochs).map(|epoch| dataset.epoch_blocks(epoch)).sum();
        blocks.div_ceil(per_step as u64)
    };
    match config.train.duration {
        Duration::Steps(steps) => Ok(steps),
        Duration::Epochs(epochs) => Ok(of_epochs(epochs)),
        Duration::Auto => Ok(of_epochs(AUTO_EPOCHS).max(AUTO_STEPS)),
        Duration::Tokens(tokens) => {
            let order = dataset.epoch_order(config.run.seed, 0);
            let of_epoch: u64 = order.iter().map(|&block| dataset.label_tokens(block)).sum();
            if tokens / of_epoch.max(1) > MAX_TOKEN_EPOCHS {
                bail!(
                    "`train.duration.tokens` must be at most {MAX_TOKEN_EPOCHS} passes over the \
                     training set, which has {of_epoch} label tokens, got {tokens}"
                );
            }
            let mut stream = BlockStream::new(dataset, config, Position::default());
            let (mut seen, mut steps) = (0, 0);
            while seen < tokens {
                let blocks = stream.take(dataset, per_step);
                seen += blocks.iter().map(|&block| dataset.label_tokens(block)).sum::<u64>();
                steps += 1;
            }
            Ok(steps)
        }
    }
}
