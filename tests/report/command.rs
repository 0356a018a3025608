//! The command: what it refuses, and what it leaves in place.

use std::process::{Command, Output};

use anyhow::Result;
use fs_err::os::unix::fs::symlink;

use crate::Scene;

fn report(scene: &Scene, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.arg("report").args(arguments).current_dir(scene.0.path());
    let Output { status, stdout, stderr } = command.env("OMP_NUM_THREADS", "1").output()?;
    let text = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((status.code(), text))
}

#[test]
fn bad_input_is_named_with_exit_code_2_and_nothing_is_written() -> Result<()> {
    let scene = Scene::new()?;
    scene.run("run", ["law", "code"], 2, 0.0)?;
    for name in ["empty", "config", "state", "study"] {
        fs_err::create_dir_all(scene.path(name))?;
    }
    for name in ["config", "state"] {
        fs_err::copy(scene.path("run/metrics.jsonl"), scene.path(name).join("metrics.jsonl"))?;
    }
    fs_err::write(scene.path("config/config.toml"), "data = 3\n")?;
    let step = scene.path("state/checkpoints/step-00000002");
    fs_err::create_dir_all(&step)?;
    fs_err::write(step.join("state.json"), "{}")?;
    symlink("step-00000002", scene.path("state/checkpoints/last"))?;
    fs_err::write(scene.path("study/study.json"), "[")?;
    let damaged = scene.run("damaged", ["law", "code"], 2, 0.0)?.join("metrics.jsonl");
    let text = fs_err::read_to_string(&damaged)?;
    fs_err::write(&damaged, text.replacen("\"loss\":", "\"los\":", 1))?;
    for (runs, said) in [
        (&["nowhere"][..], "there is no folder `nowhere`"),
        (&["empty"], "`empty` has no `metrics.jsonl`"),
        (&["run", "empty"], "`empty` has no `metrics.jsonl`"),
        (&["run", "./run"], "`./run` is named twice"),
        (&["damaged"], "line 1 of `damaged/metrics.jsonl` is damaged: missing field `loss`"),
        (&["config"], "in `config/config.toml`"),
        (&["state"], "step-00000002/state.json` is no state of this version"),
        (&["study"], "`study/study.json` is damaged"),
        (&[], "RUN"),
    ] {
        let (code, text) = report(&scene, runs)?;
        assert_eq!(code, Some(2), "{runs:?}: {text}");
        assert!(text.contains(said), "{runs:?}: {text}");
        assert!(!scene.path("report.html").exists(), "{runs:?}");
    }
    Ok(())
}

#[test]
fn a_report_replaces_a_file_only_if_asked_and_never_an_input() -> Result<()> {
    let scene = Scene::new()?;
    scene.run("run", ["law", "code"], 2, 0.0)?;
    assert_eq!(report(&scene, &["run"])?, (Some(0), first_output()));
    let before = fs_err::read(scene.path("run/metrics.jsonl"))?;
    for (out, overwrite, said) in [
        ("report.html", false, "`report.html` is there already"),
        ("run/metrics.jsonl", false, "is there already"),
        ("run/metrics.jsonl", true, "is read by this command"),
        ("run", true, "is a folder, not a file"),
    ] {
        let mut arguments = vec!["run", "--out", out];
        arguments.extend(overwrite.then_some("--overwrite"));
        let (code, text) = report(&scene, &arguments)?;
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(said), "{out}: {text}");
    }
    assert_eq!(fs_err::read(scene.path("run/metrics.jsonl"))?, before);
    assert_eq!(report(&scene, &["run", "--overwrite", "--samples", "0"])?.0, Some(0));
    let names = fs_err::read_dir(scene.0.path())?.count();
    assert_eq!(names, 2, "nothing but the run and the report is there");
    Ok(())
}

fn first_output() -> String {
    "wrote `report.html`\n WARN there are no samples of `run`: there is no checkpoint\n".into()
}

#[test]
fn a_run_in_progress_is_reported_as_far_as_it_has_come() -> Result<()> {
    let scene = Scene::new()?;
    let metrics = scene.run("run", ["law", "code"], 3, 0.0)?.join("metrics.jsonl");
    let text = fs_err::read_to_string(&metrics)?;
    fs_err::write(&metrics, text + "{\"kind\":\"train\",\"step\":4,\"epo")?;
    assert_eq!(report(&scene, &["run"])?.0, Some(0));
    let html = fs_err::read_to_string(scene.path("report.html"))?;
    assert!(html.contains("The last line of the metrics is not whole and was left out"));
    assert!(html.contains("There are no samples: there is no checkpoint."));
    // a run that has not made a step yet
    fs_err::write(&metrics, "")?;
    let (code, text) = report(&scene, &["run", "--overwrite"])?;
    assert_eq!(code, Some(0), "{text}");
    let html = fs_err::read_to_string(scene.path("report.html"))?;
    assert!(html.contains("no step yet") && !html.contains("<svg"));
    Ok(())
}
