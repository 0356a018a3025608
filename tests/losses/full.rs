//! A full disk and a full standard output, for every command.

use std::os::unix::process::CommandExt;

use anyhow::Result;

use crate::runs::full_device;
use crate::{Scene, as_str, demo, text};

/// A scene with a run of two steps in `run` and an export of it in `experts`.
fn trained() -> Result<Scene> {
    let scene = Scene::new()?;
    // `push` refuses to name a folder of this machine
    let config = fs_err::read_to_string(scene.path("base/config.json"))?;
    let config = config.replacen('{', "{\n  \"_name_or_path\": \"owner/base\",", 1);
    fs_err::write(scene.path("base/config.json"), config)?;
    for arguments in [
        as_str(&scene.train(2, 1)?),
        vec!["export-adapters", "--checkpoint", "run", "--out", "experts"],
    ] {
        let output = scene.run(&arguments)?;
        assert!(output.status.success(), "{}", text(&output));
    }
    Ok(scene)
}

/// All commands that print, in an order in which each finds its inputs.
fn commands(scene: &Scene) -> Result<Vec<Vec<String>>> {
    let data = demo().join("data/code.validation.jsonl").display().to_string();
    let new = demo().join("data/verse.train.jsonl").display().to_string();
    let train = scene.train(1, 1)?;
    let with = |more: &[&str]| -> Vec<String> {
        train.iter().cloned().chain(more.iter().map(|part| (*part).to_owned())).collect()
    };
    let mut commands = vec![
        with(&["--set", "run.dir=other"]),
        with(&["--set", "run.dir=third", "--dry-run"]),
        with(&["--set", "run.dir=third", "--dry-run", "--json"]),
    ];
    let model = ["--checkpoint", "run"];
    let lines: Vec<Vec<&str>> = vec![
        vec!["--version"],
        vec!["--help"],
        vec!["train", "--help"],
        vec!["eval", "--checkpoint", "run"],
        vec!["eval", "--base", "base", "--data", &data, "--json"],
        vec!["trace", "--text", "a b", "--checkpoint", "run"],
        vec!["trace", "--text", "a b", "--checkpoint", "run", "--out", "t.safetensors"],
        [&["generate", "--prompt", "a b", "--max-new-tokens", "2", "--raw"][..], &model].concat(),
        [&["generate", "--prompt", "a b", "--max-new-tokens", "2", "--json"][..], &model].concat(),
        [&["merge", "--weights", "uniform", "--out", "merged"][..], &model].concat(),
        [&["export-adapters", "--out", "out"][..], &model].concat(),
        vec!["report", "run", "--out", "report.html"],
        vec!["push", "--from", "experts", "a/b"],
        vec!["bench", "--device=cpu", "--base=base", "--seq-len=32", "--steps=1", "--warmup=0"],
        vec!["study", "--config", "config.toml", "--dry-run", "--seeds=1", "--device=cpu"],
        [&["remove-expert", "--expert", "0", "--out", "removed"][..], &model].concat(),
        [&["merge-experts", "--experts", "0,1", "--out", "joined"][..], &model].concat(),
        [
            &["add-expert", "--data", &new, "--out", "added", "--steps", "30", "--force"][..],
            &["--domain", "fresh", "--seed-steps", "20", "--device", "cpu"],
            &model,
        ]
        .concat(),
    ];
    commands.extend(lines.into_iter().map(|line| line.into_iter().map(String::from).collect()));
    Ok(commands)
}

#[test]
fn a_full_standard_output_is_an_error_of_every_command() -> Result<()> {
    let scene = trained()?;
    for arguments in commands(&scene)? {
        let output = scene.command(&as_str(&arguments)).stdout(full_device()?).output()?;
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        let says = message.contains("cannot write to standard output: No space left");
        assert!(says && !message.contains("bug"), "{arguments:?}: {message}");
    }
    Ok(())
}

/// A limit on the size of files stands in for a full disk. The output is small enough for it.
#[test]
fn a_limit_of_file_sizes_is_an_error_of_every_command_that_writes() -> Result<()> {
    let scene = trained()?;
    let fixed = ["--json", "--dry-run", "--version", "--help", "eval", "generate", "push", "bench"];
    for arguments in commands(&scene)? {
        let writes = !fixed.iter().any(|word| arguments.iter().any(|part| part == word));
        if !writes || (arguments[0] == "trace" && !arguments.contains(&"--out".to_owned())) {
            continue;
        }
        for limit in [0, 4096] {
            let mut command = scene.command(&as_str(&arguments));
            // SAFETY: `setrlimit` may be called between fork and exec
            unsafe {
                command.pre_exec(move || {
                    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
                    libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
                    Ok(())
                })
            };
            let output = command.output()?;
            let message = text(&output);
            assert_eq!(
                output.status.code(),
                Some(1),
                "{arguments:?}: {}: {message}",
                output.status
            );
            let says = message.contains("File too large");
            assert!(says && !message.contains("bug"), "{arguments:?}: {message}");
        }
    }
    Ok(())
}
