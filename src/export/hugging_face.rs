//! Writing a base as a folder that transformers loads: `config.json`, `model.safetensors` and the
//! tokenizer.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tch::{Kind, Tensor};

use super::peft::write_json;
use crate::config::SaveDtype;
use crate::durable::{self, output::Output};
use crate::model::decoder::Decoder;
use crate::model::families::{self, load};
use crate::tensor_file::write_tensors;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Writes `base` to the folder `out` in `dtype`, with the tokenizer beside it. The weights and
/// configs are read back and compared.
///
/// # Errors
/// Those of [`Output::write_folder`], and a file that reads back differently.
pub fn export(
    out: &Output,
    base: &Decoder,
    dtype: SaveDtype,
    tokenizer_file: Option<&Path>,
) -> Result<()> {
    let (kind, name) = kind_of(dtype);
    out.write_folder(super::is_unmarked_output, |dir| {
        let file = dir.join(WEIGHTS);
        let parameters: Vec<(String, Tensor)> = base
            .named_parameters()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.detach().to_device(tch::Device::Cpu).to_kind(kind)))
            .collect();
        write_tensors(&file, parameters.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
        let read = load::read(&base.spec, &[file], kind)?.named_parameters();
        for ((name, tensor), (_, found)) in parameters.iter().zip(&read) {
            if !tensor.equal(found) {
                bail!("tensor `{name}` was written, but reads back differently");
            }
        }
        write_json(&dir.join(CONFIG), &families::to_json(&base.spec, name))?;
        let Some(tokenizer_file) = tokenizer_file else { return Ok(()) };
        durable::write(&dir.join(TOKENIZER), &fs_err::read(tokenizer_file)?)?;
        let end_of_text = "<|endoftext|>";
        let tokenizer_config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": base.spec.max_positions,
            "bos_token": end_of_text,
            "eos_token": end_of_text,
            "unk_token": end_of_text,
        });
        write_json(&dir.join(TOKENIZER_CONFIG), &tokenizer_config)
    })
    .with_context(|| format!("cannot export to `{}`", out.path.display()))
}

/// libtorch's dtype, and its name in `config.json`.
fn kind_of(dtype: SaveDtype) -> (Kind, &'static str) {
    match dtype {
        SaveDtype::F32 => (Kind::Float, "float32"),
        SaveDtype::F16 => (Kind::Half, "float16"),
        SaveDtype::Bf16 => (Kind::BFloat16, "bfloat16"),
    }
}

/// Whether a folder with these files is a base that dylora wrote: it holds nothing else, and its
/// `config.json` is to the byte what dylora writes.
pub(super) fn is_unmarked_base(dir: &Path, files: &BTreeSet<String>) -> bool {
    let has_config = || {
        let path = dir.join(CONFIG);
        let (Ok(found), Ok(config)) = (fs_err::read_to_string(&path), families::read_spec(&path))
        else {
            return false;
        };
        [SaveDtype::F32, SaveDtype::F16, SaveDtype::Bf16].into_iter().any(|dtype| {
            let (_, name) = kind_of(dtype);
            serde_json::to_string_pretty(&families::to_json(&config, name))
                .is_ok_and(|text| text + "\n" == found)
        })
    };
    let known = [CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG];
    let needed = [CONFIG, WEIGHTS].iter().all(|name| files.contains(*name));
    needed && files.iter().all(|file| known.contains(&file.as_str())) && has_config()
}
