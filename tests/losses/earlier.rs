//! `dylora train --overwrite` replaces the earlier run in `run.dir`, and nothing else.

use anyhow::{Context, Result};
use dylora::durable::lock::FolderLock;

use crate::{Scene, as_str, contents, text};

/// The arguments that train into `run` for `steps` steps, with `more`.
fn train(scene: &Scene, steps: u64, more: &[&str]) -> Result<(Option<i32>, String)> {
    let arguments = scene.train(steps, 1)?;
    let output = scene.run(&[&as_str(&arguments)[..], more].concat())?;
    Ok((output.status.code(), text(&output)))
}

#[test]
fn an_earlier_run_is_kept_unless_it_is_to_be_replaced() -> Result<()> {
    let scene = Scene::new()?;
    let (exit, said) = train(&scene, 2, &[])?;
    assert_eq!(exit, Some(0), "{said}");
    let before = contents(&scene.path("run"))?;
    // it is refused before anything is read: the data is not there
    let (exit, said) = train(&scene, 1, &["--set", "data.seq_len=16"])?;
    assert_eq!(exit, Some(1), "{said}");
    assert!(said.contains("or replace the run with `dylora train --overwrite`"), "{said}");
    assert!(!said.contains("documents"), "{said}");

    // a run that cannot begin does not cost the earlier one
    let (exit, said) = train(&scene, 1, &["--overwrite", "--set", "data.seq_len=4096"])?;
    assert_eq!(exit, Some(2), "{said}");
    let lock = FolderLock::take(&scene.path("run"))?;
    let (exit, said) = train(&scene, 1, &["--overwrite"])?;
    assert_eq!(exit, Some(1), "{said}");
    assert!(said.contains("is in use by process"), "{said}");
    drop(lock);
    let base = scene.path("run/base");
    fs_err::rename(scene.path("base"), &base)?;
    let (exit, said) = train(&scene, 1, &["--overwrite", "--set", "base.source.path=run/base"])?;
    assert_eq!(exit, Some(1), "{said}");
    assert!(said.contains("run/base`, which is read by this command"), "{said}");
    fs_err::rename(&base, scene.path("base"))?;
    fs_err::write(scene.path("run/notes.txt"), "mine")?;
    let (exit, said) = train(&scene, 1, &["--overwrite"])?;
    assert_eq!(exit, Some(1), "{said}");
    assert!(said.contains("holds `notes.txt`, which is no part of a run"), "{said}");
    fs_err::remove_file(scene.path("run/notes.txt"))?;
    let is_lock = |(name, _): &&(String, Vec<u8>)| name != ".lock";
    let kept = contents(&scene.path("run"))?;
    assert!(kept.iter().filter(is_lock).eq(before.iter().filter(is_lock)), "a file has changed");

    let (exit, said) = train(&scene, 1, &["--overwrite"])?;
    assert_eq!(exit, Some(0), "{said}");
    assert!(said.contains("deleting the earlier run: 2 checkpoint(s) up to step 2"), "{said}");
    let metrics = fs_err::read_to_string(scene.path("run/metrics.jsonl"))?;
    assert_eq!(metrics.lines().filter(|line| line.contains("\"train\"")).count(), 1, "{metrics}");
    let steps = fs_err::read_dir(scene.path("run/checkpoints"))?;
    let names: Vec<String> = steps
        .map(|entry| entry?.file_name().into_string().ok().context("UTF-8"))
        .collect::<Result<_>>()?;
    assert!(!names.contains(&"step-00000002".to_owned()), "{names:?}");
    Ok(())
}

#[test]
fn a_folder_that_is_no_run_is_not_replaced() -> Result<()> {
    let scene = Scene::new()?;
    fs_err::create_dir(scene.path("run"))?;
    fs_err::write(scene.path("run/thesis.txt"), "mine")?;
    let (exit, said) = train(&scene, 1, &["--overwrite"])?;
    assert_eq!(exit, Some(1), "{said}");
    assert!(said.contains("is no run of dylora"), "{said}");
    assert_eq!(fs_err::read_to_string(scene.path("run/thesis.txt"))?, "mine");
    Ok(())
}
