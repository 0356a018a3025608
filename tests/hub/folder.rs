//! Finding a base in a local folder.

use std::path::Path;

use anyhow::Result;
use dylora::config::{BaseSource, Family, RandomBase};
use dylora::hub::{BaseFiles, HubSettings, SideFile, find_base};
use tempfile::TempDir;

const HINT: &str = "hint: `base.source.path` is a folder with `config.json` and \
                    `model.safetensors`; a model of the Hub is \
                    `base.source = { hub = { repo = \"Qwen/Qwen3-0.6B\" } }`";

fn find(path: &Path) -> Result<BaseFiles> {
    find_base(&BaseSource::Path(path.into()), &HubSettings::offline("absent"), &())
}

/// The message for `path`, with `DIR` in its place.
fn fault(path: &Path) -> String {
    let error = find(path).expect_err("the folder is no base");
    format!("{error:#}").replace(&path.display().to_string(), "DIR")
}

fn folder(files: &[(&str, &str)]) -> Result<TempDir> {
    let dir = tempfile::tempdir()?;
    for (name, text) in files {
        fs_err::write(dir.path().join(name), text)?;
    }
    Ok(dir)
}

#[test]
fn a_folder_with_one_file_of_weights_is_a_base() -> Result<()> {
    let dir = folder(&[("config.json", "{}"), ("model.safetensors", "")])?;
    let expected = BaseFiles {
        label: dir.path().display().to_string(),
        commit: None,
        config: dir.path().join("config.json"),
        weights: vec![dir.path().join("model.safetensors")],
        tokenizer: None,
        beside: vec![],
    };
    assert_eq!(find(dir.path())?, expected);
    fs_err::create_dir_all(dir.path().join("additional_chat_templates/folder.jinja"))?;
    let tokenizer = dir.path().join("tokenizer.json");
    let beside = [
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/tool_use.jinja",
    ];
    let beside = beside.map(|name| SideFile { name: name.into(), path: dir.path().join(name) });
    let other = dir.path().join("additional_chat_templates/README.md");
    for path in [&tokenizer, &other].into_iter().chain(beside.iter().map(|file| &file.path)) {
        fs_err::write(path, "{}")?;
    }
    let expected = BaseFiles { tokenizer: Some(tokenizer), beside: beside.into(), ..expected };
    assert_eq!(find(dir.path())?, expected);
    Ok(())
}

#[test]
fn a_folder_with_shards_is_a_base() -> Result<()> {
    let index = r#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors",
                    "z": "b.safetensors"}}"#;
    let dir = folder(&[
        ("config.json", "{}"),
        ("model.safetensors.index.json", index),
        ("a.safetensors", ""),
        ("b.safetensors", ""),
        ("c.safetensors", ""),
    ])?;
    let shards = ["a.safetensors", "b.safetensors"].map(|name| dir.path().join(name));
    assert_eq!(find(dir.path())?.weights, shards);
    fs_err::remove_file(&shards[0])?;
    assert_eq!(
        fault(dir.path()),
        "`DIR` has no `a.safetensors`, which its `model.safetensors.index.json` names"
    );
    Ok(())
}

#[test]
fn a_path_that_is_no_folder_is_refused() -> Result<()> {
    let dir = folder(&[("model.safetensors", "")])?;
    let absent = format!("the base `DIR` does not exist\n{HINT}");
    assert_eq!(fault(&dir.path().join("absent")), absent);
    let file = format!("the base `DIR` is a file, not a folder\n{HINT}");
    assert_eq!(fault(&dir.path().join("model.safetensors")), file);
    Ok(())
}

#[test]
fn a_folder_without_config_or_weights_is_refused() -> Result<()> {
    let missing = "`DIR` has neither `model.safetensors` nor `model.safetensors.index.json`";
    assert_eq!(fault(folder(&[("model.safetensors", "")])?.path()), "`DIR` has no `config.json`");
    assert_eq!(fault(folder(&[("config.json", "{}")])?.path()), missing);

    let pickled = folder(&[("config.json", "{}"), ("pytorch_model.bin", "")])?;
    assert_eq!(
        fault(pickled.path()),
        format!(
            "{missing}, only pickled weights, `pytorch_model.bin`, which are not read\n\
             hint: convert them with transformers: `AutoModelForCausalLM.from_pretrained(SOURCE)\
             .save_pretrained(DIR, safe_serialization=True)`"
        )
    );
    let hint = "hint: this is an adapter; name the base that it was trained on";
    let adapter = folder(&[("adapter_config.json", "{}"), ("adapter_model.safetensors", "")])?;
    assert_eq!(fault(adapter.path()), format!("`DIR` has no `config.json`\n{hint}"));
    fs_err::write(adapter.path().join("config.json"), "{}")?;
    let expected = format!("{missing}, only `adapter_model.safetensors`\n{hint}");
    assert_eq!(fault(adapter.path()), expected);
    Ok(())
}

#[test]
fn a_malformed_index_is_refused() -> Result<()> {
    for (index, expected) in [
        ("{", "is not an index of weights: EOF while parsing an object at line 1 column 1"),
        ("{}", "is not an index of weights: missing field `weight_map` at line 1 column 2"),
        (r#"{"weight_map": {}}"#, "is not an index of weights: its `weight_map` is empty"),
        (
            r#"{"weight_map": {"x": "../x.safetensors"}}"#,
            "names `../x.safetensors`, which is not inside its folder",
        ),
        (
            r#"{"weight_map": {"x": "/x.safetensors"}}"#,
            "names `/x.safetensors`, which is not inside its folder",
        ),
        (
            r#"{"weight_map": {"x": "pytorch_model.bin"}}"#,
            "names `pytorch_model.bin`, which is not a `.safetensors` file",
        ),
    ] {
        let dir = folder(&[("config.json", "{}"), ("model.safetensors.index.json", index)])?;
        let expected = format!("`DIR/model.safetensors.index.json` {expected}");
        assert_eq!(fault(dir.path()), expected);
    }
    Ok(())
}

#[test]
fn random_weights_have_no_files() {
    let shape = RandomBase {
        family: Family::Gpt2,
        n_layer: 1,
        n_head: 1,
        n_kv_head: None,
        head_dim: None,
        n_embd: 8,
        n_inner: None,
        n_positions: 8,
    };
    let error = find_base(&BaseSource::Random(shape), &HubSettings::offline("absent"), &())
        .expect_err("no files");
    assert_eq!(error.to_string(), "a base of random weights has no files");
}
