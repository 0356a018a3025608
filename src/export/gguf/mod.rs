//! Experts and merged bases as GGUF files, which llama.cpp and programs on top of it load.
//!
//! ```text
//! OUT/expert_0.gguf ..    each expert as a LoRA adapter, as `convert_lora_to_gguf.py` writes it
//! OUT/shared.gguf         the part that is always on, if there is one
//! OUT/model.gguf          a whole model with its tokenizer, as `convert_hf_to_gguf.py` writes it
//! ```
//!
//! llama.cpp reads these settings from no file, so that a base which needs others is refused: the
//! activation, the scale of attention scores, and the layers that rotate nothing.

mod architecture;
mod lora;
mod model;
mod sentence_piece;
mod tokenizer;

use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::Kind;

pub use tokenizer::Vocabulary;

use super::card::{self, CARD, Form, Provenance};
use crate::chat_template::ChatTemplate;
use crate::config::SaveDtype;
use crate::durable::{self, output::Output};
use crate::hub::SideFile;
use crate::model::RoutedModel;
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::part_name;
use crate::peft::adapter::Adapter;

/// The file of a whole model.
pub const MODEL: &str = "model.gguf";
/// The file of a merged adapter.
pub const ADAPTER: &str = "adapter.gguf";

/// Checks that llama.cpp can express a base.
///
/// # Errors
/// A setting of the base that llama.cpp cannot express; the message names it.
pub fn check_base(spec: &DecoderSpec) -> Result<()> {
    architecture::of(spec).map(|_| ())
}

/// Writes each expert of `model` to the folder `out`, and the part that is always on. The router is
/// not written: llama.cpp has no place for it.
///
/// # Errors
/// A base or an expert that llama.cpp cannot express, and those of [`Output::write_folder`].
pub fn export_experts(
    out: &Output,
    model: &RoutedModel,
    provenance: &Provenance,
    dtype: SaveDtype,
) -> Result<()> {
    if model.num_experts() == 0 {
        bail!("a base alone has no experts to export\nhint: `dylora merge` writes whole models");
    }
    let parts = 0..model.specs().len();
    let (names, adapters): (Vec<String>, Vec<Adapter>) =
        parts.map(|part| (part_name(model.specs(), part), Adapter::of_model(model, part))).unzip();
    let card = card::of_mixture(model, &adapters, provenance, Form::GgufExperts);
    let files: Vec<_> = names
        .iter()
        .zip(&adapters)
        .map(|(name, adapter)| {
            let base = &model.base().spec;
            let label = &provenance.origin.base_label;
            let file = lora::file(adapter, base, name, label, kind_of(dtype));
            Ok((name, file.with_context(|| format!("cannot export `{name}` as GGUF"))?))
        })
        .collect::<Result<_>>()?;
    out.write_folder(super::is_unmarked_output, |dir| {
        for (name, file) in &files {
            file.write(&dir.join(format!("{name}.gguf")))?;
        }
        write_card(dir, &card)
    })
    .with_context(|| format!("cannot export to `{}`", out.path.display()))
}

/// What a user should know of a mixture's experts as adapters of llama.cpp.
pub fn notes(model: &RoutedModel) -> Vec<String> {
    let mut notes = vec![];
    if !model.routers().is_empty() {
        notes.push("the router is not written: llama.cpp has no place for it".to_owned());
    }
    for (part, spec) in model.specs().iter().enumerate() {
        if !spec.alora_invocation_tokens.is_empty() {
            notes.push(format!(
                "`{}` has invocation tokens, which llama.cpp's server alone obeys: in its other \
                 programs the expert is always on",
                part_name(model.specs(), part)
            ));
        }
    }
    notes
}

/// Writes a merged adapter to the folder `out`.
///
/// # Errors
/// A base or an adapter that llama.cpp cannot express, and those of [`Output::write_folder`].
pub fn export_adapter(
    out: &Output,
    adapter: &Adapter,
    base: &DecoderSpec,
    provenance: &Provenance,
    dtype: SaveDtype,
    card: &str,
) -> Result<()> {
    let file = lora::file(adapter, base, "adapter", &provenance.origin.base_label, kind_of(dtype))?;
    out.write_folder(super::is_unmarked_output, |dir| {
        file.write(&dir.join(ADAPTER))?;
        write_card(dir, card)
    })
    .with_context(|| format!("cannot export to `{}`", out.path.display()))
}

/// A whole model that is to be written.
#[derive(Debug)]
pub struct WholeModel<'a> {
    /// The merged base.
    pub base: &'a Decoder,
    /// Its name in the file.
    pub name: &'a str,
    /// Its vocabulary.
    pub vocabulary: &'a Vocabulary,
    /// Its chat templates.
    pub chat_template: Option<&'a ChatTemplate>,
    /// Small files that go with the base. Those that say its licence are copied.
    pub beside: &'a [SideFile],
}

/// Writes a whole model to the folder `out`.
///
/// # Errors
/// A base or a tokenizer that llama.cpp cannot express, and those of [`Output::write_folder`].
pub fn export_model(
    out: &Output,
    whole: &WholeModel<'_>,
    dtype: SaveDtype,
    card: &str,
) -> Result<()> {
    let file = model::file(whole, kind_of(dtype))?;
    out.write_folder(super::is_unmarked_output, |dir| {
        file.write(&dir.join(MODEL))?;
        let licences = whole.beside.iter().filter(|file| file.name.starts_with("LICENSE"));
        for SideFile { name, path } in licences {
            durable::write(&dir.join(name), &fs_err::read(path)?)?;
        }
        write_card(dir, card)
    })
    .with_context(|| format!("cannot export to `{}`", out.path.display()))
}

fn write_card(dir: &Path, card: &str) -> Result<()> {
    durable::write(&dir.join(CARD), card.as_bytes())
}

fn kind_of(dtype: SaveDtype) -> Kind {
    match dtype {
        SaveDtype::F32 => Kind::Float,
        SaveDtype::F16 => Kind::Half,
        SaveDtype::Bf16 => Kind::BFloat16,
    }
}
