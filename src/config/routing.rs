//! `[router]`, and the choice of what decides the routing weights in a forward pass.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};
use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[router]`: how the experts are scored, how the scores become weights, and how the routing is
/// checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// What the router reads.
    pub input: RouterInput,
    /// Whether there is one router, or one for each layer or target module.
    pub scope: RouterScope,
    /// Whether each token is routed by itself or by the prompt of its document.
    pub level: RoutingLevel,
    /// Whether the router's input is divided by its root mean square, so that one learning rate
    /// suits every input.
    pub normalize_input: bool,
    /// Whether the router's gradient stops at its input and does not reach the experts of the
    /// layers before it.
    pub detach_input: bool,
    /// The initial weights of the layer that scores the experts.
    pub init: RouterInit,
    /// Whether the router is trained. A router that is not keeps its initial weights, or those of
    /// `router.source`, and the experts are trained with the weights that it gives.
    pub trainable: bool,
    /// Number of hidden layers, each with a ReLU, before the layer that scores the experts. With 0,
    /// the router is linear.
    pub hidden_layers: i64,
    /// Width of the hidden layers.
    pub hidden_width: i64,
    /// Divides the scores before the softmax. A value below 1 sharpens the routing.
    pub temperature: f64,
    /// How the temperature changes during training. Without it, the temperature is constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature_schedule: Option<TemperatureSchedule>,
    /// Number of experts that each token uses, the best ones by score. Without it, each token uses
    /// all experts (dense routing).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// Whether the weights of the k best experts are divided by their sum. With `true`, `top_k = 1`
    /// always gives weight 1, so the router receives no gradient from the language model's loss.
    /// `false` is Switch's rule (arXiv:2101.03961, eq. 2).
    pub renormalize: bool,
    /// Use dense routing until every expert is mature by this criterion, and `top_k` from then on
    /// (DyLoRA-MoE's rule). Without it, `top_k` holds from the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hybrid: Option<Maturity>,
    /// Noise that disturbs the router in training.
    pub noise: RouterNoise,
    /// A different routing rule for evaluation. `dylora eval` then reports the results of both
    /// rules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalRule>,
    /// Factor of the load-balancing loss (arXiv:2101.03961, eqs. 4-6).
    pub load_balancing_coef: f64,
    /// Factor of the mean squared distance of the experts' mean routing probabilities from 1 / E.
    pub uniform_mse_coef: f64,
    /// Factor of the mean squared logsumexp of the scores (ST-MoE, arXiv:2202.08906, eq. 5).
    pub z_loss_coef: f64,
    /// Factor of the mean entropy of the routing probabilities. A value above 0 concentrates each
    /// token on fewer experts; a value below 0 spreads it over more.
    pub entropy_coef: f64,
    /// Factor of the domain supervision: the cross entropy of the routing probabilities with the
    /// experts of the token's domain (`data.domains[].expert`), in nats, as a mean over all tokens,
    /// prompts included, and over the routers. It teaches the router which expert is for which
    /// domain. Without this key, it is 0.1 if several domains are trained and the router decides,
    /// and 0 otherwise; it is also 0 if experts start from adapters and no domain names its expert.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_supervision: Option<f64>,
    /// How far each step moves the selection bias of an expert that gets more or less than its
    /// share. The bias has an effect on which k experts are chosen, but not on their weights
    /// (loss-free balancing, arXiv:2408.15664, algorithm 1). 0 turns it off.
    pub balance_bias_rate: f64,
    /// Number of steps in a window. After each window, the routing is reported and checked.
    pub window_steps: u64,
    /// What happens when the routing has collapsed: a router gives one expert more than
    /// `collapse_share` of the weight, or an expert is dead (see `dead_share`).
    pub on_collapse: OnCollapse,
    /// The largest share of the routing weight that a router may give one expert over a window
    /// without counting as collapsed.
    pub collapse_share: f64,
    /// An expert is dead if its mean routing weight over a window is less than this fraction of an
    /// even weight, 1 / E.
    pub dead_share: f64,
    /// A folder with a router to start from: an export of dylora's, or a folder with
    /// `xlora_config.json` and `xlora_classifier.safetensors`. That router must have the shape and
    /// the routing rule that are set here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            input: RouterInput::LayerInput,
            scope: RouterScope::Layer,
            level: RoutingLevel::Token,
            normalize_input: true,
            detach_input: true,
            init: RouterInit::Normal,
            trainable: true,
            hidden_layers: 0,
            hidden_width: 64,
            temperature: 1.0,
            temperature_schedule: None,
            top_k: None,
            renormalize: true,
            hybrid: None,
            noise: RouterNoise::None,
            eval: None,
            load_balancing_coef: 0.0,
            uniform_mse_coef: 0.0,
            z_loss_coef: 0.0,
            entropy_coef: 0.0,
            domain_supervision: None,
            balance_bias_rate: 0.0,
            window_steps: 50,
            on_collapse: OnCollapse::Warn,
            collapse_share: 0.9,
            dead_share: 0.05,
            source: None,
        }
    }
}

impl RouterConfig {
    /// The key and the factor of each loss, and whether the factor may be negative.
    pub fn loss_coefs(&self) -> [(&'static str, f64, bool); 4] {
        [
            ("load_balancing_coef", self.load_balancing_coef, false),
            ("uniform_mse_coef", self.uniform_mse_coef, false),
            ("z_loss_coef", self.z_loss_coef, false),
            ("entropy_coef", self.entropy_coef, true),
        ]
    }
}

/// What the router reads. None of these inputs depends on a later token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouterInput {
    /// The token embeddings, with the position embeddings where the base has them.
    Embeddings,
    /// The last hidden state, after the final normalisation, of a separate forward pass of the base
    /// alone, without gradient (X-LoRA, arXiv:2402.07148, section 2).
    BaseHidden,
    /// The input of the layer itself, after the layer's first normalisation.
    #[default]
    LayerInput,
    /// The input of the target module itself (HydraLoRA, arXiv:2404.19245, eq. 5), with
    /// `router.scope = "module"`. Blocks are then computed by libtorch's operations one by one.
    ModuleInput,
}

impl RouterInput {
    /// The name in configs and exports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embeddings => "embeddings",
            Self::BaseHidden => "base_hidden",
            Self::LayerInput => "layer_input",
            Self::ModuleInput => "module_input",
        }
    }
}

/// How many routers there are.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum RouterScope {
    /// One router. With `embeddings` or `base_hidden`, it decides once for all layers; with
    /// `layer_input`, it decides anew in each layer.
    Shared,
    /// One router for each layer.
    #[default]
    Layer,
    /// One router for each target module of each layer.
    Module,
}

/// The initial weights of a router's layer that scores the experts. Its biases are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouterInit {
    /// Drawn from `N(0, 0.02^2)`.
    #[default]
    Normal,
    /// Zero: every token gives every expert the same probability at first.
    Zero,
}

/// Whether each token is routed by itself or by the prompt of its document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RoutingLevel {
    /// Each token is routed by its own features.
    #[default]
    Token,
    /// Each token is routed by the mean features of its document's prompt up to that token, so that
    /// the whole prompt routes all of a completion. A document without a prompt counts as all
    /// prompt, and so does a piece of a long document that begins after the prompt.
    Sequence,
}

/// The temperature changes geometrically from `start` to `router.temperature`, which it reaches in
/// the step after `steps`, as in `temperature_schedule = { start = 4.0, steps = 500 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TemperatureSchedule {
    /// The temperature of the first step.
    pub start: f64,
    /// Number of steps until `router.temperature` is reached.
    pub steps: u64,
}

/// When an expert is mature, as in `hybrid = { tokens = 100000 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Maturity {
    /// The expert is mature once this many label tokens have been routed to it, each counted with
    /// its routing weight.
    Tokens(u64),
    /// The expert is mature once its loss no longer falls.
    Plateau(Plateau),
}

/// An expert is mature once its loss falls by less than `min_delta` from one window of steps to the
/// next, as in `hybrid = { plateau = { window_steps = 100, min_delta = 0.01 } }`. The loss of an
/// expert is the mean loss over label tokens, weighted by their routing weights for the expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plateau {
    /// Number of steps in a window.
    pub window_steps: u64,
    /// The smallest fall of the loss that counts, in nats.
    pub min_delta: f64,
}

/// Noise that disturbs the router in training.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouterNoise {
    /// No noise.
    #[default]
    None,
    /// Adds noise from `N(0, std^2)` to each score. The value is `std` (arXiv:1701.06538, eq. 4,
    /// with a constant std).
    Gaussian(f64),
    /// Multiplies the router's input by random numbers, uniform in `[1 - eps, 1 + eps]`. The value
    /// is `eps` (Switch, arXiv:2101.03961, table 11).
    Jitter(f64),
}

/// The routing rule in evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EvalRule {
    /// Each token uses all experts.
    Dense,
    /// Each token uses its k best experts.
    TopK(i64),
}

impl EvalRule {
    /// The number of experts that a token uses; `None` means all.
    pub fn top_k(self) -> Option<i64> {
        match self {
            Self::Dense => None,
            Self::TopK(k) => Some(k),
        }
    }
}

/// What happens when the routing has collapsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnCollapse {
    /// A warning is logged.
    #[default]
    Warn,
    /// The run saves a checkpoint and stops.
    Stop,
}

/// `router`: the learned router; a single expert has no router and gets weight 1. `uniform`: weight
/// 1 / E for each expert. `all`: weight 1 for each expert, as PEFT does with several active
/// adapters. `expert:N`: weight 1 for expert N and 0 for the others. `record`: weight 1 for the
/// expert that a record's `expert` field names, as with PEFT's `adapter_names`. `domain`: weight 1
/// for the expert of the record's domain (`data.domains[].expert`), shared evenly if it has
/// several; this is the oracle. `none`: weight 0 for each expert, which is the base alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum RoutingChoice {
    /// The learned router. A single expert has no router and gets weight 1.
    #[default]
    Router,
    /// Weight 1 / E for each expert.
    Uniform,
    /// Weight 1 for each expert, as PEFT does with several active adapters.
    All,
    /// Weight 1 for this expert and 0 for the others.
    Expert(i64),
    /// Weight 1 for the expert that a record's `expert` field names, as with PEFT's
    /// `adapter_names`.
    Record,
    /// Weight 1 for the expert of the record's domain, or even shares of it for several.
    Domain,
    /// Weight 0 for each expert, which is the base alone.
    None,
}

impl FromStr for RoutingChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "router" => Self::Router,
            "uniform" => Self::Uniform,
            "all" => Self::All,
            "record" => Self::Record,
            "domain" => Self::Domain,
            "none" => Self::None,
            _ => match text.strip_prefix("expert:").and_then(|expert| expert.parse().ok()) {
                Some(expert) => Self::Expert(expert),
                None => bail!(
                    "must be `router`, `uniform`, `all`, `expert:N`, `record`, `domain` or `none`, \
                     got `{text}`"
                ),
            },
        })
    }
}

impl fmt::Display for RoutingChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Router => f.write_str("router"),
            Self::Uniform => f.write_str("uniform"),
            Self::All => f.write_str("all"),
            Self::Expert(expert) => write!(f, "expert:{expert}"),
            Self::Record => f.write_str("record"),
            Self::Domain => f.write_str("domain"),
            Self::None => f.write_str("none"),
        }
    }
}

impl TryFrom<String> for RoutingChoice {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<RoutingChoice> for String {
    fn from(choice: RoutingChoice) -> Self {
        choice.to_string()
    }
}
