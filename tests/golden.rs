//! Agreement with transformers and PEFT, and which files of a base are read or refused.
//!
//! Reference: transformers 5.17.0 and PEFT 0.21.2 in float64, by `scripts/make_golden.py` and
//! `scripts/make_golden_families.py`.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use common::{
    assert_close, assert_same_gradients, golden_path, gradients, max_difference, plain_router,
    unstack,
};
use dylora::config::{LoraConfig, RouterConfig, TargetModule};
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::families::{self, load};
use dylora::model::loss::LossSettings;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{ForwardMode, Inputs, Recorder, RoutedModel, RoutingSource, Rows};
use dylora::tensor_file::{read_tensors, write_tensors};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Largest differences allowed in each dtype.
const TOLERANCES: [(Kind, f64); 2] = [(Kind::Double, 1e-10), (Kind::Float, 1e-5)];

/// The spec and the tensor files of a base in `tests/golden`, laid out as on the Hub.
fn base_files(name: &str) -> (DecoderSpec, Vec<PathBuf>) {
    let config =
        families::read_spec(&golden_path(&format!("{name}.config.json"))).expect("it is valid");
    let whole = golden_path(&format!("{name}.safetensors"));
    let shard = |i| golden_path(&format!("{name}-{i:05}-of-00002.safetensors"));
    let files = if whole.exists() { vec![whole] } else { vec![shard(1), shard(2)] };
    (config, files)
}

fn inputs(tensors: &BTreeMap<String, Tensor>) -> Result<Inputs> {
    let (b, t) = tensors["input_ids"].size2()?;
    let host = |tensor: &Tensor| Vec::<i64>::try_from(tensor.view([-1]));
    let labels = match tensors.get("labels") {
        Some(labels) => host(labels)?,
        None => vec![-100; (b * t) as usize],
    };
    let rows = Rows {
        num_rows: b as usize,
        seq_len: t as usize,
        input_ids: &host(&tensors["input_ids"])?,
        labels: &labels,
        position_ids: &(0..b).flat_map(|_| 0..t).collect::<Vec<_>>(),
        document_ids: &vec![0; (b * t) as usize],
        expert_ids: None,
        prompt: None,
    };
    Ok(Inputs::new(rows, Device::Cpu))
}

fn base_matches_transformers(name: &str) -> Result<()> {
    let (config, files) = base_files(name);
    let golden = read_tensors(&golden_path(&format!("{name}.expected.safetensors")))?;
    let inputs = inputs(&golden)?;
    for (kind, tolerance) in TOLERANCES {
        let base = load::read(&config, &files, kind)?;
        let model = RoutedModel::plain(&base, Device::Cpu, kind, false);
        let mut recorder = Recorder::default();
        let output =
            model.forward(&inputs, &RoutingSource::Router, ForwardMode::EVAL, Some(&mut recorder));
        let logits = model.logits(&output.hidden);
        assert_eq!(logits.kind(), kind);
        assert_close(&format!("logits of `{name}`"), &logits, &golden["logits"], tolerance);
        assert_eq!(recorder.hidden_states.len() as i64, config.num_layers + 1);
        for (i, hidden) in recorder.hidden_states.iter().enumerate() {
            let what = format!("hidden_states.{i}");
            assert_close(&what, hidden, &golden[&what], tolerance);
        }
    }
    Ok(())
}

#[test]
fn tied_gpt2_matches_transformers() -> Result<()> {
    base_matches_transformers("gpt2_tied")
}

#[test]
fn untied_head_and_exact_gelu_match_transformers() -> Result<()> {
    base_matches_transformers("gpt2_untied_exact_gelu")
}

/// Its file is like that of OpenAI's GPT-2: it has mask buffers, and names without the prefix
/// `transformer.`.
#[test]
fn attention_scaled_by_layer_matches_transformers() -> Result<()> {
    base_matches_transformers("gpt2_inverse_layer_idx")
}

/// Its file stores the tied head.
#[test]
fn unscaled_attention_matches_transformers() -> Result<()> {
    base_matches_transformers("gpt2_unscaled_attention")
}

/// Its tensors are in two files.
#[test]
fn narrow_feed_forward_layer_matches_transformers() -> Result<()> {
    base_matches_transformers("gpt2_narrow_inner")
}

/// Bases of the Llama-like families with every setting that changes the forward pass: biases, head
/// widths, grouped queries, scalings of RoPE, layers without it, windows, norms of queries and
/// keys, tied and untied heads, padded vocabularies, shards and bf16 files.
const FAMILIES: [&str; 15] = [
    "llama",
    "llama_bf16",
    "llama_biases",
    "llama_llama3",
    "llama_shards",
    "llama_yarn",
    "llama_yarn_scaled",
    "mistral",
    "mistral_nemo",
    "qwen2",
    "qwen2_layer_types",
    "qwen3",
    "qwen3_biases",
    "smollm3",
    "smollm3_windows",
];

#[test]
fn llama_like_bases_match_transformers() -> Result<()> {
    for name in FAMILIES {
        base_matches_transformers(&format!("families/{name}")).context(name)?;
    }
    Ok(())
}

/// Experts in `tests/golden`.
struct Experts {
    /// The base that they are on.
    base: String,
    lora: LoraConfig,
    router: RouterConfig,
    /// The label smoothing of further losses, if there are any.
    label_smoothing: Option<f64>,
    tensors: BTreeMap<String, Tensor>,
}

impl Experts {
    /// Those of GPT-2 on the base `gpt2_tied`, and those of each Llama-like base.
    fn all() -> impl Iterator<Item = (String, Result<Self>)> {
        let families = FAMILIES.map(|name| format!("families/{name}.experts"));
        let names = GPT2_EXPERTS.into_iter().map(str::to_owned).chain(families);
        names.map(|name| (name.clone(), Self::read(&name)))
    }

    fn read(name: &str) -> Result<Self> {
        let path = golden_path(&format!("{name}.safetensors"));
        let bytes = fs_err::read(&path)?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
        let settings = header.metadata().clone().expect("the script writes metadata");
        let setting = |key: &str| serde_json::from_str::<Value>(&settings[key]);
        let number = |key: &str| anyhow::Ok(setting(key)?.as_f64().expect("it is a number"));
        let has = |key: &str| settings.contains_key(key);
        let lora = LoraConfig {
            num_experts: 3,
            rank: number("rank")? as i64,
            alpha: number("alpha")?,
            target_modules: serde_json::from_value(setting("target_modules")?)?,
            use_rslora: has("use_rslora") && setting("use_rslora")? == true,
            ..LoraConfig::default()
        };
        let router = RouterConfig { temperature: number("temperature")?, ..plain_router() };
        let smoothing = has("label_smoothing").then(|| number("label_smoothing"));
        let base = name.strip_suffix(".experts").unwrap_or("gpt2_tied").to_owned();
        let tensors = read_tensors(&path)?;
        Ok(Self { base, lora, router, label_smoothing: smoothing.transpose()?, tensors })
    }

    fn model(&self, top_k: Option<i64>, kind: Kind) -> Result<RoutedModel> {
        // more threads than one only wait for each other in models this small
        tch::set_num_threads(1);
        let (config, files) = base_files(&self.base);
        let base = load::read(&config, &files, kind)?;
        let router = RouterConfig { top_k, ..self.router.clone() };
        let specs = ExpertSpec::all(&self.lora, &config)?;
        let is_trained =
            |name: &str| ["h.", "layers.", "router."].iter().any(|part| name.starts_with(part));
        let parameters = self.tensors.iter().filter(|(name, _)| is_trained(name));
        let stacks = parameters.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        RoutedModel::from_tensors(
            &base,
            &specs,
            &RouterSpec::from(&router),
            &unstack(&stacks),
            Device::Cpu,
            kind,
        )
    }

    /// The tensors whose names start with `prefix`, by the rest of their names.
    fn under(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let strip = |name: &str| name.strip_prefix(prefix).map(str::to_owned);
        let tensors = self.tensors.iter();
        tensors.filter_map(|(name, t)| Some((strip(name)?, t.shallow_clone()))).collect()
    }
}

/// The largest element, or 1 if that is larger. Rounding errors grow with it.
fn scale(expected: &Tensor) -> f64 {
    expected.abs().max().double_value(&[]).max(1.0)
}

/// The gradients of all experts of a module in one tensor, as the golden files have them. In f32,
/// the gradient of an expert that few tokens choose is compared on the scale of its neighbours'.
fn stacked(gradients: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut stacks: BTreeMap<String, Vec<&Tensor>> = BTreeMap::new();
    for (name, tensor) in gradients {
        let parts = name.split('.').filter(|part| !part.starts_with("expert_"));
        stacks.entry(parts.collect::<Vec<_>>().join(".")).or_default().push(tensor);
    }
    let stack = |(name, tensors): (String, Vec<&Tensor>)| {
        let is_expert = name.contains(".lora_");
        let tensor =
            if is_expert { Tensor::stack(&tensors, 0) } else { tensors[0].shallow_clone() };
        (name, tensor)
    };
    stacks.into_iter().map(stack).collect()
}

const GPT2_EXPERTS: [&str; 2] = ["experts_c_attn", "experts_all_linears"];

#[test]
fn each_expert_alone_matches_its_peft_adapter() -> Result<()> {
    for (name, golden) in Experts::all() {
        let golden = golden.with_context(|| name.clone())?;
        let inputs = inputs(&golden.tensors)?;
        for (kind, tolerance) in TOLERANCES {
            let model = golden.model(None, kind)?;
            for expert in 0..3 {
                let logits = common::logits(&model, &inputs, &RoutingSource::Expert(expert));
                let expected = &golden.tensors[&format!("logits.expert_{expert}")];
                let what = format!("{name}, expert {expert}");
                assert_close(&what, &logits, expected, tolerance * scale(expected));
            }
        }
    }
    Ok(())
}

#[test]
fn given_routing_weights_mix_peft_adapters_per_token() -> Result<()> {
    for (name, golden) in Experts::all() {
        let golden = golden.with_context(|| name.clone())?;
        let inputs = inputs(&golden.tensors)?;
        for (kind, tolerance) in TOLERANCES {
            let model = golden.model(None, kind)?;
            let given = RoutingSource::Given(golden.tensors["given.weights"].shallow_clone());
            let logits = common::logits(&model, &inputs, &given);
            let expected = &golden.tensors["given.logits"];
            assert_close(&name, &logits, expected, tolerance * scale(expected));
        }
    }
    Ok(())
}

/// Compares the logits, the loss and every gradient, with dense and top-2 routing, with and without
/// label smoothing.
#[test]
fn routed_experts_match_peft_adapters_and_torch_autograd() -> Result<()> {
    for (name, golden) in Experts::all() {
        let golden = golden.with_context(|| name.clone())?;
        let inputs = inputs(&golden.tensors)?;
        for (kind, tolerance) in TOLERANCES {
            for (prefix, top_k) in [("dense", None), ("top_2", Some(2))] {
                let what = |part: &str| format!("{part} of `{name}`, {prefix}, {kind:?}");
                let expected = golden.under(&format!("{prefix}."));
                let model = golden.model(top_k, kind)?;
                let [routing] = &model.routing(&inputs, ForwardMode::EVAL)[..] else {
                    panic!("one router for all layers")
                };
                assert_close(&what("probs"), &routing.probs, &expected["probs"], tolerance);
                assert_close(&what("weights"), &routing.weights, &expected["weights"], tolerance);
                let logits = common::logits(&model, &inputs, &RoutingSource::Router);
                let tolerance_of_logits = tolerance * scale(&expected["logits"]);
                assert_close(&what("logits"), &logits, &expected["logits"], tolerance_of_logits);
                let smoothed = golden.label_smoothing.map(|smoothing| ("smoothed_", smoothing));
                for (smoothed, label_smoothing) in [("", 0.0)].into_iter().chain(smoothed) {
                    let settings = LossSettings {
                        label_smoothing,
                        ..common::mean_loss(inputs.labels.size()[0])
                    };
                    let router = &RoutingSource::Router;
                    let (loss, _) = model.loss(&inputs, router, ForwardMode::EVAL, settings);
                    let expected_loss = &expected[&format!("{smoothed}loss")];
                    assert_close(&what("loss"), &loss.loss, expected_loss, tolerance);
                    let expected = golden.under(&format!("{prefix}.{smoothed}grad."));
                    let found = gradients(&model, &loss.loss);
                    match kind {
                        Kind::Double => {
                            assert_same_gradients(&found, &unstack(&expected), tolerance);
                        }
                        _ => assert_same_gradients(&stacked(&found), &expected, tolerance),
                    }
                }
            }
        }
    }
    Ok(())
}

/// The tolerance is larger here, since transformers computes this loss in float32.
#[test]
fn load_balancing_loss_matches_mixtrals() -> Result<()> {
    for name in GPT2_EXPERTS {
        let golden = Experts::read(name)?;
        let inputs = inputs(&golden.tensors)?;
        let routing = golden.model(Some(2), Kind::Double)?.routing(&inputs, ForwardMode::EVAL);
        let mut totals = vec![];
        common::add_of_one_domain(&mut totals, &routing, &inputs.labelled);
        let loss = Tensor::from(common::losses_of(&totals).load_balancing_loss);
        assert_close(name, &loss, &golden.tensors["top_2.load_balancing_loss"], 1e-6);
    }
    Ok(())
}

/// A copy of the tensors of `gpt2_tied` that a test spoils, and a folder to write them to.
struct Spoiled {
    folder: tempfile::TempDir,
    config: DecoderSpec,
    tensors: BTreeMap<String, Tensor>,
}

impl Spoiled {
    fn new() -> Result<Self> {
        let (config, files) = base_files("gpt2_tied");
        Ok(Self { folder: tempfile::tempdir()?, config, tensors: read_tensors(&files[0])? })
    }

    fn write(&self, file: &str, keep: impl Fn(&str) -> bool) -> Result<PathBuf> {
        let path = self.folder.path().join(file);
        let kept = self.tensors.iter().filter(|(name, _)| keep(name));
        write_tensors(&path, kept.map(|(name, tensor)| (name.as_str(), tensor)))?;
        Ok(path)
    }

    /// The message of the refusal, without the folder's path.
    fn refusal(&self) -> Result<String> {
        let file = self.write("model.safetensors", |_| true)?;
        Ok(refusal(&self.config, &[file], self.folder.path()))
    }
}

fn refusal(config: &DecoderSpec, files: &[PathBuf], folder: &Path) -> String {
    let error = load::read(config, files, Kind::Float).expect_err("the files are spoiled");
    format!("{error:#}").replace(&format!("{}/", folder.display()), "").replace(CONFIG_HINT, "")
}

/// How errors about tensors end that are not those of the config.
const CONFIG_HINT: &str = "\nhint: the shapes follow from `config.json`, in which an absent key \
                           has the family's default; do both files belong together?";

#[test]
fn tensors_that_the_config_does_not_imply_point_to_the_config() -> Result<()> {
    let (_, files) = base_files("gpt2_tied");
    for changed in [json!({"n_embd": 32}), json!({"n_layer": 1}), json!({"n_layer": 3})] {
        let mut config = json!({
            "model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 32,
            "vocab_size": 61,
        });
        let changed = changed.as_object().expect("the cases are objects").clone();
        config.as_object_mut().expect("it is an object").extend(changed);
        let spec = families::from_json(&config)?;
        let error = load::read(&spec, &files, None).expect_err("the config is another");
        assert!(format!("{error:#}").ends_with(CONFIG_HINT), "{error:#}");
    }
    Ok(())
}

#[test]
fn half_precision_files_are_read_into_the_kind_asked_for() -> Result<()> {
    for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
        let mut spoiled = Spoiled::new()?;
        for tensor in spoiled.tensors.values_mut() {
            *tensor = tensor.to_kind(kind);
        }
        let file = spoiled.write("model.safetensors", |_| true)?;
        let base = load::read(&spoiled.config, &[file], Kind::Float)?;
        for (name, tensor) in base.named_parameters() {
            assert_eq!(tensor.kind(), Kind::Float);
            assert_eq!(max_difference(&tensor, &spoiled.tensors[&name]), 0.0, "{kind:?} `{name}`");
        }
    }
    Ok(())
}

#[test]
fn names_with_and_without_prefix_are_the_same_base() -> Result<()> {
    let mut bare = Spoiled::new()?;
    let hash = |spoiled: &Spoiled, file| load::read(&spoiled.config, &[file], Kind::Float)?.hash();
    let with_prefix = hash(&bare, bare.write("with_prefix.safetensors", |_| true)?)?;
    let strip = |name: String| name.strip_prefix("transformer.").expect("all have it").to_owned();
    bare.tensors =
        std::mem::take(&mut bare.tensors).into_iter().map(|(n, t)| (strip(n), t)).collect();
    bare.tensors
        .insert("h.0.attn.bias".into(), Tensor::ones([1, 1, 32, 32], (Kind::Bool, Device::Cpu)));
    bare.tensors.insert("h.1.attn.masked_bias".into(), Tensor::from(-1e4f32));
    assert_eq!(hash(&bare, bare.write("bare.safetensors", |_| true)?)?, with_prefix);
    Ok(())
}

/// The file of OpenAI's GPT-2 on the Hub is such a file: its header is 14283 bytes long.
#[test]
fn numbers_that_are_not_aligned_in_their_file_are_the_same_base() -> Result<()> {
    let spoiled = Spoiled::new()?;
    let file = spoiled.write("model.safetensors", |_| true)?;
    let read = |file| load::read(&spoiled.config, &[file], Kind::Float);
    let expected = read(file.clone())?.hash()?;
    let bytes = fs_err::read(&file)?;
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into()?))?;
    for spaces in 1..=8 {
        let shifted = spoiled.folder.path().join(format!("{spaces}.safetensors"));
        let length = (header + spaces).to_le_bytes();
        let (text, numbers) = bytes[8..].split_at(header);
        fs_err::write(&shifted, [&length, text, &b"        "[..spaces], numbers].concat())?;
        let base = read(shifted)?;
        assert_eq!(base.hash()?, expected, "{spaces} spaces");
        let element = Kind::Float.elt_size_in_bytes();
        assert_eq!(base.embedding.data_ptr() as usize % element, 0, "{spaces} spaces");
    }
    Ok(())
}

#[test]
fn a_base_is_a_copy_of_its_mapped_file() -> Result<()> {
    let spoiled = Spoiled::new()?;
    let file = spoiled.write("model.safetensors", |_| true)?;
    let bytes = fs_err::read(&file)?;
    let read = || load::read(&spoiled.config, std::slice::from_ref(&file), Kind::Float);
    let (mut written, kept) = (read()?, read()?);
    let hash = kept.hash()?;
    let _ = tch::no_grad(|| written.embedding.fill_(1.0));
    assert_ne!(written.hash()?, hash);
    assert_eq!(kept.hash()?, hash);
    assert!(fs_err::read(&file)? == bytes, "the file has changed");
    drop(spoiled);
    assert_eq!(kept.hash()?, hash, "the file is gone");
    Ok(())
}

#[test]
fn missing_extra_misshapen_and_doubled_tensors_are_named() -> Result<()> {
    let mut spoiled = Spoiled::new()?;
    spoiled.tensors.remove("transformer.h.1.mlp.c_fc.bias");
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"`model.safetensors` lacks tensor `transformer.h.1.mlp.c_fc.bias`"
    );
    spoiled.tensors.retain(|name, _| !name.contains(".ln_"));
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"`model.safetensors` lacks tensor `transformer.h.0.ln_1.bias` and 10 more"
    );

    let mut spoiled = Spoiled::new()?;
    let spare = spoiled.tensors["transformer.h.1.ln_1.weight"].shallow_clone();
    spoiled.tensors.insert("transformer.h.2.ln_1.weight".into(), spare);
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"in `model.safetensors`: tensor `transformer.h.2.ln_1.weight` belongs to no `gpt2` of \
          2 layers"
    );

    let mut spoiled = Spoiled::new()?;
    let name = "transformer.h.0.attn.c_attn.weight";
    let linear_layout = spoiled.tensors[name].tr().contiguous();
    spoiled.tensors.insert(name.into(), linear_layout);
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"in `model.safetensors`: tensor `transformer.h.0.attn.c_attn.weight` must be [16, 48], \
          got [48, 16]"
    );

    let mut spoiled = Spoiled::new()?;
    let twin = spoiled.tensors["transformer.wpe.weight"].shallow_clone();
    spoiled.tensors.insert("wpe.weight".into(), twin);
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"in `model.safetensors`: tensor `transformer.wpe.weight` is there twice"
    );

    let spoiled = Spoiled::new()?;
    let first = spoiled.write("a.safetensors", |name| !name.contains(".wpe."))?;
    let second = spoiled
        .write("b.safetensors", |name| name.contains(".wpe.") || name.contains("h.1.ln_2.bias"))?;
    let refusal = refusal(&spoiled.config, &[first, second], spoiled.folder.path());
    insta::assert_snapshot!(
        refusal,
        @"in `b.safetensors`: tensor `transformer.h.1.ln_2.bias` is there twice"
    );
    Ok(())
}

#[test]
fn integer_weights_are_refused() -> Result<()> {
    let mut spoiled = Spoiled::new()?;
    let name = "transformer.h.0.mlp.c_fc.bias";
    let integers = spoiled.tensors[name].to_kind(Kind::Int64);
    spoiled.tensors.insert(name.into(), integers);
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"in `model.safetensors`: tensor `transformer.h.0.mlp.c_fc.bias` has dtype `Int64`; use \
          f32, f16 or bf16"
    );
    Ok(())
}

#[test]
fn a_stored_head_must_equal_the_embedding_it_is_tied_to() -> Result<()> {
    let mut spoiled = Spoiled::new()?;
    let head = &spoiled.tensors["transformer.wte.weight"] * 2.0;
    spoiled.tensors.insert("lm_head.weight".into(), head);
    insta::assert_snapshot!(spoiled.refusal()?, @"
    `lm_head.weight` differs from `transformer.wte.weight`, but the config says that the head is \
    tied
    hint: set `\"tie_word_embeddings\": false` in `config.json`
    ");
    spoiled.config.tied_head = false;
    let file = spoiled.write("untied.safetensors", |_| true)?;
    let base = load::read(&spoiled.config, &[file], Kind::Float)?;
    assert_eq!(max_difference(base.head(), &spoiled.tensors["lm_head.weight"]), 0.0);
    spoiled.tensors.remove("lm_head.weight");
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"`model.safetensors` lacks tensor `lm_head.weight`"
    );
    Ok(())
}

#[test]
fn a_cut_file_is_refused() -> Result<()> {
    let spoiled = Spoiled::new()?;
    let file = spoiled.write("model.safetensors", |_| true)?;
    let bytes = fs_err::read(&file)?;
    fs_err::write(&file, &bytes[..bytes.len() - 1])?;
    insta::assert_snapshot!(
        refusal(&spoiled.config, &[file], spoiled.folder.path()),
        @"in `model.safetensors`: `model.safetensors` is no whole safetensors file: incomplete \
          metadata, file not fully covered"
    );
    Ok(())
}

#[test]
fn configs_of_other_architectures_are_refused_by_key() {
    let refusal = |changed: Value| {
        let mut json = json!({"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 16});
        let changed = changed.as_object().expect("the cases are objects").clone();
        json.as_object_mut().expect("it is an object").extend(changed);
        format!("{:#}", families::from_json(&json).expect_err("it is none of ours"))
    };
    insta::assert_snapshot!(refusal(json!({"model_type": "gpt_neox"})), @r"
    the architecture `gpt_neox` (`model_type`) is not supported
    hint: dylora trains `gpt2`, `llama`, `qwen2`, `qwen3`, `smollm3`, `mistral`
    ");
    insta::assert_snapshot!(
        refusal(json!({"activation_function": "relu"})),
        @"`activation_function` must be `gelu_new` or `gelu`, got `relu`"
    );
    insta::assert_snapshot!(
        refusal(json!({"add_cross_attention": true})),
        @"`add_cross_attention` must be false: a decoder alone is supported"
    );
    insta::assert_snapshot!(
        refusal(json!({"n_head": 3})),
        @"`n_embd` must be a multiple of `n_head` 3, got 16"
    );
    insta::assert_snapshot!(
        refusal(json!({"n_layer": 0})),
        @"`n_layer` must be a whole number from 1 to 10000, got 0"
    );
    insta::assert_snapshot!(
        refusal(json!({"tie_word_embeddings": "yes"})),
        @r#"`tie_word_embeddings` must be true or false, got "yes""#
    );
}

#[test]
fn a_config_without_keys_is_gpt2_small() -> Result<()> {
    let config = families::from_json(&json!({"model_type": "gpt2"}))?;
    assert_eq!(config.num_parameters(), 124_439_808);
    assert_eq!(config.linear_shape(TargetModule::MlpCFc), (768, 3072));
    assert!(config.tied_head);
    Ok(())
}

#[test]
fn a_config_survives_writing_and_reading() -> Result<()> {
    for name in ["gpt2_untied_exact_gelu", "gpt2_inverse_layer_idx", "gpt2_narrow_inner"] {
        let (config, _) = base_files(name);
        assert_eq!(families::from_json(&families::to_json(&config, "float32"))?, config);
    }
    Ok(())
}

#[test]
fn tensors_must_fit_the_model() -> Result<()> {
    let golden = Experts::read("experts_c_attn")?;
    let model = golden.model(None, Kind::Float)?;
    let all = || model.tensors();
    let refusal = |tensors| format!("{:#}", model.load(&tensors).expect_err("it is spoiled"));

    let mut tensors = all();
    tensors.remove("router.bias");
    insta::assert_snapshot!(refusal(tensors), @"tensor `router.bias` is missing");
    let mut tensors = all();
    let name = "h.0.attn.c_attn.expert_1.lora_a";
    tensors.insert(name.into(), Tensor::zeros([2, 16], common::DOUBLE));
    insta::assert_snapshot!(
        refusal(tensors),
        @"tensor `h.0.attn.c_attn.expert_1.lora_a` must be [4, 16], got [2, 16]"
    );
    let mut tensors = all();
    let name = "h.0.mlp.c_fc.expert_0.lora_a";
    tensors.insert(name.into(), Tensor::zeros([1], common::DOUBLE));
    insta::assert_snapshot!(
        refusal(tensors),
        @"tensor `h.0.mlp.c_fc.expert_0.lora_a` belongs to no parameter of this model"
    );
    Ok(())
}

/// Reference: transformers' own tables, which it computes in float32 from float32 powers of theta.
#[test]
fn rope_frequencies_match_transformers() -> Result<()> {
    let text = fs_err::read_to_string(golden_path("families/rope.json"))?;
    let cases: Value = serde_json::from_str(&text)?;
    let cases =
        cases.as_array().or_else(|| cases["cases"].as_array()).context("a list of cases")?;
    for case in cases {
        let name = case["name"].as_str().context("each case has a name")?;
        let mut config = case["config"].clone();
        // a fragment without it may contradict the default of 32
        config["num_key_value_heads"] = Value::Null;
        let spec = families::from_json(&config);
        if name == "scaling_and_parameters" {
            let error = format!("{:#}", spec.expect_err("the two spellings disagree"));
            assert!(error.contains("`rope_scaling` and `rope_parameters` disagree"), "{error}");
            continue;
        }
        let spec = spec.with_context(|| name.to_owned())?;
        let rope = spec.rope.as_ref().context("a Llama rotates")?;
        assert_eq!(spec.head_dim, case["head_dim"].as_i64().context("a number")?, "{name}");
        let expected: Vec<f64> = serde_json::from_value(case["inv_freq"].clone())?;
        let found = rope.frequencies(spec.head_dim);
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found / expected - 1.0).abs() < 1e-6, "{name}: {found}, not {expected}");
        }
        let scaling = case["attention_scaling"].as_f64().context("a number")?;
        assert!((rope.attention_factor() - scaling).abs() < 1e-12, "{name}");
    }
    Ok(())
}

#[test]
fn configs_of_all_families_survive_writing_and_reading() -> Result<()> {
    for name in FAMILIES {
        let (spec, _) = base_files(&format!("families/{name}"));
        let written = families::to_json(&spec, "bfloat16");
        assert_eq!(families::from_json(&written).context(name)?, spec, "{name}");
    }
    Ok(())
}

/// Reference: Python's `blake3` 1.0 over, for each parameter, `NAME Float [SHAPE]\n` and its bytes
/// in f32. Checkpoints and exports hold this hash, so it must stay as it is.
#[test]
fn the_hash_of_a_base_is_that_of_its_parameters_in_f32() -> Result<()> {
    for (name, expected) in [
        ("gpt2_tied", "827369e179fafdf0d2603ac6e9a9ebbcf44841d3d9ba6a2d1744fe25559dde1f"),
        ("families/llama_bf16", "b75046a93a85dc6722845602820a88f43ff7740c2d0a1d22cd89242e0f2a5ecb"),
    ] {
        let (spec, files) = base_files(name);
        for kind in [None, Some(Kind::Float), Some(Kind::Double)] {
            let base = load::read(&spec, &files, kind)?;
            assert_eq!(base.hash_in(Kind::Float)?, expected, "{name}, {kind:?}");
        }
    }
    Ok(())
}
