//! Writing a base as a folder that transformers loads: `config.json`, `model.safetensors`, the
//! tokenizer, and the small files that lay beside the base it was made from.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tch::{Kind, Tensor};

use super::card::CARD;
use super::peft::write_json;
use crate::config::SaveDtype;
use crate::data::Tokenizer;
use crate::durable::{self, output::Output};
use crate::hub::SideFile;
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::families::{self, load};
use crate::tensor_file::write_tensors;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Writes `base` to the folder `out` in `dtype`, with the tokenizer and the files `beside` it. The
/// weights are read back and compared.
///
/// - `card`: its model card
///
/// # Errors
/// Those of [`Output::write_folder`], and a file that reads back differently.
pub fn export(
    out: &Output,
    base: &Decoder,
    dtype: SaveDtype,
    tokenizer: Option<&Path>,
    beside: &[SideFile],
    card: &str,
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
        for SideFile { name, path } in beside {
            let file = dir.join(name);
            fs_err::create_dir_all(file.parent().expect("the folder is its parent"))?;
            durable::write(&file, &fs_err::read(path)?)?;
        }
        durable::write(&dir.join(CARD), card.as_bytes())?;
        tokenizer.map_or(Ok(()), |file| write_tokenizer(dir, &base.spec, file))
    })
    .with_context(|| format!("cannot export to `{}`", out.path.display()))
}

/// Writes the tokenizer and, if there is none yet, the `tokenizer_config.json` that transformers
/// needs to read it.
fn write_tokenizer(dir: &Path, spec: &DecoderSpec, file: &Path) -> Result<()> {
    durable::write(&dir.join(TOKENIZER), &fs_err::read(file)?)?;
    if dir.join(TOKENIZER_CONFIG).exists() {
        return Ok(());
    }
    let tokenizer = Tokenizer::load(file)?;
    let token = |id: Option<u32>| tokenizer.id_to_token(id?);
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.max_positions,
    });
    let bos = tokenizer.start_tokens().first().copied().or(spec.bos_token_id);
    let tokens = [("bos_token", token(bos)), ("eos_token", token(spec.eos_token_id()))];
    for (key, text) in tokens {
        config[key] = text.into();
    }
    write_json(&dir.join(TOKENIZER_CONFIG), &config)
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
    // such outputs are from versions that copied no other file
    let known = [CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, CARD];
    let needed = [CONFIG, WEIGHTS].iter().all(|name| files.contains(*name));
    needed && files.iter().all(|file| known.contains(&file.as_str())) && has_config()
}
