//! `--overwrite` replaces only files and folders that dylora wrote.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, Result};
use fs_err::os::unix::fs::symlink;

use crate::{Scene, as_str, contents, text};

/// A scene with a run of one step in `run` and an export of it in `experts`.
fn trained() -> Result<Scene> {
    let scene = Scene::new()?;
    let output = scene.run(&as_str(&scene.train(1, 1)?))?;
    assert!(output.status.success(), "{}", text(&output));
    export(&scene, &["--out", "experts"])?;
    Ok(scene)
}

fn export(scene: &Scene, arguments: &[&str]) -> Result<()> {
    let output = scene.run(&[&["export-adapters", "--checkpoint", "run"], arguments].concat())?;
    assert!(output.status.success(), "{}", text(&output));
    Ok(())
}

/// The commands that write a folder. Their inputs are `base`, `run` and `experts`.
const MAKERS: [&[&str]; 4] = [
    &["export-adapters", "--checkpoint", "run"],
    &["export-adapters", "--base", "base", "--adapters", "experts"],
    &[
        "merge",
        "--base",
        "base",
        "--adapters",
        "experts",
        "--weights",
        "uniform",
        "--data",
        "x=data.jsonl",
    ],
    &["merge", "--checkpoint", "run", "--weights", "uniform", "--as", "adapter"],
];

#[test]
fn only_a_folder_that_dylora_wrote_is_replaced() -> Result<()> {
    let scene = trained()?;
    fs_err::write(scene.path("data.jsonl"), "{\"text\": \"two words\"}\n")?;
    fs_err::write(scene.path("file"), "mine")?;
    fs_err::create_dir_all(scene.path("mine/deep"))?;
    fs_err::write(scene.path("mine/deep/thesis.txt"), "mine")?;
    symlink("mine", scene.path("link"))?;
    symlink("nowhere", scene.path("dangling"))?;
    // an export with a file that dylora did not write
    export(&scene, &["--out", "mixed"])?;
    fs_err::write(scene.path("mixed/notes.txt"), "mine")?;
    let before = contents(scene.dir.path())?;
    for maker in MAKERS {
        for (out, said) in [
            ("file", "is a file, not a folder"),
            ("link", "is a symbolic link"),
            ("dangling", "is a symbolic link"),
            ("/dev/null", "is a device"),
            (".", "is the working folder"),
            ("..", "holds the working folder"),
            ("mine/deep/../..", "is the working folder"),
            ("mine", "was not written by dylora"),
            ("mixed", "`notes.txt`, which dylora did not write"),
            ("base", if maker[1] == "--base" || maker[0] == "merge" { "base" } else { "`base`" }),
            ("run", "run"),
        ] {
            let output = scene.run(&[maker, &["--overwrite", "--out", out]].concat())?;
            let message = text(&output);
            assert_eq!(output.status.code(), Some(1), "{maker:?} {out}: {message}");
            assert!(message.contains(said), "{maker:?} {out}: {message}");
            let after: Vec<_> = contents(scene.dir.path())?;
            let after: Vec<_> =
                after.into_iter().filter(|(name, _)| !name.starts_with("cache")).collect();
            let before: Vec<_> =
                before.iter().filter(|(name, _)| !name.starts_with("cache")).cloned().collect();
            assert!(after == before, "{maker:?} {out} changed something");
        }
    }
    assert!(fs_err::metadata("/dev/null")?.file_type().is_char_device());
    // an input is also recognised under another path
    let alias =
        ["--base", "base", "--adapters", "experts", "--overwrite", "--out", "mine/../experts"];
    let output = scene.run(&[&["export-adapters"], &alias[..]].concat())?;
    assert!(text(&output).contains("experts` is read by this command"), "{}", text(&output));
    Ok(())
}

#[test]
fn what_dylora_wrote_is_replaced_with_overwrite_alone() -> Result<()> {
    let scene = trained()?;
    fs_err::write(scene.path("data.jsonl"), "{\"text\": \"two words\"}\n")?;
    for maker in MAKERS {
        let out = ["--out", "out"];
        let output = scene.run(&[maker, &out].concat())?;
        assert!(output.status.success(), "{}", text(&output));
        let before = contents(&scene.path("out"))?;
        let output = scene.run(&[maker, &out].concat())?;
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains("`out` is there already"), "{}", text(&output));
        let output = scene.run(&[maker, &out, &["--overwrite"]].concat())?;
        assert!(output.status.success(), "{}", text(&output));
        assert!(contents(&scene.path("out"))? == before);
        // an output of dylora may replace any other
        for other in MAKERS {
            let output = scene.run(&[other, &out, &["--overwrite"]].concat())?;
            assert!(output.status.success(), "{}", text(&output));
        }
        fs_err::remove_dir_all(scene.path("out"))?;
    }
    let hidden: Vec<_> = contents(scene.dir.path())?
        .into_iter()
        .filter(|(name, _)| name.starts_with(".writing-") || name.contains("replaced-"))
        .collect();
    assert!(hidden.is_empty(), "{hidden:?}");
    Ok(())
}

/// Removes the marker, since outputs of earlier versions have none.
fn age(dir: &Path) -> Result<()> {
    Ok(fs_err::remove_file(dir.join(".dylora-output.json"))?)
}

#[test]
fn an_output_without_a_marker_is_recognised_by_its_files() -> Result<()> {
    let scene = trained()?;
    fs_err::write(scene.path("data.jsonl"), "{\"text\": \"two words\"}\n")?;
    for maker in MAKERS {
        let run = |more: &[&str]| scene.run(&[maker, &["--out", "out"], more].concat());
        assert!(run(&[])?.status.success());
        age(&scene.path("out"))?;
        let output = run(&["--overwrite"])?;
        assert!(output.status.success(), "{}", text(&output));
        age(&scene.path("out"))?;
        fs_err::write(scene.path("out/other"), "mine")?;
        let output = run(&["--overwrite"])?;
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output).contains("was not written by dylora"), "{}", text(&output));
        fs_err::remove_dir_all(scene.path("out"))?;
    }
    // a model that another tool wrote has the same file names
    let config = fs_err::read_to_string(scene.path("base/config.json"))?;
    let config = config.replacen('{', "{\n  \"transformers_version\": \"5.17.0\",", 1);
    fs_err::create_dir(scene.path("other"))?;
    fs_err::write(scene.path("other/config.json"), config)?;
    fs_err::copy(scene.path("base/model.safetensors"), scene.path("other/model.safetensors"))?;
    let output = scene.run(&[MAKERS[2], &["--overwrite", "--out", "other"]].concat())?;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("was not written by dylora"), "{}", text(&output));
    Ok(())
}

#[test]
fn a_trace_replaces_a_file_only_if_asked_and_never_an_input() -> Result<()> {
    let scene = trained()?;
    fs_err::create_dir(scene.path("folder"))?;
    symlink("base/model.safetensors", scene.path("link"))?;
    let trace = |model: &[&str], more: &[&str]| {
        scene.run(&[&["trace", "--text", "two words"], model, more].concat())
    };
    let base: &[&str] = &["--base", "base"];
    let checkpoint: &[&str] = &["--checkpoint", "run"];
    let adapters: &[&str] = &["--base", "base", "--adapters", "experts"];
    assert!(trace(base, &["--out", "trace.safetensors"])?.status.success());
    let before = contents(scene.dir.path())?;
    let checkpoint_file = "run/checkpoints/last/model.safetensors";
    for (model, out, overwrite, said) in [
        (base, "trace.safetensors", false, "`trace.safetensors` is there already"),
        (base, "base/model.safetensors", false, "is read by this command"),
        (base, "base/model.safetensors", true, "is read by this command"),
        (base, "run/../base/tokenizer.json", true, "is read by this command"),
        (base, "link", true, "is a symbolic link"),
        (base, "folder", true, "is a folder"),
        (base, "/dev/null", true, "is a device"),
        (checkpoint, checkpoint_file, true, "is read by this command"),
        (adapters, "experts/expert_0/adapter_model.safetensors", true, "is read by this command"),
    ] {
        let mut more = vec!["--out", out];
        more.extend(overwrite.then_some("--overwrite"));
        let output = trace(model, &more)?;
        assert_eq!(output.status.code(), Some(1), "{out}: {}", text(&output));
        assert!(text(&output).contains(said), "{out}: {}", text(&output));
        assert!(contents(scene.dir.path())? == before, "{out} changed something");
    }
    let output = trace(base, &["--out", "trace.safetensors", "--overwrite"])?;
    assert!(output.status.success(), "{}", text(&output));
    let output = scene.run(&["trace", "--text", "x", "--base", "base", "--overwrite"])?;
    assert_eq!(output.status.code(), Some(2), "`--overwrite` is for `--out`: {}", text(&output));
    Ok(())
}

/// A limit on the size of files stands in for a full disk.
#[test]
fn a_full_disk_leaves_what_was_there() -> Result<()> {
    let scene = trained()?;
    let trace = ["trace", "--text", "two words", "--base", "base", "--out", "t.safetensors"];
    let export: &[&str] = &["export-adapters", "--checkpoint", "run", "--out", "again"];
    assert!(scene.run(&trace)?.status.success());
    assert!(scene.run(export)?.status.success());
    let kept = |scene: &Scene| -> Result<_> {
        Ok((contents(&scene.path("again"))?, fs_err::read(scene.path("t.safetensors"))?))
    };
    let before = kept(&scene)?;
    let names = fs_err::read_dir(scene.dir.path())?.count();
    for command in [&trace[..], export] {
        let binary = env!("CARGO_BIN_EXE_dylora");
        let line = format!(
            "ulimit -f 8; trap '' XFSZ; exec {binary} {} --overwrite",
            command.join(" ").replace("two words", "words")
        );
        let mut shell = std::process::Command::new("bash");
        shell.args(["-c", &line]).current_dir(scene.dir.path()).env("OMP_NUM_THREADS", "1");
        let output = shell.env("DYLORA_CACHE", scene.path("cache")).output()?;
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains("File too large"), "{}", text(&output));
        assert!(kept(&scene)? == before, "{command:?}");
    }
    assert_eq!(fs_err::read_dir(scene.dir.path())?.count(), names, "nothing is left over");
    let manifest = fs_err::read_to_string(scene.path("again/dylora.json"))?;
    assert!(
        serde_json::from_str::<serde_json::Value>(&manifest)?["experts"]
            .as_array()
            .context("a list")?
            .len()
            == 2
    );
    Ok(())
}

#[test]
fn a_file_that_an_input_links_to_is_an_input() -> Result<()> {
    let scene = trained()?;
    fs_err::create_dir(scene.path("store"))?;
    let adapter = scene.path("experts/expert_0/adapter_model.safetensors");
    fs_err::rename(&adapter, scene.path("store/a.safetensors"))?;
    symlink("../../store/a.safetensors", &adapter)?;
    let before = contents(scene.dir.path())?;
    let adapters = ["--base", "base", "--adapters", "experts"];
    for (model, out) in [
        (&adapters[..], "store/a.safetensors"),
        (&["--checkpoint", "run"], "run/config.toml"),
        (&["--checkpoint", "run"], "run/checkpoints/step-00000001/optimizer.safetensors"),
    ] {
        let trace = ["trace", "--text", "two words", "--overwrite", "--out", out];
        let output = scene.run(&[&trace[..], model].concat())?;
        assert_eq!(output.status.code(), Some(1), "{out}: {}", text(&output));
        assert!(text(&output).contains("is read by this command"), "{out}: {}", text(&output));
        assert!(contents(scene.dir.path())? == before, "{out} changed something");
    }
    Ok(())
}

#[test]
fn a_part_of_an_export_is_not_replaced_alone() -> Result<()> {
    let scene = trained()?;
    let before = contents(&scene.path("experts"))?;
    let export = ["export-adapters", "--checkpoint", "run", "--overwrite"];
    let output = scene.run(&[&export[..], &["--out", "experts/expert_0"]].concat())?;
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(contents(&scene.path("experts"))? == before);
    Ok(())
}

/// The result of a full training is in a folder that the next one may start from.
#[test]
fn a_full_training_does_not_replace_its_own_base() -> Result<()> {
    let scene = Scene::new()?;
    let mut arguments = scene.train(1, 1)?;
    arguments.extend(["--set".to_owned(), "method=full".to_owned()]);
    let output = scene.run(&as_str(&arguments))?;
    assert!(output.status.success(), "{}", text(&output));
    fs_err::remove_dir_all(scene.path("run/checkpoints"))?;
    let before = contents(&scene.path("run/model"))?;
    arguments.extend(["--set".to_owned(), "base.source={path=\"run/model\"}".to_owned()]);
    let output = scene.run(&as_str(&arguments))?;
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("which is read by this command"), "{}", text(&output));
    assert!(contents(&scene.path("run/model"))? == before);
    Ok(())
}

#[test]
fn a_run_does_not_write_over_the_config_that_it_is_given() -> Result<()> {
    let scene = Scene::new()?;
    let mut arguments = scene.train(1, 1)?;
    let before = fs_err::read(scene.path("config.toml"))?;
    arguments.extend(["--set".to_owned(), "run.dir=.".to_owned()]);
    let output = scene.run(&as_str(&arguments))?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(fs_err::read(scene.path("config.toml"))? == before);
    Ok(())
}

/// `| true`, say: nobody reads the table that is printed before the merge.
#[test]
fn a_merge_whose_reader_has_gone_is_written_all_the_same() -> Result<()> {
    let scene = trained()?;
    fs_err::write(scene.path("data.jsonl"), "{\"text\": \"two words\"}\n")?;
    let mut command = scene.command(&[MAKERS[2], &["--out", "out"]].concat());
    let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    child.wait()?;
    assert!(scene.path("out/model.safetensors").is_file());
    Ok(())
}
