//! Sets the checkpoints of a stage that has failed aside, so that no command that is given the
//! run's folder takes one of them for the stage's result.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::format::{folder, rejected_folder};

/// Moves the checkpoints of a run to the folder of rejected ones, in place of any that are there
/// from an earlier attempt, and returns that folder; `None` if the run has no checkpoints.
pub(crate) fn reject(run_dir: &Path) -> Result<Option<PathBuf>> {
    let (from, to) = (folder(run_dir), rejected_folder(run_dir));
    if !from.exists() {
        return Ok(None);
    }
    if to.exists() {
        fs_err::remove_dir_all(&to)?;
    }
    fs_err::rename(&from, &to)?;
    Ok(Some(to))
}
