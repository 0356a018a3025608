//! A lock on a folder, which one process at a time can hold. It is a `flock` on the file `.lock` in
//! the folder, so that it ends with its owner, however that ends. The file stays and says who held
//! the lock last.

use std::fs::TryLockError;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::check_place;

/// The file that is locked.
const LOCK: &str = ".lock";

/// The lock on a folder. It ends when this is dropped.
#[derive(Debug)]
#[must_use = "the lock ends when this is dropped"]
pub struct FolderLock {
    file: fs_err::File,
    dir: PathBuf,
}

impl FolderLock {
    /// Takes the lock on an existing folder. On a file system without locks, a warning says so.
    ///
    /// # Errors
    /// If another process holds the lock; the message names it.
    pub fn take(dir: &Path) -> Result<Self> {
        let mut this = Self::try_take(dir)?;
        this.file.set_len(0)?;
        this.file.rewind()?;
        this.file.write_all(std::process::id().to_string().as_bytes())?;
        Ok(this)
    }

    /// Checks that the folder still has the file that is locked, so that it is the same folder and
    /// no other process can have locked it meanwhile.
    pub fn check(&self) -> Result<()> {
        check_place(&self.file, &self.dir.join(LOCK))
    }

    fn try_take(dir: &Path) -> Result<Self> {
        let options = || {
            let mut options = fs_err::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options
        };
        let mut file = options().open(dir.join(LOCK)).context("cannot lock the folder")?;
        match file.file().try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(error)) => {
                tracing::warn!("`{}` cannot be locked against others: {error}", dir.display());
            }
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let known = file.read_to_string(&mut owner).is_ok();
                let owner = match owner.trim().parse::<u32>() {
                    Ok(id) if known => format!("process {id}"),
                    _ => "another process".to_owned(),
                };
                bail!(
                    "`{}` is in use by {owner}\nhint: wait until that has ended, or name another \
                     folder",
                    dir.display()
                );
            }
        }
        Ok(Self { file, dir: dir.to_owned() })
    }
}

/// Checks that no process holds the lock on a folder, which need not exist.
///
/// # Errors
/// As for [`FolderLock::take`].
pub(crate) fn check_free(dir: &Path) -> Result<()> {
    match dir.join(LOCK).exists() {
        true => FolderLock::try_take(dir).map(|_| ()),
        false => Ok(()),
    }
}
