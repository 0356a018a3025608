//! The earlier run in a new run's folder, and its removal (`dylora train --overwrite`).
//!
//! A folder counts as a run if it has `config.toml` and checkpoints or metrics, and nothing that
//! dylora does not write there. Anything else is left to the user: a folder that somebody has put
//! notes, exports or data into is not deleted.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::files::{METRICS_FILE, TENSORBOARD_DIR};
use super::history::LATER_FILE;
use super::machine::MACHINE_FILE;
use crate::checkpoint;
use crate::durable::folder::{self, REMOVED, REPLACED, WRITING};
use crate::durable::lock::FolderLock;
use crate::durable::output::{IsUnmarkedOutput, Output, files_below};

const CONFIG: &str = "config.toml";
const LOCK: &str = ".lock";
const MODEL: &str = "model";
/// The files in the folder of a run itself.
const FILES: [&str; 6] = [CONFIG, METRICS_FILE, LATER_FILE, MACHINE_FILE, LOCK, ".last"];

/// A run that may be deleted to make room for a new one.
#[derive(Debug)]
pub struct EarlierRun {
    dir: PathBuf,
    is_unmarked: IsUnmarkedOutput,
    inputs: Vec<PathBuf>,
    working_folder: PathBuf,
}

impl EarlierRun {
    /// The run in the folder `dir`; `None` if the folder does not exist or is empty.
    ///
    /// - `inputs`: the files and folders that the new run reads
    /// - `is_unmarked`: recognises a model that the run has exported
    ///
    /// # Errors
    /// A folder that may not be deleted; the message says why.
    pub fn find(
        dir: &Path,
        inputs: Vec<PathBuf>,
        working_folder: PathBuf,
        is_unmarked: IsUnmarkedOutput,
    ) -> Result<Option<Self>> {
        let is_empty = !dir.exists() || dir.is_dir() && fs_err::read_dir(dir)?.next().is_none();
        if is_empty {
            return Ok(None);
        }
        let run = Self { dir: dir.to_owned(), is_unmarked, inputs, working_folder };
        run.check()?;
        Ok(Some(run))
    }

    /// Checks that the folder is a run and nothing else.
    fn check(&self) -> Result<()> {
        let name = self.dir.display();
        if self.dir.is_symlink() || !self.dir.is_dir() {
            bail!("`{name}` is no folder, and is not replaced\nhint: name another `run.dir`");
        }
        let output = |path: &Path| Output {
            path: path.to_owned(),
            overwrite: true,
            inputs: self.inputs.clone(),
            working_folder: self.working_folder.clone(),
        };
        output(&self.dir).check_kept()?;
        let has = |entry: &str| self.dir.join(entry).exists();
        let has_steps = !checkpoint::steps(&self.dir)?.is_empty();
        if !has(CONFIG) || !has(METRICS_FILE) && !has_steps {
            bail!(
                "`{name}` is no run of dylora, as far as can be told, and is not replaced\nhint: \
                 delete it yourself, or name another `run.dir`"
            );
        }
        let model = self.dir.join(MODEL);
        if model.exists() {
            output(&model).check_folder(self.is_unmarked)?;
        }
        if let Some(other) = files_below(&self.dir)?.iter().find(|file| !is_ours(file)) {
            bail!(
                "`{name}` holds `{other}`, which is no part of a run, and is not replaced\nhint: \
                 move that elsewhere, or name another `run.dir`"
            );
        }
        Ok(())
    }

    /// What the run consists of, in words.
    pub fn describe(&self) -> Result<String> {
        let steps = checkpoint::steps(&self.dir)?;
        let mut parts = match steps.last() {
            Some(last) => vec![format!("{} checkpoint(s) up to step {last}", steps.len())],
            None => vec![],
        };
        let entries = [METRICS_FILE, TENSORBOARD_DIR, MODEL, CONFIG];
        let there = entries.into_iter().filter(|entry| self.dir.join(entry).exists());
        parts.extend(there.map(|entry| format!("`{entry}`")));
        Ok(parts.join(", "))
    }

    /// Deletes the run, but not its folder. The config goes last, so that what is left after a
    /// failure still counts as a run.
    ///
    /// # Errors
    /// If another process trains in the folder, or if the folder is no run any more.
    pub fn remove(self) -> Result<()> {
        let lock = FolderLock::take(&self.dir)?;
        self.check()?;
        let mut entries = fs_err::read_dir(&self.dir)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<PathBuf>>>()?;
        let rank = |path: &PathBuf| [METRICS_FILE, CONFIG].iter().position(|n| path.ends_with(n));
        entries.sort_by_key(rank);
        for entry in entries.iter().filter(|entry| !entry.ends_with(LOCK)) {
            let is_folder = entry.is_dir() && !entry.is_symlink();
            let removed = if is_folder {
                folder::remove(entry)
            } else {
                fs_err::remove_file(entry).map_err(anyhow::Error::from)
            };
            removed.context("cannot delete the earlier run")?;
        }
        lock.check()
    }
}

/// Whether dylora writes a file of this path, relative to a run's folder.
fn is_ours(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    let is_hidden = |name: &str| {
        let starts = [WRITING, REMOVED, REPLACED, ".last-", ".best-"];
        starts.iter().any(|start| name.starts_with(start))
    };
    if parts.iter().any(|part| is_hidden(part)) {
        return true;
    }
    match parts[..] {
        [file] => {
            FILES.contains(&file.strip_suffix(".new").unwrap_or(file))
                || [TENSORBOARD_DIR, "checkpoints", "rejected"].contains(&file)
        }
        [MODEL, ..] | ["checkpoints" | "rejected", "last" | "best"] => true,
        [TENSORBOARD_DIR, file] => file.starts_with(super::tensorboard::FILE_PREFIX),
        ["checkpoints" | "rejected", step] => step.starts_with("step-"),
        ["checkpoints" | "rejected", step, file] => {
            step.starts_with("step-") && checkpoint::FILES.contains(&file)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_run_are_told_from_others() {
        let ours = [
            "config.toml",
            "metrics.jsonl",
            "metrics.jsonl.new",
            "tensorboard/events.out.tfevents.1.dylora.2.0",
            "checkpoints/last",
            "checkpoints/step-00000002/model.safetensors",
            "checkpoints/.writing-1/state.json",
            "model/config.json",
        ];
        assert_eq!(ours.iter().filter(|path| !is_ours(path)).count(), 0);
        let others = [
            "notes.txt",
            "export/dylora.json",
            "study/study.json",
            "tensorboard/notes",
            "checkpoints/step-00000002/notes.txt",
            "checkpoints/mine/model.safetensors",
        ];
        assert_eq!(others.iter().filter(|path| is_ours(path)).count(), 0);
    }
}
