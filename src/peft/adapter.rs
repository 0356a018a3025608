//! Reading and writing PEFT adapters (PEFT 0.21, `LoraConfig` and `save_pretrained`).
//!
//! ```text
//! adapter_config.json          peft_type LORA, r, lora_alpha, target_modules, ..
//! adapter_model.safetensors    base_model.model.{module}.lora_A.weight          [r, i]
//!                                                       .lora_B.weight          [o, r]
//!                                                       .lora_magnitude_vector  [o]
//! ```
//!
//! `{module}` is the full name in the base, such as `model.layers.0.self_attn.q_proj`.
//!
//! Config keys that shape the update are read. Keys that cannot change it are ignored; one of them
//! is `lora_dropout`, which `lora.dropout` replaces. Any other key must have an empty value (null,
//! false, `[]` or `{}`), as is PEFT's default; otherwise the adapter is refused and the error names
//! the key.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use fancy_regex::Regex;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::config::{Family, LoraInit, ModulePath};
use crate::durable::output;
use crate::model::RoutedModel;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::delta::Delta;
use crate::model::experts::spec::{ExpertSpec, RankAlpha};
use crate::tensor_file::{check_numbers, read_tensors};

/// An adapter in memory.
#[derive(Debug)]
pub struct Adapter {
    /// Target modules with their rank and alpha, and options.
    pub spec: ExpertSpec,
    /// `lora_a` `[r, i]`, `lora_b` `[o, r]` and, for DoRA, `magnitude` `[o]` of each target module,
    /// in f32 on the CPU.
    pub tensors: BTreeMap<(ModulePath, &'static str), Tensor>,
}

/// Keys that [`check_options`] ignores. They do not change the update, except for `layers_pattern`
/// and `peft_type`, which are read elsewhere.
const IDLE_KEYS: [&str; 14] = [
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "eva_config",
];

/// Keys that are read, and `loftq_config`, which counts only with an `init_lora_weights` that is
/// refused.
const READ_KEYS: [&str; 13] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
    "loftq_config",
];

/// Reads an adapter for a base.
///
/// # Errors
/// A `peft_type` other than `LORA`, an option that changes the update in a way that dylora does not
/// support, and a tensor that is missing, extra or of another shape than the config and the base
/// imply. Each is named.
pub fn read(config: &Path, weights: &Path, base: &DecoderSpec) -> Result<Adapter> {
    output::check_sum(config)?;
    output::check_sum(weights)?;
    let parse = || {
        let text = fs_err::read_to_string(config)?;
        let json: Map<String, Value> =
            serde_json::from_str(&text).context("is not a JSON object")?;
        spec_of(&json, base)
    };
    let spec = parse().with_context(|| format!("in `{}`", config.display()))?;
    let tensors = read_tensors(weights)?;
    let tensors =
        named(&spec, tensors, base).with_context(|| format!("in `{}`", weights.display()))?;
    Ok(Adapter { spec, tensors })
}

fn spec_of(json: &Map<String, Value>, base: &DecoderSpec) -> Result<ExpertSpec> {
    let get = |key: &str| json.get(key).filter(|value| !value.is_null());
    let peft_type = get("peft_type").and_then(Value::as_str).unwrap_or("absent");
    if peft_type != "LORA" {
        bail!("`peft_type` must be `LORA`, got `{peft_type}`");
    }
    check_options(json)?;
    let flag = |key: &str| match get(key) {
        None => Ok(false),
        Some(value) => value.as_bool().with_context(|| format!("`{key}` must be true or false")),
    };
    let rank = get("r").map_or(Some(8), Value::as_i64);
    let alpha = get("lora_alpha").map_or(Some(8.0), Value::as_f64);
    let rank_pattern = patterns(get("rank_pattern"), "rank_pattern")?;
    let alpha_pattern = patterns(get("alpha_pattern"), "alpha_pattern")?;
    let targets = Targets::new(json, base)?;
    let mut modules = BTreeMap::new();
    for layer in 0..base.num_layers as usize {
        for &module in base.modules() {
            let path = ModulePath { layer, module };
            if !targets.contain(path)? {
                continue;
            }
            let name = base.names().module(path);
            let rank = match find(&rank_pattern, &name)? {
                Some(value) => value.as_i64(),
                None => rank,
            };
            let alpha = match find(&alpha_pattern, &name)? {
                Some(value) => value.as_f64(),
                None => alpha,
            };
            let rank = rank.filter(|&rank| rank >= 1);
            let rank = rank.with_context(|| format!("the rank of `{path}` must be at least 1"))?;
            let alpha = alpha.filter(|&alpha| alpha.is_finite() && alpha > 0.0);
            let alpha =
                alpha.with_context(|| format!("the alpha of `{path}` must be a number above 0"))?;
            modules.insert(path, RankAlpha { rank, alpha });
        }
    }
    if modules.is_empty() {
        let family = base.family.name();
        bail!("`target_modules` matches no linear layer of the base, a `{family}`");
    }
    let tokens = get("alora_invocation_tokens").cloned().unwrap_or(json!([]));
    Ok(ExpertSpec {
        modules,
        use_rslora: flag("use_rslora")?,
        use_dora: flag("use_dora")?,
        init: LoraInit::Default,
        trainable: true,
        alora_invocation_tokens: serde_json::from_value(tokens)
            .context("`alora_invocation_tokens` must be a list of token ids")?,
        shared: false,
    })
}

/// Refuses options that change the update in a way that dylora does not support.
fn check_options(json: &Map<String, Value>) -> Result<()> {
    let init = json.get("init_lora_weights").unwrap_or(&Value::Bool(true));
    match init {
        Value::Bool(_) | Value::Null => {}
        Value::String(name) if ["gaussian", "orthogonal", "eva"].contains(&name.as_str()) => {}
        _ => bail!(
            "`init_lora_weights` is {init}, which changed the base as well\nhint: save the adapter \
             with PEFT's `path_initial_model_for_weight_conversion`, which makes it plain LoRA"
        ),
    }
    let bias = json.get("bias").and_then(Value::as_str).unwrap_or("none");
    if bias != "none" {
        bail!("`bias` must be `none`, got `{bias}`: the base's biases are frozen");
    }
    for (key, value) in json {
        let is_default = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            _ => false,
        };
        let known = IDLE_KEYS.contains(&key.as_str()) || READ_KEYS.contains(&key.as_str());
        if !known && !is_default {
            bail!("`{key}` is {value}, which dylora does not know how to apply");
        }
    }
    Ok(())
}

fn patterns(value: Option<&Value>, key: &str) -> Result<Map<String, Value>> {
    match value {
        None => Ok(Map::new()),
        Some(Value::Object(entries)) => Ok(entries.clone()),
        Some(other) => bail!("`{key}` must be an object, got {other}"),
    }
}

/// The value of the first pattern that matches a module's full name, by the rule of PEFT's
/// `get_pattern_key`.
fn find(patterns: &Map<String, Value>, name: &str) -> Result<Option<Value>> {
    for (key, value) in patterns {
        if matches(&format!(r"^(?:.*\.)?(?:{key})$"), name, key)? {
            return Ok(Some(value.clone()));
        }
    }
    Ok(None)
}

fn matches(pattern: &str, name: &str, key: &str) -> Result<bool> {
    let invalid = || anyhow!("`{key}` is no pattern that can be matched");
    let regex = Regex::new(pattern).map_err(|_| invalid())?;
    regex.is_match(name).map_err(|_| invalid())
}

/// Which modules an adapter targets, by the rules of PEFT's `check_target_module_exists`.
struct Targets<'a> {
    base: &'a DecoderSpec,
    target_modules: &'a Value,
    exclude_modules: &'a Value,
    layers: Option<Vec<i64>>,
    layers_pattern: Vec<String>,
}

impl<'a> Targets<'a> {
    fn new(json: &'a Map<String, Value>, base: &'a DecoderSpec) -> Result<Self> {
        let get = |key: &str| json.get(key).unwrap_or(&Value::Null);
        let target_modules = get("target_modules");
        if target_modules.is_null() {
            bail!("`target_modules` is absent\nhint: PEFT writes it when it saves an adapter");
        }
        let list = |value: &Value| match value {
            Value::String(text) if text.is_empty() => vec![],
            Value::Number(_) | Value::String(_) => vec![value.clone()],
            Value::Array(items) => items.clone(),
            _ => vec![],
        };
        let layers = list(get("layers_to_transform"));
        if target_modules.is_string() && !layers.is_empty() {
            bail!("`layers_to_transform` is not for a `target_modules` that is a string");
        }
        let layers: Option<Vec<i64>> = layers.iter().map(Value::as_i64).collect();
        let layers = layers.context("`layers_to_transform` must be numbers of layers")?;
        let layers_pattern = list(get("layers_pattern")).into_iter();
        Ok(Self {
            base,
            target_modules,
            exclude_modules: get("exclude_modules"),
            layers: (!layers.is_empty()).then_some(layers),
            layers_pattern: layers_pattern.filter_map(|p| p.as_str().map(str::to_owned)).collect(),
        })
    }

    fn contain(&self, path: ModulePath) -> Result<bool> {
        let name = self.base.names().module(path);
        if name_is_in(self.exclude_modules, &name, "exclude_modules")? {
            return Ok(false);
        }
        if self.target_modules.as_str().is_some_and(|text| text.to_lowercase() == "all-linear") {
            return Ok(true);
        }
        if !name_is_in(self.target_modules, &name, "target_modules")? {
            return Ok(false);
        }
        // PEFT takes a module that is named in full even if `layers_to_transform` lacks its layer
        let is_name = |item: &Value| item.as_str() == Some(&name);
        if self.target_modules.as_array().is_some_and(|items| items.iter().any(is_name)) {
            return Ok(true);
        }
        let Some(layers) = &self.layers else { return Ok(true) };
        for pattern in &self.layers_pattern {
            if matches(&format!(r"^(?:.*?\.)?{pattern}\.\d+\."), &name, pattern)? {
                return Ok(layers.contains(&(path.layer as i64)));
            }
        }
        Ok(self.layers_pattern.is_empty() && layers.contains(&(path.layer as i64)))
    }
}

/// Whether `value` names the module `name`. A regular expression must match all of it; an item of a
/// list must be all of it or its end after a dot.
fn name_is_in(value: &Value, name: &str, key: &str) -> Result<bool> {
    match value {
        Value::Null => Ok(false),
        Value::String(pattern) => matches(&format!("^(?:{pattern})$"), name, pattern),
        Value::Array(items) => {
            let ends = |item: &str| name == item || name.ends_with(&format!(".{item}"));
            Ok(items.iter().filter_map(Value::as_str).any(ends))
        }
        other => bail!("`{key}` must be a list or a regular expression, got {other}"),
    }
}

/// PEFT's name, dylora's key and the shape of each tensor of an adapter with this spec.
fn expected(
    spec: &ExpertSpec,
    base: &DecoderSpec,
) -> Vec<(String, (ModulePath, &'static str), Vec<i64>)> {
    let mut all = vec![];
    for (&path, size) in &spec.modules {
        let (i, o) = base.linear_shape(path.module);
        let mut add = |name: &str, key, shape| {
            let name = format!("base_model.model.{}.{name}", base.names().module(path));
            all.push((name, (path, key), shape));
        };
        add("lora_A.weight", "lora_a", vec![size.rank, i]);
        add("lora_B.weight", "lora_b", vec![o, size.rank]);
        if spec.use_dora {
            add("lora_magnitude_vector", "magnitude", vec![o]);
        }
    }
    all
}

/// Checks that `tensors`, by PEFT's names, are those of a spec, and returns them in f32 under
/// dylora's keys.
fn named(
    spec: &ExpertSpec,
    mut tensors: BTreeMap<String, Tensor>,
    base: &DecoderSpec,
) -> Result<BTreeMap<(ModulePath, &'static str), Tensor>> {
    let mut named = BTreeMap::new();
    for (name, key, shape) in expected(spec, base) {
        let Some(tensor) = tensors.remove(&name) else { bail!("tensor `{name}` is missing") };
        if tensor.size() != shape {
            bail!(
                "tensor `{name}` must be {shape:?} by the adapter's config and the base, got {:?}",
                tensor.size()
            );
        }
        check_numbers(&name, &tensor)?;
        named.insert(key, tensor.to_kind(Kind::Float));
    }
    match tensors.keys().next() {
        Some(name)
            if ["lm_head", "embed", ".wte", ".wpe"].iter().any(|part| name.contains(part)) =>
        {
            bail!(
                "tensor `{name}` is of the head or an embedding, which no expert is on\nhint: \
                 experts are on the linear layers of blocks"
            )
        }
        Some(name) => bail!("tensor `{name}` is of no target module of the adapter's config"),
        None => Ok(named),
    }
}

impl Adapter {
    /// An expert of a model as an adapter on the CPU. An expert with PiSSA or OLoRA becomes plain
    /// LoRA of twice the rank.
    pub(crate) fn of_model(model: &RoutedModel, expert: usize) -> Self {
        let spec = model.specs()[expert].clone();
        let (mut tensors, mut initial) = (BTreeMap::new(), BTreeMap::new());
        for (path, experts) in model.modules() {
            let mut parts: BTreeMap<&str, Tensor> = BTreeMap::new();
            for part in experts.tensors().into_iter().filter(|part| part.expert == expert) {
                parts.insert(part.key, part.tensor.to_device(Device::Cpu).contiguous());
            }
            if let (Some(a), Some(b)) = (parts.remove("initial_a"), parts.remove("initial_b")) {
                initial.insert(path, (a, b));
            }
            for key in ["lora_a", "lora_b", "magnitude"] {
                tensors.extend(parts.remove(key).map(|tensor| ((path, key), tensor)));
            }
        }
        let adapter = Self { spec, tensors };
        if initial.is_empty() { adapter } else { adapter.without_start(&initial) }
    }

    /// The tensors with PEFT's names.
    pub fn peft_tensors(&self, base: &DecoderSpec) -> BTreeMap<String, Tensor> {
        let expected = expected(&self.spec, base).into_iter();
        expected.map(|(name, key, _)| (name, self.tensors[&key].shallow_clone())).collect()
    }

    /// Turns the update `s (B A - B0 A0)` of PiSSA or OLoRA into plain LoRA of twice the rank, as
    /// PEFT's `subtract_mutated_init` does.
    ///
    /// - `initial`: the initial values `A0`, `[r, i]`, and `B0`, `[o, r]`, of each module
    fn without_start(mut self, initial: &BTreeMap<ModulePath, (Tensor, Tensor)>) -> Self {
        for (path, size) in &mut self.spec.modules {
            let Some((a0, b0)) = initial.get(path) else { continue };
            let part = |key| self.tensors[&(*path, key)].shallow_clone();
            let (a, b) = (part("lora_a"), part("lora_b").tr());
            let start = Some((a0.shallow_clone(), b0.tr()));
            let (a, b) = Delta { a, b, start }.plain();
            let b = b.tr().contiguous();
            self.tensors.insert((*path, "lora_a"), a);
            self.tensors.insert((*path, "lora_b"), b);
            size.rank *= 2;
            size.alpha *= if self.spec.use_rslora { 2f64.sqrt() } else { 2.0 };
        }
        self.spec.init = LoraInit::Default;
        self
    }
}

/// The `adapter_config.json` of a spec. Its `init` must be the default.
///
/// - `base_name`, `revision`: the name and revision by which `from_pretrained` finds the base
/// - `dropout`: the dropout of the training
pub fn config_json(
    spec: &ExpertSpec,
    base: &DecoderSpec,
    base_name: &str,
    revision: Option<&str>,
    dropout: f64,
) -> Value {
    let first = *spec.modules.values().next().expect("an expert has a target module");
    let pattern = |value: &dyn Fn(&RankAlpha) -> Value| {
        let differing = |size: &RankAlpha| value(size) != value(&first);
        let mut entries = Map::new();
        for module in spec.target_modules() {
            let paths = || spec.modules.iter().filter(|(path, _)| path.module == module);
            let mut values: Vec<Value> = paths().map(|(_, size)| value(size)).collect();
            values.dedup();
            if values.len() == 1 {
                if values[0] != value(&first) {
                    entries.insert(module.name().to_owned(), values.remove(0));
                }
                continue;
            }
            for (path, size) in paths().filter(|(_, size)| differing(size)) {
                entries.insert(base.names().module(*path), value(size));
            }
        }
        Value::Object(entries)
    };
    let modules = spec.target_modules();
    let is_everywhere = spec.modules.len() == modules.len() * base.num_layers as usize;
    let target_modules: Vec<String> = match is_everywhere {
        true => modules.iter().map(|module| module.name().to_owned()).collect(),
        false => spec.modules.keys().map(|&path| base.names().module(path)).collect(),
    };
    let tokens = &spec.alora_invocation_tokens;
    json!({
        "alora_invocation_tokens": (!tokens.is_empty()).then_some(tokens),
        "alpha_pattern": pattern(&|size| number(size.alpha)),
        "base_model_name_or_path": base_name,
        "bias": "none",
        // GPT-2's Conv1D stores its weight as [in, out], the other families as [out, in]
        "fan_in_fan_out": base.family == Family::Gpt2,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": number(first.alpha),
        "lora_dropout": dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": first.rank,
        "rank_pattern": pattern(&|size| json!(size.rank)),
        "revision": revision,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    })
}

/// A number as JSON. A whole number has no decimal point, as PEFT's `lora_alpha` is an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}
