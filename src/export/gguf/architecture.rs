//! llama.cpp's architectures: which one a base is, how it names a base's tensors, and in which
//! order it wants the rows of queries and keys.
//!
//! ```text
//! base                    architecture    rows of queries and keys
//! gpt2                    gpt2            as they are
//! llama, mistral          llama           permuted
//! qwen2, qwen3            of that name    as they are
//! smollm3                 smollm3         permuted
//! ```
//!
//! RoPE rotates pairs of a head's elements. transformers pairs the element `k` with `k + h / 2`,
//! and llama.cpp pairs neighbours where it permutes, so that row `(half, k)` of a head becomes row
//! `(k, half)` (llama.cpp's `LlamaModel.permute`).

use anyhow::{Result, bail};
use tch::Tensor;

use crate::config::{Family, TargetModule};
use crate::model::decoder::mlp::Activation;
use crate::model::decoder::rope::{RopeScaling, RopeSpec};
use crate::model::decoder::spec::DecoderSpec;

/// In llama.cpp's SmolLM3, each fourth layer rotates nothing.
const SMOLLM3_ROPE_STEP: i64 = 4;

/// A base as llama.cpp sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Architecture {
    /// Its name.
    pub name: &'static str,
    /// Whether the rows of queries and keys are permuted.
    pub permutes: bool,
}

/// The architecture of a base.
///
/// # Errors
/// A setting that llama.cpp cannot express, by its key in `config.json`.
pub(super) fn of(spec: &DecoderSpec) -> Result<Architecture> {
    check_attention(spec)?;
    check_biases(spec)?;
    if let Some(rope) = &spec.rope {
        check_rope(spec, rope)?;
    }
    Ok(match spec.family {
        Family::Gpt2 => Architecture { name: "gpt2", permutes: false },
        Family::Llama | Family::Mistral => Architecture { name: "llama", permutes: true },
        Family::Qwen2 => Architecture { name: "qwen2", permutes: false },
        Family::Qwen3 => Architecture { name: "qwen3", permutes: false },
        Family::SmolLm3 => Architecture { name: "smollm3", permutes: true },
    })
}

fn check_attention(spec: &DecoderSpec) -> Result<()> {
    let family = spec.family.name();
    if spec.family == Family::Gpt2 {
        if spec.activation != Activation::GeluNew {
            bail!(
                "llama.cpp computes `{family}` with `gelu_new`, not with `activation_function` \
                   `gelu`"
            );
        }
        if !spec.scale_attn_weights {
            bail!("llama.cpp cannot compute `{family}` with `scale_attn_weights` false");
        }
        if spec.scale_attn_by_inverse_layer_idx {
            bail!("llama.cpp cannot compute `{family}` with `scale_attn_by_inverse_layer_idx`");
        }
    }
    if spec.family == Family::Qwen2 && spec.head_dim * spec.num_heads != spec.width {
        bail!(
            "llama.cpp computes `{family}` with `head_dim` `hidden_size / num_attention_heads`, \
             not {}",
            spec.head_dim
        );
    }
    let is_narrower = |size: i64| size < spec.max_positions;
    if let Some(windows) = &spec.windows
        && windows.layers.contains(&true)
        && is_narrower(windows.size)
    {
        bail!(
            "llama.cpp computes `{family}` without windows, but this base has `sliding_window` {} \
             of {} positions\nhint: as far as the window reaches, a base without it is the same: \
             set `max_position_embeddings` to {0} in a copy of its `config.json`",
            windows.size,
            spec.max_positions
        );
    }
    Ok(())
}

fn check_biases(spec: &DecoderSpec) -> Result<()> {
    let family = spec.family.name();
    if matches!(spec.family, Family::Qwen3 | Family::SmolLm3) {
        let biases = [("attention_bias", spec.biases.qkv), ("mlp_bias", spec.biases.mlp)];
        if let Some((key, _)) = biases.into_iter().find(|(_, is_set)| *is_set) {
            bail!("llama.cpp cannot compute `{family}` with `{key}` true");
        }
    }
    Ok(())
}

fn check_rope(spec: &DecoderSpec, rope: &RopeSpec) -> Result<()> {
    let family = spec.family.name();
    let skipped: Vec<i64> = match spec.family {
        Family::SmolLm3 => {
            (0..spec.num_layers).filter(|layer| (layer + 1) % SMOLLM3_ROPE_STEP == 0).collect()
        }
        _ => vec![],
    };
    if rope.skipped_layers != skipped {
        bail!(
            "llama.cpp computes `{family}` without RoPE in layers {skipped:?}, but \
             `no_rope_layers` of this base are {:?}",
            rope.skipped_layers
        );
    }
    match rope.scaling {
        RopeScaling::Default | RopeScaling::Linear { .. } => Ok(()),
        RopeScaling::Llama3 { .. } if matches!(spec.family, Family::Llama | Family::Mistral) => {
            Ok(())
        }
        RopeScaling::Llama3 { .. } => {
            bail!("llama.cpp cannot compute `{family}` with `rope_type` `llama3`")
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, attention_factor, .. } => {
            let usual = 0.1 * factor.ln() + 1.0;
            if (attention_factor - usual).abs() > 1e-6 {
                bail!(
                    "llama.cpp computes yarn with `attention_factor` {usual}, not \
                     {attention_factor}"
                );
            }
            if (beta_fast, beta_slow, truncate) != (32.0, 1.0, true) {
                bail!(
                    "llama.cpp computes yarn with `beta_fast` 32, `beta_slow` 1 and `truncate` \
                     true, not {beta_fast}, {beta_slow} and {truncate}"
                );
            }
            Ok(())
        }
    }
}

impl Architecture {
    /// A weight of queries or keys, `[out, ..]`, or its bias, in the order of llama.cpp; any other
    /// tensor as it is.
    pub fn ordered(&self, spec: &DecoderSpec, module: TargetModule, rows: &Tensor) -> Tensor {
        let num_heads = match module {
            TargetModule::QProj if self.permutes => spec.num_heads,
            TargetModule::KProj if self.permutes => spec.num_kv_heads,
            _ => return rows.shallow_clone(),
        };
        let shape = rows.size();
        let half = shape[0] / num_heads / 2;
        let split = rows.reshape([num_heads, 2, half, -1]);
        split.transpose(1, 2).reshape(&shape)
    }
}

/// The name of a linear layer's weight or bias in llama.cpp, without `.weight` or `.bias`.
pub(super) fn linear_name(layer: usize, module: TargetModule) -> String {
    use TargetModule as M;
    let name = match module {
        M::AttnCAttn => "attn_qkv",
        M::AttnCProj | M::OProj => "attn_output",
        M::MlpCFc | M::UpProj => "ffn_up",
        M::MlpCProj | M::DownProj => "ffn_down",
        M::QProj => "attn_q",
        M::KProj => "attn_k",
        M::VProj => "attn_v",
        M::GateProj => "ffn_gate",
    };
    format!("blk.{layer}.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RandomBase;
    use crate::model::families::from_random;

    /// Row `(head, half, k)` of the base's order stands at `(head, k, half)` in llama.cpp's.
    #[test]
    fn rows_of_queries_and_keys_are_paired_with_their_neighbours() -> Result<()> {
        let shape = RandomBase {
            family: Family::Llama,
            n_layer: 1,
            n_head: 4,
            n_kv_head: Some(2),
            n_embd: 24,
            head_dim: Some(6),
            n_inner: Some(8),
            n_positions: 16,
        };
        let spec = from_random(&shape, 10, None)?;
        let architecture = of(&spec)?;
        for (module, num_heads) in [(TargetModule::QProj, 4), (TargetModule::KProj, 2)] {
            let rows = Tensor::arange(num_heads * 6, (tch::Kind::Int64, tch::Device::Cpu));
            let weight = rows.unsqueeze(1).expand([-1, 3], false).contiguous();
            let found = architecture.ordered(&spec, module, &weight);
            assert_eq!(found.size(), weight.size());
            for (head, half, k) in (0..num_heads)
                .flat_map(|head| (0..2).map(move |half| (head, half)))
                .flat_map(|(head, half)| (0..3).map(move |k| (head, half, k)))
            {
                let row = found.get(head * 6 + k * 2 + half);
                assert_eq!(Vec::<i64>::try_from(row)?, [head * 6 + half * 3 + k; 3]);
            }
            let bias = architecture.ordered(&spec, module, &rows);
            assert!(bias.equal(&found.select(1, 0)));
        }
        let value = Tensor::arange(12, (tch::Kind::Int64, tch::Device::Cpu));
        assert!(architecture.ordered(&spec, TargetModule::VProj, &value).equal(&value));
        Ok(())
    }
}
