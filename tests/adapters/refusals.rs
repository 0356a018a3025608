//! Adapters that are refused, and the messages.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use dylora::config::AdapterSource;
use dylora::durable::output::{MARKER, Output};
use dylora::export::peft::{Layout, export};
use dylora::mixture::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, Mixture};
use dylora::model::decoder::spec::DecoderSpec;
use dylora::tensor_file::{read_tensors, write_tensors};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::common::{golden_path, gpt2_spec, plain_router, seed, tiny_config, tiny_model};
use crate::{find, lora, message, of_folder, peft_folder, provenance, tied_config};

/// An adapter saved by PEFT that a test spoils.
struct Spoiled {
    base: DecoderSpec,
    config: Map<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

impl Spoiled {
    fn new(name: &str) -> Result<Self> {
        let folder = peft_folder(name);
        Ok(Self {
            base: tied_config()?,
            config: serde_json::from_str(&fs_err::read_to_string(folder.join(ADAPTER_CONFIG))?)?,
            tensors: read_tensors(&folder.join(ADAPTER_WEIGHTS))?,
        })
    }

    fn write(&self, dir: &Path) -> Result<()> {
        fs_err::write(dir.join(ADAPTER_CONFIG), Value::Object(self.config.clone()).to_string())?;
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_tensors(&dir.join(ADAPTER_WEIGHTS), tensors)
    }

    /// The message by which the adapter is refused.
    fn refusal(&self) -> Result<String> {
        let dir = tempfile::tempdir()?;
        self.write(dir.path())?;
        refusal(dir.path(), &self.base)
    }
}

/// The message by which the adapter in `dir` is refused, with `DIR` in place of that path.
fn refusal(dir: &Path, base: &DecoderSpec) -> Result<String> {
    let mixture = Mixture::of_adapters(&[AdapterSource::Path(dir.into())], base, &find);
    Ok(message(&mixture.expect_err("the adapter is spoiled"), dir))
}

/// The message by which an adapter with one changed entry of its config is refused, without the
/// paths.
fn refusal_of(key: &str, value: Value) -> Result<String> {
    let mut spoiled = Spoiled::new("plain")?;
    spoiled.config.insert(key.into(), value);
    Ok(spoiled.refusal()?.replace("cannot import `DIR`: in `DIR/adapter_config.json`: ", ""))
}

/// The messages for several entries, each changed alone, one a line.
fn refusals_of(entries: Value) -> Result<String> {
    let entries = entries.as_object().expect("the cases are an object").clone();
    let messages: Result<Vec<_>> = entries.into_iter().map(|(k, v)| refusal_of(&k, v)).collect();
    Ok(messages?.join("\n"))
}

const LORA_A: &str = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight";

#[test]
fn missing_extra_and_misshapen_tensors_are_named() -> Result<()> {
    let mut spoiled = Spoiled::new("plain")?;
    let tensor = spoiled.tensors.remove(LORA_A).expect("it is there");
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight` is missing"
    );

    let mut spoiled = Spoiled::new("plain")?;
    spoiled.tensors.insert(LORA_A.replace("attn.c_attn", "mlp.c_fc"), tensor.shallow_clone());
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight` is of no target module of the \
          adapter's config"
    );

    let mut spoiled = Spoiled::new("plain")?;
    spoiled.tensors.insert(LORA_A.into(), tensor.tr().contiguous());
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight` must be [4, 16] by the \
          adapter's config and the base, got [16, 4]"
    );

    let mut spoiled = Spoiled::new("plain")?;
    spoiled.config.insert("r".into(), json!(3));
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight` must be [3, 16] by the \
          adapter's config and the base, got [4, 16]"
    );

    let mut spoiled = Spoiled::new("plain")?;
    spoiled.config.insert("use_dora".into(), json!(true));
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector` is missing"
    );
    Ok(())
}

#[test]
fn integers_and_numbers_that_are_not_finite_are_refused() -> Result<()> {
    let mut spoiled = Spoiled::new("plain")?;
    let tensor = spoiled.tensors[LORA_A].shallow_clone();
    spoiled.tensors.insert(LORA_A.into(), tensor.to_kind(Kind::Int64));
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight` has dtype `Int64`; use f32, \
          f16 or bf16"
    );
    let mut messages = vec![];
    for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let spoilt = tensor.copy();
        let _ = spoilt.get(1).get(2).fill_(number);
        spoiled.tensors.insert(LORA_A.into(), spoilt);
        messages.push(spoiled.refusal()?);
    }
    messages.dedup();
    insta::assert_snapshot!(
        messages.join("\n"),
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight` holds numbers that are not \
          finite"
    );
    Ok(())
}

#[test]
fn half_precision_adapters_are_read_as_f32() -> Result<()> {
    let _generator = seed(130);
    for kind in [Kind::Half, Kind::BFloat16, Kind::Double] {
        let mut adapter = Spoiled::new("plain")?;
        for tensor in adapter.tensors.values_mut() {
            *tensor = tensor.to_kind(kind);
        }
        let dir = tempfile::tempdir()?;
        adapter.write(dir.path())?;
        let source = [AdapterSource::Path(dir.path().into())];
        let mixture = Mixture::of_adapters(&source, &adapter.base, &find)?;
        let tensor = &mixture.tensors["h.0.attn.c_attn.expert_0.lora_a"];
        assert_eq!(tensor.kind(), Kind::Float);
        assert!(tensor.equal(&adapter.tensors[LORA_A].to_kind(Kind::Float)), "{kind:?}");
    }
    Ok(())
}

#[test]
fn other_kinds_of_adapter_are_refused() -> Result<()> {
    insta::assert_snapshot!(
        refusal_of("peft_type", json!("IA3"))?,
        @"`peft_type` must be `LORA`, got `IA3`"
    );
    insta::assert_snapshot!(
        refusal_of("peft_type", Value::Null)?,
        @"`peft_type` must be `LORA`, got `absent`"
    );
    Ok(())
}

#[test]
fn options_that_would_change_the_update_are_refused_by_name() -> Result<()> {
    let options = json!({
        "lora_bias": true,
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [5, 7],
        "layer_replication": [[0, 2], [1, 2]],
        "use_qalora": true,
        "target_parameters": ["mlp.c_fc.weight"],
        "arrow_config": { "top_k": 2 },
        "an_option_of_tomorrow": true,
        "a_number_of_tomorrow": 0.5,
        "bias": "all",
    });
    insta::assert_snapshot!(refusals_of(options)?, @r#"
    `lora_bias` is true, which dylora does not know how to apply
    `modules_to_save` is ["lm_head"], which dylora does not know how to apply
    `trainable_token_indices` is [5,7], which dylora does not know how to apply
    `layer_replication` is [[0,2],[1,2]], which dylora does not know how to apply
    `use_qalora` is true, which dylora does not know how to apply
    `target_parameters` is ["mlp.c_fc.weight"], which dylora does not know how to apply
    `arrow_config` is {"top_k":2}, which dylora does not know how to apply
    `an_option_of_tomorrow` is true, which dylora does not know how to apply
    `a_number_of_tomorrow` is 0.5, which dylora does not know how to apply
    `bias` must be `none`, got `all`: the base's biases are frozen
    "#);
    Ok(())
}

#[test]
fn inits_that_changed_the_base_are_refused_with_a_hint() -> Result<()> {
    let messages: Result<Vec<_>> = ["pissa", "pissa_niter_16", "olora", "corda", "loftq"]
        .map(|init| refusal_of("init_lora_weights", json!(init)))
        .into_iter()
        .collect();
    insta::assert_snapshot!(messages?.join("\n"), @"
    `init_lora_weights` is \"pissa\", which changed the base as well
    hint: save the adapter with PEFT's `path_initial_model_for_weight_conversion`, which makes it \
    plain LoRA
    `init_lora_weights` is \"pissa_niter_16\", which changed the base as well
    hint: save the adapter with PEFT's `path_initial_model_for_weight_conversion`, which makes it \
    plain LoRA
    `init_lora_weights` is \"olora\", which changed the base as well
    hint: save the adapter with PEFT's `path_initial_model_for_weight_conversion`, which makes it \
    plain LoRA
    `init_lora_weights` is \"corda\", which changed the base as well
    hint: save the adapter with PEFT's `path_initial_model_for_weight_conversion`, which makes it \
    plain LoRA
    `init_lora_weights` is \"loftq\", which changed the base as well
    hint: save the adapter with PEFT's `path_initial_model_for_weight_conversion`, which makes it \
    plain LoRA
    ");
    Ok(())
}

#[test]
fn modules_that_are_not_there_are_refused() -> Result<()> {
    insta::assert_snapshot!(
        refusal_of("target_modules", json!(["q_proj", "v_proj"]))?,
        @"`target_modules` matches no linear layer of the base, a `gpt2`"
    );
    insta::assert_snapshot!(
        refusal_of("target_modules", json!(".*[24]"))?,
        @"`target_modules` matches no linear layer of the base, a `gpt2`"
    );
    insta::assert_snapshot!(refusal_of("target_modules", Value::Null)?, @r"
    `target_modules` is absent
    hint: PEFT writes it when it saves an adapter
    ");
    insta::assert_snapshot!(
        refusal_of("exclude_modules", json!(["c_attn"]))?,
        @"`target_modules` matches no linear layer of the base, a `gpt2`"
    );
    let mut spoiled = Spoiled::new("layers")?;
    spoiled.config.insert("layers_pattern".into(), json!("layers"));
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_config.json`: `target_modules` matches no linear \
          layer of the base, a `gpt2`"
    );
    spoiled.config.insert("layers_pattern".into(), json!("h"));
    spoiled.config.insert("layers_to_transform".into(), json!([2]));
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_config.json`: `target_modules` matches no linear \
          layer of the base, a `gpt2`"
    );
    Ok(())
}

#[test]
fn patterns_that_cannot_be_matched_are_refused() -> Result<()> {
    let patterns = json!({
        "target_modules": ".*(c_attn",
        "exclude_modules": "[",
        "rank_pattern": { "(c_attn": 4 },
        "alpha_pattern": { "*": 4 },
    });
    insta::assert_snapshot!(refusals_of(patterns)?, @r"
    `.*(c_attn` is no pattern that can be matched
    `[` is no pattern that can be matched
    `(c_attn` is no pattern that can be matched
    `*` is no pattern that can be matched
    ");
    let mut spoiled = Spoiled::new("layers")?;
    spoiled.config.insert("layers_pattern".into(), json!("h("));
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_config.json`: `h(` is no pattern that can be matched"
    );
    Ok(())
}

#[test]
fn values_of_another_type_are_refused() -> Result<()> {
    let values = json!({
        "r": 0,
        "lora_alpha": "sixteen",
        "rank_pattern": { "c_attn": 1.5 },
        "alpha_pattern": [8],
        "target_modules": 3,
        "layers_to_transform": ["one"],
        "use_rslora": "yes",
        "alora_invocation_tokens": "[INST]",
    });
    insta::assert_snapshot!(refusals_of(values)?, @"
    the rank of `h.0.attn.c_attn` must be at least 1
    the alpha of `h.0.attn.c_attn` must be a number above 0
    the rank of `h.0.attn.c_attn` must be at least 1
    `alpha_pattern` must be an object, got [8]
    `target_modules` must be a list or a regular expression, got 3
    `layers_to_transform` must be numbers of layers
    `use_rslora` must be true or false
    `alora_invocation_tokens` must be a list of token ids: invalid type: string \"[INST]\", \
    expected a sequence
    ");
    Ok(())
}

#[test]
fn a_config_that_is_no_object_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let adapter = Spoiled::new("plain")?;
    adapter.write(dir.path())?;
    let said = |text: &str| -> Result<String> {
        fs_err::write(dir.path().join(ADAPTER_CONFIG), text)?;
        refusal(dir.path(), &adapter.base)
    };
    insta::assert_snapshot!(
        said("{\"r\": 4,")?,
        @"cannot import `DIR`: in `DIR/adapter_config.json`: is not a JSON object: EOF while \
          parsing a value at line 1 column 8"
    );
    insta::assert_snapshot!(
        said("[]")?,
        @"cannot import `DIR`: in `DIR/adapter_config.json`: is not a JSON object: invalid type: \
          sequence, expected a map at line 1 column 0"
    );
    Ok(())
}

#[test]
fn an_adapter_of_another_base_is_refused() -> Result<()> {
    let mut spoiled = Spoiled::new("plain")?;
    spoiled.base = gpt2_spec(2, 4, 32);
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.0.attn.c_attn.lora_A.weight` must be [4, 32] by the \
          adapter's config and the base, got [4, 16]"
    );
    let mut spoiled = Spoiled::new("plain")?;
    spoiled.base.num_layers = 1;
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.1.attn.c_attn.lora_A.weight` is of no target module of \
          the adapter's config"
    );
    let mut spoiled = Spoiled::new("plain")?;
    spoiled.base.num_layers = 3;
    insta::assert_snapshot!(
        spoiled.refusal()?,
        @"cannot import `DIR`: in `DIR/adapter_model.safetensors`: tensor \
          `base_model.model.transformer.h.2.attn.c_attn.lora_A.weight` is missing"
    );
    Ok(())
}

#[test]
fn a_folder_without_adapters_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = golden_path("gpt2_tied.config.json");
    fs_err::copy(config, dir.path().join("config.json"))?;
    let refusal = Mixture::of_folder(dir.path(), &tied_config()?, &find);
    let refusal = refusal.expect_err("there is no adapter");
    insta::assert_snapshot!(
        message(&refusal, dir.path()),
        @"`DIR` holds no adapters: there is neither `dylora.json` nor `xlora_config.json` nor \
          `adapter_config.json`"
    );
    let absent = dir.path().join("absent");
    let refusal = Mixture::of_folder(&absent, &tied_config()?, &find);
    let refusal = refusal.expect_err("there is no folder");
    insta::assert_snapshot!(message(&refusal, dir.path()), @"
    the adapter `DIR/absent` does not exist
    hint: `source.path` is a folder with `adapter_config.json` and `adapter_model.safetensors`; an \
    adapter of the Hub is `source = { hub = { repo = \"OWNER/NAME\" } }`
    ");
    Ok(())
}

/// The values have the right types but make no sense, as if someone had edited the manifest. Values
/// of other types are refused when the file is parsed.
#[test]
fn a_manifest_that_makes_no_sense_is_refused() -> Result<()> {
    let _generator = seed(132);
    let router = plain_router();
    let model = tiny_model(&lora("num_experts = 2"), &router, Kind::Float)?;
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export(&Output::new(&out), &model, &provenance(), Layout::Dylora)?;
    fs_err::remove_file(out.join(MARKER))?;
    let file = out.join(MANIFEST);
    let whole: Value = serde_json::from_str(&fs_err::read_to_string(&file)?)?;
    let changes = [
        ("/experts", json!([])),
        ("/experts", json!(["expert_0", "../expert_1"])),
        ("/router/file", json!("/router.file")),
        ("/routing", json!("none")),
        ("/routing", json!("expert:2")),
        ("/router/spec/temperature", json!(0.0)),
        ("/router/spec/top_k", json!(0)),
        ("/router/spec/top_k", json!(3)),
        ("/router/spec/input", json!("module_input")),
    ];
    let mut messages = vec![];
    for (key, value) in changes {
        let mut changed = whole.clone();
        *changed.pointer_mut(key).expect("the manifest has it") = value;
        fs_err::write(&file, changed.to_string())?;
        let refusal = of_folder(&out, &tiny_config()).expect_err("it makes no sense");
        messages.push(message(&refusal, dir.path()));
    }
    insta::assert_snapshot!(messages.join("\n"), @r"
    `DIR/out/dylora.json`: `experts` names none
    `DIR/out/dylora.json`: `experts` must name a file or folder beside it, got `../expert_1`
    `DIR/out/dylora.json`: `router.file` must name a file or folder beside it, got `/router.file`
    `DIR/out/dylora.json`: `routing` is `none`, by which no expert is trained
    `DIR/out/dylora.json`: `routing` is `expert:2`, but there are 2 experts from 0
    `DIR/out/dylora.json`: `router.spec.temperature` must be a number above 0, got 0
    `DIR/out/dylora.json`: `router.spec.top_k` must be from 1 to the 2 experts, got 0
    `DIR/out/dylora.json`: `router.spec.top_k` must be from 1 to the 2 experts, got 3
    `DIR/out/dylora.json`: `router.spec.scope` must be `module` with the input `module_input`
    ");
    Ok(())
}

#[test]
fn an_adapter_for_one_base_is_not_put_on_another() -> Result<()> {
    let _generator = seed(131);
    let source = [AdapterSource::Path(peft_folder("plain"))];
    let mixture = Mixture::of_adapters(&source, &tied_config()?, &find)?;
    let wider = gpt2_spec(2, 4, 32);
    let base = crate::common::tiny_base(wider);
    let refusal = mixture.put_on(&base, Device::Cpu, Kind::Float).expect_err("it is wider");
    insta::assert_snapshot!(
        format!("{refusal:#}"),
        @"tensor `h.0.attn.c_attn.expert_0.lora_a` must be [4, 32], got [4, 16]"
    );
    Ok(())
}
