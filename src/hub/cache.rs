//! One repository's part of the Hub's cache, in `huggingface_hub`'s layout (see [`super`]).

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::durable;

/// The cache's folder for one model repository.
pub(super) struct RepoCache {
    dir: PathBuf,
    repo_dir: PathBuf,
}

impl RepoCache {
    pub(super) fn new(dir: &Path, repo: &str) -> Self {
        let repo_dir = dir.join(format!("models--{}", repo.replace('/', "--")));
        Self { dir: dir.to_owned(), repo_dir }
    }

    /// The whole cache.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The commit at which `revision` stood when it was last fetched.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs_err::read_to_string(self.ref_path(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes that `revision` stands at `commit`. Only offline runs need the note, so a cache that
    /// cannot be written is no error.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) {
        if self.commit_of(revision).as_deref() == Some(commit) {
            return;
        }
        let path = self.ref_path(revision);
        let parent = path.parent().expect("a reference is in a folder");
        let written = fs_err::create_dir_all(parent).map_err(Into::into);
        if let Err(error) = written.and_then(|()| durable::replace(&path, commit.as_bytes())) {
            tracing::warn!("offline runs will not find `{revision}`: {error:#}");
        }
    }

    fn ref_path(&self, revision: &str) -> PathBuf {
        self.repo_dir.join("refs").join(revision)
    }

    /// The folder of `commit`'s files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo_dir.join("snapshots").join(commit)
    }

    /// Where the content named `etag` is, or will be once it is whole.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.repo_dir.join("blobs").join(etag)
    }

    /// Makes `file` of `commit` lead to `blob`, and returns its path. Where links cannot be made,
    /// the content itself moves there.
    pub(super) fn link(&self, blob: &Path, commit: &str, file: &str) -> Result<PathBuf> {
        let path = self.snapshot(commit).join(file);
        let parent = path.parent().expect("a file in a snapshot has a parent");
        fs_err::create_dir_all(parent)?;
        // what is there is a link to a content that is gone, or another process was faster
        if path.is_symlink() && !path.exists() {
            fs_err::remove_file(&path).or_else(ignore_not_found)?;
        }
        if !path.exists() && symlink(&self.relative(blob, file), &path).is_err() && !path.exists() {
            fs_err::rename(blob, &path)?;
        }
        Ok(path)
    }

    /// `blob` as seen from the folder of `file` in a snapshot.
    fn relative(&self, blob: &Path, file: &str) -> PathBuf {
        let up = Path::new(file).components().count() + 1;
        let blob = blob.strip_prefix(&self.repo_dir).expect("blobs are in the repository's folder");
        std::iter::repeat_n("..", up).collect::<PathBuf>().join(blob)
    }
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> std::io::Result<()> {
    fs_err::os::unix::fs::symlink(target, path)
}

#[cfg(not(unix))]
fn symlink(_target: &Path, _path: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// For a file that is to be gone: that it already is, is no error.
pub(super) fn ignore_not_found(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Whether `revision` is a full commit hash: 40 hexadecimal digits.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}
