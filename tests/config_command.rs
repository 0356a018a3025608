//! What the binary says of its own command line and configs: keys, schema, completions, man pages.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// What `dylora` prints with these arguments.
fn printed(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    let output = command.args(arguments).env("OMP_NUM_THREADS", "1").output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).context("it is UTF-8")
}

#[test]
fn a_key_is_explained() -> Result<()> {
    insta::assert_snapshot!(printed(&["config", "explain", "train.duration"])?, @r#"
    train.duration
      choice, default "auto"
      How long to train.
        "auto"
          Three passes over the training set, or more if that is fewer than 100
          optimizer updates.
        { steps = N }
          Optimizer updates.
        { epochs = N }
          Passes over the training set.
        { tokens = N }
          Target tokens; the step that reaches this number is the last.
    "#);
    Ok(())
}

/// The schema must accept the configs that are accepted, and know their keys.
#[test]
fn the_schema_is_one_of_draft_7_whose_references_exist() -> Result<()> {
    let schema: Value = serde_json::from_str(&printed(&["config", "schema"])?)?;
    assert_eq!(schema["$schema"], "http://json-schema.org/draft-07/schema#");
    assert_eq!(schema["additionalProperties"], false);
    let definitions = schema["definitions"].as_object().context("there are types")?;
    let text = schema.to_string();
    for reference in text.split("\"$ref\":\"#/definitions/").skip(1) {
        let name = reference.split('"').next().context("it ends")?;
        assert!(definitions.contains_key(name), "{name}");
    }
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("schema.json");
    printed(&["config", "schema", "--out", file.to_str().context("UTF-8")?])?;
    assert_eq!(serde_json::from_str::<Value>(&fs_err::read_to_string(file)?)?, schema);
    Ok(())
}

#[test]
fn shells_get_completions_of_what_help_lists() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let text = printed(&["completions", shell])?;
        assert!(text.contains("add-expert") && text.contains("overwrite"), "{shell}");
        assert!(!text.contains("study-run"), "{shell}");
    }
    let bash = printed(&["completions", "bash"])?;
    let mut check = Command::new("bash");
    check.args(["-n", "/dev/stdin"]).stdin(std::process::Stdio::piped());
    let mut check = check.spawn()?;
    std::io::Write::write_all(&mut check.stdin.take().context("a pipe")?, bash.as_bytes())?;
    assert!(check.wait()?.success());
    Ok(())
}

#[test]
fn every_command_has_a_man_page() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("man1");
    printed(&["man", "--out", out.to_str().context("UTF-8")?])?;
    for name in ["dylora", "dylora-train", "dylora-config-explain", "dylora-add-expert"] {
        let page = fs_err::read_to_string(out.join(format!("{name}.1")))?;
        assert!(page.contains(".SH SYNOPSIS"), "{name}");
    }
    let train = fs_err::read_to_string(out.join("dylora-train.1"))?;
    assert!(train.contains("\\-\\-overwrite"), "{train}");
    assert!(!out.join("dylora-study-run.1").exists());
    Ok(())
}
