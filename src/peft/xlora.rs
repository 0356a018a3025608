//! X-LoRA folders (arXiv:2402.07148; github.com/EricLBuehler/xlora, `save_pretrained`), depth 1.
//!
//! ```text
//! xlora_config.json            hidden_size, base_model_id, adapters { name: path },
//!                              softmax_temperature, ..
//! xlora_classifier.safetensors last.weight [e, d], last.bias [e]
//! adapters/NAME/               PEFT adapters
//! ```
//!
//! The classifier is one linear layer. It reads the last hidden state of a pass of the base alone,
//! and its softmax weights hold for every layer. dylora's router does the same with
//! `input = "base_hidden"`. X-LoRA's other options are refused by name. Top-k is one of them:
//! X-LoRA takes it over positions instead of experts (`get_maybe_topk_scalings`, `dim=1`), and PEFT
//! 0.21 takes it over experts without renormalising their weights.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::durable::output;
use crate::tensor_file::{check_numbers, read_tensors};

/// The file of the settings.
pub const CONFIG: &str = "xlora_config.json";
/// The file of the classifier's tensors.
pub const CLASSIFIER: &str = "xlora_classifier.safetensors";
/// The folder of the trained adapters.
pub const ADAPTERS: &str = "adapters";

/// Options for which only one value is supported, with that value.
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

/// Options that have no effect on a classifier of depth 1, with X-LoRA's defaults.
fn idle_options() -> [(&'static str, Value); 3] {
    [
        ("xlora_size", json!(2048)),
        ("enable_relu_and_dropout", json!(false)),
        ("xlora_dropout_p", json!(0.2)),
    ]
}

/// The options of `xlora_config.json` that differ between mixtures.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct XloraConfig {
    /// Width `d` of the hidden states that the classifier reads.
    pub hidden_size: i64,
    /// The name by which `from_pretrained` finds the base.
    pub base_model_id: String,
    /// Name and path of each adapter, in the order of the classifier's outputs.
    pub adapters: Vec<(String, String)>,
    /// The temperature that divides the scores.
    pub softmax_temperature: f64,
}

/// A classifier of depth 1.
#[derive(Debug)]
pub(crate) struct Classifier {
    /// The temperature that divides the scores.
    pub softmax_temperature: f64,
    /// `last.weight`, `[e, d]`.
    pub weight: Tensor,
    /// `last.bias`, `[e]`.
    pub bias: Tensor,
}

/// Name and path of each adapter in the X-LoRA folder `dir`, in the order of the classifier's
/// outputs.
///
/// # Errors
/// An option that is not supported, by name; a width other than `hidden_size`; no adapters.
pub(crate) fn read_adapters(dir: &Path, hidden_size: i64) -> Result<Vec<(String, String)>> {
    let config = read_config(dir)?;
    let place = || format!("in `{}`", dir.join(CONFIG).display());
    if config.get("hidden_size").and_then(Value::as_i64) != Some(hidden_size) {
        let found = config.get("hidden_size").cloned().unwrap_or_default();
        bail!("{}: `hidden_size` must be the base's {hidden_size}, got {found}", place());
    }
    let adapters = config.get("adapters").and_then(Value::as_object);
    let adapters = adapters.filter(|adapters| !adapters.is_empty());
    let adapters = adapters.with_context(|| format!("{}: `adapters` names none", place()))?;
    let path =
        |(name, path): (&String, &Value)| (name.clone(), path.as_str().unwrap_or(name).to_owned());
    Ok(adapters.iter().map(path).collect())
}

/// Reads the classifier of the X-LoRA folder `dir`.
///
/// # Errors
/// An option that is not supported, and a tensor that is missing or extra, each by name.
pub(crate) fn read_classifier(dir: &Path) -> Result<Classifier> {
    let config = read_config(dir)?;
    let temperature = config.get("softmax_temperature").map_or(Some(1.0), Value::as_f64);
    let temperature = temperature.filter(|t| t.is_finite() && *t > 0.0);
    let temperature = temperature.with_context(|| {
        format!("in `{}`: `softmax_temperature` must be above 0", dir.join(CONFIG).display())
    })?;
    let file = dir.join(CLASSIFIER);
    output::check_sum(&file)?;
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
    Ok(Classifier { softmax_temperature: temperature, weight, bias })
}

/// Reads the settings and refuses options that dylora's router does not support.
fn read_config(dir: &Path) -> Result<Map<String, Value>> {
    let path = dir.join(CONFIG);
    output::check_sum(&path)?;
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

impl XloraConfig {
    /// The contents of `xlora_config.json`.
    pub fn to_json(&self) -> Value {
        let adapters = self.adapters.iter().map(|(name, path)| (name.clone(), json!(path)));
        let mut config = Map::new();
        config.insert("hidden_size".into(), json!(self.hidden_size));
        config.insert("base_model_id".into(), json!(self.base_model_id));
        config.insert("adapters".into(), Value::Object(adapters.collect()));
        let options = fixed_options().into_iter().chain(idle_options());
        config.extend(options.map(|(key, value)| (key.to_owned(), value)));
        config.insert("use_bias".into(), json!(true));
        // with this, X-LoRA looks for the adapters in the folder beside the classifier
        config.insert("use_trainable_adapters".into(), json!(true));
        config.insert("softmax_temperature".into(), json!(self.softmax_temperature));
        Value::Object(config)
    }
}

/// The tensors of `xlora_classifier.safetensors`.
pub(crate) fn classifier_tensors(weight: &Tensor, bias: &Tensor) -> BTreeMap<String, Tensor> {
    let tensors = [("last.weight", weight), ("last.bias", bias)];
    tensors.map(|(name, tensor)| (name.to_owned(), tensor.detach())).into()
}
