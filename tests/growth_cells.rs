//! Cells of the growth table (`scripts/growth_table.py`): whatever the routers of a mixture are,
//! `dylora add-expert` with its default settings brings it a new domain, and keeps the earlier
//! ones.
//!
//! Each test trains three experts on three domains of the demo and adds verse, 200 steps each. With
//! fewer steps, a single LoRA learns relatively more from its larger share of the new domain's
//! blocks, so that the gain falls below the bound. The tests that are ignored by default are run by
//! `cargo test --test growth_cells -- --ignored`, which takes three minutes on two cores.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Number of steps of each training.
const STEPS: u64 = 200;
/// The new domain.
const NEW: &str = "verse";
/// The smallest gain, as a share of what a single LoRA gains with the same steps, rank and rate.
const MIN_GAIN: f64 = 0.9;
/// The largest rise of an earlier domain's loss, nats.
const MAX_FORGETTING: f64 = 0.06;

/// The losses of the new domain by the base, and by a single LoRA that was trained on it alone.
#[derive(Debug, Clone, Copy)]
struct Reference {
    base: f64,
    single: f64,
}

/// Runs a command in the repository's root, and returns what it prints with `--json`.
fn dylora(arguments: &[&str], sets: &[String]) -> Result<Value> {
    static CACHE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let cache = CACHE.get_or_init(|| tempfile::tempdir().expect("a folder can be made"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.arg("-q").args(arguments).args(["--device", "cpu", "--json"]);
    for set in sets {
        command.args(["--set", set]);
    }
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env("OMP_NUM_THREADS", "1").env("DYLORA_CACHE", cache.path());
    let output = command.output()?;
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{message}");
    serde_json::from_slice(&output.stdout).context(message)
}

fn train(dir: &Path, sets: &[&str]) -> Result<()> {
    let mut sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    sets.push(format!("run.dir={}", dir.display()));
    sets.push(format!("train.duration={{steps={STEPS}}}"));
    dylora(&["train", "--config", "benchmarks/growth/demo.toml"], &sets)?;
    Ok(())
}

fn path(dir: &Path) -> &str {
    dir.to_str().expect("the path is UTF-8")
}

/// The name of a file of the new domain.
fn file(split: &str) -> String {
    format!("demo/data/{NEW}.{split}.jsonl")
}

fn reference() -> Result<Reference> {
    let dir = tempfile::tempdir()?;
    let (files, validation) = (file("train"), file("validation"));
    let domains = format!(
        "data.domains=[{{name=\"{NEW}\", train=[\"{files}\"], \
         validation={{files=[\"{validation}\"]}}}}]"
    );
    train(dir.path(), &["lora.num_experts=1", &domains])?;
    let loss = |more: &[&str]| -> Result<f64> {
        let eval = [&["eval", "--checkpoint", path(dir.path())], more].concat();
        dylora(&eval, &[])?["loss"].as_f64().context("a number")
    };
    Ok(Reference { base: loss(&["--routing", "none"])?, single: loss(&[])? })
}

/// Trains a mixture with these settings of its routers, adds the new domain, and checks what it
/// gains and what the others lose.
fn check(sets: &[&str]) -> Result<()> {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    let dir = tempfile::tempdir()?;
    let (three, four) = (dir.path().join("three"), dir.path().join("four"));
    train(&three, sets)?;
    let (files, validation, steps) = (file("train"), file("validation"), STEPS.to_string());
    let add = ["add-expert", "--checkpoint", path(&three), "--out", path(&four), "--steps", &steps];
    let data = ["--data", &files, "--validation", &validation];
    let added = dylora(&[&add[..], &data].concat(), &[])?;
    assert_eq!(added["ending"], "completed", "{added}");
    let stages = added["stages"].as_array().context("a list")?;
    let losses = |stage: usize| stages[stage]["losses"].as_object().context("an object");
    let (before, after) = (losses(0)?, losses(1)?);
    let Reference { base, single } =
        *REFERENCE.get_or_init(|| reference().expect("a single LoRA is trained"));
    let gain = (base - after[NEW].as_f64().context("a number")?) / (base - single);
    assert!(gain >= MIN_GAIN, "{sets:?}: the gain is {gain:.3}");
    for domain in before.keys().filter(|domain| *domain != NEW) {
        let loss = |of: &serde_json::Map<String, Value>| of[domain].as_f64().context("a number");
        let rise = loss(after)? - loss(before)?;
        assert!(rise <= MAX_FORGETTING, "{sets:?}: `{domain}` loses {rise:.3}");
    }
    Ok(())
}

const SUPERVISED: &str = "router.domain_supervision=0.1";
const UNSUPERVISED: &str = "router.domain_supervision=0.0";
const TOP_2: &str = "router.top_k=2";

#[test]
fn routers_of_layers_on_embeddings_top_2_unsupervised_at_1e_4() -> Result<()> {
    let router = ["router.input=embeddings", "router.scope=layer", TOP_2, UNSUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-4"]].concat())
}

#[test]
fn one_router_on_the_base_dense_unsupervised_at_2e_2() -> Result<()> {
    let router = ["router.input=base_hidden", "router.scope=shared", UNSUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=2e-2"]].concat())
}

#[test]
fn routers_of_layers_on_their_inputs_top_2_supervised_at_5e_3() -> Result<()> {
    let router = ["router.input=layer_input", "router.scope=layer", TOP_2, SUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=5e-3"]].concat())
}

#[test]
fn routers_of_modules_on_their_inputs_dense_supervised_at_1e_3() -> Result<()> {
    let router = ["router.input=module_input", "router.scope=module", SUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-3"]].concat())
}

#[test]
fn one_router_on_embeddings_dense_supervised_at_1e_3() -> Result<()> {
    let router = ["router.input=embeddings", "router.scope=shared", SUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-3"]].concat())
}

#[test]
#[ignore = "it takes long"]
fn one_router_on_embeddings_top_2_supervised_at_1e_4() -> Result<()> {
    let router = ["router.input=embeddings", "router.scope=shared", TOP_2, SUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-4"]].concat())
}

#[test]
#[ignore = "it takes long"]
fn routers_of_modules_on_embeddings_dense_supervised_at_1e_4() -> Result<()> {
    let router = ["router.input=embeddings", "router.scope=module", SUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-4"]].concat())
}

#[test]
#[ignore = "it takes long"]
fn one_router_on_the_base_top_2_supervised_at_1e_4() -> Result<()> {
    let router = ["router.input=base_hidden", "router.scope=shared", TOP_2, SUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-4"]].concat())
}

#[test]
#[ignore = "it takes long"]
fn routers_of_modules_on_the_base_dense_supervised_at_5e_3() -> Result<()> {
    let router = ["router.input=base_hidden", "router.scope=module", SUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=5e-3"]].concat())
}

#[test]
#[ignore = "it takes long"]
fn one_router_on_the_inputs_of_layers_dense_unsupervised_at_1e_3() -> Result<()> {
    let router = ["router.input=layer_input", "router.scope=shared", UNSUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-3"]].concat())
}

#[test]
#[ignore = "it takes long"]
fn routers_of_modules_on_the_inputs_of_layers_top_2_unsupervised_at_1e_4() -> Result<()> {
    let router = ["router.input=layer_input", "router.scope=module", TOP_2, UNSUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=1e-4"]].concat())
}

#[test]
#[ignore = "it takes long"]
fn routers_of_modules_on_their_inputs_dense_unsupervised_at_2e_2() -> Result<()> {
    let router = ["router.input=module_input", "router.scope=module", UNSUPERVISED];
    check(&[&router[..], &["optimizer.router.learning_rate=2e-2"]].concat())
}
