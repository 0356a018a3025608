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
pub fn steps(scene: &Scene, kind: &str) -> Result<Vec<u64>> {
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
pub fn wait_until(child: &mut Child, is_done: impl Fn() -> bool) -> Result<()> {
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
pub fn start(scene: &Scene, arguments: &[&str]) -> Result<Child> {
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
fn each_step_has_its_metrics_once_after_any_history() -> Result<()> {
    let scene = Scene::new()?;
    let mut arguments = scene.train(8, 2)?;
    arguments
        .extend(["--set", "train.keep_last=9", "--set", "router.window_steps=2"].map(String::from));
    assert!(scene.run(&as_str(&arguments))?.status.success());
    let whole = |last: u64| (1..=last).collect::<Vec<_>>();
    assert_eq!(steps(&scene, "train")?, whole(8));
    // killed before its first save, again from further back, and then resumed from later steps
    resume_and_kill(&scene, "run/checkpoints/step-00000004", 5)?;
    resume_and_kill(&scene, "run/checkpoints/step-00000002", 3)?;
    resume_and_kill(&scene, "run/checkpoints/step-00000006", 7)?;
    let to = |last: u64| format!("train.duration={{steps={last}}}");
    let output = scene.run(&["train", "--resume", "run", "--set", &to(10)])?;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(steps(&scene, "train")?, whole(10), "from step 8");
    assert_eq!(steps(&scene, "window")?, [2, 4, 6, 8, 10]);
    // a history that saves replaces what came later, and a later step still finds its own
    let saves = ["--set", "train.checkpoint_every_steps=5", "--set", &to(5)];
    let from = ["train", "--resume", "run/checkpoints/step-00000004"];
    let output = scene.run(&[&from[..], &saves].concat())?;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(steps(&scene, "train")?, whole(5));
    let from = ["train", "--resume", "run/checkpoints/step-00000010", "--set", &to(11)];
    let output = scene.run(&from)?;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(steps(&scene, "train")?, whole(11));
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

#[test]
fn a_step_is_whole_as_long_as_it_has_its_name() -> Result<()> {
    let scene = Scene::new()?;
    assert!(scene.run(&as_str(&scene.train(1, 1)?))?.status.success());
    let run = scene.path("run");
    let mut saved = read(&run.join("checkpoints/last"))?;
    let (ended, folder) = (AtomicBool::new(false), run.join("checkpoints"));
    let broken = thread::scope(|scope| {
        let watch = || {
            let mut broken = vec![];
            while !ended.load(Ordering::Relaxed) {
                for step in checkpoint::steps(&run).unwrap_or_default() {
                    let dir = folder.join(format!("step-{step:08}"));
                    let whole = ["state.json", "experts.json", "model.safetensors"];
                    let is_whole = whole.iter().all(|name| dir.join(name).exists());
                    // a folder that is gone has no name any more
                    if !is_whole && dir.exists() {
                        broken.push(step);
                    }
                }
            }
            broken
        };
        let watcher = scope.spawn(watch);
        let write = |saved: &mut Checkpoint| -> Result<()> {
            for step in 2..6 {
                saved.state.step = step;
                let dir = checkpoint::write(&run, saved, 1)?;
                // so many files that their deletion can be seen
                for name in 0..4000 {
                    fs_err::write(dir.join(format!("{name}")), "")?;
                }
            }
            Ok(())
        };
        let written = write(&mut saved);
        ended.store(true, Ordering::Relaxed);
        written.map(|()| watcher.join().expect("it does not panic"))
    })?;
    assert_eq!(broken, Vec::<u64>::new(), "steps that were not whole");
    Ok(())
}

#[test]
fn what_dead_processes_left_is_cleaned() -> Result<()> {
    let scene = Scene::new()?;
    assert!(scene.run(&as_str(&scene.train(2, 1)?))?.status.success());
    let checkpoints = scene.path("run/checkpoints");
    for name in
        [".writing-Ab1cD2", ".removed-step-00000001", ".dylora-replaced-step-00000002", ".last-77"]
    {
        fs_err::create_dir(checkpoints.join(name))?;
        fs_err::write(checkpoints.join(name).join("state.json"), "{}")?;
    }
    let output = scene.run(&["train", "--resume", "run", "--set", "train.duration={steps=3}"])?;
    assert!(output.status.success(), "{}", text(&output));
    let hidden = |dir: &Path| -> Result<Vec<String>> {
        let names = fs_err::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<Vec<_>>>()?;
        let names = names.into_iter().filter_map(|name| name.into_string().ok());
        Ok(names.filter(|name| name.starts_with('.')).collect())
    };
    // `.last-77` is no name that dylora gives to a folder
    assert_eq!(hidden(&checkpoints)?, [".last-77"]);
    fs_err::create_dir(scene.path(".writing-Ab1cD2"))?;
    fs_err::write(scene.path(".writing-Ab1cD2/model.safetensors"), "half")?;
    let output = scene.run(&["export-adapters", "--checkpoint", "run", "--out", "out"])?;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(hidden(&scene.path("."))?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_resumed_run_keeps_its_folder() -> Result<()> {
    let scene = Scene::new()?;
    assert!(scene.run(&as_str(&scene.train(2, 1)?))?.status.success());
    let output = scene.run(&["train", "--resume", "run", "--set", "run.dir=other"])?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("`--set run.dir`"), "{}", text(&output));
    Ok(())
}

#[test]
fn a_file_that_vanishes_during_a_run_is_noticed() -> Result<()> {
    let scene = Scene::new()?;
    let mut child = start(&scene, &as_str(&scene.train(300, 1000)?))?;
    let metrics = scene.path("run/metrics.jsonl");
    wait_until(&mut child, || fs_err::read(&metrics).is_ok_and(|bytes| !bytes.is_empty()))?;
    fs_err::remove_file(&metrics)?;
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("metrics.jsonl` has vanished"), "{}", text(&output));
    Ok(())
}

#[test]
fn a_limit_of_file_sizes_is_an_error() -> Result<()> {
    let scene = Scene::new()?;
    let mut command = scene.command(&as_str(&scene.train(2, 1)?));
    // SAFETY: `setrlimit` may be called between fork and exec
    unsafe {
        command.pre_exec(|| {
            let limit = libc::rlimit { rlim_cur: 100_000, rlim_max: 100_000 };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            Ok(())
        })
    };
    let output = command.output()?;
    assert_eq!(output.status.code(), Some(1), "{} {}", output.status, text(&output));
    assert!(text(&output).contains("File too large"), "{}", text(&output));
    Ok(())
}
