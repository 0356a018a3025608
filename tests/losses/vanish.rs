//! Files and folders that somebody deletes or moves while a process uses them, and what dead
//! processes left.

use std::path::Path;
use std::process::{Child, Output};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use dylora::durable::lock::FolderLock;

use crate::history::{start, wait_until};
use crate::{Scene, as_str, contents, text};

/// Starts a long run that writes all of its files, and waits for its first checkpoint.
fn running(scene: &Scene, steps: u64, saves_every: u64) -> Result<Child> {
    let mut arguments = scene.train(steps, saves_every)?;
    arguments.extend(["--set".to_owned(), "run.tensorboard=true".to_owned()]);
    let mut child = start(scene, &as_str(&arguments))?;
    let last = scene.path("run/checkpoints/last/state.json");
    wait_until(&mut child, || last.is_file())?;
    Ok(child)
}

/// What somebody does to the files of a run.
type Lose<'a> = &'a dyn Fn(&Scene) -> Result<()>;

/// What a run says that loses something.
fn after(saves_every: u64, lose: impl FnOnce(&Scene) -> Result<()>) -> Result<Output> {
    let scene = Scene::new()?;
    let child = running(&scene, 400, saves_every)?;
    lose(&scene)?;
    Ok(child.wait_with_output()?)
}

#[test]
fn a_runs_folder_lock_or_events_that_vanish_are_an_error() -> Result<()> {
    let folder = |scene: &Scene| Ok(fs_err::rename(scene.path("run"), scene.path("moved"))?);
    let lock = |scene: &Scene| Ok(fs_err::remove_file(scene.path("run/.lock"))?);
    let events = |scene: &Scene| Ok(fs_err::remove_dir_all(scene.path("run/tensorboard"))?);
    let metrics = |scene: &Scene| {
        // somebody's editor writes a new file
        fs_err::copy(scene.path("run/metrics.jsonl"), scene.path("run/new"))?;
        Ok(fs_err::rename(scene.path("run/new"), scene.path("run/metrics.jsonl"))?)
    };
    let cases: [(&str, Lose<'_>); 4] = [
        ("run/metrics.jsonl` has vanished", &folder),
        ("run/.lock` has vanished", &lock),
        ("run/tensorboard/events.out.tfevents.", &events),
        ("run/metrics.jsonl` has vanished", &metrics),
    ];
    for (part, lose) in cases {
        let output = after(1, lose)?;
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{part}: {message}");
        assert!(message.contains(part) && message.contains("has vanished"), "{part}: {message}");
        assert!(message.contains("hint: "), "{message}");
    }
    Ok(())
}

#[test]
fn checkpoints_that_vanish_are_named_and_the_run_goes_on() -> Result<()> {
    let output = after(40, |scene| Ok(fs_err::remove_dir_all(scene.path("run/checkpoints"))?))?;
    let message = text(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("step-00000040` has vanished"), "{message}");
    Ok(())
}

/// A run keeps the files of its tokens open, so that it goes on after somebody has deleted them.
#[test]
fn a_cache_of_tokens_that_vanishes_changes_nothing() -> Result<()> {
    let trained = |lose: bool| -> Result<Vec<u8>> {
        let scene = Scene::new()?;
        let child = running(&scene, 60, 20)?;
        if lose {
            fs_err::remove_dir_all(scene.path("cache"))?;
        }
        let output = child.wait_with_output()?;
        assert!(output.status.success(), "{}", text(&output));
        Ok(fs_err::read(scene.path("run/checkpoints/step-00000060/model.safetensors"))?)
    };
    assert!(trained(true)? == trained(false)?);
    Ok(())
}

/// The names in a folder that begin with a dot.
fn hidden(dir: &Path) -> Result<Vec<String>> {
    let names = contents(dir)?.into_iter().map(|(name, _)| name);
    Ok(names.filter(|name| name.starts_with('.') && !name.contains('/')).collect())
}

#[test]
fn the_cache_of_tokens_is_cleaned_of_what_dead_processes_left() -> Result<()> {
    let scene = Scene::new()?;
    let tokens = scene.path("cache/tokens");
    fs_err::create_dir_all(tokens.join(".writing-Ab1cD2"))?;
    fs_err::write(tokens.join(".writing-Ab1cD2/tokens"), "half")?;
    // earlier versions wrote files; one of today may belong to a process that is alive
    for (name, age) in [(".writing-old000", 2 * 24 * 3600), (".writing-new000", 60)] {
        let file = fs_err::File::create(tokens.join(name))?;
        file.file().set_modified(SystemTime::now() - Duration::from_secs(age))?;
    }
    fs_err::write(scene.path("a.jsonl"), "{\"text\": \"two words\"}\n")?;
    let output = scene.run(&["eval", "--base", "base", "--data", "a.jsonl"])?;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(hidden(&tokens)?, [".writing-new000"]);
    Ok(())
}

#[test]
fn a_study_locks_its_folder_as_a_run_does() -> Result<()> {
    let scene = Scene::new()?;
    scene.train(2, 1)?;
    fs_err::create_dir(scene.path("study"))?;
    let lock = FolderLock::take(&scene.path("study"))?;
    let arguments = ["study", "--config", "config.toml", "--out", "study", "--seeds", "1"];
    let output = scene.run(&[&arguments[..], &["--device", "cpu"]].concat())?;
    drop(lock);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let expected = format!("is in use by process {}", std::process::id());
    assert!(text(&output).contains(&expected), "{}", text(&output));
    Ok(())
}
