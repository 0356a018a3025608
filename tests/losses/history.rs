//! What a run's folder holds after any history: whole checkpoints, each step's metrics once, and
//! the files of one process at a time.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dylora::checkpoint::{self, Checkpoint};

use crate::{Scene, as_str, text};

/// The steps of a run's lines of `kind`, in the order of the file.
fn steps(scene: &Scene, kind: &str) -> Result<Vec<u64>> {
    let metrics = fs_err::read_to_string(scene.path("run/metrics.jsonl"))?;
    let mut found = vec![];
    for line in metrics.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        if line["kind"] == kind {
            found.push(line["step"].as_u64().context("a number")?);
        }
    }
    Ok(found)
}

/// Waits until `is_done` holds, while the process runs.
fn wait_until(child: &mut Child, is_done: impl Fn() -> bool) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(90) {
        if is_done() {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!("the process ended early: {status}");
        }
        thread::sleep(Duration::from_millis(2));
    }
    bail!("nothing happens")
}

/// Starts a command whose output is kept.
fn start(scene: &Scene, arguments: &[&str]) -> Result<Child> {
    let mut command = scene.command(arguments);
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Resumes from `from` and kills the process when it has done a step, before its first save.
fn resume_and_kill(scene: &Scene, from: &str, first: u64) -> Result<()> {
    let sets = ["train.checkpoint_every_steps=100000", "train.duration={steps=100000}"];
    let mut child = start(scene, &["train", "--resume", from, "--set", sets[0], "--set", sets[1]])?;
    wait_until(&mut child, || {
        let last = steps(scene, "train").ok().and_then(|steps| steps.last().copied());
        last.is_some_and(|last| (first..first + 4).contains(&last))
    })?;
    child.kill()?;
    child.wait()?;
    Ok(())
}

#[test]
fn a_second_process_on_a_runs_folder_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = scene.train(100_000, 3)?;
    let mut first = start(&scene, &as_str(&arguments))?;
    wait_until(&mut first, || scene.path("run/checkpoints/last/state.json").is_file())?;
    let second = scene.run(&["train", "--resume", "run", "--set", "train.duration={steps=9}"])?;
    first.kill()?;
    first.wait()?;
    let message = text(&second);
    assert_eq!(second.status.code(), Some(1), "{message}");
    assert!(message.contains(&format!("is in use by process {}", first.id())), "{message}");
    // the lock ends with its owner
    let state = fs_err::read_to_string(scene.path("run/checkpoints/last/state.json"))?;
    let step = serde_json::from_str::<serde_json::Value>(&state)?["step"].as_u64();
    let last = step.context("a number")? + 1;
    let more = format!("train.duration={{steps={last}}}");
    let third = scene.run(&["train", "--resume", "run", "--set", &more])?;
    assert!(third.status.success(), "{}", text(&third));
    assert_eq!(steps(&scene, "train")?, (1..=last).collect::<Vec<_>>());
    Ok(())
}

/// A checkpoint of a run, to be written again under other steps.
fn read(dir: &Path) -> Result<Checkpoint> {
    Ok(Checkpoint {
        config: checkpoint::read_config(dir)?,
        state: checkpoint::read_state(dir)?,
        experts: checkpoint::read_experts(dir)?,
        skills: None,
        model: checkpoint::read_model(dir)?,
        optimizer: checkpoint::read_optimizer(dir)?,
    })
}
