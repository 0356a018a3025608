//! Configs of the Llama-like families: what is read, what is refused and by which name, and in
//! which dtype weights lie in memory.

mod common;

use anyhow::Result;
use common::{golden_path, max_difference};
use dylora::config::{Family, RandomBase};
use dylora::model::decoder::Decoder;
use dylora::model::decoder::rope::RopeScaling;
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::families::{from_json, from_random, load, read_spec, to_json};
use serde_json::{Value, json};
use tch::Kind;

/// A small config of a family, with `changed` keys.
fn config(family: &str, changed: &Value) -> Value {
    let mut config = json!({
        "model_type": family, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "vocab_size": 61,
    });
    let changed = changed.as_object().expect("the cases are objects").clone();
    config.as_object_mut().expect("it is an object").extend(changed);
    config
}

#[track_caller]
fn spec(family: &str, changed: &Value) -> DecoderSpec {
    from_json(&config(family, changed)).expect("the config is sound")
}

fn refusal(family: &str, changed: &Value) -> String {
    let error = from_json(&config(family, changed)).expect_err("the config is not supported");
    format!("{error:#}")
}

/// The lengths of the windows of the four layers, 0 for none.
fn windows(family: &str, changed: &Value) -> Vec<i64> {
    let spec = spec(family, changed);
    (0..4).map(|layer| spec.window(layer).unwrap_or(0)).collect()
}

const WINDOWED: &str = "sliding_attention";
const FULL: &str = "full_attention";

#[test]
fn keys_that_are_absent_have_the_defaults_of_transformers() {
    let plain = |family| spec(family, &json!({}));
    assert_eq!(plain("llama").norm_eps, 1e-6);
    assert_eq!((plain("llama").head_dim, plain("qwen3").head_dim), (4, 128));
    assert!(!plain("llama").tied_head && plain("smollm3").tied_head);
    let theta = |family| plain(family).rope.expect("it rotates").theta;
    assert_eq!((theta("llama"), theta("smollm3")), (10_000.0, 2_000_000.0));
    assert_eq!(plain("llama").eos_token_ids, [2]);
    assert!(plain("qwen2").eos_token_ids.is_empty());
    // 128001, which is outside this vocabulary
    assert!(plain("smollm3").eos_token_ids.is_empty());
    let kv_heads = |family: &str, kv: &Value| {
        let mut config = config(family, &json!({"num_attention_heads": 32, "hidden_size": 64}));
        let keys = config.as_object_mut().expect("it is an object");
        keys.remove("num_key_value_heads");
        keys.extend(kv.as_object().expect("it is an object").clone());
        from_json(&config).expect("it is sound").num_kv_heads
    };
    let absent = ["llama", "qwen2", "qwen3", "smollm3", "mistral"].map(|f| kv_heads(f, &json!({})));
    assert_eq!(absent, [32, 32, 32, 4, 8]);
    assert_eq!(kv_heads("smollm3", &json!({"num_key_value_heads": null})), 32);
}

#[test]
fn biases_are_where_each_family_has_them() {
    let biases = |family, changed| {
        let biases = spec(family, &changed).biases;
        (biases.qkv, biases.attention_out, biases.mlp)
    };
    let both = || json!({"attention_bias": true, "mlp_bias": true});
    assert_eq!(biases("llama", json!({})), (false, false, false));
    assert_eq!(biases("llama", both()), (true, true, true));
    assert_eq!(biases("qwen2", both()), (true, false, false));
    assert_eq!(biases("qwen3", both()), (true, true, false));
    assert_eq!(biases("smollm3", both()), (true, true, true));
    assert_eq!(biases("mistral", both()), (false, false, false));
}

#[test]
fn windows_are_in_the_layers_of_each_familys_rule() {
    assert_eq!(windows("mistral", &json!({})), [4096; 4]);
    assert_eq!(windows("mistral", &json!({"sliding_window": null})), [0; 4]);
    assert_eq!(windows("llama", &json!({"sliding_window": 8})), [0; 4]);
    let qwen = json!({"sliding_window": 8, "max_window_layers": 3});
    assert_eq!(windows("qwen2", &qwen), [0; 4]);
    let used = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 3});
    assert_eq!(windows("qwen2", &used), [0, 0, 0, 8]);
    assert_eq!(windows("qwen3", &json!({"use_sliding_window": true})), [0; 4]);
    let types = json!({
        "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 3,
        "layer_types": [WINDOWED, FULL, FULL, WINDOWED],
    });
    assert_eq!(windows("qwen3", &types), [8, 0, 0, 8]);
    assert_eq!(windows("smollm3", &types), [8, 0, 0, 8]);
    let own = json!({
        "use_sliding_window": true, "sliding_window": 8, "no_rope_layers": [1, 0, 0, 1],
    });
    assert_eq!(windows("smollm3", &own), [0, 8, 8, 0]);
    assert_eq!(windows("smollm3", &json!({"use_sliding_window": true})), [0; 4]);
}

#[test]
fn layers_without_rope_are_those_of_the_list_or_the_interval() {
    let rotates = |changed: &Value| -> Vec<bool> {
        let spec = spec("smollm3", changed);
        (0..4).map(|layer| spec.rotates(layer)).collect()
    };
    assert_eq!(rotates(&json!({})), [true, true, true, false]);
    assert_eq!(rotates(&json!({"no_rope_layer_interval": 2})), [true, false, true, false]);
    assert_eq!(rotates(&json!({"no_rope_layers": [0, 1, 1, 0]})), [false, true, true, false]);
    assert!((0..4).all(|layer| spec("qwen3", &json!({})).rotates(layer)));
}

#[test]
fn a_config_without_a_kind_of_rope_has_the_plain_one() {
    let rope = |changed: &Value| spec("llama", changed).rope.expect("a Llama rotates");
    assert_eq!(rope(&json!({"rope_theta": 5e5, "rope_scaling": null})).theta, 5e5);
    let new = json!({"rope_parameters": {"rope_theta": 5e5}});
    assert_eq!((rope(&new).theta, rope(&new).scaling), (5e5, RopeScaling::Default));
    let both = json!({
        "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    });
    assert_eq!(rope(&both).scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn other_architectures_are_refused_with_the_list_of_those_that_are_known() {
    for other in ["gemma3_text", "phi3", "qwen3_5_text", "qwen3_moe", "mixtral", "ministral"] {
        assert_eq!(
            refusal(other, &json!({})),
            format!(
                "the architecture `{other}` (`model_type`) is not supported\nhint: dylora trains \
                 `gpt2`, `llama`, `qwen2`, `qwen3`, `smollm3`, `mistral`"
            )
        );
    }
}

/// The refusals of configs with changed keys, in the order of `cases`.
fn refusals(cases: &[(&str, Value)]) -> String {
    let all = cases.iter().map(|(family, changed)| refusal(family, changed));
    all.collect::<Vec<_>>().join("\n")
}

#[test]
fn values_that_are_not_supported_are_refused_by_key() {
    let all = refusals(&[
        ("llama", json!({"hidden_act": "gelu"})),
        ("llama", json!({"num_key_value_heads": 3})),
        ("llama", json!({"hidden_size": 18, "head_dim": 4})),
        ("qwen2", json!({"hidden_size": 18})),
        ("llama", json!({"head_dim": 5})),
        ("llama", json!({"hidden_size": "wide"})),
        ("llama", json!({"rms_norm_eps": -1})),
        ("llama", json!({"num_hidden_layers": 1_000_000_000})),
        ("qwen3", json!({"num_attention_heads": 65536, "head_dim": 65536})),
        ("llama", json!({"quantization_config": {"bits": 4}})),
        ("llama", json!({"eos_token_id": "end"})),
        ("llama", json!({"tie_word_embeddings": 1})),
        ("mistral", json!({"layer_types": vec![WINDOWED; 4]})),
        ("mistral", json!({"sliding_window": 0})),
        ("qwen3", json!({"layer_types": vec![WINDOWED; 4]})),
        ("qwen3", json!({"use_sliding_window": true, "layer_types": vec![FULL; 3]})),
        ("qwen3", json!({"use_sliding_window": true, "layer_types": vec!["chunked_attention"; 4]})),
    ]);
    insta::assert_snapshot!(all, @r#"
    `hidden_act` must be `silu`, got `gelu`
    `num_attention_heads` must be a multiple of `num_key_value_heads` 3, got 4
    `hidden_size` must be a multiple of `num_attention_heads` 4, got 18
    `hidden_size` must be a multiple of `num_attention_heads` 4, got 18
    `head_dim` must be even, got 5
    `hidden_size` must be a whole number from 1 to 1048576, got "wide"
    `rms_norm_eps` must be a number of at least 0, got -1
    `num_hidden_layers` must be a whole number from 1 to 10000, got 1000000000
    `num_attention_heads` times `head_dim` must be at most 1048576, got 65536 times 65536
    `quantization_config` is not supported: the weights must be f32, f16 or bf16
    `eos_token_id` must be a token id or a list of them, got "end"
    `tie_word_embeddings` must be true or false, got 1
    `layer_types` makes another architecture of a Mistral, `ministral`, which is not supported
    `sliding_window` must be a whole number from 1 to 1073741824, got 0
    `layer_types` names `sliding_attention`, but the other keys turn windows off
    hint: `use_sliding_window` must be true, and `sliding_window` a number
    `layer_types` must have 4 entries, one for each layer, got 3
    `layer_types` must name `full_attention` or `sliding_attention`, got "chunked_attention"
    "#);
}

#[test]
fn kinds_of_rope_that_are_not_supported_are_refused_by_key() {
    let all = refusals(&[
        ("llama", json!({"rope_theta": -1.0})),
        ("llama", json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})),
        ("llama", json!({"rope_scaling": {"rope_type": "longrope"}})),
        ("llama", json!({"rope_scaling": {"rope_type": "linear"}})),
        ("llama", json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})),
        ("llama", json!({"rope_scaling": "linear"})),
        (
            "llama",
            json!({"rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1,
            }}),
        ),
        ("llama", json!({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}})),
        ("llama", json!({"rope_theta": 1})),
        ("llama", json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}})),
        ("llama", json!({"partial_rotary_factor": 0.5})),
        ("smollm3", json!({"no_rope_layers": [1, 1]})),
        ("smollm3", json!({"no_rope_layers": [true, true, true, true]})),
    ]);
    insta::assert_snapshot!(all, @r#"
    `rope_theta` must be a number above 0, got -1.0
    in `rope_scaling`: `rope_type` must be `default`, `linear`, `llama3` or `yarn`, got `dynamic`
    in `rope_scaling`: `rope_type` must be `default`, `linear`, `llama3` or `yarn`, got `longrope`
    in `rope_scaling`: `factor` is missing
    in `rope_scaling`: `low_freq_factor` is missing
    `rope_scaling` must be an object, got "linear"
    in `rope_scaling`: `high_freq_factor` must be above `low_freq_factor` 4, got 1
    in `rope_scaling`: `beta_fast` must be a number of at least 0, got -1
    `rope_theta` must be above 1, got 1
    in `rope_parameters`: `full_attention` is an object: one RoPE for all layers is supported
    `partial_rotary_factor` must be 1, got 0.5
    `no_rope_layers` must have 4 entries, one for each layer, got 2
    `no_rope_layers` must be a list of 0 and 1
    "#);
}

/// Shapes of the Hub's models; the numbers are those of transformers' `num_parameters`.
#[test]
fn known_shapes_have_their_numbers_of_parameters() {
    let smollm2 = json!({
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": true,
    });
    assert_eq!(spec("llama", &smollm2).num_parameters(), 134_515_008);
    let qwen3 = json!({
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936,
        "tie_word_embeddings": true,
    });
    assert_eq!(spec("qwen3", &qwen3).num_parameters(), 596_049_920);
    let llama3 = json!({
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "tie_word_embeddings": true,
    });
    assert_eq!(spec("llama", &llama3).num_parameters(), 1_235_814_400);
}

#[test]
fn random_bases_have_the_shape_that_is_asked_for() -> Result<()> {
    let shape = |family| RandomBase {
        family,
        n_layer: 2,
        n_head: 4,
        n_kv_head: None,
        head_dim: None,
        n_embd: 48,
        n_inner: None,
        n_positions: 32,
    };
    for family in Family::ALL {
        let spec = from_random(&shape(family), 61, Some(3))?;
        assert_eq!((spec.family, spec.num_layers, spec.num_kv_heads), (family, 2, 4));
        assert_eq!((spec.head_dim, spec.vocab_size, spec.tied_head), (12, 61, true));
        assert_eq!(spec.eos_token_ids, [3]);
        assert_eq!(spec.inner_width, if family == Family::Gpt2 { 192 } else { 128 });
        assert_eq!(from_json(&to_json(&spec, "float32"))?, spec, "{family:?}");
    }
    let own = RandomBase {
        n_kv_head: Some(2),
        head_dim: Some(8),
        n_inner: Some(40),
        ..shape(Family::Qwen3)
    };
    let spec = from_random(&own, 61, None)?;
    assert_eq!((spec.num_kv_heads, spec.head_dim, spec.inner_width), (2, 8, 40));
    assert!(spec.eos_token_ids.is_empty());
    Ok(())
}

/// A base in bf16 takes half the memory of one in f32, and has the hash of the latter.
#[test]
fn weights_keep_the_dtype_of_their_file_unless_another_is_asked_for() -> Result<()> {
    let spec = read_spec(&golden_path("families/llama_bf16.config.json"))?;
    let files = [golden_path("families/llama_bf16.safetensors")];
    let read = |kind: Option<Kind>| -> Result<Decoder> { load::read(&spec, &files, kind) };
    let (stored, wide) = (read(None)?, read(Some(Kind::Float))?);
    for ((name, stored), (_, wide)) in stored.named_parameters().iter().zip(wide.named_parameters())
    {
        assert_eq!((stored.kind(), wide.kind()), (Kind::BFloat16, Kind::Float), "{name}");
        assert_eq!(max_difference(stored, &wide), 0.0, "{name}");
    }
    assert_eq!(stored.hash_in(Kind::Float)?, wide.hash()?);
    assert_ne!(stored.hash()?, wide.hash()?);
    // to the same device and dtype, nothing is copied
    let same = stored.to(tch::Device::Cpu, Kind::BFloat16);
    assert_eq!(same.embedding.data_ptr(), stored.embedding.data_ptr());
    let (found, kept) = (&same.blocks[0].linears, &stored.blocks[0].linears);
    for (module, linear) in found {
        assert_eq!(linear.weight().data_ptr(), kept[module].weight().data_ptr(), "{module:?}");
    }
    Ok(())
}
