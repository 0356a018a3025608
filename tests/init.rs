//! `dylora init`: the config that it writes can be trained on at once.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The command in `folder`, with a token cache of its own and one thread.
fn dylora(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(arguments).current_dir(folder);
    command.env("DYLORA_CACHE", folder.join("cache")).env("OMP_NUM_THREADS", "1");
    command
}

fn done(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// A folder with the demo's base, two of its domains in `data`, and records of another kind.
fn project() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    fs_err::create_dir_all(folder.path().join("data"))?;
    fs_err::os::unix::fs::symlink(demo.join("base"), folder.path().join("base"))?;
    for name in ["code.train.jsonl", "code.validation.jsonl", "verse.train.jsonl"] {
        fs_err::copy(demo.join("data").join(name), folder.path().join("data").join(name))?;
    }
    let facts = (0..40).map(|i| format!("Say the number after {i}.,It is {}.\n", i + 1));
    let facts = format!("instruction,output\n{}", facts.collect::<String>());
    fs_err::write(folder.path().join("data/facts.csv"), facts)?;
    Ok(folder)
}

#[test]
fn a_config_that_init_wrote_is_planned_and_trained_as_it_is() -> Result<()> {
    let folder = project()?;
    let run = |arguments: &[&str]| done(&dylora(folder.path(), arguments).output()?);
    let data = ["data/code.train.jsonl", "prose=data/verse.train.jsonl"];
    let init = [&["init", "--base", "base", "--device", "cpu", "--data"][..], &data].concat();
    let text = run(&init)?;
    assert!(text.contains("and dylora.schema.json for editors: a mixture of 2 experts,"), "{text}");
    let config = fs_err::read_to_string(folder.path().join("dylora.toml"))?;
    for line in [
        "source = { path = \"base\" }",
        "train = [\"data/code.train.jsonl\"]",
        "validation = { files = [\"data/code.validation.jsonl\"] }",
        "validation = { fraction = 0.1 }",
        "dir = \"runs/dylora\"  # checkpoints and metrics",
    ] {
        assert!(config.contains(line), "{line} is not in\n{config}");
    }

    let plan = run(&["train", "--config", "dylora.toml", "--dry-run", "--json"])?;
    let plan: Value = serde_json::from_str(&plan)?;
    let steps = plan["steps"].as_u64().context("a number")?;
    assert!(text.contains(&format!("{steps} steps of 8 blocks of 256 tokens on cpu")), "{text}");
    run(&["-q", "train", "--config", "dylora.toml", "--set", "train.duration={steps=2}"])?;
    assert!(folder.path().join("runs/dylora/checkpoints/best").exists());

    let again = dylora(folder.path(), &init).output()?;
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8(again.stderr)?.contains("`dylora.toml` exists already"));
    Ok(())
}

#[test]
fn a_terminal_is_asked_and_one_domain_becomes_a_single_lora() -> Result<()> {
    let folder = project()?;
    let mut command = dylora(folder.path(), &["init", "--device", "cpu", "--out", "facts.toml"]);
    command.env("TERM", "dumb");
    let mut terminal = rexpect::session::spawn_command(command, Some(60_000))?;
    for (question, answer) in [
        ("Base, a folder or a Hub id", "base"),
        ("File 1, as FILE or DOMAIN=FILE", "data/none.jsonl"),
        ("does not exist", ""),
        ("File 1, as FILE or DOMAIN=FILE", "data/facts.csv"),
        ("domain `facts`: 40 alpaca", ""),
        ("File 2, as FILE or DOMAIN=FILE, or nothing", ""),
    ] {
        terminal.exp_string(question)?;
        if !answer.is_empty() || question.starts_with("File 2") {
            terminal.send_line(answer)?;
        }
    }
    terminal.exp_string("for editors: a single LoRA, since one domain needs no router")?;
    terminal.exp_eof()?;
    let config = fs_err::read_to_string(folder.path().join("facts.toml"))?;
    assert!(config.contains("num_experts = 1\n"), "{config}");
    assert!(config.contains("dir = \"runs/facts\""), "{config}");
    Ok(())
}
