//! The examples of the library, which train on the demo, generate and route by a rule of their own.
//!
//! `cargo test` builds them; to run this file alone, run `cargo build --examples` first.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Runs an example in the repository's root and returns what it prints.
fn run(name: &str, arguments: &[&str]) -> Result<String> {
    // a test is in `target/PROFILE/deps`, and the examples are in `target/PROFILE/examples`
    let test = std::env::current_exe()?;
    let profile = test.ancestors().nth(2).context("a test is in a folder of the profile")?;
    let example: PathBuf = profile.join("examples").join(name);
    let output = Command::new(&example)
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("OMP_NUM_THREADS", "1")
        .output()
        .with_context(|| format!("`{}`, of `cargo build --examples`", example.display()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{name}` failed: {errors}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The number behind `key` in a line of `text` that begins with it.
fn number(text: &str, key: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let word = line.and_then(|rest| rest.split_whitespace().next());
    Ok(word.with_context(|| format!("no number behind `{key}` in: {text}"))?.parse()?)
}

#[test]
fn the_examples_train_generate_and_route() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path().join("run");
    let dir = dir.to_str().context("the path is UTF-8")?;
    let text = run("train", &[dir, "6"])?;
    let (first, last) = (number(&text, "step 1: loss")?, number(&text, "step 6: loss")?);
    assert!(last < first, "{text}");
    assert!(text.contains("completed after 6 steps\n"), "{text}");
    assert!(Path::new(dir).join("checkpoints/step-00000006").is_dir());

    let text = run("generate", &[dir, "Anna finds 7 apples."])?;
    let (written, weights) = text.split_once("\nmean routing weights: [").context("weights")?;
    assert!(written.starts_with("Anna finds 7 apples.") && written.len() > 20, "{text}");
    let weights = weights.trim().trim_end_matches(']').split(", ").map(str::parse::<f64>);
    let sum: f64 = weights.collect::<Result<Vec<_>, _>>()?.iter().sum();
    assert!((sum - 1.0).abs() < 0.02, "{text}");

    let text = run("custom_router", &[dir])?;
    let losses = ["router:", "uniform:", "first token:"].map(|name| number(&text, name));
    let [router, uniform, first] = losses;
    let (router, uniform, first) = (router?, uniform?, first?);
    assert!(first != uniform && first != router && first < 2.0, "{text}");
    Ok(())
}
