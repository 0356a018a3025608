//! Reads a base's weights from safetensors files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use safetensors::tensor::TensorView;
use tch::{Kind, Tensor};

use super::canonical_name;
use crate::model::decoder::Decoder;
use crate::model::decoder::names::PartNames;
use crate::model::decoder::spec::DecoderSpec;
use crate::tensor_file::{check_finite, for_each_tensor, open, share};

/// What to do if the tensors are not those of the spec.
const CONFIG_HINT: &str = "hint: the shapes follow from `config.json`, in which an absent key has \
                           the family's default; do both files belong together?";

/// Reads the base from one safetensors file or several shards, on the CPU, in dtype `kind`, or with
/// `None` in the dtypes of the files.
///
/// A tensor that the file holds in `kind` is not copied but mapped into memory, where a page is
/// read when it is first used. Writing into such a tensor does not change the file. A file whose
/// header leaves its numbers unaligned, as in some older files, is read into memory.
///
/// Names may have the prefix `transformer.` or `model.` or lack it. Buffers in old files (GPT-2's
/// `attn.bias` and `attn.masked_bias`, and `rotary_emb.inv_freq`) are left out. A tied head may be
/// stored if it equals the token embedding.
///
/// # Errors
/// If a tensor is missing, extra, doubled or misshapen, has a dtype other than f32, f16, bf16 and
/// f64, holds a NaN or an infinity, or is a tied head that differs from the token embedding; the
/// message names it.
pub fn read(
    spec: &DecoderSpec,
    files: &[PathBuf],
    kind: impl Into<Option<Kind>>,
) -> Result<Decoder> {
    let kind = kind.into();
    let expected: BTreeMap<String, Vec<i64>> = spec.parameter_shapes().into_iter().collect();
    let mut tensors = BTreeMap::new();
    let mut stored_head = None;
    for file in files {
        let bytes = open(file)?;
        let add = |name: &str, view: &TensorView<'_>| -> Result<()> {
            let Some(name) = canonical_name(spec.family, name) else { return Ok(()) };
            let tensor = share(&bytes, view).with_context(|| format!("tensor `{name}`"))?;
            if spec.tied_head && name == PartNames::HEAD {
                stored_head = Some(tensor);
                return Ok(());
            }
            let Some(shape) = expected.get(&name) else {
                let (family, num_layers) = (spec.family.name(), spec.num_layers);
                bail!(
                    "tensor `{name}` belongs to no `{family}` of {num_layers} layers\n{CONFIG_HINT}"
                );
            };
            if tensor.size() != *shape {
                bail!("tensor `{name}` must be {shape:?}, got {:?}\n{CONFIG_HINT}", tensor.size());
            }
            if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
                bail!("tensor `{name}` has dtype `{:?}`; use f32, f16 or bf16", tensor.kind());
            }
            check_finite(&name, &tensor)?;
            let tensor = tensor.to_kind(kind.unwrap_or(tensor.kind()));
            if tensors.insert(name.clone(), tensor).is_some() {
                bail!("tensor `{name}` is there twice");
            }
            Ok(())
        };
        for_each_tensor(&bytes, file, add).with_context(|| format!("in `{}`", file.display()))?;
    }
    assert!(!files.is_empty(), "a base has at least one file");
    let missing: Vec<_> = expected.keys().filter(|name| !tensors.contains_key(*name)).collect();
    if let [first, rest @ ..] = missing.as_slice() {
        let more =
            if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        bail!("`{}` lacks tensor `{first}`{more}\n{CONFIG_HINT}", files[0].display());
    }
    let embedding = spec.names().embedding;
    // of two dtypes the wider one tells them apart
    let is_equal = |a: &Tensor, b: &Tensor| match a.kind() == b.kind() {
        true => a.equal(b),
        false => a.to_kind(Kind::Float).equal(&b.to_kind(Kind::Float)),
    };
    if let Some(head) = stored_head
        && !is_equal(&head, &tensors[embedding])
    {
        bail!(
            "`lm_head.weight` differs from `{embedding}`, but the config says that the head is \
             tied\nhint: set `\"tie_word_embeddings\": false` in `config.json`"
        );
    }
    Ok(Decoder::new(spec.clone(), tensors))
}
