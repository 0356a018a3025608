//! How each family names the parts of a decoder in its files (transformers 5.17, `state_dict`).

use crate::config::{Family, ModulePath};

/// The names of a family's parts.
#[derive(Debug, PartialEq, Eq)]
pub struct PartNames {
    /// The decoder without its head, such as `transformer`.
    pub root: &'static str,
    /// The list of blocks in the decoder: `h` or `layers`.
    pub blocks: &'static str,
    /// The token embedding's parameter.
    pub embedding: &'static str,
    /// The position embedding's parameter; `None` if there is none.
    pub positions: Option<&'static str>,
    /// In a block, what normalises the input of attention.
    pub norm_1: &'static str,
    /// In a block, what normalises the input of the feed-forward network.
    pub norm_2: &'static str,
    /// In a block, what normalises queries and keys, if anything may.
    pub qk_norms: Option<[&'static str; 2]>,
    /// What normalises the last hidden states.
    pub final_norm: &'static str,
    /// Whether normalisations have a bias, as LayerNorm has and RMSNorm has not.
    pub norms_have_bias: bool,
}

static GPT2: PartNames = PartNames {
    root: "transformer",
    blocks: Family::Gpt2.block_list(),
    embedding: "transformer.wte.weight",
    positions: Some("transformer.wpe.weight"),
    norm_1: "ln_1",
    norm_2: "ln_2",
    qk_norms: None,
    final_norm: "transformer.ln_f",
    norms_have_bias: true,
};

static LLAMA: PartNames = PartNames {
    root: "model",
    blocks: Family::Llama.block_list(),
    embedding: "model.embed_tokens.weight",
    positions: None,
    norm_1: "input_layernorm",
    norm_2: "post_attention_layernorm",
    qk_norms: Some(["self_attn.q_norm", "self_attn.k_norm"]),
    final_norm: "model.norm",
    norms_have_bias: false,
};

impl PartNames {
    /// The head's parameter, in every family.
    pub const HEAD: &'static str = "lm_head.weight";

    /// The names of a family.
    pub fn of(family: Family) -> &'static Self {
        match family {
            Family::Gpt2 => &GPT2,
            Family::Llama | Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 | Family::Mistral => {
                &LLAMA
            }
        }
    }

    /// A block, such as `transformer.h.0`.
    pub fn block(&self, layer: i64) -> String {
        format!("{}.{}.{layer}", self.root, self.blocks)
    }

    /// A linear layer, such as `transformer.h.0.attn.c_attn`.
    pub fn module(&self, path: ModulePath) -> String {
        format!("{}.{}", self.block(path.layer as i64), path.module.name())
    }

    /// Whether a parameter is the token embedding or the position embedding.
    pub(crate) fn is_embedding(&self, name: &str) -> bool {
        name == self.embedding || Some(name) == self.positions
    }
}
