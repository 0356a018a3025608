//! Writes files and folders that are either complete or absent, even after a crash. Single files
//! are written here and folders in [`folder`]; [`output`] checks what a command may write, and
//! [`lock`] keeps two processes from writing into one folder. [`sums`] are checksums of its files.

pub mod folder;
pub mod lock;
pub mod output;
pub mod sums;

use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Result, bail};

/// Writes a file and waits until its bytes are on disk.
pub fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    let mut handle = fs_err::File::create(file)?;
    handle.write_all(bytes)?;
    Ok(handle.sync_all()?)
}

/// Writes a file by calling `fill`, and waits until its bytes are on disk.
pub fn stream(file: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let mut handle = BufWriter::new(fs_err::File::create(file)?);
    fill(&mut handle)?;
    Ok(handle.into_inner()?.sync_all()?)
}

/// Replaces a file in one step.
pub fn replace(file: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(".new");
    write(Path::new(&temporary), bytes)?;
    Ok(fs_err::rename(&temporary, file)?)
}

/// Checks that `path` still leads to `file`, which a run keeps open and writes.
pub(crate) fn check_place(file: &fs_err::File, path: &Path) -> Result<()> {
    let own = file.metadata()?;
    let is_own = |found: std::fs::Metadata| (found.dev(), found.ino()) == (own.dev(), own.ino());
    if !fs_err::metadata(path).is_ok_and(is_own) {
        bail!(
            "`{}` has vanished while the run wrote it\nhint: somebody has deleted, moved or \
             replaced it; `dylora train --resume` goes on from the last checkpoint",
            path.display()
        );
    }
    Ok(())
}

/// Waits until the names in a folder are on disk.
pub(crate) fn sync_folder(dir: &Path) -> Result<()> {
    Ok(fs_err::File::open(dir)?.sync_all()?)
}
