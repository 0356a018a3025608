//! GPT-2's `config.json` (transformers 5.17, `GPT2Config`), and the names of its parameters.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::model::decoder::mlp::Activation;
use crate::model::decoder::spec::DecoderSpec;

/// Reads `config.json`.
///
/// # Errors
/// If the architecture is another, the activation is not GELU, there is cross-attention, or the
/// shape contradicts itself; the message names the key.
pub fn read_spec(path: &Path) -> Result<DecoderSpec> {
    let text = fs_err::read_to_string(path).context("cannot read the base's config")?;
    let parse = || {
        let json: Value = serde_json::from_str(&text).context("is not valid JSON")?;
        from_json(&json)
    };
    parse().with_context(|| format!("in `{}`", path.display()))
}

/// Reads a parsed `config.json`. Keys that are absent have the defaults of transformers.
pub fn from_json(json: &Value) -> Result<DecoderSpec> {
    let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("absent");
    if model_type != "gpt2" {
        bail!("`model_type` must be `gpt2`, got `{model_type}`\nhint: dylora trains GPT-2 only");
    }
    if flag(json, "add_cross_attention", false)? {
        bail!("`add_cross_attention` must be false: a decoder alone is supported");
    }
    let n_embd = size(json, "n_embd", Some(768))?;
    let name = match json.get("activation_function") {
        None | Some(Value::Null) => "gelu_new",
        Some(name) => name.as_str().context("`activation_function` is not a string")?,
    };
    let activation = match name {
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluNew,
        "gelu" => Activation::Gelu,
        _ => bail!("`activation_function` must be `gelu_new` or `gelu`, got `{name}`"),
    };
    let epsilon = json.get("layer_norm_epsilon").map_or(Some(1e-5), Value::as_f64);
    let vocab_size = size(json, "vocab_size", Some(50257))?;
    let eos = json.get("eos_token_id").map_or(Some(50256), Value::as_i64);
    let spec = DecoderSpec {
        n_layer: size(json, "n_layer", Some(12))?,
        n_head: size(json, "n_head", Some(12))?,
        n_embd,
        n_inner: size(json, "n_inner", Some(4 * n_embd))?,
        n_positions: size(json, "n_positions", Some(1024))?,
        vocab_size,
        layer_norm_epsilon: epsilon.context("`layer_norm_epsilon` is not a number")?,
        activation,
        tied_head: flag(json, "tie_word_embeddings", true)?,
        scale_attn_weights: flag(json, "scale_attn_weights", true)?,
        scale_attn_by_inverse_layer_idx: flag(json, "scale_attn_by_inverse_layer_idx", false)?,
        eos_token_id: eos.filter(|id| (0..vocab_size).contains(id)).map(|id| id as u32),
    };
    if spec.n_embd % spec.n_head != 0 {
        let (d, h) = (spec.n_embd, spec.n_head);
        bail!("`n_embd` must be a multiple of `n_head` {h}, got {d}");
    }
    Ok(spec)
}

/// A `config.json` that transformers can read. `dtype` is `float32`, `bfloat16` or `float16`.
pub fn to_json(spec: &DecoderSpec, dtype: &str) -> Value {
    json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": spec.n_layer,
        "n_head": spec.n_head,
        "n_embd": spec.n_embd,
        "n_inner": spec.n_inner,
        "n_positions": spec.n_positions,
        "vocab_size": spec.vocab_size,
        "layer_norm_epsilon": spec.layer_norm_epsilon,
        "activation_function": match spec.activation {
            Activation::GeluNew => "gelu_new",
            Activation::Gelu => "gelu",
        },
        "tie_word_embeddings": spec.tied_head,
        "scale_attn_weights": spec.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": spec.scale_attn_by_inverse_layer_idx,
        "bos_token_id": spec.eos_token_id,
        "eos_token_id": spec.eos_token_id,
        "torch_dtype": dtype,
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

fn size(json: &Value, key: &str, default: Option<i64>) -> Result<i64> {
    let value = match json.get(key) {
        None | Some(Value::Null) => default,
        Some(value) => value.as_i64(),
    };
    match value {
        Some(value) if value >= 1 => Ok(value),
        _ => bail!("`{key}` must be a whole number of at least 1, got {}", json[key]),
    }
}

fn flag(json: &Value, key: &str, default: bool) -> Result<bool> {
    match json.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => bail!("`{key}` must be true or false, got {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The four GPT-2s on the Hub. transformers 5.17 counts the same numbers (`num_parameters`,
    /// where a tied head counts once).
    #[test]
    fn the_four_sizes_have_their_known_numbers_of_parameters() -> Result<()> {
        for (n_layer, n_head, n_embd, parameters) in [
            (12, 12, 768, 124_439_808),
            (24, 16, 1024, 354_823_168),
            (36, 20, 1280, 774_030_080),
            (48, 25, 1600, 1_557_611_200),
        ] {
            let json = json!({
                "model_type": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
            });
            let config = from_json(&json)?;
            assert_eq!(config.num_parameters(), parameters);
            assert_eq!(from_json(&to_json(&config, "float32"))?, config);
        }
        Ok(())
    }
}
