//! Where the files of a base or an adapter are looked for: in a local folder, or in a folder of a
//! repository at one commit, whose files are fetched when they are needed. A snapshot in the Hub's
//! cache counts as a local folder.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::client::Client;
use super::names::RepoSource;
use super::settings::DownloadProgress;
use crate::durable::folder;

/// A folder of files. Its `Display` is the folder as messages name it.
pub(super) struct Place<'a> {
    /// The name for messages: the folder's path, or the source's label, such as `repo@revision`.
    pub(super) label: String,
    /// The commit that the revision pointed to; `None` for a user's folder.
    pub(super) commit: Option<String>,
    store: Store<'a>,
}

enum Store<'a> {
    Folder(PathBuf),
    Repo {
        client: &'a Client<'a>,
        commit: String,
        /// The paths, relative to the folder, of all files below it.
        files: BTreeSet<String>,
        progress: &'a dyn DownloadProgress,
    },
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.store {
            Store::Folder(dir) => write!(f, "`{}`", dir.display()),
            Store::Repo { client, .. } => write!(f, "`{}` on `{}`", self.label, client.endpoint()),
        }
    }
}

impl<'a> Place<'a> {
    /// The user's folder `dir`, which should hold a `what`. The error for a missing folder ends
    /// with `hint`.
    pub(super) fn user_folder(dir: &Path, what: &str, hint: &str) -> Result<Self> {
        folder::restore(dir)?;
        let name = dir.display();
        if dir.is_file() {
            bail!("the {what} `{name}` is a file, not a folder\n{hint}");
        }
        if !dir.exists() {
            bail!("the {what} `{name}` does not exist\n{hint}");
        }
        Ok(Self { label: name.to_string(), commit: None, store: Store::Folder(dir.to_owned()) })
    }

    /// A folder in the Hub's cache.
    pub(super) fn cached(label: String, commit: &str, dir: PathBuf) -> Self {
        Self { label, commit: Some(commit.to_owned()), store: Store::Folder(dir) }
    }

    /// The folder of `client`'s source in the repository at `commit`. It is an error if the
    /// repository has no such folder.
    ///
    /// - `files`: the paths of all files in the repository
    pub(super) fn on_hub(
        client: &'a Client<'a>,
        commit: &str,
        files: impl Iterator<Item = String>,
        progress: &'a dyn DownloadProgress,
    ) -> Result<Self> {
        let below = client.source.path_of("");
        let files = files.filter_map(|file| Some(file.strip_prefix(&below)?.to_owned()));
        let files: BTreeSet<String> = files.collect();
        let RepoSource { repo, revision, subfolder, .. } = client.source;
        if files.is_empty() && !subfolder.is_empty() {
            bail!(
                "`{repo}@{revision}` on `{}` has no folder `{subfolder}`\n\
                 hint: check `{}.subfolder`",
                client.endpoint(),
                client.source.key()
            );
        }
        let store = Store::Repo { client, commit: commit.to_owned(), files, progress };
        Ok(Self { label: client.source.label(), commit: Some(commit.to_owned()), store })
    }

    pub(super) fn has(&self, file: &str) -> bool {
        match &self.store {
            Store::Folder(dir) => dir.join(file).is_file(),
            Store::Repo { files, .. } => files.contains(file),
        }
    }

    /// The path of `file`, which this place must have. A file on the Hub is fetched if the
    /// cache lacks it.
    pub(super) fn get(&self, file: &str) -> Result<PathBuf> {
        match &self.store {
            Store::Folder(dir) => Ok(dir.join(file)),
            Store::Repo { client, commit, progress, .. } => {
                client.fetch(&client.source.path_of(file), commit, *progress)
            }
        }
    }

    /// The files directly in the subfolder `folder`, as paths from this place, sorted. There are
    /// none if there is no such folder.
    pub(super) fn files_in(&self, folder: &str) -> Result<Vec<String>> {
        let mut files: Vec<String> = match &self.store {
            Store::Folder(dir) if !dir.join(folder).is_dir() => vec![],
            Store::Folder(dir) => {
                let entries =
                    fs_err::read_dir(dir.join(folder))?.collect::<std::io::Result<_>>()?;
                let entries: Vec<fs_err::DirEntry> = entries;
                let files = entries.iter().filter(|entry| entry.path().is_file());
                files
                    .map(|entry| format!("{folder}/{}", entry.file_name().to_string_lossy()))
                    .collect()
            }
            Store::Repo { files, .. } => {
                let is_in = |file: &&String| {
                    let name = file.strip_prefix(folder).and_then(|name| name.strip_prefix('/'));
                    name.is_some_and(|name| !name.contains('/'))
                };
                files.iter().filter(is_in).cloned().collect()
            }
        };
        files.sort();
        Ok(files)
    }

    /// The paths of all files below the folder, sorted.
    pub(super) fn all_files(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        match &self.store {
            Store::Repo { files, .. } => found.extend(files.iter().cloned()),
            Store::Folder(dir) => {
                let mut folders = vec![String::new()];
                while let Some(folder) = folders.pop() {
                    for entry in fs_err::read_dir(dir.join(&folder))? {
                        let name = entry?.file_name().to_string_lossy().into_owned();
                        let path =
                            if folder.is_empty() { name } else { format!("{folder}/{name}") };
                        match dir.join(&path).is_dir() {
                            true => folders.push(path),
                            false => found.push(path),
                        }
                    }
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// The names of the files and folders directly in the folder, sorted.
    pub(super) fn entries(&self) -> Result<BTreeSet<String>> {
        match &self.store {
            Store::Folder(dir) => {
                let name = |entry: std::io::Result<fs_err::DirEntry>| {
                    Ok(entry?.file_name().to_string_lossy().into_owned())
                };
                fs_err::read_dir(dir)?.map(name).collect()
            }
            Store::Repo { files, .. } => {
                let first = |file: &String| file.split('/').next().unwrap_or_default().to_owned();
                Ok(files.iter().map(first).collect())
            }
        }
    }
}
