//! Reads a base's weights from safetensors files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use safetensors::tensor::TensorView;
use tch::Kind;

use super::gpt2::canonical_name;
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::tensor_file::{for_each_tensor, open, share};

/// Reads the base from one safetensors file or several shards, in dtype `kind`, on the CPU.
///
/// A tensor that the file holds in `kind` is not copied but mapped into memory, where a page is
/// read when it is first used. Writing into such a tensor does not change the file. A file whose
/// header leaves its numbers unaligned, as in some older files, is read into memory.
///
/// Names may have the `transformer.` prefix or lack it. The causal-mask buffers `attn.bias` and
/// `attn.masked_bias` of old files are left out. A tied head may be stored if it equals the token
/// embedding.
///
/// # Errors
/// If a tensor is missing, extra, doubled or misshapen, has a dtype other than f32, f16, bf16 and
/// f64, or is a tied head that differs from the token embedding; the message names it.
pub fn read(spec: &DecoderSpec, files: &[PathBuf], kind: Kind) -> Result<Decoder> {
    let expected: BTreeMap<String, Vec<i64>> = spec.parameter_shapes().into_iter().collect();
    let mut tensors = BTreeMap::new();
    let mut stored_head = None;
    for file in files {
        let bytes = open(file)?;
        let add = |name: &str, view: &TensorView<'_>| -> Result<()> {
            let Some(name) = canonical_name(name) else { return Ok(()) };
            let tensor = share(&bytes, view).with_context(|| format!("tensor `{name}`"))?;
            if spec.tied_head && name == "lm_head.weight" {
                stored_head = Some(tensor);
                return Ok(());
            }
            let Some(shape) = expected.get(&name) else {
                bail!("tensor `{name}` belongs to no GPT-2 of {} layers", spec.n_layer);
            };
            if tensor.size() != *shape {
                bail!("tensor `{name}` must be {shape:?}, got {:?}", tensor.size());
            }
            if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
                bail!("tensor `{name}` has dtype `{:?}`; use f32, f16 or bf16", tensor.kind());
            }
            if tensors.insert(name.clone(), tensor.to_kind(kind)).is_some() {
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
        bail!("`{}` lacks tensor `{first}`{more}", files[0].display());
    }
    if let Some(head) = stored_head
        && !head.to_kind(kind).equal(&tensors["transformer.wte.weight"])
    {
        bail!(
            "`lm_head.weight` differs from `transformer.wte.weight`, but the config says that the \
             head is tied\nhint: set `\"tie_word_embeddings\": false` in `config.json`"
        );
    }
    Ok(Decoder::new(spec.clone(), tensors))
}
