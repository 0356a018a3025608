//! The families of bases: how each family writes its `config.json`, names its tensors and lays them
//! out.

mod gpt2;
mod json;
mod llama;
pub mod load;
mod rope;

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::config::{Family, RandomBase};
use crate::model::decoder::spec::DecoderSpec;
use json::Keys;

/// Reads `config.json`.
///
/// # Errors
/// Those of [`from_json`], with the file's path.
pub fn read_spec(path: &Path) -> Result<DecoderSpec> {
    let text = fs_err::read_to_string(path).context("cannot read the base's config")?;
    let parse = || {
        let json: Value = serde_json::from_str(&text).context("is not valid JSON")?;
        from_json(&json)
    };
    parse().with_context(|| format!("in `{}`", path.display()))
}

/// Reads a parsed `config.json`. Keys that are absent have the defaults of transformers.
///
/// # Errors
/// An architecture that is not supported, a value that is not supported, and a shape that
/// contradicts itself; the message names the key.
pub fn from_json(json: &Value) -> Result<DecoderSpec> {
    let keys = Keys(json.as_object().context("is no JSON object")?);
    let model_type = keys.text("model_type")?.context("`model_type` is missing")?;
    match Family::ALL.into_iter().find(|family| family.name() == model_type) {
        Some(Family::Gpt2) => gpt2::from_keys(keys),
        Some(family) => llama::from_keys(family, keys),
        None => {
            let known = Family::ALL.map(|family| format!("`{}`", family.name()));
            bail!(
                "the architecture `{model_type}` (`model_type`) is not supported\nhint: dylora \
                 trains {}",
                known.join(", ")
            )
        }
    }
}

/// A `config.json` that transformers can read. `dtype` is `float32`, `bfloat16` or `float16`.
pub fn to_json(spec: &DecoderSpec, dtype: &str) -> Value {
    let mut json = match spec.family {
        Family::Gpt2 => gpt2::to_json(spec),
        _ => llama::to_json(spec),
    };
    let keys = json.as_object_mut().expect("it was made as an object");
    keys.insert(
        "eos_token_id".into(),
        match spec.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        },
    );
    keys.insert("torch_dtype".into(), dtype.into());
    json
}

/// What `config.json` says of a base's forward pass and of the end of a document. Two bases with
/// the same weights and the same settings are the same base.
pub fn settings(spec: &DecoderSpec) -> Value {
    let mut json = to_json(spec, "");
    let keys = json.as_object_mut().expect("it was made as an object");
    for idle in ["architectures", "bos_token_id", "max_position_embeddings", "torch_dtype"] {
        keys.remove(idle);
    }
    json
}

/// The shape of a random base with a tokenizer's vocabulary. What its config does not set has the
/// default of its family, and its head is tied to the token embedding.
///
/// # Errors
/// A shape that contradicts itself; the message names the key of a `config.json`.
pub fn from_random(
    shape: &RandomBase,
    vocab_size: i64,
    eos_token_id: Option<u32>,
) -> Result<DecoderSpec> {
    let d = shape.n_embd;
    let mut json = match shape.family {
        Family::Gpt2 => json!({
            "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": d,
            "n_positions": shape.n_positions, "n_inner": shape.n_inner,
        }),
        _ => json!({
            "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head,
            "hidden_size": d, "max_position_embeddings": shape.n_positions,
            "num_key_value_heads": shape.n_kv_head.unwrap_or(shape.n_head),
            "head_dim": shape.head_dim.unwrap_or(d / shape.n_head.max(1)),
            // 8 d / 3, so that three matrices have about as many numbers as GPT-2's two
            "intermediate_size": shape.n_inner.unwrap_or((8 * d / 3 + 63) / 64 * 64),
        }),
    };
    let keys = json.as_object_mut().expect("it was made as an object");
    keys.insert("model_type".into(), shape.family.name().into());
    keys.insert("vocab_size".into(), vocab_size.into());
    keys.insert("tie_word_embeddings".into(), true.into());
    keys.insert("eos_token_id".into(), eos_token_id.into());
    keys.insert("bos_token_id".into(), eos_token_id.into());
    from_json(&json)
}

/// The name that transformers gives a family's parameter; `None` for a tensor that is no parameter.
fn canonical_name(family: Family, name: &str) -> Option<String> {
    match family {
        Family::Gpt2 => gpt2::canonical_name(name),
        _ => llama::canonical_name(name),
    }
}
