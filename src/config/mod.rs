//! The configuration of a run: one typed TOML file. Every default is defined here.
//!
//! Each section of the file is a struct and each choice is an enum. Every struct denies unknown
//! keys, so the error for a typo shows its line and the valid keys. [`load`] reads the file,
//! applies `--set key=value` and checks what types cannot. [`inputs`] says in which folder the
//! paths of a config begin.

mod bounds;
mod data;
mod device;
mod document;
mod domains;
pub mod explain;
mod faults;
mod growth;
mod guesses;
pub mod inputs;
pub mod keys;
pub mod load;
mod lora;
mod modules;
mod names;
mod overrides;
mod paths;
mod recipe;
pub mod reference;
mod routing;
pub mod schema;
mod targets;
mod template;
mod train;
mod validate;
mod validate_lora;
pub mod variables;
mod words;

use std::path::PathBuf;

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use data::{FieldNames, FileFormat, HubDataset, RecordConfig, RecordShape, RecordStyle};
pub use device::DeviceChoice;
pub use domains::{DomainConfig, DomainExperts, Validation, expert_names};
pub use growth::GrowthConfig;
pub use lora::{
    Capacity, DropoutMasks, ExpertConfig, LoraConfig, LoraInit, LoraScale, Orthogonality,
};
pub use modules::{Family, TargetModule};
pub use names::ModuleName;
pub use paths::{ModulePath, ModulePattern};
pub use recipe::DOMAIN_SUPERVISION;
pub use routing::{
    EvalRule, Maturity, OnCollapse, Plateau, RouterConfig, RouterInit, RouterInput, RouterNoise,
    RouterScope, RoutingChoice, RoutingLevel, TemperatureSchedule,
};
pub use targets::TargetModules;
pub use template::{RecordTemplate, fill};
pub use train::{
    BaseProducts, Duration, EarlyStopping, GroupConfig, Kernels, OptimizerConfig, SaveDtype,
    ScheduleConfig, ScheduleKind, TrainConfig,
};
pub use variables::Written;

/// The config of a run. `method` comes first in the file; every other field is a section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is trained.
    #[serde(default)]
    pub method: Method,
    /// `[run]`: where the run's files go, its seed and its device.
    #[serde(default)]
    pub run: RunConfig,
    /// `[base]`: the pretrained decoder.
    pub base: BaseConfig,
    /// `[data]`: the domains and how they become blocks.
    pub data: DataConfig,
    /// `[lora]`: the experts.
    #[serde(default)]
    pub lora: LoraConfig,
    /// `[router]`: how the experts are scored and mixed.
    #[serde(default)]
    pub router: RouterConfig,
    /// `[train]`: how long to train, how a step is computed, and when to evaluate and to save.
    #[serde(default)]
    pub train: TrainConfig,
    /// `[optimizer]`: AdamW and its settings for each parameter group.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// `[schedule]`: the learning rate over the steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// `[growth]`: how an added expert is trained. `dylora add-expert` writes this section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthConfig>,
    /// Which texts were written with environment variables, and how.
    #[serde(skip)]
    pub written: Written,
}

impl Config {
    /// A config of which only the base and the data are known; all else has its default.
    pub fn new(base: BaseConfig, data: DataConfig) -> Self {
        Self {
            method: Method::default(),
            run: RunConfig::default(),
            base,
            data,
            lora: LoraConfig::default(),
            router: RouterConfig::default(),
            train: TrainConfig::default(),
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            growth: None,
            written: Written::default(),
        }
    }
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// LoRA experts and their router, on a frozen base. With `lora.num_experts = 1`, this is plain
    /// LoRA.
    #[default]
    RoutedLora,
    /// All parameters of the base itself. The result is a Hugging Face folder.
    Full,
}

/// `[run]`: where the run's files go, its seed and its device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Folder for the resolved config, metrics, TensorBoard events and checkpoints. A relative path
    /// begins in the working folder, unlike those of files that the run reads.
    pub dir: PathBuf,
    /// Seeds the initial weights, the dropout masks, the data's order and its validation split.
    pub seed: u64,
    /// The device to compute on. The option `--device` overrides it.
    pub device: DeviceChoice,
    /// Whether to write TensorBoard event files beside `metrics.jsonl`.
    pub tensorboard: bool,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { dir: "runs/dylora".into(), seed: 0, device: DeviceChoice::Auto, tensorboard: true }
    }
}

/// `[base]`: the pretrained decoder, of one of the families GPT-2, Llama (with SmolLM2), Qwen2,
/// Qwen3, SmolLM3 and Mistral.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BaseConfig {
    /// Where the base comes from.
    pub source: BaseSource,
    /// A `tokenizer.json` to use instead of the one beside the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// A Jinja file with the chat template to use instead of those beside the tokenizer. It turns
    /// records with `messages` into text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,
    /// The number type that the base and the experts compute in. Trained parameters, DoRA's norms,
    /// the router, the loss and the optimizer's state are kept in f32 in any case.
    #[serde(default)]
    pub dtype: Dtype,
}

/// Where the base comes from: `{ path = "DIR" }`, `{ hub = { repo = "NAME" } }` or
/// `{ random = { .. } }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum BaseSource {
    /// A folder with `config.json`, `*.safetensors` and, as a rule, `tokenizer.json`.
    Path(PathBuf),
    /// A repository of the Hugging Face Hub.
    Hub(HubSource),
    /// Random weights of a given shape, for `method = "full"`.
    Random(RandomBase),
}

/// A model repository of the Hugging Face Hub at one revision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HubSource {
    /// The repository's name, such as `Qwen/Qwen3-0.6B`.
    pub repo: String,
    /// A branch, a tag or a commit.
    #[serde(default = "default_revision")]
    pub revision: String,
}

fn default_revision() -> String {
    "main".into()
}

/// Where an adapter comes from: `{ path = "DIR" }` or `{ hub = { repo = "NAME" } }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AdapterSource {
    /// A folder with `adapter_config.json` and `adapter_model.safetensors`.
    Path(PathBuf),
    /// A repository of the Hugging Face Hub, or a folder in one.
    Hub(AdapterHub),
}

/// An adapter on the Hugging Face Hub at one revision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdapterHub {
    /// The repository's name, such as `owner/name`.
    pub repo: String,
    /// A branch, a tag or a commit.
    #[serde(default = "default_revision")]
    pub revision: String,
    /// The folder in the repository. If it is empty or left out, this is the repository's root.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subfolder: String,
}

/// The shape of a base that starts from random weights. Its vocabulary is the tokenizer's, and its
/// head is tied to the token embedding. What no key sets is as transformers' config of the family
/// has it by default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomBase {
    /// The family of the base.
    #[serde(default)]
    pub family: Family,
    /// Number of layers, that is, of transformer blocks.
    pub n_layer: i64,
    /// Number of attention heads. It must divide `n_embd` unless `head_dim` is set.
    pub n_head: i64,
    /// Number of key-value heads, which must divide `n_head`. Without it, there are as many as
    /// attention heads. GPT-2 has no such setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_kv_head: Option<i64>,
    /// Width of a head. Without it, `n_embd / n_head`. GPT-2 has no such setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<i64>,
    /// Width of the hidden states.
    pub n_embd: i64,
    /// Width of the feed-forward network. Without it, `4 n_embd` for GPT-2, and for the other
    /// families `8 n_embd / 3`, rounded up to a multiple of 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_inner: Option<i64>,
    /// The longest sequence, in tokens.
    pub n_positions: i64,
}

/// The number type of computations.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 32-bit floating point.
    #[default]
    F32,
    /// Brain floating point: 8 bits of exponent, 7 of mantissa.
    Bf16,
}

/// `[data]`: the domains and how they become blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Length of a block, in tokens. Short documents are packed into blocks together, and longer
    /// documents are split.
    pub seq_len: usize,
    /// Which tokens the loss counts.
    #[serde(default)]
    pub loss_on: LossOn,
    /// Which turns of the assistant the loss counts in a record with `messages`, unless `loss_on`
    /// is `all`.
    #[serde(default)]
    pub loss_on_turns: LossOnTurns,
    /// What happens when a record is malformed or has nothing to learn.
    #[serde(default)]
    pub on_bad_record: OnBadRecord,
    /// What share of the training blocks each domain gets.
    #[serde(default)]
    pub mixing: Mixing,
    /// What happens when all blocks of a domain have been used before the epoch ends.
    #[serde(default)]
    pub on_exhausted: OnExhausted,
    /// `[[data.domains]]`: the kinds of text. There must be at least one.
    pub domains: Vec<DomainConfig>,
}

impl Default for DataConfig {
    /// No domains, and blocks of 1024 tokens. A file must name both.
    fn default() -> Self {
        Self {
            seq_len: 1024,
            loss_on: LossOn::default(),
            loss_on_turns: LossOnTurns::default(),
            on_bad_record: OnBadRecord::default(),
            mixing: Mixing::default(),
            on_exhausted: OnExhausted::default(),
            domains: vec![],
        }
    }
}

/// What share of the training blocks each domain gets. At any point of an epoch, the number of
/// blocks that a domain has had differs from its share by at most the number of domains minus 1.
/// With `on_exhausted = "end"`, this holds until the first domain is used up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mixing {
    /// Shares are proportional to a domain's weight times its number of blocks. Unless
    /// `on_exhausted` is `end`, an epoch then passes `weight` times over each domain.
    #[default]
    Proportional,
    /// Shares are proportional to the power `1 / temperature` of a domain's weight times its number
    /// of blocks. The temperature must be above 0. With 1, the shares are those of `proportional`;
    /// a larger temperature brings them closer together.
    Temperature(f64),
    /// Shares are proportional to the weights, whatever the sizes of the domains.
    Weights,
    /// All domains have equal shares and strictly take turns. All weights must be 1.
    Interleaved,
}

/// What happens when all blocks of a domain have been used before the epoch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnExhausted {
    /// The domain starts over: none of its blocks is used again before all of them have been used
    /// equally often. Unless the mixing is `proportional`, an epoch has about as many blocks as all
    /// domains together.
    #[default]
    Repeat,
    /// The other domains get the rest of the epoch, so that an epoch has each block exactly once.
    End,
}

/// Which tokens the loss counts.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum LossOn {
    /// In a record with a `prompt` and a `completion`, the completion and the end-of-text token
    /// after it. In a record with `messages`, the turns of the assistant that `loss_on_turns`
    /// chooses. In a `text`, the same as with `all`.
    #[default]
    Completion,
    /// Every token of a document except the first, which has no tokens before it.
    All,
}

/// Which turns of the assistant the loss counts.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum LossOnTurns {
    /// Every turn of the assistant.
    #[default]
    All,
    /// The last turn of the assistant. The earlier ones are only read.
    Last,
}

/// What happens when a record is malformed or has nothing to learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRecord {
    /// The run ends with an error that names the file, the line and the fault.
    #[default]
    Fail,
    /// The record is left out and counted.
    Skip,
}
