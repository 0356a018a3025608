//! Files and folders that are whole or absent, also after a crash.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Writes a file and waits until its bytes are on disk.
pub fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    let mut handle = fs_err::File::create(file)?;
    handle.write_all(bytes)?;
    Ok(handle.sync_all()?)
}

/// Replaces a file in one step.
pub fn replace(file: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(".new");
    write(Path::new(&temporary), bytes)?;
    Ok(fs_err::rename(&temporary, file)?)
}

/// Waits until the names in a folder are on disk.
pub fn sync_folder(dir: &Path) -> Result<()> {
    Ok(fs_err::File::open(dir)?.sync_all()?)
}

/// Fills a folder with `fill` and puts it at `dir` in one step, with the missing parents. A folder
/// that is there is refused, or with `overwrite` replaced.
pub fn folder(dir: &Path, overwrite: bool, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    check_free(dir, overwrite)?;
    let exists = dir.symlink_metadata().is_ok();
    let dir = std::path::absolute(dir)?;
    let parent = dir.parent().with_context(|| format!("`{}` is no folder name", dir.display()))?;
    fs_err::create_dir_all(parent)?;
    let temporary = tempfile::Builder::new().prefix(".writing-").tempdir_in(parent)?;
    fs_err::set_permissions(temporary.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    fill(temporary.path())?;
    sync_folder(temporary.path())?;
    // what was there is removed when the new folder is in its place, not before
    let replaced = tempfile::Builder::new().prefix(".replaced-").tempdir_in(parent)?;
    let old = replaced.path().join("old");
    if exists {
        fs_err::rename(&dir, &old)?;
    }
    if let Err(error) = fs_err::rename(temporary.keep(), &dir) {
        if exists {
            fs_err::rename(&old, &dir)?;
        }
        return Err(error.into());
    }
    sync_folder(parent)
}

/// Checks that [`folder`] may write `dir`: nothing is there, or an empty folder, or `overwrite`.
pub fn check_free(dir: &Path, overwrite: bool) -> Result<()> {
    let exists = dir.symlink_metadata().is_ok();
    let is_empty = exists && dir.is_dir() && fs_err::read_dir(dir)?.next().is_none();
    if exists && !is_empty && !overwrite {
        bail!("`{}` is there already\nhint: name another, or add `--overwrite`", dir.display());
    }
    Ok(())
}
