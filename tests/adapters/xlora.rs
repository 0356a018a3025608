//! Reading and writing X-LoRA folders.

use std::path::Path;

use anyhow::Result;
use dylora::durable::output::Output;
use dylora::export::peft::{Layout, export};
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use dylora::peft::xlora::{ADAPTERS, CLASSIFIER, CONFIG};
use dylora::tensor_file::{read_tensors, write_tensors};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::common::{
    assert_close, logits, max_difference, router_of, seed, tiny_config, tiny_model, two_rows,
};
use crate::{
    expected, inputs, lora, message, of_folder, peft_folder, provenance, tied_base, tied_config,
};

#[test]
fn an_xlora_folder_gives_pefts_scalings_and_logits() -> Result<()> {
    let _generator = seed(150);
    let (base, expected) = (tied_base(Kind::Double)?, expected("xlora")?);
    let mixture = of_folder(&peft_folder("xlora"), &base.spec)?;
    let model = mixture.put_on(&base, Device::Cpu, Kind::Double)?;
    let inputs = inputs(&expected["input_ids"], None)?;
    let [routing] = &model.routing(&inputs, ForwardMode::EVAL)[..] else {
        panic!("one router for all layers")
    };
    assert_close("scalings", &routing.weights, &expected["scalings"], 1e-10);
    let logits = logits(&model, &inputs, &RoutingSource::Router);
    assert_close("logits", &logits, &expected["logits"], 1e-10);
    let [router] = model.routers() else { panic!("one router for all layers") };
    assert_eq!(max_difference(&router.weight, &expected["classifier.weight"]), 0.0);
    assert_eq!(max_difference(&router.bias, &expected["classifier.bias"]), 0.0);
    Ok(())
}

#[test]
fn a_written_xlora_folder_routes_as_before_to_the_bit() -> Result<()> {
    let _generator = seed(151);
    let base = tied_base(Kind::Float)?;
    let mixture = of_folder(&peft_folder("xlora"), &base.spec)?;
    let model = mixture.put_on(&base, Device::Cpu, Kind::Float)?;
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export(&Output::new(&out), &model, &provenance(), Layout::Xlora)?;
    let written = of_folder(&out, &base.spec)?;
    assert_eq!((&written.specs, &written.router), (&mixture.specs, &mixture.router));
    let again = written.put_on(&base, Device::Cpu, Kind::Float)?;
    let inputs = inputs(&expected("xlora")?["input_ids"], None)?;
    let run = |model: &RoutedModel| {
        let weights = model.routing(&inputs, ForwardMode::EVAL).remove(0).weights;
        (weights, logits(model, &inputs, &RoutingSource::Router))
    };
    let (weights, logits) = run(&model);
    let (weights_again, logits_again) = run(&again);
    assert!(weights.equal(&weights_again) && logits.equal(&logits_again));
    Ok(())
}

/// A tiny model with the given sections `[lora]` and `[router]`.
fn model(lora_text: &str, router: &str) -> Result<RoutedModel> {
    tiny_model(&lora(lora_text), &router_of(router)?, Kind::Float)
}

#[test]
fn what_xlora_cannot_express_is_not_written() -> Result<()> {
    let _generator = seed(152);
    let dir = tempfile::tempdir()?;
    let refusal = |lora: &str, router: &str| -> Result<String> {
        let out = dir.path().join("out");
        let refusal =
            export(&Output::new(&out), &model(lora, router)?, &provenance(), Layout::Xlora);
        assert!(!out.exists());
        Ok(message(&refusal.expect_err("X-LoRA cannot express it"), dir.path()))
    };
    let base_hidden = "input = 'base_hidden'";
    insta::assert_snapshot!(refusal("", "")?, @r#"
    X-LoRA's classifier reads the base's last hidden state, this router `embeddings`
    hint: train with `router.input = "base_hidden"`
    "#);
    insta::assert_snapshot!(
        refusal("", "input = 'layer_input'\nscope = 'layer'")?,
        @"X-LoRA has one classifier for all layers, this mixture 2"
    );
    insta::assert_snapshot!(refusal("", "input = 'layer_input'")?, @r#"
    X-LoRA's classifier reads the base's last hidden state, this router `layer_input`
    hint: train with `router.input = "base_hidden"`
    "#);
    let with = |more: &str| refusal("", &format!("{base_hidden}\n{more}"));
    insta::assert_snapshot!(
        with("hidden_layers = 1")?,
        @"X-LoRA does not know hidden layers of a router that end in its width"
    );
    insta::assert_snapshot!(
        with("level = 'sequence'")?,
        @"X-LoRA does not know routing by the prompt"
    );
    insta::assert_snapshot!(
        with("eval = { top_k = 1 }")?,
        @"X-LoRA does not know another rule in evaluation"
    );
    insta::assert_snapshot!(
        refusal("", "input = 'base_hidden'\ntop_k = 2")?,
        @"X-LoRA's top-k is another rule; this router keeps 2 experts of a token"
    );
    insta::assert_snapshot!(refusal("use_dora = true", base_hidden)?, @"X-LoRA does not know DoRA");
    insta::assert_snapshot!(
        refusal("experts = [{}, { use_dora = true }]", base_hidden)?,
        @"X-LoRA does not know DoRA"
    );
    insta::assert_snapshot!(
        refusal("experts = [{ alora_invocation_tokens = [5] }]", base_hidden)?,
        @"X-LoRA does not know invocation tokens"
    );
    insta::assert_snapshot!(
        refusal("num_experts = 1", base_hidden)?,
        @"a single expert has no router, and is a PEFT adapter as it is"
    );
    Ok(())
}

#[test]
fn what_xlora_can_express_is_written() -> Result<()> {
    let _generator = seed(153);
    let mixed = "experts = [{ use_rslora = true }, { rank = 3 }, { init = 'pissa' }]";
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    let model = model(mixed, "input = 'base_hidden'\ntemperature = 0.3")?;
    export(&Output::new(&out), &model, &provenance(), Layout::Xlora)?;
    let read = of_folder(&out, &tiny_config())?.put_on(model.base(), Device::Cpu, Kind::Float)?;
    let run = |model: &RoutedModel| logits(model, &two_rows(), &RoutingSource::Router);
    assert_close("logits", &run(&read), &run(&model), 1e-5);
    assert_eq!(read.router_spec().temperature, 0.3);
    Ok(())
}

/// Copies PEFT's X-LoRA folder with its adapters, applies `change` to it and reads it. Returns the
/// message by which it is refused, or `taken` if it is not.
fn spoiled(change: impl FnOnce(&Path, &mut Map<String, Value>) -> Result<()>) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let out = dir.path();
    for name in ["plain", "all_linears", "rslora"] {
        let to = out.join(ADAPTERS).join(name);
        fs_err::create_dir_all(&to)?;
        for file in fs_err::read_dir(peft_folder(name))? {
            let file = file?;
            fs_err::copy(file.path(), to.join(file.file_name()))?;
        }
    }
    fs_err::copy(peft_folder("xlora").join(CLASSIFIER), out.join(CLASSIFIER))?;
    let text = fs_err::read_to_string(peft_folder("xlora").join(CONFIG))?;
    let mut config: Map<String, Value> = serde_json::from_str(&text)?;
    change(out, &mut config)?;
    fs_err::write(out.join(CONFIG), Value::Object(config).to_string())?;
    let base = tied_base(Kind::Float)?;
    let model =
        of_folder(out, &tied_config()?).and_then(|m| m.put_on(&base, Device::Cpu, Kind::Float));
    Ok(match model {
        Ok(_) => "taken".into(),
        Err(refusal) => message(&refusal, out),
    })
}

/// The result of [`spoiled`] for one changed entry of the config, without the path.
fn with_option(key: &str, value: Value) -> Result<String> {
    let said = spoiled(|_, config| {
        config.insert(key.to_owned(), value);
        Ok(())
    })?;
    Ok(said.replace("in `DIR/xlora_config.json`: ", ""))
}

#[test]
fn options_of_other_classifiers_are_refused_by_name() -> Result<()> {
    let _generator = seed(154);
    let options = json!({
        "enable_softmax": false,
        "enable_softmax_topk": true,
        "layerwise_scalings": true,
        "xlora_depth": 2,
        "top_k_lora": 2,
        "scaling_pass_value": 0.5,
        "global_scaling_weight": 2,
        "an_option_of_tomorrow": true,
        "hidden_size": 32,
        "adapters": {},
        "softmax_temperature": 0.0,
    });
    let options = options.as_object().expect("it is an object").clone();
    let said: Result<Vec<_>> = options.into_iter().map(|(k, v)| with_option(&k, v)).collect();
    insta::assert_snapshot!(said?.join("\n"), @r"
    `enable_softmax` must be true, got false
    `enable_softmax_topk` must be false, got true
    `layerwise_scalings` must be false, got true
    `xlora_depth` must be 1, got 2
    `top_k_lora` must be null, got 2
    `scaling_pass_value` must be 0.0, got 0.5
    `global_scaling_weight` must be 1.0, got 2
    `an_option_of_tomorrow` is no option of X-LoRA that dylora knows
    `hidden_size` must be the base's 16, got 32
    `adapters` names none
    `softmax_temperature` must be above 0
    ");
    Ok(())
}

#[test]
fn options_without_effect_on_a_linear_classifier_are_passed_over() -> Result<()> {
    let _generator = seed(155);
    for (key, value) in [
        ("xlora_size", json!(64)),
        ("enable_relu_and_dropout", json!(true)),
        ("xlora_dropout_p", json!(0.5)),
        ("use_trainable_adapters", json!(true)),
        ("device", json!("cuda")),
        ("xlora_depth", json!(1.0)),
        ("scaling_pass_value", json!(0)),
    ] {
        assert_eq!(with_option(key, value)?, "taken", "{key}");
    }
    Ok(())
}

#[test]
fn a_classifier_that_does_not_fit_is_refused() -> Result<()> {
    let _generator = seed(156);
    let classifier = |tensors: &[(&str, Tensor)]| {
        spoiled(|dir, _| {
            write_tensors(
                &dir.join(CLASSIFIER),
                tensors.iter().map(|(name, tensor)| (*name, tensor)),
            )
        })
    };
    let read = read_tensors(&peft_folder("xlora").join(CLASSIFIER))?;
    let weight = ("last.weight", read["last.weight"].shallow_clone());
    let bias = ("last.bias", read["last.bias"].shallow_clone());
    let [weight, bias] = [weight, bias].map(|(name, t)| move || (name, t.shallow_clone()));
    assert_eq!(classifier(&[weight(), bias()])?, "taken");
    insta::assert_snapshot!(
        classifier(&[weight()])?,
        @"in `DIR/xlora_classifier.safetensors`: `last.bias` is missing"
    );
    insta::assert_snapshot!(
        classifier(&[bias()])?,
        @"in `DIR/xlora_classifier.safetensors`: `last.weight` is missing"
    );
    let inner = ("inner.0.weight", weight().1);
    insta::assert_snapshot!(
        classifier(&[weight(), bias(), inner])?,
        @"in `DIR/xlora_classifier.safetensors`: tensor `inner.0.weight` is of no classifier of \
          depth 1"
    );
    let not_finite = ("last.bias", bias().1.log() * 0.0);
    insta::assert_snapshot!(
        classifier(&[weight(), not_finite])?,
        @"in `DIR/xlora_classifier.safetensors`: tensor `last.bias` holds numbers that are not \
          finite"
    );
    let integers = ("last.weight", weight().1.to_kind(Kind::Int64));
    insta::assert_snapshot!(
        classifier(&[integers, bias()])?,
        @"in `DIR/xlora_classifier.safetensors`: tensor `last.weight` has dtype `Int64`; use f32, \
          f16 or bf16"
    );
    let scalar = ("last.weight", weight().1.sum(Kind::Float));
    insta::assert_snapshot!(
        classifier(&[scalar, bias()])?,
        @"in `DIR/xlora_classifier.safetensors`: `last.weight` must be [adapters, hidden_size], \
          got []"
    );
    let two =
        [("last.weight", weight().1.narrow(0, 0, 2)), ("last.bias", bias().1.narrow(0, 0, 2))];
    insta::assert_snapshot!(
        classifier(&two)?,
        @"`DIR/xlora_classifier.safetensors` scores 2 adapters, the config names 3"
    );
    Ok(())
}

#[test]
fn a_classifier_without_bias_has_none() -> Result<()> {
    let _generator = seed(157);
    let without = |dir: &Path, config: &mut Map<String, Value>| {
        config.insert("use_bias".into(), json!(false));
        let weight = read_tensors(&dir.join(CLASSIFIER))?.remove("last.weight");
        let weight = weight.expect("it is there");
        write_tensors(&dir.join(CLASSIFIER), [("last.weight", &weight)])
    };
    assert_eq!(spoiled(without)?, "taken");
    // the file has a bias although `use_bias` is false
    let refusal = with_option("use_bias", json!(false))?;
    insta::assert_snapshot!(
        refusal,
        @"in `DIR/xlora_classifier.safetensors`: tensor `last.bias` is of no classifier of depth 1"
    );
    Ok(())
}

#[test]
fn adapters_that_are_not_there_are_looked_for_on_the_hub() -> Result<()> {
    let _generator = seed(158);
    let absent = spoiled(|dir, config| {
        fs_err::remove_dir_all(dir.join(ADAPTERS).join("rslora"))?;
        config["adapters"]["rslora"] = json!("someone/rslora");
        Ok(())
    })?;
    insta::assert_snapshot!(absent, @r#"
    `someone/rslora@main` is not in the cache `absent`; `HF_HUB_OFFLINE` forbids fetching it
    hint: fetch it once without `HF_HUB_OFFLINE`, or use a folder: `source = { path = "DIR" }`
    "#);
    Ok(())
}
