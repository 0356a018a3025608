//! Runs whose domains have experts, as `dylora train` and `dylora eval` report them.

use std::process::{Command, Output};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Runs the binary on the CPU with one thread and a token cache of its own.
fn dylora(folder: &tempfile::TempDir, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    let cache = folder.path().join("cache");
    command.args(arguments).env("DYLORA_CACHE", cache).env("OMP_NUM_THREADS", "1");
    Ok(command.output()?)
}

fn text(output: &Output) -> String {
    let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    of(&output.stdout) + &of(&output.stderr)
}

fn report(folder: &tempfile::TempDir, arguments: &[&str]) -> Result<Value> {
    let output = dylora(folder, &[&["eval", "--json"], arguments].concat())?;
    serde_json::from_slice(&output.stdout).with_context(|| text(&output))
}

/// Trains the demo for four steps in the folder `run`, and returns that folder.
fn train(folder: &tempfile::TempDir, run: &str, more: &[&str]) -> Result<String> {
    let run = folder.path().join(run);
    let run = run.to_str().context("UTF-8")?.to_owned();
    let dir = format!("run.dir={run}");
    let common = ["train", "--config", "configs/moe.toml", "--device", "cpu", "--set", &dir];
    let length = ["train.duration={steps=4}", "train.eval_every_steps=2", "router.window_steps=3"];
    let plain = ["lora.shared_rank=0", "lora.capacity=even", "router.level=token"];
    let sets = length.iter().chain(&plain).chain(more).flat_map(|set| ["--set", set]);
    let arguments: Vec<&str> = common.into_iter().chain(sets).collect();
    let output = dylora(folder, &arguments)?;
    assert!(output.status.success(), "{}", text(&output));
    Ok(run)
}

fn metrics(run: &str, kind: &str) -> Result<Vec<Value>> {
    let lines = fs_err::read_to_string(format!("{run}/metrics.jsonl"))?;
    let lines = lines.lines().map(|line| Ok(serde_json::from_str(line)?));
    let lines: Vec<Value> = lines.collect::<Result<_>>()?;
    Ok(lines.into_iter().filter(|line| line["kind"] == kind).collect())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn list(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list")).iter().map(number).collect()
}

const DOMAINS: [&str; 4] = ["arithmetic", "code", "data2text", "verse"];
const SUPERVISED: &str = "router.domain_supervision=0.1";

#[test]
fn a_supervised_run_reports_how_well_each_router_knows_the_domains() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = train(&folder, "run", &[SUPERVISED])?;
    let routers = (0..4).map(|layer| format!("h.{layer}.router")).collect::<Vec<_>>();
    let passes = metrics(&run, "validation")?;
    let last = passes.last().context("there is one")?;
    let found =
        report(&folder, &["--checkpoint", &format!("{run}/checkpoints/last"), "--batch-size=4"])?;
    for (index, router) in routers.iter().enumerate() {
        let accuracy = number(&last["domain_accuracy"][router]);
        let of_site = number(&found["routing"]["sites"][index]["domain_accuracy"]);
        assert!((accuracy - of_site).abs() < 1e-9, "{router}: {accuracy}, not {of_site}");
    }
    let supervision = number(&found["domain_supervision"]);
    assert!((number(&last["domain_supervision"]) - supervision).abs() < 1e-6);
    for (index, domain) in DOMAINS.iter().enumerate() {
        let of_domain = &found["domains"][index];
        assert_eq!(of_domain["name"], *domain);
        let accuracy = number(&of_domain["domain_accuracy"]);
        assert!((number(&last["accuracy_by_domain"][domain]) - accuracy).abs() < 1e-9);
    }
    let experts = found["experts"].as_array().context("a list")?;
    assert_eq!(experts.len(), 4);
    assert!(experts.iter().all(|of| number(&of["update_norm"]) > 0.0), "{experts:?}");
    let table = text(&dylora(&folder, &["eval", "--checkpoint", &run])?);
    assert!(table.contains("entropy | accuracy |"), "{table}");
    assert!(table.contains("update norm | relative to the base's weights |"), "{table}");
    assert!(table.contains(&format!("domain supervision: {supervision:.4} nats")), "{table}");
    assert!(!table.contains("has not moved"), "{table}");
    windows_have_the_matrix_of_routers_and_domains(&run)
}

/// The mean over the routers is the weight of an expert on a domain.
fn windows_have_the_matrix_of_routers_and_domains(run: &str) -> Result<()> {
    let windows = metrics(run, "window")?;
    assert_eq!(windows.len(), 2);
    for window in &windows {
        let by_domain = window["domain_routing_weights"].as_object().context("an object")?;
        for (domain, mean) in by_domain {
            assert!(DOMAINS.contains(&domain.as_str()));
            let sites: Vec<Vec<f64>> = (0..4)
                .map(|layer| list(&window["site_routing_weights"][format!("h.{layer}")][domain]))
                .collect();
            for (expert, mean) in list(mean).into_iter().enumerate() {
                let of_sites = sites.iter().map(|weights| weights[expert]).sum::<f64>() / 4.0;
                assert!((mean - of_sites).abs() < 1e-12, "{domain}: {mean}, not {of_sites}");
            }
            for weights in sites {
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{weights:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_run_routed_by_domain_is_evaluated_merged_and_refused_where_domains_have_no_expert()
-> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = train(&folder, "run", &["train.routing=domain"])?;
    let passes = metrics(&run, "validation")?;
    let found = report(&folder, &["--checkpoint", &format!("{run}/checkpoints/last")])?;
    let last = passes.last().context("there is one")?;
    assert!((number(&last["loss"]) - number(&found["loss"])).abs() < 1e-6);
    assert_eq!(
        (&found["routing_source"], &found["domain_accuracy"]),
        (&json!("domain"), &Value::Null)
    );
    // the loss of a domain is that of its own expert
    let own = report(&folder, &["--checkpoint", &run, "--routing", "expert:2"])?;
    let of = |report: &Value| number(&report["domains"][2]["loss"]);
    assert!((of(&found) - of(&own)).abs() < 1e-6, "{} is not {}", of(&found), of(&own));

    let merge = ["merge", "--checkpoint", &run, "--out", "unused"];
    let refused = dylora(&folder, &merge)?;
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused).contains("weights the experts token by token"), "{}", text(&refused));
    let out = folder.path().join("merged");
    let merge = ["merge", "--checkpoint", &run, "--json", "--weights", "uniform", "--out"];
    let merged = dylora(&folder, &[&merge[..], &[out.to_str().context("UTF-8")?]].concat())?;
    let merged: Value = serde_json::from_slice(&merged.stdout).with_context(|| text(&merged))?;
    let routed = number(&merged["measured"]["routed"]["loss"]);
    assert!((routed - number(&found["loss"])).abs() < 1e-6, "{merged}");

    let other = ["eval", "--checkpoint", &run, "--data", "law=demo/data/code.validation.jsonl"];
    let refused = dylora(&folder, &other)?;
    assert_eq!(refused.status.code(), Some(1));
    let message = text(&refused);
    assert!(message.contains("needs an expert for each domain, `law` has none"), "{message}");
    assert!(message.contains("`data.domains[].expert`"), "{message}");
    let refused = dylora(&folder, &["trace", "--checkpoint", &run, "--text", "a"])?;
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused).contains("a text has no domain"), "{}", text(&refused));
    Ok(())
}

#[test]
fn adapters_on_a_base_have_no_experts_of_domains() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = train(&folder, "run", &["train.routing=domain", "train.duration={steps=1}"])?;
    let export = folder.path().join("export");
    let export = export.to_str().context("UTF-8")?;
    let exported = dylora(&folder, &["export-adapters", "--checkpoint", &run, "--out", export])?;
    assert!(exported.status.success(), "{}", text(&exported));
    let eval = ["eval", "--adapters", export, "--base", "demo/base", "--data"];
    let eval = [&eval[..], &["code=demo/data/code.validation.jsonl", "--routing"]].concat();
    let refused = dylora(&folder, &[&eval[..], &["domain"]].concat())?;
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused).contains("needs a run's config"), "{}", text(&refused));
    let found = dylora(&folder, &[&eval[..], &["uniform"]].concat())?;
    assert!(found.status.success(), "{}", text(&found));
    Ok(())
}

/// With `expert:2`, the others stay as they are.
#[test]
fn experts_that_have_not_moved_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let routing = ["train.routing=expert:2", "router.domain_supervision=0.0"];
    let run = train(&folder, "run", &routing)?;
    let message = text(&dylora(&folder, &["eval", "--checkpoint", &run])?);
    for expert in 0..4 {
        let warned = message.contains(&format!("`expert_{expert}` has not moved from its start"));
        assert_eq!(warned, expert != 2, "{message}");
    }
    Ok(())
}
