//! `[train]`, `[optimizer]` and `[schedule]`: how long to train, how to compute a step, and which
//! learning rates to use.

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::RoutingChoice;

/// `[train]`: how long to train, how a step is computed, and when to evaluate and to save.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// How long to train.
    pub duration: Duration,
    /// What decides the routing weights, in training and in the run's evaluations. Only the experts
    /// and routers that this choice uses are trained: with `router` the router and the experts,
    /// with `expert:N` only that expert, and otherwise the experts.
    pub routing: RoutingChoice,
    /// Sequences in one forward pass.
    pub micro_batch_size: usize,
    /// Forward passes in one step, that is, in one optimizer update.
    pub grad_accum_steps: usize,
    /// Share of the target's probability that is spread evenly over the vocabulary.
    pub label_smoothing: f64,
    /// Whether to keep only the input of each transformer block and to compute the rest again in
    /// the backward pass. This saves memory and costs time.
    pub gradient_checkpointing: bool,
    /// How a step is computed.
    pub kernels: Kernels,
    /// How the products of the frozen base with activations and gradients are computed in training.
    /// The experts' products, the head, the pass that a `base_hidden` router reads, and all
    /// evaluations are exact in either case.
    pub base_products: BaseProducts,
    /// Number of positions whose logits are in memory at the same time.
    pub loss_chunk_tokens: i64,
    /// Number of steps between evaluations. The run also evaluates at the end, and without this key
    /// only then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every_steps: Option<u64>,
    /// Number of steps between checkpoints. A checkpoint is also saved after each evaluation and at
    /// the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every_steps: Option<u64>,
    /// Number of latest checkpoints to keep, in addition to the best one.
    pub keep_last: usize,
    /// The number type of the Hugging Face folder that `method = "full"` writes at the end.
    pub save_dtype: SaveDtype,
    /// When to stop before `train.duration` is over. Without it, the run does not stop early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            duration: Duration::Auto,
            routing: RoutingChoice::Router,
            micro_batch_size: 8,
            grad_accum_steps: 1,
            label_smoothing: 0.0,
            gradient_checkpointing: false,
            kernels: Kernels::Auto,
            base_products: BaseProducts::Exact,
            loss_chunk_tokens: 1024,
            eval_every_steps: None,
            checkpoint_every_steps: None,
            keep_last: 2,
            save_dtype: SaveDtype::F32,
            early_stopping: None,
        }
    }
}

/// How a step is computed. The results agree except for rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kernels {
    /// The fastest way that the device, the number type and the kinds of experts allow. It uses
    /// fused operations with their own backward passes and, on CUDA, dylora's own kernels and CUDA
    /// graphs.
    #[default]
    Auto,
    /// libtorch's operations, computed one by one and differentiated by autograd.
    Reference,
}

/// How the products of the frozen base's linear layers are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BaseProducts {
    /// In `base.dtype`.
    #[default]
    Exact,
    /// In 8 bits (e4m3, a scale for each row of either factor). This is faster for bases of a few
    /// billion parameters, but each product is off by about 4 %, and the linear layers' weights in
    /// FP8 take 2 bytes for each of their numbers in addition. It needs `base.dtype = "bf16"`, a
    /// GPU of compute capability 8.9 or higher, and sizes of the linear layers that are multiples
    /// of 16. On the CPU it is simulated, slowly, for GPT-2 alone. It does not go with DoRA, a
    /// dropout mask for each expert, `router.input = "module_input"`, or experts that are skipped
    /// under top-k.
    Fp8,
}

/// The number type of saved weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum SaveDtype {
    /// 32-bit floating point.
    F32,
    /// 16-bit floating point.
    F16,
    /// Brain floating point: 8 bits of exponent, 7 of mantissa.
    Bf16,
}

/// How long to train, as in `duration = { epochs = 3 }` or `duration = "auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Duration {
    /// Three passes over the training set, or more if that is fewer than 100 optimizer updates.
    Auto,
    /// Optimizer updates.
    Steps(u64),
    /// Passes over the training set.
    Epochs(u64),
    /// Target tokens; the step that reaches this number is the last.
    Tokens(u64),
}

/// Stops the run when the mean of the domains' validation losses no longer falls.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// Number of evaluations in a row without an improvement after which the run stops.
    pub patience: u64,
    /// By how much the loss must fall below its best value to count as an improvement, in nats.
    #[serde(default)]
    pub min_delta: f64,
}

/// `[optimizer]`: AdamW (arXiv:1711.05101) and its settings for each parameter group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The parameters of the experts.
    #[serde(deserialize_with = "GroupValues::adapters")]
    #[schemars(with = "GroupValues")]
    pub adapters: GroupConfig,
    /// The parameters of the router.
    #[serde(deserialize_with = "GroupValues::router")]
    #[schemars(with = "GroupValues")]
    pub router: GroupConfig,
    /// The parameters of the base, which only `method = "full"` trains. Biases, normalisations and
    /// embeddings have no weight decay.
    #[serde(deserialize_with = "GroupValues::base")]
    #[schemars(with = "GroupValues")]
    pub base: GroupConfig,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Largest norm of all gradients together, except those of groups with a `max_grad_norm` of
    /// their own. Gradients with a larger norm are scaled down to it. 0 means no limit.
    pub max_grad_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            adapters: GroupConfig::at(1.5e-3),
            router: GroupConfig::at(1e-3),
            base: GroupConfig { weight_decay: 0.1, ..GroupConfig::at(6e-4) },
            betas: [0.9, 0.999],
            eps: 1e-8,
            max_grad_norm: 1.0,
        }
    }
}

/// The settings of one parameter group.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GroupConfig {
    /// The learning rate at the schedule's peak.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The group's own `schedule.warmup_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// The group's own largest norm; 0 means no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_grad_norm: Option<f64>,
}

/// The settings of one parameter group. A `learning_rate` or `weight_decay` that is not set is the
/// one in the table above.
#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "GroupConfig")]
#[serde(deny_unknown_fields)]
struct GroupValues {
    /// The learning rate at the schedule's peak.
    learning_rate: Option<f64>,
    /// Decoupled weight decay: each step reduces a parameter by `learning_rate * weight_decay`
    /// times its value.
    weight_decay: Option<f64>,
    /// The group's own `schedule.warmup_steps`.
    warmup_steps: Option<u64>,
    /// The group's own largest norm: its gradients are clipped by themselves. 0 means no limit.
    max_grad_norm: Option<f64>,
}

impl GroupValues {
    fn adapters<'a, D: Deserializer<'a>>(source: D) -> Result<GroupConfig, D::Error> {
        Ok(Self::deserialize(source)?.over(OptimizerConfig::default().adapters))
    }

    fn router<'a, D: Deserializer<'a>>(source: D) -> Result<GroupConfig, D::Error> {
        Ok(Self::deserialize(source)?.over(OptimizerConfig::default().router))
    }

    fn base<'a, D: Deserializer<'a>>(source: D) -> Result<GroupConfig, D::Error> {
        Ok(Self::deserialize(source)?.over(OptimizerConfig::default().base))
    }

    fn over(self, default: GroupConfig) -> GroupConfig {
        GroupConfig {
            learning_rate: self.learning_rate.unwrap_or(default.learning_rate),
            weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
            warmup_steps: self.warmup_steps,
            max_grad_norm: self.max_grad_norm,
        }
    }
}

impl GroupConfig {
    /// The group with this learning rate, without weight decay.
    pub fn at(learning_rate: f64) -> Self {
        Self { learning_rate, weight_decay: 0.0, warmup_steps: None, max_grad_norm: None }
    }
}

/// `[schedule]`: the learning rate over the steps, as a factor of each group's learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// The shape after the warm-up.
    pub kind: ScheduleKind,
    /// Number of steps over which the factor rises evenly. The step after them has the factor 1.
    /// Without it, a tenth of the run's steps, but at most 50.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// The factor that `linear` and `cosine` approach towards the end of the run.
    pub min_ratio: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, warmup_steps: None, min_ratio: 0.1 }
    }
}

/// The shape of the schedule after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// The factor stays at 1.
    Constant,
    /// The factor falls in a straight line towards `min_ratio`.
    Linear,
    /// The factor falls as half a cosine wave towards `min_ratio`.
    Cosine,
}
