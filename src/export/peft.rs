//! Exporting experts as PEFT adapters, joined by dylora's own manifest and router or by X-LoRA's
//! classifier.
//!
//! ```text
//! the layout `dylora`
//! OUT/expert_0/ ..             PEFT adapters (`peft::adapter`), each with a model card
//! OUT/router.safetensors       absent with one expert
//! OUT/dylora.json              the manifest (`mixture`)
//! OUT/dylora_peft.py           a program that loads all of it in transformers and PEFT
//! OUT/README.md                the model card of the mixture
//!
//! the layout `xlora`
//! OUT/adapters/expert_0/ ..    the same adapters
//! OUT/xlora_config.json, OUT/xlora_classifier.safetensors      (`peft::xlora`)
//! OUT/README.md                the model card of the mixture
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::Value;
use tch::Tensor;

use super::card::{self, BY_DYLORA, CARD, Form};
pub use super::card::{Origin, Provenance};
use crate::config::RoutingChoice;
use crate::durable::{self, output::Output};
use crate::mixture::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, FORMAT, MANIFEST, Manifest, ManifestBase, ManifestRouter,
    ROUTER,
};
use crate::model::RoutedModel;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::{ExpertSpec, part_name};
use crate::model::families;
use crate::peft::adapter::{self, Adapter};
use crate::peft::xlora;
use crate::tensor_file::{read_tensors, write_tensors};

/// The program that loads an export in transformers and PEFT.
const PROGRAM: &str = "dylora_peft.py";
/// The files of an adapter, sorted.
const ADAPTER_FILES: [&str; 3] = [CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS];

/// How the experts are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// `dylora.json` and `router.safetensors`.
    Dylora,
    /// `xlora_config.json` and `xlora_classifier.safetensors`.
    Xlora,
}

/// Writes the experts and the router of `model` to the folder `out`. Tensors and JSON files are
/// read back and compared.
///
/// # Errors
/// A model without experts, with [`Layout::Xlora`] a mixture that X-LoRA cannot express, and those
/// of [`Output::write_folder`].
pub fn export(
    out: &Output,
    model: &RoutedModel,
    provenance: &Provenance,
    layout: Layout,
) -> Result<()> {
    let (num_experts, num_parts) = (model.num_experts() as usize, model.specs().len());
    if num_experts == 0 {
        bail!("a base alone has no experts to export\nhint: a full training's are in its `model/`");
    }
    let names: Vec<String> = (0..num_parts).map(|part| part_name(model.specs(), part)).collect();
    let adapters: Vec<Adapter> =
        (0..num_parts).map(|part| Adapter::of_model(model, part)).collect();
    let xlora = match layout {
        Layout::Dylora => None,
        Layout::Xlora if provenance.routing != RoutingChoice::Router => bail!(
            "X-LoRA routes by its classifier, but this mixture was trained with weights by `{}`",
            provenance.routing
        ),
        Layout::Xlora => {
            Some(super::xlora::settings_and_classifier(model, &provenance.base_name, &names)?)
        }
    };
    let form = match layout {
        Layout::Dylora => Form::Dylora,
        Layout::Xlora => Form::Xlora,
    };
    out.write_folder(super::is_unmarked_output, |dir| {
        let parent = match layout {
            Layout::Dylora => dir.to_owned(),
            Layout::Xlora => dir.join(xlora::ADAPTERS),
        };
        fs_err::create_dir_all(&parent)?;
        for (name, adapter) in names.iter().zip(&adapters) {
            let folder = parent.join(name);
            fs_err::create_dir(&folder)?;
            let card = card::of_expert(&adapter.spec, num_experts, name, provenance);
            write_adapter(&folder, adapter, &model.base().spec, provenance, &card)?;
        }
        match xlora {
            Some((config, classifier)) => {
                write_json(&dir.join(xlora::CONFIG), &config)?;
                write_checked(&dir.join(xlora::CLASSIFIER), &classifier)?;
            }
            None => {
                if !model.routers().is_empty() {
                    write_checked(&dir.join(ROUTER), &model.router_tensors())?;
                }
                let manifest = serde_json::to_value(manifest(model, provenance, names))?;
                write_json(&dir.join(MANIFEST), &manifest)?;
                durable::write(&dir.join(PROGRAM), include_bytes!("dylora_peft.py"))?;
            }
        }
        durable::write(
            &dir.join(CARD),
            card::of_mixture(model, &adapters, provenance, form).as_bytes(),
        )
    })
    .with_context(|| format!("cannot export to `{}`", out.path.display()))
}

/// Whether a folder with these files is an export: it has a `dylora.json`, and each file belongs to
/// the export that this describes.
pub(super) fn is_unmarked_export(dir: &Path, files: &BTreeSet<String>) -> bool {
    let text = fs_err::read_to_string(dir.join(MANIFEST)).ok();
    let manifest = text.and_then(|text| serde_json::from_str::<Manifest>(&text).ok());
    let Some(manifest) = manifest else { return false };
    let of_expert = |name: &String| ADAPTER_FILES.map(|file| format!("{name}/{file}"));
    let parts = manifest.experts.iter().chain(&manifest.shared);
    let mut known: BTreeSet<String> = parts.flat_map(of_expert).collect();
    known.extend([MANIFEST, ROUTER, CARD, PROGRAM].map(str::to_owned));
    files.is_subset(&known)
}

/// Whether a folder with these files is a single adapter whose card says that dylora wrote it.
pub(super) fn is_unmarked_adapter(dir: &Path, files: &BTreeSet<String>) -> bool {
    let is_ours =
        || fs_err::read_to_string(dir.join(CARD)).is_ok_and(|card| card.contains(BY_DYLORA));
    files.iter().map(String::as_str).eq(ADAPTER_FILES) && is_ours()
}

/// Writes one adapter with its model card into an existing folder, and reads the adapter back as an
/// import would.
pub fn write_adapter(
    folder: &Path,
    adapter: &Adapter,
    base: &DecoderSpec,
    provenance: &Provenance,
    card: &str,
) -> Result<()> {
    let (config, weights) = (folder.join(ADAPTER_CONFIG), folder.join(ADAPTER_WEIGHTS));
    write_checked(&weights, &adapter.peft_tensors(base))?;
    let Provenance { base_name, revision, dropout, .. } = provenance;
    let json = adapter::config_json(&adapter.spec, base, base_name, revision.as_deref(), *dropout);
    write_json(&config, &json)?;
    let read = adapter::read(&config, &weights, base)?.spec;
    let ExpertSpec { trainable, shared, .. } = adapter.spec;
    if (ExpertSpec { trainable, shared, ..read }) != adapter.spec {
        bail!("`{}` was written, but reads back as another adapter", config.display());
    }
    durable::write(&folder.join(CARD), card.as_bytes())?;
    durable::sync_folder(folder)
}

fn manifest(model: &RoutedModel, provenance: &Provenance, mut experts: Vec<String>) -> Manifest {
    let shared = experts.split_off(model.num_experts() as usize).pop();
    Manifest {
        format: FORMAT,
        dylora_version: env!("CARGO_PKG_VERSION").into(),
        base: ManifestBase {
            name: provenance.origin.base_label.clone(),
            blake3: provenance.base_hash.clone(),
            settings: Some(families::settings(&model.base().spec)),
        },
        experts,
        shared,
        routing: provenance.routing,
        router: model
            .routers()
            .first()
            .map(|_| ManifestRouter { file: ROUTER.into(), spec: model.router_spec().clone() }),
    }
}

/// Writes tensors, reads the file back and compares it with them.
pub(super) fn write_checked(file: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    write_tensors(file, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
    let read = read_tensors(file)?;
    for (name, tensor) in tensors {
        let same = read.get(name).is_some_and(|found| {
            let tensor = tensor.to_device(tch::Device::Cpu);
            found.kind() == tensor.kind() && found.size() == tensor.size() && found.equal(&tensor)
        });
        if !same {
            bail!("`{}` was written, but tensor `{name}` reads back differently", file.display());
        }
    }
    if read.len() != tensors.len() {
        bail!("`{}` was written, but holds other tensors", file.display());
    }
    Ok(())
}

/// Writes JSON, reads the file back and compares it.
pub(super) fn write_json(file: &Path, json: &Value) -> Result<()> {
    durable::write(file, (serde_json::to_string_pretty(json)? + "\n").as_bytes())?;
    let read: Value = serde_json::from_str(&fs_err::read_to_string(file)?)?;
    if read != *json {
        bail!("`{}` was written, but reads back differently", file.display());
    }
    Ok(())
}
