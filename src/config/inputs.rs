//! The files that a config names for a run to read, and the folder in which their paths begin.
//!
//! In a config file they are relative to the file's own folder, so that a folder with a config and
//! its data can be moved and used from anywhere. In `--set` they are relative to the working
//! folder, like every other path on a command line. A config that a run saves has absolute paths.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use toml::Value;

use super::variables::Written;
use super::{AdapterSource, BaseSource, Config, Validation};

/// The keys whose values are paths or globs of files to read; `[]` stands for each entry of a list.
const KEYS: [&str; 7] = [
    "base.source.path",
    "base.tokenizer",
    "base.chat_template",
    "data.domains.[].train.[]",
    "data.domains.[].validation.files.[]",
    "lora.experts.[].source.path",
    "router.source",
];

/// A file or a folder that a config names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// The key with its indices, such as `data.domains[0].train[1]`.
    pub key: String,
    /// The path, absolute in a config that was loaded; a glob if [`Input::is_pattern`].
    pub path: PathBuf,
    /// Whether the path may be a glob.
    pub is_pattern: bool,
}

/// Every file and folder that a run of `config` reads.
pub fn of_config(config: &Config) -> Vec<Input> {
    let mut found = vec![];
    let mut add = |key: String, path: &Path, is_pattern: bool| {
        found.push(Input { key, path: path.to_owned(), is_pattern });
    };
    let base = &config.base;
    if let BaseSource::Path(path) = &base.source {
        add("base.source.path".into(), path, false);
    }
    for (key, path) in [("tokenizer", &base.tokenizer), ("chat_template", &base.chat_template)] {
        if let Some(path) = path {
            add(format!("base.{key}"), path, false);
        }
    }
    for (i, expert) in config.lora.experts.iter().enumerate() {
        if let Some(AdapterSource::Path(path)) = &expert.source {
            add(format!("lora.experts[{i}].source.path"), path, false);
        }
    }
    if let Some(path) = &config.router.source {
        add("router.source".into(), path, false);
    }
    for (i, domain) in config.data.domains.iter().enumerate() {
        for (j, pattern) in domain.train.iter().enumerate() {
            add(format!("data.domains[{i}].train[{j}]"), Path::new(pattern), true);
        }
        let files = match &domain.validation {
            Some(Validation::Files(files)) => files.as_slice(),
            _ => &[],
        };
        for (j, pattern) in files.iter().enumerate() {
            add(format!("data.domains[{i}].validation.files[{j}]"), Path::new(pattern), true);
        }
    }
    found
}

/// Makes the relative paths of input files in `table` begin at `folder`, which is absolute.
///
/// - `written`: learns the new form of paths that were written with variables
pub(super) fn make_absolute(
    table: &mut toml::Table,
    folder: &Path,
    written: &mut Written,
) -> Result<()> {
    for key in KEYS {
        let parts: Vec<&str> = key.split('.').collect();
        if let Some(value) = table.get_mut(parts[0]) {
            let key = key.replace(".[]", "[]");
            let mut absolute = |path: &mut String| {
                let before = std::mem::take(path);
                *path = absolute(folder, &before)?;
                written.moved(&key, &before, path);
                Ok(())
            };
            change(value, &parts[1..], &mut absolute)
                .with_context(|| format!("in `{}`", parts[0]))?;
        }
    }
    Ok(())
}

/// Changes the paths at `parts` below `value`. Values of other types are left to the parser.
fn change(
    value: &mut Value,
    parts: &[&str],
    absolute: &mut dyn FnMut(&mut String) -> Result<()>,
) -> Result<()> {
    match (value, parts) {
        (Value::String(path), []) => absolute(path)?,
        (Value::Array(items), ["[]", rest @ ..]) => {
            items.iter_mut().try_for_each(|item| change(item, rest, absolute))?;
        }
        (Value::Table(table), [key, rest @ ..]) => {
            if let Some(value) = table.get_mut(*key) {
                change(value, rest, absolute)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The absolute form of `path`, which begins at `folder`. An empty path stays empty.
pub(super) fn absolute(folder: &Path, path: &str) -> Result<String> {
    if path.is_empty() || Path::new(path).is_absolute() {
        return Ok(path.to_owned());
    }
    let (mut folder, mut rest) = (folder.to_owned(), Path::new(path));
    loop {
        if let Ok(below) = rest.strip_prefix(".") {
            rest = below;
        } else if let Ok(below) = rest.strip_prefix("..")
            && let Some(parent) = plain_parent(&folder)
        {
            (folder, rest) = (parent, below);
        } else {
            break;
        }
    }
    let joined = if rest.as_os_str().is_empty() { folder } else { folder.join(rest) };
    joined
        .into_os_string()
        .into_string()
        .map_err(|path| anyhow!("`{}` is not valid UTF-8", path.display()))
}

/// The folder above `folder` by its name, if that is the one that `..` means: above a link, it is
/// not.
fn plain_parent(folder: &Path) -> Option<PathBuf> {
    let parent = folder.parent()?;
    let real = |path: &Path| fs_err::canonicalize(path).ok();
    let is_same = real(&folder.join(".."))? == real(parent)?;
    is_same.then(|| parent.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_taken_by_name_unless_the_folder_is_a_link() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (project, elsewhere) = (dir.path().join("project"), dir.path().join("elsewhere/real"));
        fs_err::create_dir_all(project.join("configs")).expect("a folder");
        fs_err::create_dir_all(&elsewhere).expect("a folder");
        fs_err::os::unix::fs::symlink(&elsewhere, project.join("linked")).expect("a link");
        let begun =
            |folder: &str, path: &str| absolute(&project.join(folder), path).expect("it is UTF-8");
        let in_project = |path: &str| project.join(path).display().to_string();
        assert_eq!(begun("configs", "../data/*.jsonl"), in_project("data/*.jsonl"));
        assert_eq!(begun("configs", "./a.jsonl"), in_project("configs/a.jsonl"));
        assert_eq!(begun("configs", ".."), in_project("").trim_end_matches('/'));
        assert_eq!(begun("linked", "../a.jsonl"), in_project("linked/../a.jsonl"));
        assert_eq!(begun("configs", "/a.jsonl"), "/a.jsonl");
        assert_eq!(begun("configs", ""), "");
    }
}
