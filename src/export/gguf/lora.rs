//! An expert as llama.cpp's LoRA adapter.
//!
//! ```text
//! llama.cpp    y += alpha / r * B (A x)       one alpha for all modules, r is A's number of rows
//! an expert    y += s B (A x)                 s = alpha / r, or alpha / sqrt(r) with rsLoRA
//! ```
//!
//! The file's alpha is `s r` of the first module, so that its B is the expert's. The B of a module
//! with another `s r` is multiplied by the ratio of the two.

use anyhow::{Context, Result, bail};
use tch::{Kind, Tensor};

use super::architecture;
use crate::config::ModulePath;
use crate::gguf::{GgufFile, TensorSource, Value};
use crate::model::decoder::spec::DecoderSpec;
use crate::peft::adapter::Adapter;

/// The file of an adapter on `base`.
///
/// - `name`, `base_label`: the adapter's and the base's names for people
///
/// # Errors
/// A DoRA adapter, and a base that llama.cpp cannot express.
pub(super) fn file(
    adapter: &Adapter,
    base: &DecoderSpec,
    name: &str,
    base_label: &str,
    kind: Kind,
) -> Result<GgufFile<'static>> {
    let architecture = architecture::of(base)?;
    let spec = &adapter.spec;
    if spec.use_dora {
        bail!(
            "DoRA scales the base's own weight, which no LoRA adapter of GGUF can hold\nhint: \
             `dylora merge --weights expert:N --format gguf` merges the expert into the base"
        );
    }
    let strength = |path: &ModulePath| {
        let scaling = spec.scaling(*path).context("a module of the adapter has a scaling")?;
        Ok::<f64, anyhow::Error>(scaling * spec.modules[path].rank as f64)
    };
    let strengths = spec.modules.keys().map(strength).collect::<Result<Vec<f64>>>()?;
    // llama.cpp takes an alpha of 0 for an absent one
    let alpha = strengths.iter().copied().find(|alpha| *alpha != 0.0).unwrap_or(1.0) as f32;
    let mut metadata = vec![
        ("general.architecture".to_owned(), architecture.name.into()),
        ("general.type".to_owned(), "adapter".into()),
        ("general.name".to_owned(), name.into()),
        ("general.description".to_owned(), Value::String(format!("LoRA on {base_label}"))),
        ("adapter.type".to_owned(), "lora".into()),
        ("adapter.lora.alpha".to_owned(), Value::F32(alpha)),
    ];
    if !spec.alora_invocation_tokens.is_empty() {
        let tokens = spec.alora_invocation_tokens.iter().map(|token| *token as u32).collect();
        metadata.push(("adapter.alora.invocation_tokens".to_owned(), Value::U32s(tokens)));
    }
    let mut tensors = vec![];
    for (path, strength) in spec.modules.keys().zip(strengths) {
        let part = |key| adapter.tensors[&(*path, key)].shallow_clone();
        let (a, b) = (part("lora_a"), part("lora_b"));
        let ratio = strength / f64::from(alpha);
        let is_whole = (ratio - 1.0).abs() < 1e-7;
        let b = if is_whole { b } else { (b.to_kind(Kind::Double) * ratio).to_kind(Kind::Float) };
        let b = architecture.ordered(base, path.module, &b);
        let name = architecture::linear_name(path.layer, path.module);
        for (end, tensor) in [("lora_a", a), ("lora_b", b)] {
            tensors.push(source(format!("{name}.weight.{end}"), tensor, kind));
        }
    }
    Ok(GgufFile { metadata, tensors })
}

fn source(name: String, tensor: Tensor, kind: Kind) -> TensorSource<'static> {
    TensorSource {
        name,
        shape: tensor.size(),
        kind,
        make: Box::new(move || tensor.shallow_clone()),
    }
}
