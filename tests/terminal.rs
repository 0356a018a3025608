//! What a terminal shows: the bar of a training run, and no escapes where they are not wanted.

use std::process::Command;

use anyhow::Result;

/// What a terminal shows of a training run of two steps with these variables.
fn shown(variables: &[(&str, &str)]) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(["train", "--config", "configs/lifecycle.toml", "--device", "cpu"]);
    for set in ["train.duration={steps=3}", "train.eval_every_steps=2", "run.tensorboard=false"] {
        command.args(["--set", set]);
    }
    command.args(["--set", &format!("run.dir={}", dir.path().join("run").display())]);
    command.env("DYLORA_CACHE", dir.path().join("cache")).env("OMP_NUM_THREADS", "1");
    for name in ["NO_COLOR", "CLICOLOR_FORCE", "DYLORA_LOG"] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm").envs(variables.iter().copied());
    let text = rexpect::session::spawn_command(command, Some(120_000))?.exp_eof()?;
    // rexpect makes a character of each byte
    Ok(String::from_utf8(text.chars().map(|byte| byte as u8).collect())?)
}

#[test]
fn the_bar_says_what_the_run_does() -> Result<()> {
    let text = shown(&[])?;
    assert!(text.contains("\x1b["), "{text}");
    for part in ["training step", "validating ", "saving, step"] {
        assert!(text.contains(part), "`{part}` is not in {text}");
    }
    Ok(())
}

#[test]
fn a_dumb_terminal_gets_lines_without_escapes() -> Result<()> {
    let text = shown(&[("TERM", "dumb")])?;
    assert!(!text.contains('\x1b'), "{text}");
    assert!(text.contains("step 3: loss "), "{text}");
    Ok(())
}
