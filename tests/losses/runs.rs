//! Runs that are interrupted, killed at a bad moment, or whose messages cannot be written.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fs_err::File;

use crate::signals::notice_signals;
use crate::{Scene, as_str, text};

/// A device to which nothing can be written.
pub fn full_device() -> Result<Stdio> {
    Ok(File::create("/dev/full")?.into_parts().0.into())
}

/// Waits until the run has written `count` lines of metrics.
fn wait_for_steps(scene: &Scene, child: &mut Child, count: usize) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        let metrics = fs_err::read_to_string(scene.path("run/metrics.jsonl")).unwrap_or_default();
        if metrics.lines().count() >= count {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!("the run ended early: {status}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("the run makes no steps")
}

fn send(child: &Child, signal: i32) {
    // SAFETY: `kill` takes two numbers and accesses no memory
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

#[test]
fn an_interrupted_run_saves_and_exits_as_its_signal_says() -> Result<()> {
    for (signal, code) in [(libc::SIGINT, 130), (libc::SIGTERM, 143), (libc::SIGHUP, 129)] {
        let scene = Scene::new()?;
        let mut command = scene.command(&as_str(&scene.train(100_000, 100_000)?));
        notice_signals(&mut command);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        wait_for_steps(&scene, &mut child, 3)?;
        send(&child, signal);
        let output = child.wait_with_output()?;
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        let run = scene.path("run");
        let resume = format!("go on with `dylora train --resume {}`", run.display());
        assert!(message.contains(&resume), "{message}");
        assert!(text(&output).contains("interrupted after step"), "{}", text(&output));
        // the run resumes by the command that it printed
        let steps = fs_err::read_dir(run.join("checkpoints"))?.count();
        assert_eq!(steps, 2, "one step and `last`");
        let state = fs_err::read_to_string(run.join("checkpoints/last/state.json"))?;
        let step = serde_json::from_str::<serde_json::Value>(&state)?["step"].as_u64();
        let more = format!("train.duration={{steps={}}}", step.context("a number")? + 1);
        let output = scene.run(&["train", "--resume", "run", "--set", &more])?;
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    }
    Ok(())
}

#[test]
fn a_second_signal_ends_at_once_with_the_files_whole() -> Result<()> {
    let scene = Scene::new()?;
    let mut command = scene.command(&as_str(&scene.train(100_000, 1)?));
    notice_signals(&mut command);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_for_steps(&scene, &mut child, 3)?;
    send(&child, libc::SIGTERM);
    send(&child, libc::SIGINT);
    let code = child.wait()?.code();
    // the kernel decides which of the two signals arrives first
    assert!(matches!(code, Some(130 | 143)), "{code:?}");
    let output = scene.run(&["eval", "--checkpoint", "run"])?;
    assert!(output.status.success(), "{}", text(&output));
    Ok(())
}

/// `nohup` depends on this.
#[test]
fn a_signal_that_was_ignored_from_the_start_stays_ignored() -> Result<()> {
    let scene = Scene::new()?;
    let mut command = scene.command(&as_str(&scene.train(30, 1000)?));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: `signal` may be called between fork and exec
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Ok(())
        })
    };
    let mut child = command.spawn()?;
    wait_for_steps(&scene, &mut child, 3)?;
    send(&child, libc::SIGHUP);
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("completed after step 30"), "{}", text(&output));
    Ok(())
}

#[test]
fn training_goes_on_when_nobody_reads_its_messages() -> Result<()> {
    for verbosity in ["-v", "-vv"] {
        for stderr in ["closed pipe", "full device"] {
            let scene = Scene::new()?;
            let mut arguments = as_str(&scene.train(20, 1000)?).join(" ");
            arguments.push_str(&format!(" {verbosity}"));
            let mut command = scene.command(&arguments.split(' ').collect::<Vec<_>>());
            command.stdout(Stdio::piped());
            match stderr {
                "full device" => command.stderr(full_device()?),
                _ => command.stderr(Stdio::piped()),
            };
            let mut child = command.spawn()?;
            if let Some(mut pipe) = child.stderr.take() {
                pipe.read_exact(&mut [0; 10])?;
            }
            let output = child.wait_with_output()?;
            assert_eq!(output.status.code(), Some(0), "{stderr} {verbosity}: {}", output.status);
            assert!(text(&output).contains("completed after step 20"), "{}", text(&output));
            assert!(scene.path("run/checkpoints/step-00000020/state.json").is_file());
        }
    }
    Ok(())
}

#[test]
fn an_error_that_cannot_be_printed_keeps_its_exit_code() -> Result<()> {
    let scene = Scene::new()?;
    let mut command = scene.command(&["train", "--config", "no.toml"]);
    assert_eq!(command.stderr(full_device()?).status()?.code(), Some(2));
    let mut command = scene.command(&["--version"]);
    let output = command.stdout(full_device()?).output()?;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("cannot write to standard output: No space left"),
        "{}",
        text(&output)
    );
    Ok(())
}

#[test]
fn a_run_whose_last_link_is_lost_resumes_from_its_newest_whole_step() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = scene.train(3, 1)?;
    assert!(scene.run(&as_str(&arguments))?.status.success());
    let checkpoints = scene.path("run/checkpoints");
    let last = checkpoints.join("last");
    for way in ["absent", "dangling"] {
        fs_err::remove_file(&last)?;
        if way == "dangling" {
            fs_err::os::unix::fs::symlink("step-00000099", &last)?;
        }
        // an incomplete checkpoint, such as an interrupted copy leaves
        let broken = checkpoints.join("step-00000050");
        fs_err::create_dir(&broken)?;
        fs_err::write(broken.join("state.json"), "{")?;
        let more = ["--set", "train.duration={steps=4}", "--resume"];
        let resumed = [&as_str(&arguments)[..], &more].concat();
        let output = scene.run(&resumed)?;
        let message = text(&output);
        assert!(output.status.success(), "{way}: {message}");
        assert!(
            message.contains("step-00000003") && message.contains("`last`"),
            "{way}: {message}"
        );
        assert!(message.contains("completed after step 4"), "{way}: {message}");
        assert_eq!(fs_err::read_link(&last)?, Path::new("step-00000004"), "{way}");
        // restore the state before this case
        fs_err::remove_dir_all(&broken)?;
        fs_err::remove_dir_all(checkpoints.join("step-00000004"))?;
    }
    // commands that only read also find the newest complete step, and restore the link
    fs_err::remove_file(&last)?;
    let _ = fs_err::remove_file(checkpoints.join("best"));
    let output = scene.run(&["eval", "--checkpoint", "run"])?;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(fs_err::read_link(&last)?, Path::new("step-00000003"));
    fs_err::remove_file(&last)?;
    // a run without a complete step is refused with a message
    for entry in fs_err::read_dir(&checkpoints)? {
        let state = entry?.path().join("state.json");
        if state.is_file() {
            fs_err::write(state, "{")?;
        }
    }
    let output = scene.run(&["train", "--resume", "run"])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("holds no whole checkpoint"), "{}", text(&output));
    Ok(())
}

/// The run was killed after the first step was in place and before `last` pointed to it.
#[test]
fn a_kill_before_the_first_link_leaves_a_run_that_resumes() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = scene.train(2, 1)?;
    assert!(scene.run(&as_str(&arguments))?.status.success());
    let checkpoints = scene.path("run/checkpoints");
    fs_err::remove_file(checkpoints.join("last"))?;
    fs_err::remove_dir_all(checkpoints.join("step-00000001"))?;
    let output = scene.run(&as_str(&arguments))?;
    assert!(text(&output).contains("go on with `dylora train --resume`"), "{}", text(&output));
    let output = scene.run(&["train", "--resume", "run", "--set", "train.duration={steps=3}"])?;
    assert!(output.status.success(), "{}", text(&output));
    Ok(())
}

#[test]
fn an_interrupted_run_has_its_exit_code_though_nobody_reads_its_result() -> Result<()> {
    let scene = Scene::new()?;
    let mut command = scene.command(&as_str(&scene.train(100_000, 100_000)?));
    let mut child = command.stdout(full_device()?).stderr(Stdio::piped()).spawn()?;
    wait_for_steps(&scene, &mut child, 3)?;
    send(&child, libc::SIGTERM);
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(143), "{}", text(&output));
    assert!(text(&output).contains("go on with `dylora train --resume"), "{}", text(&output));
    Ok(())
}

#[test]
fn a_damaged_last_step_is_passed_over() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = scene.train(3, 1)?;
    assert!(scene.run(&as_str(&arguments))?.status.success());
    let last = scene.path("run/checkpoints/step-00000003");
    for file in ["state.json", "model.safetensors", "optimizer.safetensors", "config.toml"] {
        fs_err::write(last.join(file), "{")?;
        let output = scene.run(&["train", "--resume", "run"])?;
        let message = text(&output);
        assert!(output.status.success(), "{file}: {message}");
        assert!(message.contains("is damaged") && message.contains("step-00000002"), "{message}");
        assert!(message.contains("completed after step 3"), "{file}: {message}");
    }
    Ok(())
}
