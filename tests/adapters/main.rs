//! Adapters and mixtures of them: importing them from PEFT and X-LoRA, mixing, exporting and
//! merging them.
//!
//! Reference: PEFT 0.21.2 and transformers 5.17.0 in float64, by `scripts/make_golden_adapters.py`.

#[path = "../common/mod.rs"]
mod common;

mod cards;
mod export;
mod fused;
mod gguf;
mod import;
mod init;
mod merge;
mod mixtures;
mod refusals;
mod shared;
mod targets;
mod xlora;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use dylora::config::{AdapterSource, DropoutMasks, LoraConfig, ModulePath, RoutingChoice};
use dylora::export::peft::{Origin, Provenance};
use dylora::hub::{AdapterFiles, HubSettings, find_adapter};
use dylora::mixture::Mixture;
use dylora::model::decoder::Decoder;
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::families::{self, load};
use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};
use dylora::peft::adapter::Adapter;
use dylora::tensor_file::read_tensors;
use tch::{Device, Kind, Tensor};

use common::{golden_path, gpt2_spec, labelled_rows};

/// Largest differences from the reference's logits allowed in each dtype.
const TOLERANCES: [(Kind, f64); 2] = [(Kind::Double, 1e-10), (Kind::Float, 1e-5)];

/// The two ways to apply experts: all at once with a shared dropout mask, or one after the other.
const BOTH_WAYS: [DropoutMasks; 2] = [DropoutMasks::Shared, DropoutMasks::PerExpert];

/// The base of the adapters in `tests/golden/peft`.
fn tied_base(kind: Kind) -> Result<Decoder> {
    load::read(&tied_config()?, &[golden_path("gpt2_tied.safetensors")], kind)
}

fn tied_config() -> Result<DecoderSpec> {
    families::read_spec(&golden_path("gpt2_tied.config.json"))
}

/// The path of a folder in `tests/golden/peft`.
fn peft_folder(name: &str) -> PathBuf {
    golden_path("peft").join(name)
}

/// The reference's results for a folder in `tests/golden/peft`.
fn expected(name: &str) -> Result<BTreeMap<String, Tensor>> {
    read_tensors(&peft_folder(&format!("{name}.expected.safetensors")))
}

/// Finds adapters in folders only, not on the Hub.
fn find(source: &AdapterSource) -> Result<AdapterFiles> {
    find_adapter(source, &HubSettings::offline("absent"), &())
}

fn of_folder(dir: &Path, base: &DecoderSpec) -> Result<Mixture> {
    Mixture::of_folder(dir, base, &find)
}

/// A model in f64 of `gpt2_tied` whose experts are the given folders in `tests/golden/peft`.
fn mixed(names: &[&str]) -> Result<RoutedModel> {
    let base = tied_base(Kind::Double)?;
    let sources: Vec<_> = names.iter().map(|n| AdapterSource::Path(peft_folder(n))).collect();
    let mixture = Mixture::of_adapters(&sources, &base.spec, &find)?;
    mixture.put_on(&base, Device::Cpu, Kind::Double)
}

/// A batch of `input_ids`, `[b, t]`, with the labels of a golden file or without labels.
fn inputs(input_ids: &Tensor, labels: Option<&Tensor>) -> Result<Inputs> {
    let rows: Vec<Vec<i64>> = input_ids.try_into()?;
    let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    let labels = match labels {
        Some(labels) => Vec::try_from(labels.view([-1]))?,
        None => vec![-100; input_ids.numel()],
    };
    Ok(labelled_rows(&rows, &labels))
}

/// The mode of a forward pass in one of [`BOTH_WAYS`], with dropout of `probability`.
fn mode(masks: DropoutMasks, probability: f64) -> ForwardMode {
    ForwardMode { dropout: LoraDropout { probability, masks }, ..ForwardMode::EVAL }
}

/// The logits, `[b, t, v]`, computed in one of [`BOTH_WAYS`].
fn logits_by(
    masks: DropoutMasks,
    model: &RoutedModel,
    inputs: &Inputs,
    source: &RoutingSource,
) -> Tensor {
    model.logits(&model.forward(inputs, source, mode(masks, 0.0), None).hidden)
}

fn path(text: &str) -> ModulePath {
    text.parse().expect("it is a module's path")
}

/// Parses the section `[lora]` of a config.
fn lora(text: &str) -> LoraConfig {
    toml::from_str(text).expect("it is a `[lora]`")
}

fn provenance() -> Provenance {
    Provenance {
        base_name: "gpt2_tied".into(),
        revision: None,
        base_hash: "0".repeat(64),
        dropout: 0.1,
        routing: RoutingChoice::Router,
        origin: Origin { base_label: "gpt2_tied".into(), ..Origin::default() },
    }
}

/// A base of three layers, so that adapters can target a module in any subset of them.
fn three_layers() -> DecoderSpec {
    DecoderSpec { inner_width: 8, ..gpt2_spec(3, 2, 4) }
}

/// An adapter of zeros in the shapes that its spec requires.
fn zeros(spec: ExpertSpec, base: &DecoderSpec) -> Adapter {
    let mut tensors = BTreeMap::new();
    for (&path, size) in &spec.modules {
        let (i, o) = base.linear_shape(path.module);
        let mut add = |key, shape: &[i64]| {
            tensors.insert((path, key), Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
        };
        add("lora_a", &[size.rank, i]);
        add("lora_b", &[o, size.rank]);
        if spec.use_dora {
            add("magnitude", &[o]);
        }
    }
    Adapter { spec, tensors }
}

/// The message of an error, with `DIR` in place of the path `dir`.
fn message(error: &anyhow::Error, dir: &Path) -> String {
    format!("{error:#}").replace(&dir.display().to_string(), "DIR")
}
