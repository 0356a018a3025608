//! The families of bases, and their linear layers.

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A family of bases, by the `model_type` of its `config.json`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Default,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
    ValueEnum,
)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Family {
    /// GPT-2.
    #[default]
    Gpt2,
    /// Llama 2 and 3, SmolLM and SmolLM2, and others that are published as Llama.
    Llama,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// The dense models of Qwen3.
    Qwen3,
    /// SmolLM3.
    SmolLm3,
    /// Mistral.
    Mistral,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 6] =
        [Self::Gpt2, Self::Llama, Self::Qwen2, Self::Qwen3, Self::SmolLm3, Self::Mistral];

    /// The `model_type`, such as `llama`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
            Self::Mistral => "mistral",
        }
    }

    /// The linear layers of a transformer block, in the order in which it applies them.
    pub fn modules(self) -> &'static [TargetModule] {
        use TargetModule as M;
        match self {
            Self::Gpt2 => &[M::AttnCAttn, M::AttnCProj, M::MlpCFc, M::MlpCProj],
            _ => &[M::QProj, M::KProj, M::VProj, M::OProj, M::GateProj, M::UpProj, M::DownProj],
        }
    }

    /// The name of the list of blocks: `h` in GPT-2, and `layers` in the other families.
    pub const fn block_list(self) -> &'static str {
        match self {
            Self::Gpt2 => "h",
            _ => "layers",
        }
    }
}

/// A linear layer of a transformer block, by its Hugging Face name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum TargetModule {
    /// In GPT-2, the layer that computes queries, keys and values together, `[d, 3d]` with the
    /// width `d` of the hidden states.
    #[serde(rename = "attn.c_attn")]
    AttnCAttn,
    /// In GPT-2, the output projection of attention, `[d, d]`.
    #[serde(rename = "attn.c_proj")]
    AttnCProj,
    /// In GPT-2, the first layer of the feed-forward network, `[d, n_inner]`.
    #[serde(rename = "mlp.c_fc")]
    MlpCFc,
    /// In GPT-2, the second layer of the feed-forward network, `[n_inner, d]`.
    #[serde(rename = "mlp.c_proj")]
    MlpCProj,
    /// In the other families, the layer that computes queries, `[d, heads * head_dim]`.
    #[serde(rename = "self_attn.q_proj")]
    QProj,
    /// In the other families, the layer that computes keys, `[d, key-value heads * head_dim]`.
    #[serde(rename = "self_attn.k_proj")]
    KProj,
    /// In the other families, the layer that computes values, `[d, key-value heads * head_dim]`.
    #[serde(rename = "self_attn.v_proj")]
    VProj,
    /// In the other families, the output projection of attention, `[heads * head_dim, d]`.
    #[serde(rename = "self_attn.o_proj")]
    OProj,
    /// In the other families, the layer of the feed-forward network whose output goes through the
    /// activation, `[d, intermediate_size]`.
    #[serde(rename = "mlp.gate_proj")]
    GateProj,
    /// In the other families, the layer of the feed-forward network that the activation is
    /// multiplied by, `[d, intermediate_size]`.
    #[serde(rename = "mlp.up_proj")]
    UpProj,
    /// In the other families, the last layer of the feed-forward network, `[intermediate_size, d]`.
    #[serde(rename = "mlp.down_proj")]
    DownProj,
}

impl TargetModule {
    /// The target modules of all families, in the order in which a transformer block applies them:
    /// first those of GPT-2, then those of the other families.
    pub const ALL: [Self; 11] = [
        Self::AttnCAttn,
        Self::AttnCProj,
        Self::MlpCFc,
        Self::MlpCProj,
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// The name within a transformer block, such as `self_attn.q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AttnCAttn => "attn.c_attn",
            Self::AttnCProj => "attn.c_proj",
            Self::MlpCFc => "mlp.c_fc",
            Self::MlpCProj => "mlp.c_proj",
            Self::QProj => "self_attn.q_proj",
            Self::KProj => "self_attn.k_proj",
            Self::VProj => "self_attn.v_proj",
            Self::OProj => "self_attn.o_proj",
            Self::GateProj => "mlp.gate_proj",
            Self::UpProj => "mlp.up_proj",
            Self::DownProj => "mlp.down_proj",
        }
    }

    /// The name of the list of blocks to which the layer belongs, as [`Family::block_list`] says.
    pub fn block_list(self) -> &'static str {
        let family = Family::ALL.into_iter().find(|family| family.modules().contains(&self));
        family.expect("each module is of a family").block_list()
    }
}
