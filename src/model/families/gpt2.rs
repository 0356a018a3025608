//! GPT-2's `config.json` (transformers 5.17, `GPT2Config`), and the names of its parameters.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::json::Keys;
use crate::config::Family;
use crate::model::decoder::mlp::Activation;
use crate::model::decoder::spec::{Biases, DecoderSpec};

/// Reads a parsed `config.json`. Keys that are absent have the defaults of transformers.
///
/// # Errors
/// If the activation is not GELU, there is cross-attention, or the shape contradicts itself; the
/// message names the key.
pub(super) fn from_keys(keys: Keys<'_>) -> Result<DecoderSpec> {
    if keys.flag("add_cross_attention", false)? {
        bail!("`add_cross_attention` must be false: a decoder alone is supported");
    }
    let width = keys.width("n_embd", 768)?;
    let activation = match keys.text("activation_function")?.unwrap_or("gelu_new") {
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluNew,
        "gelu" => Activation::Gelu,
        name => bail!("`activation_function` must be `gelu_new` or `gelu`, got `{name}`"),
    };
    let num_heads = keys.width("n_head", 12)?;
    if width % num_heads != 0 {
        bail!("`n_embd` must be a multiple of `n_head` {num_heads}, got {width}");
    }
    let vocab_size = keys.size("vocab_size", 50257)?;
    let bos = keys.token_ids("bos_token_id", Some(50256), vocab_size)?;
    Ok(DecoderSpec {
        family: Family::Gpt2,
        num_layers: keys.layers("n_layer", 12)?,
        num_heads,
        num_kv_heads: num_heads,
        head_dim: width / num_heads,
        width,
        inner_width: keys.width("n_inner", 4 * width)?,
        max_positions: keys.size("n_positions", 1024)?,
        vocab_size,
        norm_eps: keys.at_least_zero("layer_norm_epsilon", 1e-5)?,
        activation,
        biases: Biases { qkv: true, attention_out: true, mlp: true },
        has_qk_norm: false,
        rope: None,
        windows: None,
        tied_head: keys.flag("tie_word_embeddings", true)?,
        scale_attn_weights: keys.flag("scale_attn_weights", true)?,
        scale_attn_by_inverse_layer_idx: keys.flag("scale_attn_by_inverse_layer_idx", false)?,
        eos_token_ids: keys.token_ids("eos_token_id", Some(50256), vocab_size)?,
        bos_token_id: bos.first().copied(),
    })
}

/// The `config.json` of a spec, without its `eos_token_id`.
pub(super) fn to_json(spec: &DecoderSpec) -> Value {
    json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_embd": spec.width,
        "n_inner": spec.inner_width,
        "n_positions": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": match spec.activation {
            Activation::Gelu => "gelu",
            Activation::GeluNew | Activation::Silu => "gelu_new",
        },
        "tie_word_embeddings": spec.tied_head,
        "scale_attn_weights": spec.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": spec.scale_attn_by_inverse_layer_idx,
        "bos_token_id": spec.bos_token_id,
    })
}

/// The name that transformers gives the parameter; `None` for a buffer of a mask.
pub(super) fn canonical_name(name: &str) -> Option<String> {
    if name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") {
        return None;
    }
    if name.starts_with("transformer.") || name.starts_with("lm_head.") {
        return Some(name.to_owned());
    }
    Some(format!("transformer.{name}"))
}
