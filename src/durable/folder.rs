//! Replaces a folder by another in one step.
//!
//! The new folder is filled beside the old one under a name `.writing-*` and forced to disk. The
//! two then exchange their names (`renameat2` with `RENAME_EXCHANGE`, Linux 3.15), so that a
//! complete folder is at the path at any moment. On a file system that cannot exchange names, such
//! as NFS, two renames are made. Between them, the old folder is at `.dylora-replaced-NAME` alone;
//! if the process is killed there, [`restore`] brings it back.
//!
//! A folder that is filled is locked as long as its process lives. What a dead process left is
//! thus known, and deleted when something is written beside it.

use std::ffi::OsString;
use std::fs::TryLockError;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::sync_folder;

/// Beginning of a folder's name while it is written; random characters follow.
pub(crate) const WRITING: &str = ".writing-";
/// Beginning of a folder's name between the two renames; its own name follows.
pub(crate) const REPLACED: &str = ".dylora-replaced-";

/// A file without a lock belongs to a dead process after this time.
const OLD: Duration = Duration::from_secs(24 * 3600);

/// Beginning of a folder's name while it is deleted; its own name follows.
pub(crate) const REMOVED: &str = ".removed-";

/// A folder that is being filled, and is deleted unless it is kept.
#[derive(Debug)]
pub(crate) struct Writing {
    dir: tempfile::TempDir,
    /// Held by this process.
    _lock: fs_err::File,
}

impl Writing {
    /// Makes an empty folder in `parent`, and deletes those of dead processes there.
    pub(crate) fn new_in(parent: &Path) -> Result<Self> {
        clean_dead(parent);
        loop {
            let dir = tempfile::Builder::new().prefix(WRITING).tempdir_in(parent)?;
            let lock = lock(dir.path());
            // before it was locked, another process may have taken it for that of a dead one
            if dir.path().is_dir() {
                return Ok(Self { dir, _lock: lock? });
            }
        }
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Locks a folder as long as the file is open, if the file system can.
fn lock(dir: &Path) -> Result<fs_err::File> {
    let file = fs_err::File::open(dir)?;
    if let Err(error) = file.file().lock() {
        tracing::debug!("`{}` cannot be locked: {error}", dir.display());
    }
    Ok(file)
}

/// Deletes the folders in `parent` that dead processes were filling.
pub(crate) fn clean_dead(parent: &Path) {
    for entry in fs_err::read_dir(parent).into_iter().flatten().filter_map(Result::ok) {
        let name = entry.file_name();
        let random = name.to_str().and_then(|name| name.strip_prefix(WRITING));
        let is_ours = random.is_some_and(|random| {
            random.len() == 6 && random.chars().all(|c| c.is_ascii_alphanumeric())
        });
        if !is_ours {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            // earlier versions wrote such files, without a lock
            let changed = entry.metadata().and_then(|metadata| metadata.modified()).ok();
            let age = changed.and_then(|changed| changed.elapsed().ok());
            if age.is_some_and(|age| age > OLD) {
                let _ = fs_err::remove_file(entry.path());
            }
            continue;
        }
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let Ok(file) = fs_err::File::open(entry.path()) else { continue };
        match file.file().try_lock() {
            Ok(()) => {
                tracing::info!("`{}` was left by a process that died", entry.path().display());
                let _ = fs_err::remove_dir_all(entry.path());
            }
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

/// Deletes a folder, which loses its name first, so that a folder of this name is always whole.
pub fn remove(dir: &Path) -> Result<()> {
    let name = dir.file_name().with_context(|| format!("`{}` has no name", dir.display()))?;
    let mut hidden = OsString::from(REMOVED);
    hidden.push(name);
    let hidden = dir.with_file_name(hidden);
    if hidden.symlink_metadata().is_ok() {
        fs_err::remove_dir_all(&hidden)?;
    }
    fs_err::rename(dir, &hidden)?;
    Ok(fs_err::remove_dir_all(hidden)?)
}

/// Fills a folder by calling `fill` and moves it to `dir`, in place of any folder that is there.
/// Missing parent folders are created.
///
/// - `check_old`: decides whether the folder at a path may be replaced. It is called for `dir` when
///   the new folder is filled, and for the old folder, under its temporary name, before it is
///   deleted. If that fails, the old folder is moved back: somebody has changed it meanwhile
pub fn write(
    dir: &Path,
    fill: impl FnOnce(&Path) -> Result<()>,
    check_old: impl Fn(&Path) -> Result<()>,
) -> Result<()> {
    restore(dir)?;
    let dir = std::path::absolute(dir)?;
    let parent = dir.parent().with_context(|| format!("`{}` is no folder name", dir.display()))?;
    fs_err::create_dir_all(parent)?;
    if let Some(parked) = parked(&dir).filter(|parked| parked.is_dir() && check_old(parked).is_ok())
    {
        fs_err::remove_dir_all(parked)?;
    }
    let temporary = Writing::new_in(parent)?;
    fs_err::set_permissions(temporary.path(), PermissionsExt::from_mode(0o755))?;
    fill(temporary.path())?;
    sync_folder(temporary.path())?;
    if dir.symlink_metadata().is_err() {
        rename_to_free(temporary.path(), &dir)?;
        let _ = temporary.dir.keep();
        return sync_folder(parent);
    }
    check_old(&dir)?;
    // the old folder gets a name that others would clean
    let _lock = lock(&dir)?;
    exchange(temporary.path(), &dir)?;
    // the old folder has the temporary name now
    let old = temporary.path().to_owned();
    if let Err(error) = check_old(&old) {
        exchange(&old, &dir)?;
        return Err(error);
    }
    sync_folder(parent)?;
    if let Err(error) = temporary.dir.close() {
        tracing::warn!("`{}` is left over and may be deleted: {error}", old.display());
    }
    Ok(())
}

/// Renames `from` to `to`, where nothing must exist. If something has been created there meanwhile,
/// this is an error, unless the file system cannot tell.
pub(super) fn rename_to_free(from: &Path, to: &Path) -> Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(fs_err::rename(from, to)?),
        Err(error) => Err(std::io::Error::from(error))
            .with_context(|| format!("cannot rename `{}` to `{}`", from.display(), to.display())),
    }
}

/// Moves the folder `new` to `dir`, and the folder at `dir` to `new`.
fn exchange(new: &Path, dir: &Path) -> Result<()> {
    match renameat_with(CWD, new, CWD, dir, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => exchange_by_renames(new, dir),
        Err(error) => Err(std::io::Error::from(error)).with_context(|| {
            format!("cannot exchange `{}` and `{}`", new.display(), dir.display())
        }),
    }
}

fn exchange_by_renames(new: &Path, dir: &Path) -> Result<()> {
    let parked = parked(dir).with_context(|| format!("`{}` has no name", dir.display()))?;
    // a folder that is left over from a kill is in nobody's place, and stays
    if parked.symlink_metadata().is_ok() {
        bail!("`{}` is in the way\nhint: delete it if it is not needed", parked.display());
    }
    fs_err::rename(dir, &parked)?;
    if let Err(error) = fs_err::rename(new, dir) {
        fs_err::rename(&parked, dir)?;
        return Err(error.into());
    }
    Ok(fs_err::rename(&parked, new)?)
}

/// The path of a folder between the two renames.
fn parked(dir: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(REPLACED);
    name.push(dir.file_name()?);
    Some(dir.with_file_name(name))
}

/// Cleans up after a process that was killed while it replaced `dir`: if the old folder is missing
/// from `dir`, it is moved back. If it has been replaced, it is left, and a warning names it.
pub fn restore(dir: &Path) -> Result<()> {
    let Some(parked) = parked(dir).filter(|parked| parked.is_dir() && !parked.is_symlink()) else {
        return Ok(());
    };
    if dir.symlink_metadata().is_ok() {
        tracing::warn!("`{}` is left over and may be deleted", parked.display());
        return Ok(());
    }
    fs_err::rename(&parked, dir)?;
    tracing::warn!("`{}` is restored: a command was killed while it replaced it", dir.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use super::*;

    fn fill(dir: &Path, text: &str) -> Result<()> {
        for name in ["a", "b"] {
            super::super::write(&dir.join(name), text.as_bytes())?;
        }
        Ok(())
    }

    /// The text that both files of a complete folder contain.
    fn text_of(dir: &Path) -> Result<String> {
        let [a, b] = ["a", "b"].map(|name| fs_err::read_to_string(dir.join(name)));
        let (a, b) = (a?, b?);
        assert_eq!(a, b, "half of one folder, half of the other");
        Ok(a)
    }

    fn names(dir: &Path) -> Result<Vec<OsString>> {
        let mut names: Vec<OsString> =
            fs_err::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        names.sort();
        Ok(names)
    }

    #[test]
    fn a_folder_is_replaced_as_a_whole_and_nothing_is_left_over() -> Result<()> {
        let place = tempfile::tempdir()?;
        let dir = place.path().join("deep/out");
        for text in ["first", "second"] {
            write(&dir, |dir| fill(dir, text), |_| Ok(()))?;
            assert_eq!(text_of(&dir)?, text);
            assert_eq!(names(dir.parent().context("it has one")?)?, ["out"]);
        }
        let full = |dir: &Path| {
            fill(dir, "third")?;
            bail!("no space left")
        };
        let error = write(&dir, full, |_| Ok(()));
        assert_eq!(error.expect_err("it failed").to_string(), "no space left");
        assert_eq!(text_of(&dir)?, "second");
        assert_eq!(names(dir.parent().context("it has one")?)?, ["out"]);
        Ok(())
    }

    /// Whoever puts something there while the new folder is filled gets it back.
    #[test]
    fn what_appears_meanwhile_is_not_lost() -> Result<()> {
        let place = tempfile::tempdir()?;
        let dir = place.path().join("out");
        let is_ours = |dir: &Path| match dir.join("thesis").exists() {
            true => bail!("not ours"),
            false => Ok(()),
        };
        let fill_slowly = |new: &Path| {
            fs_err::create_dir_all(&dir)?;
            fs_err::write(dir.join("thesis"), "mine")?;
            fill(new, "new")
        };
        let error = write(&dir, fill_slowly, is_ours).expect_err("it is not replaced");
        assert_eq!(error.to_string(), "not ours");
        assert_eq!(names(&dir)?, ["thesis"]);
        // between the last look and the exchange
        let asked = std::cell::Cell::new(0);
        let late = |found: &Path| {
            asked.set(asked.get() + 1);
            if asked.get() == 1 { Ok(()) } else { is_ours(found) }
        };
        write(&dir, |new| fill(new, "new"), late).expect_err("it is put back");
        assert_eq!(
            (names(&dir)?, names(place.path())?),
            (vec!["thesis".into()], vec!["out".into()])
        );
        Ok(())
    }

    #[test]
    fn two_renames_do_what_an_exchange_does() -> Result<()> {
        let place = tempfile::tempdir()?;
        let [new, dir] = ["new", "dir"].map(|name| place.path().join(name));
        for (folder, text) in [(&new, "new"), (&dir, "old")] {
            fs_err::create_dir(folder)?;
            fill(folder, text)?;
        }
        exchange_by_renames(&new, &dir)?;
        assert_eq!((text_of(&dir)?, text_of(&new)?), ("new".into(), "old".into()));
        assert_eq!(names(place.path())?, ["dir", "new"]);
        // the new folder does not exist, so the old one comes back
        fs_err::remove_dir_all(&new)?;
        exchange_by_renames(&new, &dir).expect_err("there is nothing to put there");
        assert_eq!(text_of(&dir)?, "new");
        Ok(())
    }

    #[test]
    fn a_kill_between_two_renames_is_undone() -> Result<()> {
        let place = tempfile::tempdir()?;
        let dir = place.path().join("out");
        write(&dir, |dir| fill(dir, "old"), |_| Ok(()))?;
        // the process was killed before the second rename
        fs_err::rename(&dir, place.path().join(".dylora-replaced-out"))?;
        restore(&dir)?;
        assert_eq!(text_of(&dir)?, "old");
        // the process was killed after the second rename
        fs_err::create_dir(place.path().join(".dylora-replaced-out"))?;
        restore(&dir)?;
        let both = vec![".dylora-replaced-out".into(), "out".into()];
        assert_eq!((text_of(&dir)?.as_str(), names(place.path())?), ("old", both));
        Ok(())
    }

    /// The environment variable that tells the next test's child process which folder to replace.
    const CHILD: &str = "DYLORA_TEST_REPLACES";

    /// Kills a process that replaces a folder again and again, at many different moments.
    #[test]
    fn a_kill_at_any_moment_leaves_a_whole_folder() -> Result<()> {
        if let Some(dir) = std::env::var_os(CHILD) {
            for count in 0.. {
                let text = format!("count {count}");
                write(Path::new(&dir), |dir| fill(dir, &text), |_| Ok(()))?;
            }
        }
        let place = tempfile::tempdir()?;
        let dir = place.path().join("out");
        write(&dir, |dir| fill(dir, "count 0"), |_| Ok(()))?;
        let name = "durable::folder::tests::a_kill_at_any_moment_leaves_a_whole_folder";
        for round in 0..30 {
            let mut command = Command::new(std::env::current_exe()?);
            let mut child = command.args(["--exact", name]).env(CHILD, &dir).spawn()?;
            thread::sleep(Duration::from_millis(20 + 7 * round));
            child.kill()?;
            child.wait()?;
            assert!(text_of(&dir)?.starts_with("count "));
        }
        Ok(())
    }
}
