//! Where the paths of a config begin.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use dylora::config::{AdapterSource, BaseSource, Config, Validation, inputs, load, variables};

const CONFIG: &str = r#"
[run]
dir = "runs/mine"
[base]
source = { path = "../base" }
tokenizer = "tokenizer.json"
chat_template = "/absolute.jinja"
[data]
seq_len = 64
[[data.domains]]
name = "law"
train = ["law.jsonl", "../more/*.jsonl"]
validation = { files = ["./law.validation.jsonl"] }
[[data.domains]]
name = "verse"
train = ["verse.jsonl"]
validation = { fraction = 0.1 }
[lora]
experts = [{ source = { path = "adapters/law" } }]
[router]
source = "../router"
"#;

/// A folder `project/configs` with `mine.toml` in it, and the canonical path of `project`.
fn project() -> Result<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir()?;
    let project = fs_err::canonicalize(dir.path())?.join("project");
    fs_err::create_dir_all(project.join("configs"))?;
    fs_err::write(project.join("configs/mine.toml"), CONFIG)?;
    Ok((dir, project))
}

fn load_with(file: &Path, set: &[&str]) -> Result<Config> {
    load::load(file, &set.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>())
}

#[test]
fn the_paths_of_a_config_begin_at_its_folder_and_those_of_set_and_run_dir_in_the_working_folder()
-> Result<()> {
    let (_dir, project) = project()?;
    let here = std::env::current_dir()?;
    let set = [
        "lora.experts=[{}, {source={path=\"own\"}}]",
        "base.tokenizer=demo/base/tokenizer.json",
        "data.domains.1.train=[\"set.jsonl\"]",
    ];
    let config = load_with(&project.join("configs/mine.toml"), &set)?;
    assert_eq!(config.run.dir, here.join("runs/mine"));
    assert_eq!(config.base.source, BaseSource::Path(project.join("base")));
    assert_eq!(config.base.tokenizer, Some(here.join("demo/base/tokenizer.json")));
    assert_eq!(config.base.chat_template, Some("/absolute.jinja".into()));
    let law = &config.data.domains[0];
    let text = |path: PathBuf| path.display().to_string();
    assert_eq!(law.train[0], text(project.join("configs/law.jsonl")));
    assert_eq!(law.train[1], text(project.join("more/*.jsonl")));
    let held_out = text(project.join("configs/law.validation.jsonl"));
    assert_eq!(law.validation, Some(Validation::Files(vec![held_out])));
    assert_eq!(config.data.domains[1].train, [text(here.join("set.jsonl"))]);
    assert_eq!(config.lora.experts[1].source, Some(AdapterSource::Path(here.join("own"))));
    assert_eq!(config.router.source, Some(project.join("router")));
    // every path is known to those who check that it is there
    let keys: Vec<String> = inputs::of_config(&config).into_iter().map(|input| input.key).collect();
    assert_eq!(keys.len(), 9, "{keys:?}");
    assert!(inputs::of_config(&config).iter().all(|input| input.path.is_absolute()));
    Ok(())
}

#[test]
fn a_saved_config_means_the_same_in_every_folder() -> Result<()> {
    let (dir, project) = project()?;
    let config = load_with(&project.join("configs/mine.toml"), &[])?;
    let saved = dir.path().join("config.toml");
    fs_err::write(&saved, load::to_toml(&config))?;
    assert_eq!(load::load(&saved, &[])?, config);
    Ok(())
}

/// What `dylora train` says of `project/configs/mine.toml` if it is run in `project`.
fn message(project: &Path) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(["train", "--config", "configs/mine.toml"]).current_dir(project);
    let output = command.env("OMP_NUM_THREADS", "1").output()?;
    let text = String::from_utf8(output.stderr).context("it is UTF-8")?;
    Ok((output.status.code(), text.replace(&project.display().to_string(), "PROJECT")))
}

#[test]
fn a_config_whose_paths_begin_in_the_working_folder_is_told_how_to_write_them() -> Result<()> {
    let (_dir, project) = project()?;
    let old = CONFIG.replace("../base", "base").replace("[router]\nsource = \"../router\"", "");
    let old = old.replace("/absolute.jinja", "tokenizer.json").replace("../more", "more");
    fs_err::write(project.join("configs/mine.toml"), old)?;
    fs_err::create_dir(project.join("base"))?;
    fs_err::write(project.join("configs/tokenizer.json"), "{}")?;
    for file in ["law.jsonl", "verse.jsonl", "law.validation.jsonl"] {
        fs_err::write(project.join("configs").join(file), "{}")?;
    }
    fs_err::create_dir_all(project.join("configs/adapters/law"))?;
    let (exit, said) = message(&project)?;
    assert_eq!(exit, Some(2), "{said}");
    insta::assert_snapshot!(said, @"
    error: `base.source.path`: `PROJECT/configs/base` does not exist
    `data.domains[0].train[1]`: `PROJECT/configs/more/*.jsonl` matches no file
    hint: `base` exists in the working folder, but paths in a config begin at the config's own \
    folder: write `../base` in `configs/mine.toml`
    ");
    fs_err::remove_dir(project.join("base"))?;
    let (exit, said) = message(&project)?;
    assert_eq!(exit, Some(2), "{said}");
    let hint = "\nhint: relative paths in `configs/mine.toml` begin at its own folder\n";
    assert!(said.ends_with(hint), "{said}");
    Ok(())
}

/// Sets the variables of configs in this process: `DATA` is absolute and `SHARED` is relative.
fn provide_variables() {
    variables::provide(|name| match name {
        "DATA" => Some("/data".to_owned()),
        "SHARED" => Some("shared".to_owned()),
        "LAW" => Some("law".to_owned()),
        _ => None,
    });
}

const WITH_VARIABLES: &str = r#"
[base]
source = { path = "${DATA}/base" }
[data]
seq_len = 64
[[data.domains]]
name = "$${LAW}"
train = ["${SHARED}/${LAW}.jsonl", "/data/plain.jsonl"]
"#;

#[test]
fn variables_are_expanded_and_saved_as_they_were_written() -> Result<()> {
    provide_variables();
    let (_dir, project) = project()?;
    let file = project.join("configs/variables.toml");
    fs_err::write(&file, WITH_VARIABLES)?;
    let config = load_with(&file, &["run.dir=/runs/${LAW}"])?;
    let shared = project.join("configs/shared/law.jsonl").display().to_string();
    assert_eq!(config.base.source, BaseSource::Path("/data/base".into()));
    assert_eq!(config.data.domains[0].name, "${LAW}");
    assert_eq!(config.data.domains[0].train, [&shared, "/data/plain.jsonl"]);
    assert_eq!(config.run.dir, Path::new("/runs/law"));

    let saved = load::to_toml(&config);
    assert!(saved.contains("path = \"${DATA}/base\""), "{saved}");
    assert!(saved.contains("dir = \"/runs/${LAW}\""), "{saved}");
    assert!(saved.contains("name = \"$${LAW}\""), "{saved}");
    assert!(saved.contains("/configs/${SHARED}/${LAW}.jsonl\", \"/data/plain.jsonl\""), "{saved}");
    // a run's config is read from another folder, and changed for the next stage
    let copy = project.join("config.toml");
    fs_err::write(&copy, &saved)?;
    let mut again = load::load(&copy, &[])?;
    assert_eq!(again, config);
    assert_eq!(load::to_toml(&again), saved);
    let first = again.data.domains[0].clone();
    again.data.domains.insert(0, first);
    again.data.domains[0].name = "new".into();
    again.data.domains[1].train = vec!["/other.jsonl".into()];
    let next = load::to_toml(&again);
    assert_eq!(next.matches("${SHARED}/${LAW}.jsonl").count(), 1, "{next}");
    assert_eq!(load::resolve(&next, &[])?, again);
    Ok(())
}

#[test]
fn a_variable_that_is_not_set_is_an_error_with_its_key() {
    provide_variables();
    let fault = |text: &str, set: &[&str]| {
        let set: Vec<String> = set.iter().map(|item| (*item).to_owned()).collect();
        dylora::cli::describe(&load::parse(text, &set).expect_err("it is refused"))
    };
    insta::assert_snapshot!(fault(&WITH_VARIABLES.replace("DATA", "NONE"), &[]), @"
    line 3: `base.source.path`: the environment variable `NONE` is not set, which \
    `${NONE}/base` needs
      |
    3 | source = { path = \"${NONE}/base\" }
      |                   ^^^^^^^^^^^^^^
    hint: set it, or write `$${` for `${` itself
    ");
    insta::assert_snapshot!(fault(WITH_VARIABLES, &["run.dir=${HOME_RUNS"]), @"
    in `--set run.dir=${HOME_RUNS`: `run.dir`: `${HOME_RUNS` has `${` without `}`
    hint: write `$${` for `${` itself
    ");
}

#[test]
fn a_repository_that_is_written_as_a_path_is_answered_with_the_source_of_the_hub() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = "base.source = { path = \"Qwen/Qwen3-0.6B\" }\ndata.seq_len = 64\n\
                  data.domains = [{ name = \"law\", train = [\"law.jsonl\"] }]\n";
    fs_err::write(dir.path().join("mine.toml"), config)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(["train", "--config", "mine.toml"]).current_dir(dir.path());
    let said = String::from_utf8(command.env("OMP_NUM_THREADS", "1").output()?.stderr)?;
    let hint =
        "hint: a repository of the Hub is `source = { hub = { repo = \"Qwen/Qwen3-0.6B\" } }`";
    assert!(said.contains("`data.domains[0].train[0]`") && said.contains(hint), "{said}");
    Ok(())
}
