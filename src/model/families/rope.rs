//! The keys of RoPE in a `config.json`, in both of their spellings:
//!
//! ```text
//! legacy           "rope_theta": 500000.0, "rope_scaling": {"rope_type" | "type": "llama3", ..}
//! transformers 5   "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", ..}
//! ```
//!
//! If both `rope_scaling` and `rope_parameters` are there, they must agree: transformers 5.17 takes
//! the former, other versions take the latter, and the wrong frequencies cost quality without any
//! error. A `rope_theta` within one of them counts before the one beside it, as in transformers.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::json::Keys;
use crate::model::decoder::rope::{RopeScaling, RopeSpec};

const KINDS: &str = "`default`, `linear`, `llama3` or `yarn`";

/// Reads how queries and keys are rotated.
///
/// - `default_theta`: the frequencies' base if no key names it
/// - `max_positions`: the value of `original_max_position_embeddings` if no key names it
pub(super) fn read(keys: Keys<'_>, default_theta: f64, max_positions: i64) -> Result<RopeSpec> {
    check_whole_heads(keys)?;
    let theta_of = |keys: Keys<'_>, default: f64| match keys.positive("rope_theta")? {
        None => Ok(default),
        Some(theta) if theta > 1.0 => Ok(theta),
        Some(theta) => bail!("`rope_theta` must be above 1, got {theta}"),
    };
    let theta = theta_of(keys, default_theta)?;
    let original = keys.positive("original_max_position_embeddings")?;
    let spelled = |key: &'static str| -> Result<Option<RopeSpec>> {
        let Some(dict) = keys.object(key)? else { return Ok(None) };
        let parse = || -> Result<RopeSpec> {
            let theta = theta_of(dict, theta)?;
            let own = dict.positive("original_max_position_embeddings")?;
            let original = original.or(own).unwrap_or(max_positions as f64);
            let scaling = scaling(dict, original, max_positions as f64)?;
            Ok(RopeSpec { theta, scaling, skipped_layers: vec![] })
        };
        parse().with_context(|| format!("in `{key}`")).map(Some)
    };
    match (spelled("rope_scaling")?, spelled("rope_parameters")?) {
        (Some(legacy), Some(new)) if legacy != new => bail!(
            "`rope_scaling` and `rope_parameters` disagree: with `rope_theta`, they are {} and {}\n\
             hint: remove the one that the base was not trained with",
            to_json(&legacy),
            to_json(&new)
        ),
        (Some(spec), _) | (None, Some(spec)) => Ok(spec),
        (None, None) => {
            Ok(RopeSpec { theta, scaling: RopeScaling::Default, skipped_layers: vec![] })
        }
    }
}

/// Refuses to rotate only a part of each head.
fn check_whole_heads(keys: Keys<'_>) -> Result<()> {
    match keys.get("partial_rotary_factor") {
        Some(factor) if factor.as_f64() != Some(1.0) => {
            bail!("`partial_rotary_factor` must be 1, got {factor}")
        }
        _ => Ok(()),
    }
}

fn scaling(dict: Keys<'_>, original: f64, max_positions: f64) -> Result<RopeScaling> {
    check_whole_heads(dict)?;
    let needed = |key: &str| dict.positive(key)?.with_context(|| format!("`{key}` is missing"));
    let kind = match dict.text("rope_type")? {
        Some(kind) => kind,
        None => dict.text("type")?.unwrap_or("default"),
    };
    Ok(match kind {
        "default" => {
            if let Some((key, _)) = dict.0.iter().find(|(_, value)| value.is_object()) {
                bail!("`{key}` is an object: one RoPE for all layers is supported");
            }
            RopeScaling::Default
        }
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "llama3" => {
            let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if high <= low {
                bail!("`high_freq_factor` must be above `low_freq_factor` {low}, got {high}");
            }
            let factor = needed("factor")?;
            RopeScaling::Llama3 { factor, low, high, original_positions: original }
        }
        "yarn" => yarn(dict, original, max_positions)?,
        other => bail!("`rope_type` must be {KINDS}, got `{other}`"),
    })
}

fn yarn(dict: Keys<'_>, original: f64, max_positions: f64) -> Result<RopeScaling> {
    if !dict.has("factor") {
        bail!("`factor` is missing");
    }
    let factor = dict.positive("factor")?.unwrap_or(max_positions / original);
    let number = |key: &str| match dict.get(key) {
        None => Ok(None),
        Some(value) => value
            .as_f64()
            .map(Some)
            .with_context(|| format!("`{key}` must be a number, got {value}")),
    };
    let nonzero = |key: &str| number(key).map(|value| value.filter(|value| *value != 0.0));
    // 0 counts as absent, as in transformers
    let turns = |key: &str, default: f64| match nonzero(key)? {
        None => Ok(default),
        Some(turns) if turns > 0.0 => Ok(turns),
        Some(turns) => bail!("`{key}` must be a number of at least 0, got {turns}"),
    };
    let magnitude = |weight: f64| match factor {
        factor if factor <= 1.0 => 1.0,
        factor => 0.1 * weight * factor.ln() + 1.0,
    };
    let by_weights = match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
        (Some(weight), Some(all)) => magnitude(weight) / magnitude(all),
        _ => magnitude(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_positions: original,
        beta_fast: turns("beta_fast", 32.0)?,
        beta_slow: turns("beta_slow", 1.0)?,
        truncate: dict.flag("truncate", true)?,
        attention_factor: number("attention_factor")?.unwrap_or(by_weights),
    })
}

/// A number of positions as JSON, which is whole in all but odd configs.
fn number(positions: f64) -> Value {
    if positions.fract() == 0.0 { json!(positions as i64) } else { json!(positions) }
}

/// The value of the older `rope_scaling` for a spec, beside which `rope_theta` stands.
pub(super) fn scaling_to_json(rope: &RopeSpec) -> Value {
    if rope.scaling == RopeScaling::Default {
        return Value::Null;
    }
    let mut scaling = to_json(rope);
    scaling.as_object_mut().expect("it was made as an object").remove("rope_theta");
    scaling
}

/// The value of `rope_parameters` for a spec.
pub(super) fn to_json(rope: &RopeSpec) -> Value {
    let RopeSpec { theta, scaling, .. } = rope;
    match *scaling {
        RopeScaling::Default => json!({ "rope_type": "default", "rope_theta": theta }),
        RopeScaling::Linear { factor } => {
            json!({ "rope_type": "linear", "rope_theta": theta, "factor": factor })
        }
        RopeScaling::Llama3 { factor, low, high, original_positions } => json!({
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": number(original_positions),
        }),
        RopeScaling::Yarn {
            factor,
            original_positions,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
        } => json!({
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": number(original_positions),
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "truncate": truncate,
            "attention_factor": attention_factor,
        }),
    }
}
