//! `[router]`, and what decides the routing weights of a forward pass.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// `[router]`: the linear layer that scores the experts for each token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// What it reads.
    pub input: RouterInput,
    /// Divides the scores before the softmax; below 1 sharpens.
    pub temperature: f64,
    /// Keep the k best experts of a token and renormalise; absent = all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// Factor of the load-balancing loss (arXiv:2101.03961, eqs. 4-6).
    pub load_balancing_coef: f64,
    /// A folder to start the router from: an export of dylora's, or one with `xlora_config.json` and
    /// `xlora_classifier.safetensors`. Its input, temperature and top-k must be those set here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            input: RouterInput::Embeddings,
            temperature: 1.0,
            top_k: None,
            load_balancing_coef: 0.0,
            source: None,
        }
    }
}

/// What the router reads. At position t, none of them depends on a later token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterInput {
    /// Token plus position embeddings: one router, whose weights every layer shares.
    #[default]
    Embeddings,
    /// The last hidden state, after `ln_f`, of a pass of the base alone, without gradient: one
    /// router, whose weights every layer shares (X-LoRA, arXiv:2402.07148, section 2).
    BaseHidden,
    /// A block's own input after its first LayerNorm: one router for each layer.
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
