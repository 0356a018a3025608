//! Checks that the files that a config names are there, before a command begins its work.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::{Config, inputs};
use crate::durable::folder;

/// Checks that every file and folder that `config` names is there.
///
/// - `file`: the config file; `None` if the config is one that a run saved
///
/// # Errors
/// Lists all that is missing. What exists in the working folder instead, where paths of configs
/// began in earlier versions, is said with the path to write.
pub fn check_inputs(config: &Config, file: Option<&Path>) -> Result<()> {
    let mut missing = vec![];
    for input in inputs::of_config(config) {
        if !is_there(&input)? {
            missing.push(input);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let line = |input: &inputs::Input| {
        let what = match has_glob(&input.path) && input.is_pattern {
            true => "matches no file",
            false => "does not exist",
        };
        format!("`{}`: `{}` {what}", input.key, input.path.display())
    };
    let mut lines: Vec<String> = missing.iter().map(line).collect();
    if let Some(file) = file {
        lines.extend(hint(&missing, file)?);
    }
    bail!(lines.join("\n"))
}

fn is_there(input: &inputs::Input) -> Result<bool> {
    if input.is_pattern && has_glob(&input.path) && !input.path.exists() {
        let matches = input.path.to_str().and_then(|pattern| glob::glob(pattern).ok());
        return Ok(matches.is_some_and(|mut paths| paths.next().is_some()));
    }
    // a folder whose exchange was interrupted is put back into its place first
    folder::restore(&input.path)?;
    Ok(input.path.exists())
}

fn has_glob(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

/// The hint for paths that exist in the working folder but not in that of the config.
fn hint(missing: &[inputs::Input], file: &Path) -> Result<Option<String>> {
    let here = std::env::current_dir().context("there is no working folder")?;
    let absolute = std::path::absolute(file)?;
    let folder = absolute.parent().context("a file lies in a folder")?;
    let names = missing.iter().filter_map(|input| {
        let written = input.path.strip_prefix(folder).ok()?;
        Some((input, written))
    });
    let mut elsewhere = names.clone().filter(|_| folder != here).filter(|(input, written)| {
        let moved = inputs::Input { path: here.join(written), ..(*input).clone() };
        is_there(&moved).is_ok_and(|is_there| is_there)
    });
    if let Some((_, written)) = elsewhere.next() {
        return Ok(Some(format!(
            "hint: `{}` exists in the working folder, but paths in a config begin at the config's \
             own folder: write `{}` in `{}`",
            written.display(),
            from_folder(&here.join(written), folder, &here).display(),
            file.display()
        )));
    }
    let repo = names.clone().find(|(input, written)| {
        input.key.ends_with("source.path") && written.components().count() == 2
    });
    if let Some((_, repo)) = repo {
        let repo = repo.display();
        return Ok(Some(format!(
            "hint: a repository of the Hub is `source = {{ hub = {{ repo = \"{repo}\" }} }}`"
        )));
    }
    // paths of overrides begin in the working folder anyway
    let hint = || format!("hint: relative paths in `{}` begin at its own folder", file.display());
    Ok((folder != here && names.count() > 0).then(hint))
}

/// How a config in `folder` names `path`, which lies in `here`: by way of `..` if the config's
/// folder lies in `here` as well, and otherwise from the root.
fn from_folder(path: &Path, folder: &Path, here: &Path) -> PathBuf {
    match (folder.strip_prefix(here), path.strip_prefix(here)) {
        (Ok(depth), Ok(below)) => {
            let up: PathBuf = depth.components().map(|_| "..").collect();
            up.join(below)
        }
        _ => path.to_owned(),
    }
}
