//! X-LoRA folders (arXiv:2402.07148; github.com/EricLBuehler/xlora, `save_pretrained`), depth 1.
//!
//! ```text
//! xlora_config.json            hidden_size, base_model_id, adapters { name: path }, softmax_temperature, ..
//! xlora_classifier.safetensors last.weight [e, d], last.bias [e]
//! adapters/NAME/               PEFT adapters
//! ```
//!
//! Its classifier of one linear layer reads the last hidden state of a pass of the base alone and
//! gives every layer the same softmax weights: dylora's router with `input = "base_hidden"`. What
//! X-LoRA can do beside that is refused by name. So is top-k, which it takes over positions, not
//! experts (`get_maybe_topk_scalings`, `dim=1`), and which PEFT 0.21, where it is over experts, does not
//! renormalise.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use tch::Tensor;

use super::{ADAPTER_CONFIG, FindAdapter, Mixture};
use crate::config::{AdapterHub, AdapterSource, RouterInput, RoutingLevel};
use crate::model::RoutedModel;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::routing::router::RouterSpec;
use crate::tensor_file::{check_numbers, read_tensors};

/// The classifier's settings.
pub const CONFIG: &str = "xlora_config.json";
/// The classifier.
pub const CLASSIFIER: &str = "xlora_classifier.safetensors";
/// Where the trained adapters are.
pub const ADAPTERS: &str = "adapters";

/// Options and the one value of each that dylora's router has.
fn fixed_options() -> [(&'static str, Value); 7] {
    [
        ("enable_softmax", json!(true)),
        ("enable_softmax_topk", json!(false)),
        ("layerwise_scalings", json!(false)),
        ("xlora_depth", json!(1)),
        ("top_k_lora", Value::Null),
        ("scaling_pass_value", json!(0.0)),
        ("global_scaling_weight", json!(1.0)),
    ]
}

/// Options without effect on a classifier of depth 1, and X-LoRA's defaults.
fn idle_options() -> [(&'static str, Value); 3] {
    [
        ("xlora_size", json!(2048)),
        ("enable_relu_and_dropout", json!(false)),
        ("xlora_dropout_p", json!(0.2)),
    ]
}

/// Reads a folder: classifier and adapters.
///
/// # Errors
/// Options other than those above, by name; adapters that are not found.
pub fn read(dir: &Path, base: &DecoderSpec, find: &FindAdapter<'_>) -> Result<Mixture> {
    let config = read_config(dir)?;
    let place = || format!("in `{}`", dir.join(CONFIG).display());
    let hidden_size = config.get("hidden_size").and_then(Value::as_i64);
    if hidden_size != Some(base.n_embd) {
        let found = config.get("hidden_size").cloned().unwrap_or_default();
        bail!("{}: `hidden_size` must be the base's {}, got {found}", place(), base.n_embd);
    }
    let adapters = config.get("adapters").and_then(Value::as_object);
    let adapters = adapters.filter(|adapters| !adapters.is_empty());
    let adapters = adapters.with_context(|| format!("{}: `adapters` names none", place()))?;
    let source = |(name, path): (&String, &Value)| {
        let path = path.as_str().unwrap_or(name);
        let candidates = [dir.join(ADAPTERS).join(name), dir.join(name), dir.join(path)];
        match candidates.into_iter().find(|folder| folder.join(ADAPTER_CONFIG).is_file()) {
            Some(folder) => AdapterSource::Path(folder),
            None => AdapterSource::Hub(AdapterHub {
                repo: path.to_owned(),
                revision: "main".into(),
                subfolder: String::new(),
            }),
        }
    };
    let sources: Vec<AdapterSource> = adapters.iter().map(source).collect();
    let mut mixture = Mixture::of_adapters(&sources, base, find)?;
    let (router, tensors) = read_router(dir)?;
    let (outputs, count) = (tensors["router.weight"].size()[0], mixture.specs.len());
    if outputs != count as i64 {
        let file = dir.join(CLASSIFIER);
        bail!("`{}` scores {outputs} adapters, the config names {count}", file.display());
    }
    // the softmax of a single score is 1
    if count > 1 {
        mixture.router = router;
        mixture.tensors.extend(tensors);
    }
    mixture.is_whole = true;
    Ok(mixture)
}

/// The classifier alone: its rule, and its tensors by the names of [`RoutedModel::tensors`].
pub fn read_router(dir: &Path) -> Result<(RouterSpec, BTreeMap<String, Tensor>)> {
    let config = read_config(dir)?;
    let temperature = config.get("softmax_temperature").map_or(Some(1.0), Value::as_f64);
    let temperature = temperature.filter(|t| t.is_finite() && *t > 0.0);
    let temperature = temperature.with_context(|| {
        format!("in `{}`: `softmax_temperature` must be above 0", dir.join(CONFIG).display())
    })?;
    let file = dir.join(CLASSIFIER);
    let mut tensors = read_tensors(&file).context("cannot read the classifier")?;
    let in_file = || format!("in `{}`", file.display());
    for (name, tensor) in &tensors {
        check_numbers(name, tensor).with_context(in_file)?;
    }
    let weight = tensors.remove("last.weight");
    let weight = weight.with_context(|| format!("{}: `last.weight` is missing", in_file()))?;
    let Ok((experts, _)) = weight.size2() else {
        let found = weight.size();
        bail!("{}: `last.weight` must be [adapters, hidden_size], got {found:?}", in_file());
    };
    let bias = match config.get("use_bias").and_then(Value::as_bool) {
        Some(false) => Tensor::zeros([experts], (weight.kind(), weight.device())),
        _ => {
            let bias = tensors.remove("last.bias");
            bias.with_context(|| format!("{}: `last.bias` is missing", in_file()))?
        }
    };
    if let Some(name) = tensors.keys().next() {
        bail!("{}: tensor `{name}` is of no classifier of depth 1", in_file());
    }
    let router =
        RouterSpec { input: RouterInput::BaseHidden, temperature, ..RouterSpec::default() };
    let named = [("router.weight", weight), ("router.bias", bias)];
    Ok((router, named.map(|(name, tensor)| (name.to_owned(), tensor)).into()))
}

/// Reads the settings and refuses what dylora's router cannot do.
fn read_config(dir: &Path) -> Result<Map<String, Value>> {
    let path = dir.join(CONFIG);
    let parse = || {
        let text = fs_err::read_to_string(&path)?;
        let config: Map<String, Value> =
            serde_json::from_str(&text).context("is not a JSON object")?;
        for (key, wanted) in fixed_options() {
            let Some(found) = config.get(key) else { continue };
            let same = match (found.as_f64(), wanted.as_f64()) {
                (Some(found), Some(wanted)) => found == wanted,
                _ => *found == wanted,
            };
            if !same {
                bail!("`{key}` must be {wanted}, got {found}");
            }
        }
        let read = ["hidden_size", "base_model_id", "adapters", "use_bias", "softmax_temperature"];
        let read = read.into_iter().chain(["use_trainable_adapters", "device"]);
        let known: Vec<&str> = fixed_options()
            .iter()
            .chain(&idle_options())
            .map(|(key, _)| *key)
            .chain(read)
            .collect();
        match config.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => bail!("`{key}` is no option of X-LoRA that dylora knows"),
            None => Ok(config),
        }
    };
    parse().with_context(|| format!("in `{}`", path.display()))
}

/// `xlora_config.json` of a mixture, and the classifier's tensors.
///
/// # Errors
/// A mixture that X-LoRA cannot express, by what stands against it.
pub fn write(
    model: &RoutedModel,
    base_name: &str,
    experts: &[String],
) -> Result<(Value, BTreeMap<String, Tensor>)> {
    let router = match model.routers() {
        [] => bail!("a single expert has no router, and is a PEFT adapter as it is"),
        [router] => router,
        routers => {
            bail!("X-LoRA has one classifier for all layers, this mixture {}", routers.len())
        }
    };
    let spec = model.router_spec();
    let input = spec.input;
    if input != RouterInput::BaseHidden {
        bail!(
            "X-LoRA's classifier reads the base's last hidden state, this router `{}`\nhint: train \
             with `router.input = \"base_hidden\"`",
            input.name()
        );
    }
    if let Some(k) = spec.top_k {
        bail!("X-LoRA's top-k is another rule; this router keeps {k} experts of a token");
    }
    let with = |what: &str, has: bool| match has {
        true => bail!("X-LoRA does not know {what}"),
        false => Ok(()),
    };
    with("hidden layers of a router that end in its width", spec.hidden_layers > 0)?;
    with("routing by the prompt", spec.level == RoutingLevel::Sequence)?;
    with("layers with experts of their own", spec.own_experts)?;
    with("another rule in evaluation", spec.eval.is_some())?;
    with("DoRA", model.specs().iter().any(|spec| spec.use_dora))?;
    with("invocation tokens", model.specs().iter().any(|s| !s.alora_invocation_tokens.is_empty()))?;
    let adapters: Map<String, Value> =
        experts.iter().map(|name| (name.clone(), json!(format!("{ADAPTERS}/{name}")))).collect();
    let mut config = Map::new();
    config.insert("hidden_size".into(), json!(model.base().spec.n_embd));
    config.insert("base_model_id".into(), json!(base_name));
    config.insert("adapters".into(), Value::Object(adapters));
    let options = fixed_options().into_iter().chain(idle_options());
    config.extend(options.map(|(key, value)| (key.to_owned(), value)));
    config.insert("use_bias".into(), json!(true));
    // the adapters are then looked for beside the classifier
    config.insert("use_trainable_adapters".into(), json!(true));
    config.insert("softmax_temperature".into(), json!(spec.temperature));
    let tensors = [("last.weight", &router.weight), ("last.bias", &router.bias)];
    let tensors = tensors.map(|(name, tensor)| (name.to_owned(), tensor.detach()));
    Ok((Value::Object(config), tensors.into()))
}
