//! Exporting experts as PEFT adapters, joined by dylora's own manifest and router or by X-LoRA's
//! classifier.
//!
//! ```text
//! the layout `dylora`
//! OUT/expert_0/ ..             PEFT adapters (`peft::adapter`), each with a model card
//! OUT/router.safetensors       absent with one expert
//! OUT/dylora.json              the manifest (`mixture`)
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

use crate::config::{EvalRule, RouterInput, RouterScope, RoutingChoice, RoutingLevel};
use crate::durable::{self, output::Output};
use crate::mixture::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, FORMAT, MANIFEST, Manifest, ManifestBase, ManifestRouter,
    ROUTER,
};
use crate::model::RoutedModel;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::{ExpertSpec, part_name};
use crate::model::families;
use crate::model::routing::router::RouterSpec;
use crate::peft::adapter::{self, Adapter};
use crate::peft::xlora;
use crate::tensor_file::{read_tensors, write_tensors};

const CARD: &str = "README.md";
/// The files of an adapter, sorted.
const ADAPTER_FILES: [&str; 3] = [CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS];
/// The words by which a model card says that dylora wrote it. The version follows them.
const BY_DYLORA: &str = "by dylora ";

/// What an export says about its origin.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// The name by which `from_pretrained` finds the base.
    pub base_name: String,
    /// The base's revision on the Hub.
    pub revision: Option<String>,
    /// The base's name for people: [`crate::base::Base::label`].
    pub base_label: String,
    /// BLAKE3 of the base's parameters in f32.
    pub base_hash: String,
    /// The dropout of the experts' inputs in training.
    pub dropout: f64,
    /// What decided the routing weights in training.
    pub routing: RoutingChoice,
    /// The names of the domains that the experts were trained on.
    pub domains: Vec<String>,
}

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
    out.write_folder(super::is_unmarked_output, |dir| {
        let parent = match layout {
            Layout::Dylora => dir.to_owned(),
            Layout::Xlora => dir.join(xlora::ADAPTERS),
        };
        fs_err::create_dir_all(&parent)?;
        for (name, adapter) in names.iter().zip(&adapters) {
            let folder = parent.join(name);
            fs_err::create_dir(&folder)?;
            let card = expert_card(&adapter.spec, num_experts, name, provenance);
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
            }
        }
        durable::write(&dir.join(CARD), mixture_card(model, &adapters, provenance).as_bytes())
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
    known.extend([MANIFEST, ROUTER, CARD].map(str::to_owned));
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
            name: provenance.base_label.clone(),
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

pub(super) fn card_head(provenance: &Provenance) -> String {
    format!(
        "---\nbase_model: {}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- \
         lora\n- dylora\n---\n\n",
        provenance.base_name
    )
}

fn domain_line(provenance: &Provenance) -> String {
    let domains = provenance.domains.iter().map(|domain| format!("`{domain}`"));
    match provenance.domains.is_empty() {
        true => String::new(),
        false => format!("- trained on: {}\n", domains.collect::<Vec<_>>().join(", ")),
    }
}

/// An expert in one line: rank, alpha, target modules and options.
pub(super) fn describe(spec: &ExpertSpec) -> String {
    let range = |values: Vec<f64>| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        if low == high { low.to_string() } else { format!("{low} to {high}") }
    };
    let ranks = range(spec.modules.values().map(|size| size.rank as f64).collect());
    let alphas = range(spec.modules.values().map(|size| size.alpha).collect());
    let modules: Vec<String> =
        spec.target_modules().iter().map(|module| format!("`{}`", module.name())).collect();
    let mut text = format!("rank {ranks}, alpha {alphas}, target modules {}", modules.join(", "));
    for (is_so, what) in [(spec.use_rslora, ", rsLoRA"), (spec.use_dora, ", DoRA")] {
        text += if is_so { what } else { "" };
    }
    let tokens = &spec.alora_invocation_tokens;
    if !tokens.is_empty() {
        text += &format!(", active from the last occurrence of the tokens {tokens:?} on");
    }
    text
}

/// The routers of a mixture in words.
fn describe_router(spec: &RouterSpec) -> String {
    let reads = match spec.input {
        RouterInput::Embeddings => {
            "the token embedding, plus the position embedding where the base has one"
        }
        RouterInput::BaseHidden => "the last hidden state of a pass of the base alone",
        RouterInput::LayerInput => "a block's input after its first normalisation",
        RouterInput::ModuleInput => "the module's own input",
    };
    let averaged = match spec.level {
        RoutingLevel::Token => "",
        RoutingLevel::Sequence => ", averaged over the document's prompt up to the token",
    };
    let scope = match spec.scope {
        RouterScope::Shared => "One router serves every layer.",
        RouterScope::Layer => "Each layer has its own router.",
        RouterScope::Module => "Each target module has its own router.",
    };
    let hidden = match spec.hidden_layers {
        0 => String::new(),
        n => format!(" behind {n} hidden layer(s) of width {} with ReLU", spec.hidden_width),
    };
    let chosen = match (spec.top_k, spec.selection_bias) {
        (None, _) => String::new(),
        (Some(k), false) => format!("; the {k} largest are kept and renormalised"),
        (Some(k), true) => {
            format!(
                "; the {k} largest with `selection_bias` added are kept, without it renormalised"
            )
        }
    };
    let chosen = match spec.eval {
        None => chosen,
        Some(EvalRule::Dense) => chosen + "; in evaluation, all of them",
        Some(EvalRule::TopK(k)) => format!("{chosen}; in evaluation, the {k} largest"),
    };
    let normalized = match spec.normalize_input {
        true => ", divided by `sqrt(mean(x^2) + 1e-6)`",
        false => "",
    };
    let own = match spec.own_experts {
        true => " A layer's softmax is over the experts that it has.",
        false => "",
    };
    format!(
        "{scope} It gives each token `softmax((x weight^T + bias) / {})` over the \
         experts{hidden}, where `x` is {reads}{averaged}{normalized}{chosen}.{own}",
        spec.temperature
    )
}

fn expert_card(
    spec: &ExpertSpec,
    num_experts: usize,
    name: &str,
    provenance: &Provenance,
) -> String {
    let label = &provenance.base_label;
    let (is, note) = match (num_experts, provenance.routing) {
        _ if spec.shared => (
            format!("The part that is always on in a mixture on `{label}`"),
            "Each token gets this adapter at weight 1, beside the routed experts.\n\n".to_owned(),
        ),
        (1, _) => (format!("A LoRA adapter on `{label}`"), String::new()),
        (count, routing) => {
            let how = match routing {
                RoutingChoice::Router => "token by token with a router".to_owned(),
                routing => format!("by `{routing}`"),
            };
            let note = format!(
                "This adapter is one expert at weight 1. The mixture weights the experts {how}, so \
                 that one expert alone gives other outputs than the mixture.\n\n"
            );
            (format!("One of {count} LoRA experts of a mixture on `{label}`"), note)
        }
    };
    format!(
        "{head}# {name}\n\n{is}, by dylora {version}.\n\n- {shape}\n{domains}\n{note}\
         ```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base, \
         \"{name}\")\n```\n",
        head = card_head(provenance),
        version = env!("CARGO_PKG_VERSION"),
        shape = describe(spec),
        domains = domain_line(provenance),
    )
}

fn mixture_card(model: &RoutedModel, adapters: &[Adapter], provenance: &Provenance) -> String {
    let routing = match model.routers().first() {
        _ if provenance.routing != RoutingChoice::Router => {
            let routing = provenance.routing;
            format!("It was trained with weights by `{routing}`, and its router was not trained.")
        }
        None => "There is one expert and no router: plain LoRA.".to_owned(),
        Some(_) => describe_router(model.router_spec()),
    };
    // not the specs of the model, because PiSSA and OLoRA are written as LoRA of twice the rank
    let experts: String = adapters
        .iter()
        .enumerate()
        .map(|(part, adapter)| {
            let name = part_name(model.specs(), part);
            let note = if adapter.spec.shared { ", always on" } else { "" };
            format!("- `{name}`: {}{note}\n", describe(&adapter.spec))
        })
        .collect();
    format!(
        "{head}# A mixture of {count} LoRA experts\n\nBy dylora {version} on `{label}`.\n\n\
         {experts}{domains}\nThe output of a target module is \
         `W x + b + sum_e g_e (E_e(x) - W x - b)`, `E_e` being expert e alone and `g` the \
         routing weights{shared}. {routing}\n\nEach folder is a PEFT adapter.\n",
        head = card_head(provenance),
        count = model.num_experts(),
        shared = match adapters.iter().any(|adapter| adapter.spec.shared) {
            true => ", 1 for `shared`",
            false => "",
        },
        version = env!("CARGO_PKG_VERSION"),
        label = provenance.base_label,
        domains = domain_line(provenance),
    )
}
