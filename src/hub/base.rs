//! Finds the files of a base as `save_pretrained` of `transformers` writes it: `config.json`, the
//! weights and, as a rule, `tokenizer.json` and small files beside it. The weights are
//! `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.
//!
//! The index is JSON: `{"metadata": {..}, "weight_map": {"<tensor>": "<shard>", ..}}`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Error, Result, anyhow, bail};
use serde::Deserialize;

use super::adapter;
use super::files::{BaseFiles, SideFile};
use super::place::Place;

pub(super) const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
/// Small files that go with a base wherever it goes.
const BESIDE: [&str; 6] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
];

/// The folder of the chat templates that have names.
const TEMPLATES: &str = "additional_chat_templates";

/// The config key of the base, for messages.
pub(super) const OPTION: &str = "base.source";

const HINT: &str = "hint: `base.source.path` is a folder with `config.json` and \
                    `model.safetensors`; a model of the Hub is \
                    `base.source = { hub = { repo = \"Qwen/Qwen3-0.6B\" } }`";

/// Finds the base in the user's folder `dir`.
pub(super) fn find_in_folder(dir: &Path) -> Result<BaseFiles> {
    collect(&Place::user_folder(dir, "base", HINT)?)
}

/// The files of the base in `place`. It is an error if one that is needed is missing.
pub(super) fn collect(place: &Place) -> Result<BaseFiles> {
    if !place.has(CONFIG) {
        bail!("{place} has no `{CONFIG}`{}", adapter_hint(place));
    }
    let single = place.has(WEIGHTS);
    if !single && !place.has(WEIGHTS_INDEX) {
        return Err(no_weights(place, &place.entries()?));
    }
    let config = place.get(CONFIG)?;
    let tokenizer = if place.has(TOKENIZER) { Some(place.get(TOKENIZER)?) } else { None };
    let weights = if single {
        vec![place.get(WEIGHTS)?]
    } else {
        let shards = shards(&place.get(WEIGHTS_INDEX)?)?;
        if let Some(shard) = shards.iter().find(|shard| !place.has(shard)) {
            bail!("{place} has no `{shard}`, which its `{WEIGHTS_INDEX}` names");
        }
        shards.iter().map(|shard| place.get(shard)).collect::<Result<_>>()?
    };
    let beside = side_files(place)?;
    let (label, commit) = (place.label.clone(), place.commit.clone());
    Ok(BaseFiles { label, commit, config, weights, tokenizer, beside })
}

/// The small files in `place` that go with a base.
pub(super) fn side_files(place: &Place) -> Result<Vec<SideFile>> {
    let known = BESIDE.into_iter().filter(|file| place.has(file)).map(str::to_owned);
    let templates = place.files_in(TEMPLATES)?;
    let templates = templates.into_iter().filter(|file| file.ends_with(".jinja"));
    let get = |name: String| Ok(SideFile { path: place.get(&name)?, name });
    known.chain(templates).map(get).collect()
}

/// The names of the shards in the index at `path`, sorted and without duplicates.
fn shards(path: &Path) -> Result<Vec<String>> {
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

/// The error for a `place` without weights that can be read; `files` are the entries of its folder.
fn no_weights(place: &Place, files: &BTreeSet<String>) -> Error {
    let ending_in = |endings: &[&str]| {
        files.iter().find(|file| endings.iter().any(|ending| file.ends_with(ending)))
    };
    let missing = format!("{place} has neither `{WEIGHTS}` nor `{WEIGHTS_INDEX}`");
    if let Some(file) = ending_in(&[".safetensors"]) {
        return anyhow!("{missing}, only `{file}`{}", adapter_hint(place));
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

fn adapter_hint(place: &Place) -> &'static str {
    if place.has(adapter::CONFIG) {
        "\nhint: this is an adapter; name the base that it was trained on"
    } else {
        ""
    }
}

/// Whether `name`, which was read from a file, stays inside the folder that it is joined to.
fn is_inside(name: &str) -> bool {
    let plain = |part| matches!(part, std::path::Component::Normal(_));
    !name.is_empty() && !name.contains('\\') && Path::new(name).components().all(plain)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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
