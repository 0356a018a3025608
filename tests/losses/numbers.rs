//! Every number of a config, with values that nobody means. Each is refused by its key, or the run
//! works with it.

use std::collections::BTreeSet;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dylora::config::{Config, load};
use schemars::schema_for;
use serde_json::Value;

use crate::{Scene, demo, text};

/// What is tried for each number.
const VALUES: [&str; 13] = [
    "9223372036854775807",
    "-9223372036854775808",
    "1099511627777",
    "1e308",
    "-1e308",
    "1e-308",
    "5e-324",
    "nan",
    "inf",
    "-inf",
    "-1",
    "-1.0",
    "0",
];

/// What a number needs beside it, by the beginning of its path.
const NEEDS: [(&str, &[&str]); 9] = [
    ("router.hybrid", &["router.top_k=1"]),
    ("router.balance_bias_rate", &["router.top_k=1"]),
    ("router.hybrid.plateau", &["router.hybrid={plateau={window_steps=10,min_delta=0.1}}"]),
    ("router.temperature_schedule", &["router.temperature_schedule={start=2.0,steps=5}"]),
    ("train.early_stopping", &["train.early_stopping={patience=3}", "train.eval_every_steps=5"]),
    (
        "growth",
        &["growth={domain='a',old_experts_rate=0.1,old_columns_rate=0.1,seed_steps=2,\
           seed_router_coef=0.1,consolidation_rate=0.1}"],
    ),
    (
        "base.source.random",
        &[
            "method=full",
            "base.tokenizer=base/tokenizer.json",
            "base.source={random={family='llama',n_layer=1,n_head=2,n_embd=16,n_positions=64}}",
        ],
    ),
    ("router.hidden_width", &["router.hidden_layers=1"]),
    ("optimizer.base", &["method=full"]),
];

/// The paths of all numbers: `[]` stands for an item of a list, and `{}` for an entry of a table.
fn numbers() -> BTreeSet<String> {
    let schema = schema_for!(Config).to_value();
    let mut found = BTreeSet::new();
    walk(&schema, &schema["$defs"], "", &mut found);
    found
}

fn walk(schema: &Value, definitions: &Value, path: &str, found: &mut BTreeSet<String>) {
    let name = schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/"));
    if let Some(name) = name {
        walk(&definitions[name], definitions, path, found);
    }
    for any in ["anyOf", "oneOf"].iter().flat_map(|key| schema[*key].as_array()).flatten() {
        walk(any, definitions, path, found);
    }
    for (key, value) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        walk(value, definitions, &path, found);
    }
    if schema["items"].is_object() {
        walk(&schema["items"], definitions, &format!("{path}[]"), found);
    }
    if schema["additionalProperties"].is_object() {
        walk(&schema["additionalProperties"], definitions, &format!("{path}{{}}"), found);
    }
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        other => vec![other.clone()],
    };
    if types.iter().any(|kind| kind == "integer" || kind == "number") {
        found.insert(path.to_owned());
    }
}

/// What `--set` gets so that the number at `path` has the value.
fn set(path: &str, value: &str) -> String {
    let at = path.find(['[', '{']).unwrap_or(path.len());
    let (key, rest) = path.split_at(at);
    format!("{key}={}", inside(key, rest, value))
}

fn inside(key: &str, path: &str, value: &str) -> String {
    if let Some(rest) = path.strip_prefix("[]") {
        let item = inside(key, rest, value);
        return if key == "optimizer.betas" {
            format!("[{item}, 0.9]")
        } else {
            format!("[{item}]")
        };
    }
    if let Some(rest) = path.strip_prefix("{}") {
        return format!("{{c_attn={}}}", inside(key, rest, value));
    }
    let Some(path) = path.strip_prefix('.') else { return value.to_owned() };
    let at = path.find(['.', '[', '{']).unwrap_or(path.len());
    let (name, rest) = path.split_at(at);
    let domain = if key == "data.domains" { "name='a',train=['a.jsonl']," } else { "" };
    format!("{{{domain}{name}={}}}", inside("", rest, value))
}

/// The settings of a run in which the number at `path` has the value.
fn sets(path: &str, value: &str) -> Vec<String> {
    let needs = NEEDS.iter().filter(|(start, _)| path.starts_with(start));
    let mut sets: Vec<String> =
        needs.flat_map(|(_, sets)| sets.iter().map(|set| (*set).to_owned())).collect();
    sets.push(set(path, value));
    sets
}

const CONFIG: &str = "[run]\ndir = 'run'\ndevice = 'cpu'\ntensorboard = false\n\
                      [base.source]\npath = 'base'\n[data]\nseq_len = 16\n\
                      [lora]\nnum_experts = 2\n\
                      [[data.domains]]\nname = 'a'\ntrain = ['a.jsonl']\n\
                      validation = { fraction = 0.5 }\n";

/// Whether a config is accepted. If not, the message must name the number, its value and what is
/// right.
fn accepts(path: &str, value: &str) -> Result<bool> {
    let sets = sets(path, value);
    let Err(error) = load::resolve(CONFIG, &sets) else { return Ok(true) };
    let message = format!("{error:#}");
    let name = path.trim_end_matches(['[', ']', '{', '}']);
    let name = name.rsplit(['.', ']']).next().context("a path has a name")?;
    // the two losses of `lora.orthogonality` have one fault
    let name = if path.starts_with("lora.orthogonality") { "orthogonality" } else { name };
    let of_bound = |line: &str| line.contains(name) && line.contains(" must ");
    let of_type = message.starts_with(&format!("in `--set {}`", sets.last().context("a set")?));
    let says = of_type || message.lines().any(of_bound);
    if !says || message.contains("panicked") {
        bail!("{path} = {value}: {message}");
    }
    // one sentence about this number, and none about others
    let lines = message.lines().count();
    if !of_type && (lines > 2 || message.len() > 400) {
        bail!("{path} = {value} has a long message: {message}");
    }
    Ok(false)
}

/// Runs a command, which must end within some seconds.
fn run_in_time(scene: &Scene, arguments: &[&str]) -> Result<Output> {
    let (out, begun) = (scene.path("out.txt"), Instant::now());
    let file = fs_err::File::create(&out)?.into_parts().0;
    let mut command = scene.command(arguments);
    let mut child = command.stdout(file.try_clone()?).stderr(file).spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Output { status, stdout: fs_err::read(&out)?, stderr: vec![] });
        }
        if begun.elapsed() > Duration::from_secs(20) {
            child.kill()?;
            child.wait()?;
            bail!("it hangs");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn every_number_of_a_config_is_bounded() -> Result<()> {
    let numbers = numbers();
    assert!(numbers.len() > 60, "{numbers:?}");
    let mut accepted = vec![];
    for path in &numbers {
        for value in VALUES {
            if accepts(path, value)? {
                accepted.push((path.as_str(), value));
            }
        }
    }
    // what is as large as a number can be is refused, whatever the number is
    let is_huge = |(path, value): &&(&str, &str)| {
        let huge = VALUES[..2].contains(value) || VALUES[3..5].contains(value);
        (huge && *path != "run.seed") || ["nan", "inf", "-inf"].contains(value)
    };
    let huge: Vec<_> = accepted.iter().filter(is_huge).collect();
    assert!(huge.is_empty(), "{huge:?}");
    let scene = Scene::new()?;
    let data = fs_err::read_to_string(demo().join("data/code.validation.jsonl"))?;
    fs_err::write(scene.path("a.jsonl"), data)?;
    fs_err::write(scene.path("config.toml"), CONFIG)?;
    for (path, value) in accepted {
        let sets = sets(path, value);
        let mut arguments = vec!["train", "--config", "config.toml", "--dry-run"];
        arguments.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
        let output =
            run_in_time(&scene, &arguments).with_context(|| format!("{path} = {value}"))?;
        let message = text(&output);
        let refuses = matches!(output.status.code(), Some(1 | 2)) && message.contains(path);
        let ok = output.status.success() || refuses;
        assert!(ok && !message.contains("bug"), "{path} = {value}: {message}");
    }
    Ok(())
}
