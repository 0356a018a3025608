//! `[router]`, and what decides the routing weights of a forward pass.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// `[router]`: what scores the experts, by which rule they are mixed, and what is told about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// What it reads.
    pub input: RouterInput,
    /// Whether layers, or target modules, have routers of their own.
    pub scope: RouterScope,
    /// Whether each token is routed by itself or by its document's prompt.
    pub level: RoutingLevel,
    /// Layers before the one that scores the experts, each with a ReLU; 0 for a linear router.
    pub hidden_layers: i64,
    /// Their width.
    pub hidden_width: i64,
    /// Divides the scores before the softmax; below 1 sharpens.
    pub temperature: f64,
    /// How the temperature comes to its value; absent = it is constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature_schedule: Option<TemperatureSchedule>,
    /// Keep the k best experts of a token; absent = all (dense).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// Whether the weights of the k best are divided by their sum. If so, `top_k = 1` always gives weight
    /// 1, and the language model's loss teaches the router nothing; if not, that is Switch's rule
    /// (arXiv:2101.03961, eq. 2).
    pub renormalize: bool,
    /// Route densely until every expert is mature by this criterion, and by `top_k` from then on
    /// (DyLoRA-MoE's rule); absent = by `top_k` from the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hybrid: Option<Maturity>,
    /// What disturbs the router in training.
    pub noise: RouterNoise,
    /// The rule for evaluation, if it is not that of training; `eval` then shows both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalRule>,
    /// Factor of the load-balancing loss (arXiv:2101.03961, eqs. 4-6).
    pub load_balancing_coef: f64,
    /// Factor of the mean squared distance of the mean routing_probs from 1 / E.
    pub uniform_mse_coef: f64,
    /// Factor of the mean squared logsumexp of the scores (ST-MoE, arXiv:2202.08906, eq. 5).
    pub z_loss_coef: f64,
    /// Factor of the mean entropy of routing_probs: above 0 each token comes to fewer experts, below 0
    /// to more.
    pub entropy_coef: f64,
    /// How far a step moves the bias of each expert that has more or less than its share, by which
    /// the k best are chosen, but not weighted (arXiv:2408.15664, algorithm 1); 0 for no bias.
    pub balance_bias_rate: f64,
    /// Steps of a window, after each of which routing is told about and checked.
    pub window_steps: u64,
    /// What happens when the routing collapses.
    pub on_collapse: OnCollapse,
    /// Collapsed is a router that gives one expert more than this share of weight over a window.
    pub collapse_share: f64,
    /// Dead is an expert whose mean routing weight over a window is less than this part of an even one,
    /// 1 / E.
    pub dead_share: f64,
    /// A folder to start the router from: an export of dylora's, or one with `xlora_config.json` and
    /// `xlora_classifier.safetensors`. Its shape and rule must be those set here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            input: RouterInput::Embeddings,
            scope: RouterScope::Shared,
            level: RoutingLevel::Token,
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
    /// The factors of the losses by key, and whether a factor below 0 has a meaning.
    pub fn loss_coefs(&self) -> [(&'static str, f64, bool); 4] {
        [
            ("load_balancing_coef", self.load_balancing_coef, false),
            ("uniform_mse_coef", self.uniform_mse_coef, false),
            ("z_loss_coef", self.z_loss_coef, false),
            ("entropy_coef", self.entropy_coef, true),
        ]
    }
}

/// What the router reads. At position t, none of them depends on a later token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterInput {
    /// Token plus position embeddings.
    #[default]
    Embeddings,
    /// The last hidden state, after `ln_f`, of a pass of the base alone, without gradient (X-LoRA,
    /// arXiv:2402.07148, section 2).
    BaseHidden,
    /// A block's own input after its first LayerNorm.
    LayerInput,
}

impl RouterInput {
    /// The name in configs and exports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embeddings => "embeddings",
            Self::BaseHidden => "base_hidden",
            Self::LayerInput => "layer_input",
        }
    }
}

/// How many routers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScope {
    /// One. From embeddings or the base's hidden state it routes once for all layers; on layer inputs,
    /// each layer anew.
    #[default]
    Shared,
    /// One for each layer.
    Layer,
    /// One for each target module of each layer.
    Module,
}

/// What is routed as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoutingLevel {
    /// Each token by its own features.
    #[default]
    Token,
    /// Each token by the mean features of its document's prompt up to it: all of a completion by those
    /// of the whole prompt. A document without a prompt counts as one, up to each token, and so does a
    /// window of a long document that begins after its prompt.
    Sequence,
}

/// `temperature_schedule = { start = 4.0, steps = 500 }`: from `start` in a geometric row to
/// `temperature`, which the step after `steps` has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemperatureSchedule {
    /// Of the first step.
    pub start: f64,
    /// Steps until `temperature` is reached.
    pub steps: u64,
}

/// When an expert is mature, as in `hybrid = { tokens = 100000 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Maturity {
    /// Once this many label tokens were routed to it, each counted by its routing weight.
    Tokens(u64),
    /// Once its loss no longer falls.
    Plateau(Plateau),
}

/// `hybrid = { plateau = { window_steps = 100, min_delta = 0.01 } }`: mature is an expert whose loss (the
/// mean over label tokens, weighted with its routing weights) over a window is not `min_delta` below that
/// over the window before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plateau {
    /// Steps of a window.
    pub window_steps: u64,
    /// Nats.
    pub min_delta: f64,
}

/// What disturbs the router in training: `"none"`, `{ gaussian = 0.1 }` or `{ jitter = 0.01 }`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterNoise {
    /// Nothing.
    #[default]
    None,
    /// Adds `N(0, std^2)` to each score (arXiv:1701.06538, eq. 4, with a constant std).
    Gaussian(f64),
    /// Multiplies what it reads with numbers from `[1 - eps, 1 + eps]` (Switch, arXiv:2101.03961,
    /// table 11).
    Jitter(f64),
}

/// The rule of routing in evaluation: `"dense"` or `{ top_k = 1 }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalRule {
    /// All experts.
    Dense,
    /// The k best.
    TopK(i64),
}

impl EvalRule {
    /// How many experts a token keeps; none = all.
    pub fn top_k(self) -> Option<i64> {
        match self {
            Self::Dense => None,
            Self::TopK(k) => Some(k),
        }
    }
}

/// What happens when the routing collapses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnCollapse {
    /// A warning.
    #[default]
    Warn,
    /// The run stops behind a checkpoint.
    Stop,
}

/// What decides the routing weights: `router`, `uniform`, `all`, `expert:N`, `record` or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RoutingChoice {
    /// The learned router; with one expert, which has none, weight 1.
    #[default]
    Router,
    /// 1 / E for each expert.
    Uniform,
    /// 1 for each expert: PEFT with several active adapters.
    All,
    /// 1 for this expert, 0 for the others.
    Expert(i64),
    /// 1 for the expert that a record's `expert` field names: PEFT's `adapter_names`.
    Record,
    /// 0 for each expert: the base alone.
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
            "none" => Self::None,
            _ => match text.strip_prefix("expert:").and_then(|expert| expert.parse().ok()) {
                Some(expert) => Self::Expert(expert),
                None => bail!(
                    "must be `router`, `uniform`, `all`, `expert:N`, `record` or `none`, got \
                     `{text}`"
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
