//! Checks what a command may write or replace, and writes it.
//!
//! An output folder contains a marker, [`MARKER`], which lists the files that dylora wrote and
//! their BLAKE3 sums. With `overwrite`, a file may be replaced, and a folder if it contains only
//! files that its marker lists, or if it has no marker but the caller recognises it. These are
//! never replaced:
//!
//! - what the command reads, and what is inside a folder that it reads;
//! - the working folder;
//! - a folder that contains one of these;
//! - links and devices;
//! - a file by a folder, or a folder by a file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::FileType;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{folder, sums};

/// The file that marks a folder as written by dylora.
pub const MARKER: &str = ".dylora-output.json";

/// The version of the marker's format. Version 1 has no sums. Folders with another version count as
/// unmarked.
const FORMAT: u32 = 2;

/// How far above a file its marker may be.
const MARKER_DEPTH: usize = 3;

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    format: u32,
    dylora_version: String,
    /// Paths relative to the folder, sorted, without the marker itself.
    files: BTreeSet<String>,
    /// The BLAKE3 sum of each of them that is a file, in hexadecimal digits.
    #[serde(default)]
    blake3: BTreeMap<String, String>,
}

impl Marker {
    /// The marker of a folder that has one.
    fn read(dir: &Path) -> Option<Self> {
        let text = fs_err::read_to_string(dir.join(MARKER)).ok()?;
        let marker: Self = serde_json::from_str(&text).ok()?;
        (1..=FORMAT).contains(&marker.format).then_some(marker)
    }

    /// The marker of a folder that has been filled.
    fn of_folder(dir: &Path) -> Result<Self> {
        let files = files_below(dir)?;
        let is_file = |name: &&String| dir.join(name).is_file();
        let sum = |name: &String| Ok((name.clone(), sums::of_file(&dir.join(name))?));
        let blake3 = files.iter().filter(is_file).map(sum).collect::<Result<_>>()?;
        let dylora_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Self { format: FORMAT, dylora_version, files, blake3 })
    }
}

/// Checks a file of an output against the sum in its marker. A file without a sum, such as any that
/// dylora did not write, is not checked.
///
/// # Errors
/// A file with another sum.
pub(crate) fn check_sum(file: &Path) -> Result<()> {
    for dir in file.ancestors().skip(1).take(MARKER_DEPTH) {
        let Some(marker) = Marker::read(dir) else { continue };
        let name = file.strip_prefix(dir).expect("it is above the file").to_string_lossy();
        return match marker.blake3.get(&*name) {
            Some(sum) => {
                let marker = dir.join(MARKER);
                let hint = format!("if that was on purpose, delete `{}`", marker.display());
                sums::check_file(file, sum, &hint)
            }
            None => Ok(()),
        };
    }
    Ok(())
}

/// The output of a command.
#[derive(Debug, Clone, Default)]
pub struct Output {
    /// The file or folder to write.
    pub path: PathBuf,
    /// Whether an earlier output may be replaced.
    pub overwrite: bool,
    /// Files and folders that the command reads.
    pub inputs: Vec<PathBuf>,
    /// The folder in which relative paths begin. It is never replaced.
    pub working_folder: PathBuf,
}

/// Whether dylora wrote the folder, which has no marker and contains the given files.
pub(crate) type IsUnmarkedOutput = fn(&Path, &BTreeSet<String>) -> bool;

impl Output {
    /// An output to a new file or folder.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }

    /// Checks that [`Self::write_folder`] may write.
    ///
    /// # Errors
    /// If there is something at the path that may not be replaced; the message names it.
    pub fn check_folder(&self, is_unmarked: IsUnmarkedOutput) -> Result<()> {
        folder::restore(&self.path)?;
        let name = self.path.display();
        let Ok(metadata) = self.path.symlink_metadata() else { return Ok(()) };
        if !metadata.is_dir() {
            bail!(
                "`{name}` is {}, not a folder, and is not replaced\nhint: name another",
                kind_of(metadata.file_type())
            );
        }
        let is_empty = fs_err::read_dir(&self.path)?.next().is_none();
        if !is_empty && !self.overwrite {
            bail!("`{name}` is there already\nhint: name another, or add `--overwrite`");
        }
        self.check_kept()?;
        self.check_found(&self.path, is_unmarked)
    }

    /// Checks that the folder at `found`, which is or was at the path, may be replaced.
    fn check_found(&self, found: &Path, is_unmarked: IsUnmarkedOutput) -> Result<()> {
        let is_empty = found.is_dir() && fs_err::read_dir(found)?.next().is_none();
        if is_empty {
            return Ok(());
        }
        if !self.overwrite || found.is_symlink() || !found.is_dir() {
            let name = self.path.display();
            bail!("`{name}` is there already\nhint: name another, or add `--overwrite`");
        }
        self.check_ours(found, is_unmarked)
    }

    /// Fills a folder by calling `fill`, adds the marker and moves the folder to the path in one
    /// step. Missing parent folders are created.
    ///
    /// # Errors
    /// As for [`Self::check_folder`], and if `fill` fails. What was at the path is then unchanged.
    pub fn write_folder(
        &self,
        is_unmarked: IsUnmarkedOutput,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        self.check_folder(is_unmarked)?;
        let fill = |dir: &Path| {
            fill(dir)?;
            let text = serde_json::to_string_pretty(&Marker::of_folder(dir)?)? + "\n";
            super::write(&dir.join(MARKER), text.as_bytes())
        };
        folder::write(&self.path, fill, |found| self.check_found(found, is_unmarked))
    }

    /// Checks that [`Self::write_file`] may write.
    ///
    /// # Errors
    /// If there is something at the path that may not be replaced; the message names it.
    pub(crate) fn check_file(&self) -> Result<()> {
        let name = self.path.display();
        let Ok(metadata) = self.path.symlink_metadata() else { return Ok(()) };
        if !metadata.is_file() {
            let kind = kind_of(metadata.file_type());
            bail!("`{name}` is {kind}, not a file, and is not replaced\nhint: name another");
        }
        self.check_kept()?;
        if !self.overwrite {
            bail!("`{name}` is there already\nhint: name another, or add `--overwrite`");
        }
        Ok(())
    }

    /// Writes a temporary file beside the path by calling `fill`, and renames it to the path.
    /// Missing parent folders are created.
    ///
    /// # Errors
    /// As for [`Self::check_file`], and if `fill` fails. What was at the path is then unchanged.
    pub(crate) fn write_file(&self, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        self.check_file()?;
        let path = std::path::absolute(&self.path)?;
        let parent = path.parent().with_context(|| format!("`{}` is no file", path.display()))?;
        fs_err::create_dir_all(parent)?;
        let temporary = folder::Writing::new_in(parent)?;
        let file = temporary.path().join("file");
        fill(&file)?;
        if self.overwrite {
            fs_err::rename(file, &path)?;
        } else {
            folder::rename_to_free(&file, &path)?;
        }
        super::sync_folder(parent)
    }

    /// Checks that what is at the path is no input and not the working folder, and contains
    /// neither.
    ///
    /// # Errors
    /// The message says which of them it is.
    pub fn check_kept(&self) -> Result<()> {
        let name = self.path.display();
        let real = fs_err::canonicalize(&self.path)?;
        let real_of = |path: &Path| fs_err::canonicalize(path).ok();
        match real_of(&self.working_folder) {
            Some(folder) if folder == real => {
                bail!("`{name}` is the working folder, which is not replaced\nhint: name another")
            }
            Some(folder) if folder.starts_with(&real) => {
                bail!("`{name}` holds the working folder and is not replaced\nhint: name another")
            }
            _ => {}
        }
        for input in &self.inputs {
            let Some(real_input) = real_of(input) else { continue };
            if real.starts_with(&real_input) {
                bail!("`{name}` is read by this command and is not replaced\nhint: name another");
            }
            if real_input.starts_with(&real) {
                bail!(
                    "`{name}` holds `{}`, which is read by this command, and is not replaced\n\
                     hint: name another",
                    input.display()
                );
            }
        }
        Ok(())
    }

    /// Checks that the folder at the path contains only what dylora wrote.
    fn check_ours(&self, found: &Path, is_unmarked: IsUnmarkedOutput) -> Result<()> {
        let name = self.path.display();
        let files = files_below(found)?;
        let Some(marker) = Marker::read(found) else {
            // an expert of an export looks like an adapter, but belongs to the export
            let parent = std::path::absolute(&self.path)?.parent().map(Path::to_owned);
            let is_part = parent.is_some_and(|parent| {
                parent.join(MARKER).exists() || parent.join("dylora.json").exists()
            });
            if !is_part && is_unmarked(found, &files) {
                return Ok(());
            }
            bail!(
                "`{name}` was not written by dylora, as far as can be told, and is not replaced\n\
                 hint: delete it yourself, or name another"
            );
        };
        if let Some(other) = files.difference(&marker.files).next() {
            bail!(
                "`{name}` holds `{other}`, which dylora did not write, and is not replaced\n\
                 hint: move that elsewhere, or name another"
            );
        }
        Ok(())
    }
}

/// The files that dylora wrote to the folder `dir`, and the other ones in it. The marker is
/// neither.
///
/// # Errors
/// A folder without a marker, a file that the marker lists and that is missing, and a link.
pub(crate) fn written_files(dir: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let name = dir.display();
    let Some(marker) = Marker::read(dir) else {
        bail!(
            "`{name}` has no `{MARKER}`, so that it is no output of dylora\nhint: `dylora \
             export-adapters` and `dylora merge` write such folders"
        );
    };
    let found = files_below(dir)?;
    if let Some(missing) = marker.files.difference(&found).next() {
        bail!("`{name}` lacks `{missing}`, which dylora wrote there\nhint: export it again");
    }
    let is_ours = |file: &String| marker.files.contains(file);
    let (ours, others): (Vec<String>, Vec<String>) = found.into_iter().partition(is_ours);
    for file in &ours {
        if !dir.join(file).symlink_metadata()?.is_file() {
            bail!("`{name}/{file}` is no file");
        }
    }
    Ok((ours, others))
}

fn kind_of(kind: FileType) -> &'static str {
    if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_dir() {
        "a folder"
    } else if kind.is_file() {
        "a file"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "a pipe or a socket"
    }
}

/// The paths, relative to `dir`, of everything below it except the marker: files, links, other
/// entries and empty folders.
pub fn files_below(dir: &Path) -> Result<BTreeSet<String>> {
    let (mut found, mut folders) = (BTreeSet::new(), vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        let mut is_empty = true;
        for entry in fs_err::read_dir(&folder)? {
            let entry = entry?;
            is_empty = false;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                found.insert(path_from(dir, &entry.path()));
            }
        }
        if is_empty && folder != dir {
            found.insert(path_from(dir, &folder));
        }
    }
    found.remove(MARKER);
    Ok(found)
}

fn path_from(dir: &Path, path: &Path) -> String {
    path.strip_prefix(dir).expect("it was found below").to_string_lossy().into_owned()
}
