//! GGUF files, read by a parser of their own and compared with what they should compute. They are
//! compared with llama.cpp itself by `scripts/check_gguf`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use dylora::config::{ModulePath, SaveDtype, TargetModule};
use dylora::durable::output::Output;
use dylora::export::gguf::{
    MODEL, Vocabulary, WholeModel, check_base, export_experts, export_model, notes,
};
use dylora::export::merge::into_base;
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::families;
use dylora::model::{RoutedModel, routing::router::RouterSpec};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::common::{assert_close, golden_path, plain_router, randomize, seed, tiny_base};
use crate::{lora, message, provenance};

/// Experts of several ranks, alphas and kinds, and a part that is always on.
const EXPERTS: &str = r#"
    num_experts = 3
    rank = 3
    alpha = 4.0
    shared_rank = 2
    target_modules = "all-linear"
    rank_pattern = { "MODULE" = 5 }
    alpha_pattern = { "MODULE" = 1.5 }
    experts = [{ alpha = 2.0 }, { use_rslora = true }, { init = "pissa", rank = 2 }]
"#;

/// A file as it is laid out.
struct Parsed {
    values: BTreeMap<String, Value>,
    /// The dimensions, innermost first, the type's number, and the bytes from the tensor on.
    tensors: BTreeMap<String, (Vec<i64>, u32, Vec<u8>)>,
}

/// Takes numbers and texts off the front of a file.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(count);
        self.0 = left;
        taken
    }

    fn number(&mut self, size: usize) -> u64 {
        let taken = self.bytes(size).iter().rev();
        taken.fold(0, |number, byte| (number << 8) | u64::from(*byte))
    }

    fn text(&mut self) -> String {
        let count = self.number(8) as usize;
        String::from_utf8(self.bytes(count).to_vec()).expect("texts are UTF-8")
    }

    fn value(&mut self, kind: u64) -> Value {
        match kind {
            4 => json!(self.number(4) as u32),
            5 => json!(self.number(4) as u32 as i32),
            6 => json!(f32::from_bits(self.number(4) as u32)),
            7 => json!(self.number(1) == 1),
            8 => json!(self.text()),
            9 => {
                let (kind, count) = (self.number(4), self.number(8));
                (0..count).map(|_| self.value(kind)).collect()
            }
            other => panic!("type {other}"),
        }
    }
}

fn parse(file: &Path) -> Result<Parsed> {
    let all = fs_err::read(file)?;
    let mut reader = Reader(&all);
    assert_eq!(reader.bytes(4), b"GGUF");
    assert_eq!(reader.number(4), 3);
    let (num_tensors, num_values) = (reader.number(8), reader.number(8));
    let mut values = BTreeMap::new();
    for _ in 0..num_values {
        let (key, kind) = (reader.text(), reader.number(4));
        assert!(values.insert(key, reader.value(kind)).is_none(), "each key stands once");
    }
    let mut infos = vec![];
    for _ in 0..num_tensors {
        let name = reader.text();
        let num_dims = reader.number(4);
        let dims: Vec<i64> = (0..num_dims).map(|_| reader.number(8) as i64).collect();
        infos.push((name, dims, reader.number(4) as u32, reader.number(8) as usize));
    }
    let data = (all.len() - reader.0.len()).next_multiple_of(32);
    let tensors = infos.into_iter().map(|(name, dims, kind, offset)| {
        assert_eq!(offset % 32, 0, "`{name}` is aligned");
        (name, (dims, kind, all[data + offset..].to_vec()))
    });
    Ok(Parsed { values, tensors: tensors.collect() })
}

impl Parsed {
    /// A tensor in f64, in libtorch's order of dimensions.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let (dims, kind, bytes) = self.tensors.get(name).with_context(|| format!("no `{name}`"))?;
        let kind = match kind {
            0 => Kind::Float,
            1 => Kind::Half,
            30 => Kind::BFloat16,
            other => panic!("dtype {other}"),
        };
        let shape: Vec<i64> = dims.iter().rev().copied().collect();
        let count = shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        Ok(Tensor::from_data_size(&bytes[..count], &shape, kind).to_kind(Kind::Double))
    }
}

/// A base of a family that llama.cpp can express, and whether its queries and keys are permuted.
fn bases() -> Vec<(DecoderSpec, bool)> {
    let own = [
        (
            json!({"model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 16,
                "n_positions": 32, "vocab_size": 2048}),
            false,
        ),
        (json!({"model_type": "llama", "attention_bias": true, "mlp_bias": true}), true),
        (json!({"model_type": "qwen2"}), false),
        (json!({"model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": true}), false),
        (json!({"model_type": "smollm3"}), true),
        (json!({"model_type": "mistral", "sliding_window": null, "head_dim": 8}), true),
    ];
    own.map(|(own, permutes)| (spec_of(own), permutes)).into()
}

fn spec_of(own: Value) -> DecoderSpec {
    let mut config = json!({
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "vocab_size": 2048, "rope_theta": 20.0, "eos_token_id": 0, "bos_token_id": 0,
    });
    let own = own.as_object().expect("it is an object").clone();
    config.as_object_mut().expect("it is an object").extend(own);
    families::from_json(&config).expect("the shape is sound")
}

/// llama.cpp's name of a linear layer, as its `gguf-py/gguf/tensor_mapping.py` (0.19) has it.
fn name_of(path: ModulePath) -> String {
    use TargetModule as M;
    let name = match path.module {
        M::AttnCAttn => "attn_qkv",
        M::AttnCProj | M::OProj => "attn_output",
        M::MlpCFc | M::UpProj => "ffn_up",
        M::MlpCProj | M::DownProj => "ffn_down",
        M::QProj => "attn_q",
        M::KProj => "attn_k",
        M::VProj => "attn_v",
        M::GateProj => "ffn_gate",
    };
    format!("blk.{}.{name}.weight", path.layer)
}

/// The row of a file's matrix that is row `row` of the base's, if queries and keys are permuted.
fn file_row(spec: &DecoderSpec, module: TargetModule, permutes: bool, row: i64) -> i64 {
    if !permutes || !matches!(module, TargetModule::QProj | TargetModule::KProj) {
        return row;
    }
    let (head, at, half) = (row / spec.head_dim, row % spec.head_dim, spec.head_dim / 2);
    head * spec.head_dim + 2 * (at % half) + at / half
}

/// A matrix of a file in the base's order of rows.
fn unordered(spec: &DecoderSpec, module: TargetModule, permutes: bool, rows: &Tensor) -> Tensor {
    let count = rows.size()[0];
    let order: Vec<i64> = (0..count).map(|r| file_row(spec, module, permutes, r)).collect();
    rows.index_select(0, &Tensor::from_slice(&order))
}

fn model_on(base: &dylora::model::decoder::Decoder, text: &str) -> Result<RoutedModel> {
    let module = base.spec.modules()[0].name();
    let lora = lora(&text.replace("MODULE", module));
    let mut specs = ExpertSpec::all(&lora, &base.spec)?;
    specs.extend(ExpertSpec::of_shared(&lora, &base.spec)?);
    let router = RouterSpec::from(&plain_router());
    let model = RoutedModel::with_experts(base, &specs, &router, Device::Cpu, Kind::Float);
    randomize(&model)?;
    Ok(model)
}

/// llama.cpp adds `alpha / r * B A`, which must be what merging the expert adds to the base.
#[test]
fn each_adapter_adds_what_its_expert_adds() -> Result<()> {
    let _generator = seed(710);
    for (spec, permutes) in bases() {
        let base = tiny_base(spec).to(Device::Cpu, Kind::Float);
        let model = model_on(&base, EXPERTS)?;
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("out");
        export_experts(&Output::new(&out), &model, &provenance(), SaveDtype::F32)?;
        let shared = parse(&out.join("shared.gguf"))?;
        for expert in 0..3 {
            let mut weights = [0.0; 3];
            weights[expert] = 1.0;
            let merged = into_base(&model, &base, &weights)?;
            let file = parse(&out.join(format!("expert_{expert}.gguf")))?;
            assert_eq!(file.values["general.type"], "adapter");
            assert_eq!(file.values["adapter.type"], "lora");
            let mut count = 0;
            for layer in 0..base.spec.num_layers as usize {
                for &module in base.spec.modules() {
                    let name = name_of(ModulePath { layer, module });
                    let update = |file: &Parsed| -> Result<Tensor> {
                        let a = file.tensor(&format!("{name}.lora_a"))?;
                        let b = file.tensor(&format!("{name}.lora_b"))?;
                        let alpha = file.values["adapter.lora.alpha"].as_f64();
                        let scale = alpha.context("it is a number")? / a.size()[0] as f64;
                        Ok(b.mm(&a) * scale)
                    };
                    let added = update(&file)? + update(&shared)?;
                    let added = unordered(&base.spec, module, permutes, &added);
                    let [old, new] = [&base, &merged].map(|base| {
                        base.blocks[layer].linears[&module].weight().to_kind(Kind::Double)
                    });
                    assert_close(&name, &added, &(new - old).tr(), 2e-6);
                    count += 2;
                }
            }
            assert_eq!(file.tensors.len(), count, "there is nothing else");
        }
    }
    Ok(())
}

#[test]
fn a_model_has_the_bases_tensors_and_settings() -> Result<()> {
    let _generator = seed(711);
    let vocabulary = Vocabulary::read(Path::new("demo/base/tokenizer.json"))?;
    for (spec, permutes) in bases() {
        let base = tiny_base(spec).to(Device::Cpu, Kind::Float);
        let dir = tempfile::tempdir()?;
        for (dtype, code, tolerance) in
            [(SaveDtype::F32, 0, 0.0), (SaveDtype::F16, 1, 2e-3), (SaveDtype::Bf16, 30, 1e-2)]
        {
            let out = dir.path().join(format!("{dtype:?}"));
            let whole = WholeModel {
                base: &base,
                name: "tiny",
                vocabulary: &vocabulary,
                chat_template: None,
                beside: &[],
            };
            export_model(&Output::new(&out), &whole, dtype, "")?;
            let file = parse(&out.join(MODEL))?;
            for layer in 0..base.spec.num_layers as usize {
                for (&module, linear) in &base.blocks[layer].linears {
                    let name = name_of(ModulePath { layer, module });
                    let weight = unordered(&base.spec, module, permutes, &file.tensor(&name)?);
                    let expected = linear.weight().tr().to_kind(Kind::Double);
                    assert_close(&name, &weight, &expected, tolerance);
                    assert_eq!(file.tensors[&name].1, code);
                    if let Some(bias) = &linear.bias {
                        let name = name.replace(".weight", ".bias");
                        let found = unordered(&base.spec, module, permutes, &file.tensor(&name)?);
                        assert_close(&name, &found, &bias.to_kind(Kind::Double), 0.0);
                    }
                }
            }
            let expected = base.spec.parameter_shapes().len();
            assert_eq!(file.tensors.len(), expected, "each parameter is there once");
            let vectors = file.tensors.values().filter(|(dims, ..)| dims.len() == 1);
            assert!(vectors.into_iter().all(|(_, kind, _)| *kind == 0), "vectors are in f32");
            let head = file.tensors.contains_key("output.weight");
            assert_eq!(head, !base.spec.tied_head, "a tied head is not written again");
            let tokens = &file.values["tokenizer.ggml.tokens"];
            assert_eq!(tokens.as_array().map(Vec::len), Some(2048));
        }
    }
    Ok(())
}

/// The factors of Llama 3's RoPE: a high frequency is kept, and a low one divided by `factor`.
#[test]
fn llama3_frequencies_are_written_as_factors() -> Result<()> {
    let rope = json!({"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    let spec = spec_of(json!({"model_type": "llama", "rope_parameters": rope, "head_dim": 16}));
    let _generator = seed(712);
    let base = tiny_base(spec).to(Device::Cpu, Kind::Float);
    let vocabulary = Vocabulary::read(Path::new("demo/base/tokenizer.json"))?;
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    let whole = WholeModel {
        base: &base,
        name: "tiny",
        vocabulary: &vocabulary,
        chat_template: None,
        beside: &[],
    };
    export_model(&Output::new(&out), &whole, SaveDtype::Bf16, "")?;
    let file = parse(&out.join(MODEL))?;
    let factors: Vec<f64> = Vec::try_from(file.tensor("rope_freqs.weight")?)?;
    assert_eq!(factors.len(), 8);
    assert!((factors[0] - 1.0).abs() < 1e-6, "{factors:?}");
    assert!((factors[7] - 8.0).abs() < 1e-6, "{factors:?}");
    assert!(factors.is_sorted(), "{factors:?}");
    assert_eq!(file.tensors["rope_freqs.weight"].1, 0, "they are in f32");
    assert!(!file.values.contains_key("llama.rope.scaling.type"));
    Ok(())
}

#[test]
fn what_llama_cpp_cannot_express_is_refused_by_name() -> Result<()> {
    let yarn = |own: Value| {
        let mut yarn = json!({"rope_type": "yarn", "rope_theta": 20.0, "factor": 2.0});
        yarn.as_object_mut().expect("it is one").extend(own.as_object().expect("it is").clone());
        json!({"model_type": "llama", "rope_parameters": yarn})
    };
    let llama3 = json!({"rope_type": "llama3", "rope_theta": 20.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8});
    let gpt2 = |key: &str, value: Value| {
        json!({"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16,
               key: value})
    };
    for (config, words) in [
        (gpt2("activation_function", json!("gelu")), "`activation_function` `gelu`"),
        (gpt2("scale_attn_weights", json!(false)), "`scale_attn_weights` false"),
        (gpt2("scale_attn_by_inverse_layer_idx", json!(true)), "`scale_attn_by_inverse_layer_idx`"),
        (json!({"model_type": "mistral", "sliding_window": 8}), "`sliding_window` 8 of 32"),
        (json!({"model_type": "qwen2", "head_dim": 6}), "`head_dim`"),
        (json!({"model_type": "qwen3", "attention_bias": true}), "`attention_bias` true"),
        (json!({"model_type": "qwen3", "rope_parameters": llama3}), "`rope_type` `llama3`"),
        (json!({"model_type": "smollm3", "mlp_bias": true}), "`mlp_bias` true"),
        (json!({"model_type": "smollm3", "no_rope_layer_interval": 2}), "`no_rope_layers`"),
        (yarn(json!({"attention_factor": 1.5})), "`attention_factor`"),
        (yarn(json!({"beta_fast": 16.0})), "`beta_fast` 32"),
        (yarn(json!({"truncate": false})), "`truncate` true"),
    ] {
        let error = check_base(&spec_of(config.clone())).expect_err("it is refused");
        let text = format!("{error:#}");
        assert!(text.contains(words) && text.contains("llama.cpp"), "{config}: {text}");
    }
    // a window as long as the sequences changes nothing
    check_base(&spec_of(json!({"model_type": "mistral", "sliding_window": 32})))
}

#[test]
fn a_dora_expert_and_a_number_too_large_for_f16_are_refused() -> Result<()> {
    let _generator = seed(713);
    let (spec, _) = bases().swap_remove(1);
    let base = tiny_base(spec).to(Device::Cpu, Kind::Float);
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    let model = model_on(&base, "num_experts = 2\nexperts = [{}, { use_dora = true }]")?;
    let error = export_experts(&Output::new(&out), &model, &provenance(), SaveDtype::F32);
    let text = message(&error.expect_err("it is refused"), dir.path());
    assert!(text.starts_with("cannot export `expert_1` as GGUF: DoRA scales"), "{text}");
    let model = model_on(&base, "num_experts = 2")?;
    for (_, experts) in model.modules() {
        let b = experts.tensor(0, "lora_b").context("it has one")?;
        let _ = tch::no_grad(|| b.shallow_clone().fill_(1e5));
    }
    let error = export_experts(&Output::new(&out), &model, &provenance(), SaveDtype::F16);
    let text = message(&error.expect_err("it is refused"), dir.path());
    assert!(text.contains("lora_b` holds numbers that Half cannot"), "{text}");
    assert!(!out.exists(), "nothing is left of it");
    export_experts(&Output::new(&out), &model, &provenance(), SaveDtype::Bf16)
}

/// The format has a place for them, but not every program looks there.
#[test]
fn invocation_tokens_are_written_and_noted() -> Result<()> {
    let _generator = seed(714);
    let (spec, _) = bases().swap_remove(1);
    let base = tiny_base(spec).to(Device::Cpu, Kind::Float);
    let tokens = "num_experts = 2\nexperts = [{}, { alora_invocation_tokens = [18, 28] }]";
    let model = model_on(&base, tokens)?;
    let notes = notes(&model).join("\n");
    assert!(notes.contains("the router is not written") && notes.contains("`expert_1`"), "{notes}");
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    export_experts(&Output::new(&out), &model, &provenance(), SaveDtype::F32)?;
    let key = "adapter.alora.invocation_tokens";
    assert_eq!(parse(&out.join("expert_1.gguf"))?.values[key], json!([18, 28]));
    assert!(!parse(&out.join("expert_0.gguf"))?.values.contains_key(key));
    Ok(())
}

/// The kind of each tokenizer of `tests/golden/tokenizers`, or why llama.cpp cannot follow it.
#[test]
fn tokenizers_are_known_by_their_rules() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let read = |name: &str, change: &dyn Fn(&mut Value)| -> Result<Vocabulary> {
        let file = golden_path("tokenizers").join(format!("{name}.tokenizer.json"));
        let mut json: Value = serde_json::from_str(&fs_err::read_to_string(file)?)?;
        change(&mut json);
        let file = dir.path().join("tokenizer.json");
        fs_err::write(&file, json.to_string())?;
        Vocabulary::read(&file)
    };
    for name in ["llama2", "llama3", "mistral", "qwen", "smollm"] {
        let vocabulary = read(name, &|_| {})?;
        let notes = vocabulary.notes().join("\n");
        assert_eq!(notes.contains("NFC"), name == "qwen", "{name}: {notes}");
        assert_eq!(notes.contains("a space in front"), name == "mistral", "{name}: {notes}");
    }
    type Change = dyn Fn(&mut Value);
    let refused: [(&str, &Change, &str); 5] = [
        ("qwen", &|json| json["normalizer"] = json!({"type": "Lowercase"}), "`normalizer` is"),
        ("smollm", &|json| json["pre_tokenizer"] = json!({"type": "Whitespace"}), "Whitespace"),
        ("llama3", &|json| json["model"]["dropout"] = json!(0.1), "`model.dropout` is 0.1"),
        ("smollm", &|json| json["model"]["ignore_merges"] = json!(true), "`model.ignore_merges`"),
        ("mistral", &|json| json["pre_tokenizer"]["split"] = json!(true), "`pre_tokenizer` is"),
    ];
    for (name, change, words) in refused {
        let error = read(name, change).expect_err("it is refused");
        assert!(format!("{error:#}").contains(words), "{name}: {error:#}");
    }
    Ok(())
}
