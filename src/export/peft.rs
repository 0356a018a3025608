//! Experts as PEFT adapters (PEFT 0.21, `save_pretrained`'s format), the router as a file of its own.
//!
//! ```text
//! OUT/expert_0/adapter_config.json          peft_type LORA, r, lora_alpha, target_modules, ..
//!              adapter_model.safetensors    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight ..
//!              README.md                    model card
//! OUT/router.safetensors                    weight [e, d], bias [e]; absent with one expert
//! OUT/dylora.json                           what joins them: base, experts, routing
//! OUT/README.md                             model card of the mixture
//! ```
//!
//! Slice `e` of `lora_a`, `[e, r, i]`, is `lora_A.weight`, `[r, i]`, and of `lora_b`, `[e, o, r]`, is
//! `lora_B.weight`, `[o, r]`. Experts are named `expert_0`, .., because PEFT mistakes bare digits.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::Tensor;

use crate::config::{BaseSource, Config, RouterInput};
use crate::durable;
use crate::model::RoutedGpt2;
use crate::model::weights::{read_tensors, write_tensors};

/// Version of `dylora.json`.
const FORMAT: u32 = 1;

/// Writes the experts and the router of `model` to `dir`, reads every file back and compares it.
///
/// - `config`: the run's config, for rank, alpha, modules and base
/// - `base_label`: how people know the base
pub fn export(
    dir: &Path,
    model: &RoutedGpt2,
    config: &Config,
    base_label: &str,
    overwrite: bool,
) -> Result<()> {
    if model.num_experts() == 0 {
        bail!("a fully trained base has no experts to export\nhint: its run folder has `model/`");
    }
    let base_hash = model.base().hash()?;
    durable::folder(dir, overwrite, |dir| {
        for expert in 0..model.num_experts() {
            let folder = dir.join(expert_name(expert));
            fs_err::create_dir(&folder)?;
            let tensors = expert_tensors(model, expert);
            write_checked(&folder.join("adapter_model.safetensors"), &tensors)?;
            let adapter_config = adapter_config(config);
            write_json(&folder.join("adapter_config.json"), &adapter_config)?;
            let card = expert_card(config, base_label, expert);
            durable::write(&folder.join("README.md"), card.as_bytes())?;
            durable::sync_folder(&folder)?;
        }
        if let Some(router) = model.router() {
            let tensors = BTreeMap::from([
                ("weight".to_owned(), router.weight.shallow_clone()),
                ("bias".to_owned(), router.bias.shallow_clone()),
            ]);
            write_checked(&dir.join("router.safetensors"), &tensors)?;
        }
        write_json(&dir.join("dylora.json"), &mixture_json(model, config, base_label, &base_hash))?;
        durable::write(&dir.join("README.md"), mixture_card(model, config, base_label).as_bytes())
    })
    .with_context(|| format!("cannot export to `{}`", dir.display()))
}

/// The folder of an expert, which is also its adapter name.
pub fn expert_name(expert: i64) -> String {
    format!("expert_{expert}")
}

/// An expert's tensors under PEFT's names.
fn expert_tensors(model: &RoutedGpt2, expert: i64) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    for layer in 0..model.base().config.n_layer {
        for module in crate::config::TargetModule::ALL {
            let Some(experts) = model.experts(layer as usize, module) else { continue };
            let name = format!("base_model.model.transformer.h.{layer}.{}", module.name());
            let (a, b) = (experts.lora_a.get(expert), experts.lora_b.get(expert));
            tensors.insert(format!("{name}.lora_A.weight"), a.detach());
            tensors.insert(format!("{name}.lora_B.weight"), b.detach());
        }
    }
    tensors
}

/// Writes tensors and compares what was written with what was meant.
fn write_checked(file: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
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

/// Writes JSON and compares what was written with what was meant.
pub(super) fn write_json(file: &Path, json: &Value) -> Result<()> {
    durable::write(file, (serde_json::to_string_pretty(json)? + "\n").as_bytes())?;
    let read: Value = serde_json::from_str(&fs_err::read_to_string(file)?)?;
    if read != *json {
        bail!("`{}` was written, but reads back differently", file.display());
    }
    Ok(())
}

/// The base as `from_pretrained` names it, and its revision.
fn base_reference(config: &Config) -> (String, Option<String>) {
    match &config.base.source {
        BaseSource::Path(path) => (path.display().to_string(), None),
        BaseSource::Hub(hub) => (hub.repo.clone(), Some(hub.revision.clone())),
        BaseSource::Random(_) => ("random".into(), None),
    }
}

fn adapter_config(config: &Config) -> Value {
    let lora = &config.lora;
    let (base, revision) = base_reference(config);
    let modules: Vec<&str> = lora.target_modules.iter().map(|module| module.name()).collect();
    json!({
        "base_model_name_or_path": base,
        "bias": "none",
        // GPT-2's Conv1D keeps its weight as [in, out]
        "fan_in_fan_out": true,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": number(lora.alpha),
        "lora_dropout": lora.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": revision,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    })
}

/// A whole number without a decimal point, as PEFT types `lora_alpha`.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

fn mixture_json(model: &RoutedGpt2, config: &Config, label: &str, base_hash: &str) -> Value {
    let lora = &config.lora;
    let experts: Vec<String> = (0..model.num_experts()).map(expert_name).collect();
    let modules: Vec<&str> = lora.target_modules.iter().map(|module| module.name()).collect();
    let router = model.router().map(|router| {
        json!({
            "file": "router.safetensors",
            "input": match config.router.input {
                RouterInput::Embeddings => "embeddings",
            },
            "temperature": router.temperature,
            "top_k": router.top_k,
        })
    });
    json!({
        "format": FORMAT,
        "dylora_version": env!("CARGO_PKG_VERSION"),
        "base": { "name": label, "blake3": base_hash },
        "experts": experts,
        "rank": lora.rank,
        "alpha": number(lora.alpha),
        "target_modules": modules,
        "router": router,
    })
}

fn card_head(base: &str) -> String {
    format!(
        "---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- \
         lora\n- dylora\n---\n\n"
    )
}

fn domain_list(config: &Config) -> String {
    let domains = config.data.domains.iter().map(|domain| format!("`{}`", domain.name));
    domains.collect::<Vec<_>>().join(", ")
}

fn expert_card(config: &Config, label: &str, expert: i64) -> String {
    let (base, _) = base_reference(config);
    let name = expert_name(expert);
    let count = config.lora.num_experts;
    format!(
        "{head}# {name}\n\nOne of {count} LoRA experts that dylora {version} trained together, with \
         a router, on `{label}`.\n\n- rank {rank}, alpha {alpha}, target modules {modules}\n- \
         domains of the mixture: {domains}\n\nThis adapter is one expert at weight 1. The mixture \
         weights the experts token by token with the router in the folder above, so that one expert \
         alone gives other outputs than the mixture.\n\n```python\nfrom peft import PeftModel\n\
         model = PeftModel.from_pretrained(base, \"{name}\")\n```\n",
        head = card_head(&base),
        version = env!("CARGO_PKG_VERSION"),
        rank = config.lora.rank,
        alpha = config.lora.alpha,
        modules = module_list(config),
        domains = domain_list(config),
    )
}

fn module_list(config: &Config) -> String {
    let modules = config.lora.target_modules.iter().map(|module| format!("`{}`", module.name()));
    modules.collect::<Vec<_>>().join(", ")
}

fn mixture_card(model: &RoutedGpt2, config: &Config, label: &str) -> String {
    let (base, _) = base_reference(config);
    let routing = match model.router() {
        None => "There is one expert and no router: plain LoRA.".to_owned(),
        Some(router) => format!(
            "`router.safetensors` holds the router: for each token, `softmax((x weight^T + bias) / \
             {})` over the experts, where `x` is the token plus position embedding{}. The weights of a \
             token are the same in every layer.",
            router.temperature,
            router
                .top_k
                .map(|k| format!("; the {k} largest are kept and renormalised"))
                .unwrap_or_default(),
        ),
    };
    format!(
        "{head}# A mixture of {count} LoRA experts\n\nTrained by dylora {version} on `{label}`.\n\n- \
         rank {rank}, alpha {alpha}, target modules {modules}\n- domains: {domains}\n\nThe output of a \
         target module is `W x + b + sum_e g_e (alpha / rank) B_e A_e x`, `g` being the routing \
         weights. {routing}\n\nEach `expert_*` folder is a PEFT adapter. `dylora.json` says what \
         belongs together.\n",
        head = card_head(&base),
        count = config.lora.num_experts,
        version = env!("CARGO_PKG_VERSION"),
        rank = config.lora.rank,
        alpha = config.lora.alpha,
        modules = module_list(config),
        domains = domain_list(config),
    )
}
