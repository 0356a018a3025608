//! A base as a folder that transformers loads: `config.json`, `model.safetensors`, tokenizer.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tch::{Kind, Tensor};

use super::peft::write_json;
use crate::config::SaveDtype;
use crate::durable;
use crate::model::gpt2::Gpt2;
use crate::model::weights::{read_gpt2, write_tensors};

/// Writes `base` in `dtype` to `dir`, with the tokenizer beside it, reads it back and compares.
pub fn export(
    dir: &Path,
    base: &Gpt2,
    dtype: SaveDtype,
    tokenizer_file: Option<&Path>,
    overwrite: bool,
) -> Result<()> {
    let (kind, name) = match dtype {
        SaveDtype::F32 => (Kind::Float, "float32"),
        SaveDtype::F16 => (Kind::Half, "float16"),
        SaveDtype::Bf16 => (Kind::BFloat16, "bfloat16"),
    };
    durable::folder(dir, overwrite, |dir| {
        let file = dir.join("model.safetensors");
        let parameters: Vec<(String, Tensor)> = base
            .named_parameters()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.detach().to_device(tch::Device::Cpu).to_kind(kind)))
            .collect();
        write_tensors(&file, parameters.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
        let read = read_gpt2(&base.config, &[file], kind)?.named_parameters();
        for ((name, tensor), (_, found)) in parameters.iter().zip(&read) {
            if !tensor.equal(found) {
                bail!("tensor `{name}` was written, but reads back differently");
            }
        }
        write_json(&dir.join("config.json"), &base.config.to_json(name))?;
        let Some(tokenizer_file) = tokenizer_file else { return Ok(()) };
        durable::write(&dir.join("tokenizer.json"), &fs_err::read(tokenizer_file)?)?;
        let end_of_text = "<|endoftext|>";
        let tokenizer_config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": base.config.n_positions,
            "bos_token": end_of_text,
            "eos_token": end_of_text,
            "unk_token": end_of_text,
        });
        write_json(&dir.join("tokenizer_config.json"), &tokenizer_config)
    })
    .with_context(|| format!("cannot export to `{}`", dir.display()))
}
