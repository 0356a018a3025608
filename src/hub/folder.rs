//! A base in a local folder, as `save_pretrained` of `transformers` writes it: `config.json`,
//! `model.safetensors` (or `model.safetensors.index.json` and the shards that it names) and, as a
//! rule, `tokenizer.json`. A snapshot in the Hub's cache is such a folder too.
//!
//! The index is JSON: `{"metadata": {..}, "weight_map": {"<tensor>": "<shard>", ..}}`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, anyhow, bail};
use serde::Deserialize;

use super::{BaseFiles, CONFIG, TOKENIZER, WEIGHTS, WEIGHTS_INDEX, is_inside};

const HINT: &str = "hint: `base.source.path` is a folder with `config.json` and \
                    `model.safetensors`; a model of the Hub is \
                    `base.source = { hub = { repo = \"openai-community/gpt2\" } }`";

/// The files of a base in one folder.
pub(super) struct Layout {
    config: PathBuf,
    weights: Vec<PathBuf>,
    tokenizer: Option<PathBuf>,
}

impl Layout {
    pub(super) fn into_base(self, label: String, commit: Option<String>) -> BaseFiles {
        let Self { config, weights, tokenizer } = self;
        BaseFiles { label, commit, config, weights, tokenizer }
    }
}

/// The base in the user's folder `dir`.
pub(super) fn find(dir: &Path) -> Result<BaseFiles> {
    let name = dir.display();
    if dir.is_file() {
        bail!("the base `{name}` is a file, not a folder\n{HINT}");
    }
    if !dir.exists() {
        bail!("the base `{name}` does not exist\n{HINT}");
    }
    Ok(layout(dir)?.into_base(name.to_string(), None))
}

/// What is in `dir`; an error if it lacks a file that a base needs.
pub(super) fn layout(dir: &Path) -> Result<Layout> {
    let place = format!("`{}`", dir.display());
    let existing = |file: &str| Some(dir.join(file)).filter(|path| path.is_file());

    let Some(config) = existing(CONFIG) else {
        return Err(no_config(&place, &file_names(dir)?));
    };
    let weights = if let Some(path) = existing(WEIGHTS) {
        vec![path]
    } else if let Some(index) = existing(WEIGHTS_INDEX) {
        let shard = |name: String| {
            existing(&name).ok_or_else(|| {
                anyhow!("{place} has no `{name}`, which its `{WEIGHTS_INDEX}` names")
            })
        };
        shards(&index)?.into_iter().map(shard).collect::<Result<_>>()?
    } else {
        return Err(no_weights(&place, &file_names(dir)?));
    };
    Ok(Layout { config, weights, tokenizer: existing(TOKENIZER) })
}

fn file_names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// The shards that the index at `path` names, each once, sorted.
pub(super) fn shards(path: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }

    let text = fs_err::read_to_string(path).context("cannot read the index of the weights")?;
    let name = path.display();
    let index: Index = serde_json::from_str(&text)
        .map_err(|error| anyhow!("`{name}` is not an index of weights: {error}"))?;
    if index.weight_map.is_empty() {
        bail!("`{name}` is not an index of weights: its `weight_map` is empty");
    }
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if let Some(shard) = shards.iter().find(|shard| !is_inside(shard)) {
        bail!("`{name}` names `{shard}`, which is not inside its folder");
    }
    if let Some(shard) = shards.iter().find(|shard| !shard.ends_with(".safetensors")) {
        bail!("`{name}` names `{shard}`, which is not a `.safetensors` file");
    }
    Ok(shards.into_iter().collect())
}

/// The error for a `place` (quoted) that has no `config.json`; `files` is all it has.
pub(super) fn no_config(place: &str, files: &[String]) -> Error {
    anyhow!("{place} has no `{CONFIG}`{}", adapter_hint(files))
}

/// The error for a `place` (quoted) that has none of the weights that are read; `files` is all it
/// has.
pub(super) fn no_weights(place: &str, files: &[String]) -> Error {
    let ending_in = |endings: &[&str]| {
        let mut top = files.iter().filter(|file| !file.contains('/'));
        top.find(|file| endings.iter().any(|ending| file.ends_with(ending)))
    };
    let missing = format!("{place} has neither `{WEIGHTS}` nor `{WEIGHTS_INDEX}`");
    if let Some(file) = ending_in(&[".safetensors"]) {
        return anyhow!("{missing}, only `{file}`{}", adapter_hint(files));
    }
    if let Some(file) = ending_in(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"]) {
        return anyhow!(
            "{missing}, only pickled weights, `{file}`, which are not read\n\
             hint: convert them with transformers: `AutoModelForCausalLM.from_pretrained(SOURCE)\
             .save_pretrained(DIR, safe_serialization=True)`"
        );
    }
    anyhow!("{missing}")
}

fn adapter_hint(files: &[String]) -> &'static str {
    if files.iter().any(|file| file == "adapter_config.json") {
        "\nhint: this is an adapter; name the base that it was trained on"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_index(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary folder can be made");
        let path = dir.path().join(WEIGHTS_INDEX);
        fs_err::write(&path, text).expect("it is writable");
        (dir, path)
    }

    #[test]
    fn shards_are_named_once_and_sorted() -> Result<()> {
        let text = r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors",
                       "c": "2.safetensors"}}"#;
        let (_dir, path) = write_index(text);
        assert_eq!(shards(&path)?, ["1.safetensors", "2.safetensors"]);
        Ok(())
    }

    #[test]
    fn shards_outside_the_folder_are_refused() {
        for shard in ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "", ".."] {
            let (_dir, path) = write_index(&format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#));
            let error = shards(&path).expect_err("it leads out of the folder").to_string();
            assert_eq!(
                error,
                format!("`{}` names `{shard}`, which is not inside its folder", path.display())
            );
        }
    }
}
