//! Where the files of a base or an adapter are looked for: a local folder, or a folder of a
//! repository at one commit, whose files are fetched as they are asked for. A snapshot in the Hub's
//! cache is a local folder too.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::client::Client;
use super::names::RepoSource;
use super::settings::DownloadProgress;

/// A folder of files. Displayed, it is the folder in the words of messages.
pub(super) struct Place<'a> {
    /// What to call it: the folder's path, or `repo@revision`.
    pub(super) label: String,
    /// The commit that the revision stood at; absent for a user's folder.
    pub(super) commit: Option<String>,
    store: Store<'a>,
}

enum Store<'a> {
    Folder(PathBuf),
    Repo {
        client: &'a Client<'a>,
        commit: String,
        /// All files below the folder, by their paths from there.
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
    /// The user's folder `dir`, which is to hold a `what`; errors end with `hint`.
    pub(super) fn user_folder(dir: &Path, what: &str, hint: &str) -> Result<Self> {
        let name = dir.display();
        if dir.is_file() {
            bail!("the {what} `{name}` is a file, not a folder\n{hint}");
        }
        if !dir.exists() {
            bail!("the {what} `{name}` does not exist\n{hint}");
        }
        Ok(Self { label: name.to_string(), commit: None, store: Store::Folder(dir.to_owned()) })
    }

    /// A folder in the cache.
    pub(super) fn cached(label: String, commit: &str, dir: PathBuf) -> Self {
        Self { label, commit: Some(commit.to_owned()), store: Store::Folder(dir) }
    }

    /// The folder that `client` is to look in, at `commit`; `files` is all that the repository has.
    /// An error if there is no such folder.
    pub(super) fn on_hub(
        client: &'a Client<'a>,
        commit: &str,
        files: impl Iterator<Item = String>,
        progress: &'a dyn DownloadProgress,
    ) -> Result<Self> {
        let below = client.source.path_of("");
        let files = files.filter_map(|file| Some(file.strip_prefix(&below)?.to_owned()));
        let files: BTreeSet<String> = files.collect();
        let RepoSource { repo, revision, subfolder, option, .. } = client.source;
        if files.is_empty() && !subfolder.is_empty() {
            bail!(
                "`{repo}@{revision}` on `{}` has no folder `{subfolder}`\n\
                 hint: check `{option}.hub.subfolder`",
                client.endpoint()
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

    /// The path of `file`, which the place has. On the Hub, it is fetched if the cache lacks it.
    pub(super) fn get(&self, file: &str) -> Result<PathBuf> {
        match &self.store {
            Store::Folder(dir) => Ok(dir.join(file)),
            Store::Repo { client, commit, progress, .. } => {
                client.fetch(&client.source.path_of(file), commit, *progress)
            }
        }
    }

    /// The names of the files and folders that lie in the folder itself, sorted.
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
