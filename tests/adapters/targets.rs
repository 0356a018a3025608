//! The target modules of an adapter and their ranks, from the adapter's config.

use anyhow::{Context, Result};
use dylora::config::LoraInit;
use dylora::mixture::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use dylora::model::experts::spec::{ExpertSpec, RankAlpha};
use dylora::peft::adapter;
use dylora::tensor_file::write_tensors;
use serde_json::{Map, Value, json};

use crate::{path, three_layers, zeros};

/// The target modules and ranks that we read from PEFT's `config`, for an adapter whose tensors
/// have the modules and ranks of `expected`.
fn ranks(config: &Value, expected: &[(&str, i64)]) -> Result<Vec<(String, i64)>> {
    let dir = tempfile::tempdir()?;
    let (file, weights) = (dir.path().join(ADAPTER_CONFIG), dir.path().join(ADAPTER_WEIGHTS));
    let mut entries: Map<String, Value> = Map::new();
    entries.insert("peft_type".into(), json!("LORA"));
    entries.extend(config.as_object().expect("the cases are objects").clone());
    fs_err::write(&file, Value::Object(entries).to_string())?;
    let size = |rank| RankAlpha { rank, alpha: 8.0 };
    let spec = ExpertSpec {
        modules: expected.iter().map(|(module, rank)| (path(module), size(*rank))).collect(),
        use_rslora: false,
        use_dora: false,
        init: LoraInit::Default,
        trainable: true,
        alora_invocation_tokens: vec![],
        shared: false,
    };
    let tensors = zeros(spec, &three_layers()).peft_tensors(&three_layers());
    write_tensors(&weights, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
    let modules = adapter::read(&file, &weights, &three_layers())?.spec.modules.into_iter();
    Ok(modules.map(|(path, size)| (path.to_string(), size.rank)).collect())
}

/// A config, and the target modules with their ranks that PEFT 0.21.2 takes from it on a GPT-2 of
/// three layers.
type Targeted = (Value, Vec<(&'static str, i64)>);

const ALL: [&str; 12] = [
    "h.0.attn.c_attn",
    "h.0.attn.c_proj",
    "h.0.mlp.c_fc",
    "h.0.mlp.c_proj",
    "h.1.attn.c_attn",
    "h.1.attn.c_proj",
    "h.1.mlp.c_fc",
    "h.1.mlp.c_proj",
    "h.2.attn.c_attn",
    "h.2.attn.c_proj",
    "h.2.mlp.c_fc",
    "h.2.mlp.c_proj",
];

fn by_targets() -> Vec<Targeted> {
    let all = ALL.map(|module| (module, 8)).to_vec();
    let c_proj = |layers: &[&'static str]| layers.iter().map(|layer| (*layer, 8)).collect();
    let (first, second) = ("h.1.mlp.c_proj", "h.2.mlp.c_proj");
    vec![
        (json!({ "target_modules": "all-linear" }), all),
        (
            json!({ "target_modules": ["attn.c_attn"], "exclude_modules": r".*\.1\..*" }),
            vec![("h.0.attn.c_attn", 8), ("h.2.attn.c_attn", 8)],
        ),
        (
            json!({
                "target_modules": "all-linear",
                "exclude_modules": ["c_fc", "attn.c_proj", "c_attn", "transformer.h.0.mlp.c_proj"],
            }),
            c_proj(&[first, second]),
        ),
        (json!({ "target_modules": ["mlp.c_proj"], "layers_to_transform": 1 }), c_proj(&[first])),
        (
            json!({
                "target_modules": ["mlp.c_proj"],
                "layers_to_transform": [2, 1],
                "layers_pattern": ["layers", "h"],
            }),
            c_proj(&[first, second]),
        ),
        // an empty pattern counts as no pattern
        (
            json!({
                "target_modules": ["mlp.c_proj"], "layers_to_transform": [1], "layers_pattern": "",
            }),
            c_proj(&[first]),
        ),
    ]
}

fn by_names_and_patterns() -> Vec<Targeted> {
    vec![
        // a module that is named in full is a target whatever `layers_to_transform` says
        (
            json!({
                "target_modules": ["transformer.h.0.attn.c_attn", "mlp.c_proj"],
                "layers_to_transform": [1],
            }),
            vec![("h.0.attn.c_attn", 8), ("h.1.mlp.c_proj", 8)],
        ),
        // the first pattern that matches the end of a module's name gives its rank
        (
            json!({
                "target_modules": ["attn.c_attn"],
                "rank_pattern": { "h.1": 3, "attn.c_attn": 2, "h.0.attn.c_attn": 5 },
            }),
            vec![("h.0.attn.c_attn", 2), ("h.1.attn.c_attn", 2), ("h.2.attn.c_attn", 2)],
        ),
        (
            json!({
                "target_modules": ["attn.c_attn"],
                "rank_pattern": { "^transformer.h.2.attn.c_attn": 5, r"h\.[01].*": 4 },
            }),
            vec![("h.0.attn.c_attn", 4), ("h.1.attn.c_attn", 4), ("h.2.attn.c_attn", 5)],
        ),
    ]
}

#[test]
fn the_modules_and_ranks_of_a_config_are_those_that_peft_finds() -> Result<()> {
    for (config, expected) in by_targets().into_iter().chain(by_names_and_patterns()) {
        let found = ranks(&config, &expected).with_context(|| config.to_string())?;
        let expected: Vec<_> = expected.iter().map(|(name, r)| ((*name).to_owned(), *r)).collect();
        assert_eq!(found, expected, "{config}");
    }
    Ok(())
}
