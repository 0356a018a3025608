//! The `config.json` of the Llama-like families (transformers 5.17, `configuration_*.py` and what
//! `modeling_*.py` makes of it), and the names of their parameters.
//!
//! The families differ in their defaults and in these keys:
//!
//! ```text
//! attention_bias        llama, qwen3, smollm3: q, k, v and o; qwen2 has those of q, k and v always
//! mlp_bias              llama, smollm3
//! head_dim              absent: hidden_size / num_attention_heads; qwen3: 128
//! q_norm, k_norm        qwen3
//! sliding windows       mistral: every layer; qwen2, qwen3, smollm3: see `windows`
//! layers without RoPE   smollm3: `no_rope_layers`, where 1 means with RoPE, or every
//!                       `no_rope_layer_interval`-th layer
//! ```

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::json::{Keys, MAX_WIDTH};
use super::rope;
use crate::config::Family;
use crate::model::decoder::mlp::Activation;
use crate::model::decoder::rope::RopeSpec;
use crate::model::decoder::spec::{Biases, DecoderSpec, Windows};

/// Keys that change the forward pass in a way that is not supported, and why.
const UNSUPPORTED: [(&str, &str); 2] = [
    ("per_layer_config", "all layers must be alike"),
    ("quantization_config", "the weights must be f32, f16 or bf16"),
];

/// The families that have the key `attention_bias`.
const ATTENTION_BIAS: [Family; 3] = [Family::Llama, Family::Qwen3, Family::SmolLm3];
/// The families that have the key `mlp_bias`.
const MLP_BIAS: [Family; 2] = [Family::Llama, Family::SmolLm3];

/// The values of keys that are absent.
struct Defaults {
    vocab_size: i64,
    width: i64,
    inner_width: i64,
    num_layers: i64,
    num_heads: i64,
    /// `None` for as many as there are query heads.
    num_kv_heads: Option<i64>,
    head_dim: Option<i64>,
    max_positions: i64,
    theta: f64,
    tied_head: bool,
    eos_token_id: Option<i64>,
    bos_token_id: Option<i64>,
}

impl Defaults {
    fn of(family: Family) -> Self {
        let llama = Self {
            vocab_size: 32000,
            width: 4096,
            inner_width: 11008,
            num_layers: 32,
            num_heads: 32,
            num_kv_heads: None,
            head_dim: None,
            max_positions: 2048,
            theta: 10_000.0,
            tied_head: false,
            eos_token_id: Some(2),
            bos_token_id: Some(1),
        };
        let qwen2 = Self {
            vocab_size: 151_936,
            inner_width: 22016,
            num_kv_heads: Some(32),
            max_positions: 32768,
            eos_token_id: None,
            bos_token_id: None,
            ..llama
        };
        match family {
            Family::Gpt2 | Family::Llama => llama,
            Family::Qwen2 => qwen2,
            Family::Qwen3 => Self { head_dim: Some(128), ..qwen2 },
            Family::SmolLm3 => Self {
                vocab_size: 128_256,
                width: 2048,
                num_layers: 36,
                num_heads: 16,
                num_kv_heads: Some(4),
                max_positions: 32768,
                theta: 2_000_000.0,
                tied_head: true,
                eos_token_id: Some(128_001),
                bos_token_id: Some(128_000),
                ..llama
            },
            Family::Mistral => {
                Self { inner_width: 14336, num_kv_heads: Some(8), max_positions: 131_072, ..llama }
            }
        }
    }
}

/// Reads a parsed `config.json` of `family`. Keys that are absent have the defaults of
/// transformers.
///
/// # Errors
/// A value that is not supported, and a shape that contradicts itself; the message names the key.
pub(super) fn from_keys(family: Family, keys: Keys<'_>) -> Result<DecoderSpec> {
    let defaults = Defaults::of(family);
    for (key, what) in UNSUPPORTED {
        if keys.get(key).is_some() {
            bail!("`{key}` is not supported: {what}");
        }
    }
    let activation = keys.text("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        bail!("`hidden_act` must be `silu`, got `{activation}`");
    }
    let width = keys.width("hidden_size", defaults.width)?;
    let num_layers = keys.layers("num_hidden_layers", defaults.num_layers)?;
    let vocab_size = keys.size("vocab_size", defaults.vocab_size)?;
    let max_positions = keys.size("max_position_embeddings", defaults.max_positions)?;
    let (num_heads, num_kv_heads, head_dim) = heads(family, keys, &defaults, width)?;
    let mut rope = rope::read(keys, defaults.theta, max_positions)?;
    let mut windows = None;
    if family == Family::SmolLm3 {
        rope.skipped_layers = layers_without_rope(keys, num_layers)?;
    }
    if let Some(size) = window_size(family, keys)? {
        let layers = window_layers(family, keys, num_layers, &rope.skipped_layers)?;
        windows = layers.contains(&true).then_some(Windows { size, layers });
    } else if family != Family::Llama {
        check_no_window(keys, num_layers)?;
    }
    let bos = keys.token_ids("bos_token_id", defaults.bos_token_id, vocab_size)?;
    Ok(DecoderSpec {
        family,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        width,
        inner_width: keys.width("intermediate_size", defaults.inner_width)?,
        max_positions,
        vocab_size,
        norm_eps: keys.at_least_zero("rms_norm_eps", 1e-6)?,
        activation: Activation::Silu,
        biases: biases(family, keys)?,
        has_qk_norm: family == Family::Qwen3,
        rope: Some(rope),
        windows,
        tied_head: keys.flag("tie_word_embeddings", defaults.tied_head)?,
        scale_attn_weights: true,
        scale_attn_by_inverse_layer_idx: false,
        eos_token_ids: keys.token_ids("eos_token_id", defaults.eos_token_id, vocab_size)?,
        bos_token_id: bos.first().copied(),
    })
}

/// The numbers of query heads and of key-value heads, and the width of a head.
fn heads(
    family: Family,
    keys: Keys<'_>,
    defaults: &Defaults,
    width: i64,
) -> Result<(i64, i64, i64)> {
    let num_heads = keys.width("num_attention_heads", defaults.num_heads)?;
    let absent = match keys.has("num_key_value_heads") {
        true => num_heads,
        false => defaults.num_kv_heads.unwrap_or(num_heads),
    };
    let num_kv_heads = keys.width("num_key_value_heads", absent)?;
    if num_heads % num_kv_heads != 0 {
        bail!(
            "`num_attention_heads` must be a multiple of `num_key_value_heads` {num_kv_heads}, \
             got {num_heads}"
        );
    }
    let has_own = keys.get("head_dim").is_some() || defaults.head_dim.is_some();
    // transformers refuses it for `llama` even if `head_dim` is there
    if width % num_heads != 0 && (!has_own || family == Family::Llama) {
        bail!("`hidden_size` must be a multiple of `num_attention_heads` {num_heads}, got {width}");
    }
    let head_dim = keys.width("head_dim", defaults.head_dim.unwrap_or(width / num_heads))?;
    if head_dim % 2 != 0 {
        bail!("`head_dim` must be even, got {head_dim}");
    }
    if num_heads * head_dim > MAX_WIDTH {
        bail!(
            "`num_attention_heads` times `head_dim` must be at most {MAX_WIDTH}, got {num_heads} \
             times {head_dim}"
        );
    }
    Ok((num_heads, num_kv_heads, head_dim))
}

fn biases(family: Family, keys: Keys<'_>) -> Result<Biases> {
    let (mut attention, mut mlp) = (false, false);
    if ATTENTION_BIAS.contains(&family) {
        attention = keys.flag("attention_bias", false)?;
    }
    if MLP_BIAS.contains(&family) {
        mlp = keys.flag("mlp_bias", false)?;
    }
    Ok(Biases { qkv: attention || family == Family::Qwen2, attention_out: attention, mlp })
}

/// The layers of a SmolLM3 that rotate nothing.
fn layers_without_rope(keys: Keys<'_>, num_layers: i64) -> Result<Vec<i64>> {
    let key = "no_rope_layers";
    let Some(flags) = keys.list(key)? else {
        let interval = keys.size("no_rope_layer_interval", 4)?;
        return Ok((0..num_layers).filter(|layer| (layer + 1) % interval == 0).collect());
    };
    let flags: Option<Vec<i64>> = flags.iter().map(Value::as_i64).collect();
    let flags = flags.with_context(|| format!("`{key}` must be a list of 0 and 1"))?;
    if (flags.len() as i64) < num_layers {
        bail!("`{key}` must have {num_layers} entries, one for each layer, got {}", flags.len());
    }
    Ok((0..num_layers).filter(|layer| flags[*layer as usize] == 0).collect())
}

/// The size of the sliding window, if some layers may have one.
fn window_size(family: Family, keys: Keys<'_>) -> Result<Option<i64>> {
    let key = "sliding_window";
    let is_used = match family {
        Family::Gpt2 | Family::Llama => false,
        Family::Mistral if keys.get("layer_types").is_some() => bail!(
            "`layer_types` makes another architecture of a Mistral, `ministral`, which is not \
             supported"
        ),
        Family::Mistral => true,
        Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 => {
            keys.flag("use_sliding_window", false)?
        }
    };
    let is_null = keys.has(key) && keys.get(key).is_none();
    let has_default = family != Family::SmolLm3;
    match is_used && !is_null && (keys.has(key) || has_default) {
        true => keys.size(key, 4096).map(Some),
        false => Ok(None),
    }
}

/// Whether each layer has the sliding window: as `layer_types` says, or else in a Qwen those from
/// `max_window_layers` on, in a SmolLM3 those without RoPE, and in a Mistral all.
fn window_layers(
    family: Family,
    keys: Keys<'_>,
    num_layers: i64,
    skipped_layers: &[i64],
) -> Result<Vec<bool>> {
    if let Some(types) = layer_types(keys, num_layers)? {
        return Ok(types);
    }
    Ok(match family {
        Family::Qwen2 | Family::Qwen3 => {
            let first = keys.get("max_window_layers").map_or(Some(28), Value::as_i64);
            let first = first.context("`max_window_layers` must be a whole number")?;
            (0..num_layers).map(|layer| layer >= first).collect()
        }
        Family::SmolLm3 => (0..num_layers).map(|layer| skipped_layers.contains(&layer)).collect(),
        _ => vec![true; num_layers as usize],
    })
}

/// Whether each entry of `layer_types` is a sliding window; `None` if the key is absent.
fn layer_types(keys: Keys<'_>, num_layers: i64) -> Result<Option<Vec<bool>>> {
    let Some(types) = keys.list("layer_types")? else { return Ok(None) };
    if types.len() as i64 != num_layers {
        bail!(
            "`layer_types` must have {num_layers} entries, one for each layer, got {}",
            types.len()
        );
    }
    let is_window = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => bail!("`layer_types` must name `full_attention` or `sliding_attention`, got {kind}"),
    };
    types.iter().map(is_window).collect::<Result<_>>().map(Some)
}

/// Refuses `layer_types` with windows where no window is used: transformers fails there, or
/// different kinds of attention disagree.
fn check_no_window(keys: Keys<'_>, num_layers: i64) -> Result<()> {
    if layer_types(keys, num_layers)?.is_some_and(|types| types.contains(&true)) {
        bail!(
            "`layer_types` names `sliding_attention`, but the other keys turn windows off\nhint: \
             `use_sliding_window` must be true, and `sliding_window` a number"
        );
    }
    Ok(())
}

/// The `config.json` of a spec, without its `eos_token_id`.
pub(super) fn to_json(spec: &DecoderSpec) -> Value {
    let architecture = match spec.family {
        Family::Gpt2 | Family::Llama => "LlamaForCausalLM",
        Family::Qwen2 => "Qwen2ForCausalLM",
        Family::Qwen3 => "Qwen3ForCausalLM",
        Family::SmolLm3 => "SmolLM3ForCausalLM",
        Family::Mistral => "MistralForCausalLM",
    };
    let rope = spec.rope.as_ref().expect("these families rotate");
    let mut json = json!({
        "architectures": [architecture],
        "model_type": spec.family.name(),
        "hidden_size": spec.width,
        "intermediate_size": spec.inner_width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
        "rope_parameters": rope::to_json(rope),
        // the old spelling, for versions of transformers before 5
        "rope_theta": rope.theta,
        "rope_scaling": rope::scaling_to_json(rope),
        "bos_token_id": spec.bos_token_id,
    });
    let keys = json.as_object_mut().expect("it was made as an object");
    add_own_keys(spec, rope, &mut |key, value| {
        keys.insert(key.to_owned(), value);
    });
    json
}

/// Adds the keys that only some families have.
fn add_own_keys(spec: &DecoderSpec, rope: &RopeSpec, add: &mut dyn FnMut(&str, Value)) {
    let family = spec.family;
    if ATTENTION_BIAS.contains(&family) {
        add("attention_bias", spec.biases.qkv.into());
    }
    if MLP_BIAS.contains(&family) {
        add("mlp_bias", spec.biases.mlp.into());
    }
    if family == Family::SmolLm3 {
        let flag = |layer| i64::from(!rope.skipped_layers.contains(&layer));
        add("no_rope_layers", (0..spec.num_layers).map(flag).collect());
        // not read beside the list, but the list's reason
        if let Some(interval) = interval(&rope.skipped_layers, spec.num_layers) {
            add("no_rope_layer_interval", interval.into());
        }
        // its default, 128004, may be outside a small vocabulary
        add("pad_token_id", Value::Null);
    }
    let window = spec.windows.as_ref().map(|windows| windows.size);
    if family != Family::Llama {
        add("sliding_window", window.into());
    }
    if matches!(family, Family::Qwen2 | Family::Qwen3 | Family::SmolLm3) {
        add("use_sliding_window", window.is_some().into());
        let kind = |layer| match spec.window(layer) {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        add("layer_types", (0..spec.num_layers).map(kind).collect());
    }
    // versions of transformers before `layer_types` read this alone
    if matches!(family, Family::Qwen2 | Family::Qwen3) {
        let first = (0..spec.num_layers).find(|&layer| spec.window(layer).is_some());
        if let Some(first) = first {
            add("max_window_layers", first.into());
        }
    }
}

/// The interval at which layers are skipped, if there is one.
fn interval(skipped_layers: &[i64], num_layers: i64) -> Option<i64> {
    let interval = skipped_layers.first()? + 1;
    let at_interval = (0..num_layers).filter(|layer| (layer + 1) % interval == 0);
    at_interval.eq(skipped_layers.iter().copied()).then_some(interval)
}

/// The name that transformers gives the parameter; `None` for a buffer of RoPE.
pub(super) fn canonical_name(name: &str) -> Option<String> {
    if name.ends_with(".rotary_emb.inv_freq") {
        return None;
    }
    if name.starts_with("model.") || name.starts_with("lm_head.") {
        return Some(name.to_owned());
    }
    Some(format!("model.{name}"))
}
