//! One file from the Hub into the cache by `hf-hub`, repeated and checked, so that what carries its
//! name is whole.
//!
//! Attempts are repeated here and not by `hf-hub` 0.5.0, whose own repetition appends a file to the
//! part of it that is already there. Each attempt continues the part that the last one left.

use std::cell::Cell;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use hf_hub::api::Progress;
use hf_hub::api::sync::ApiError;

use super::DownloadProgress;
use super::client::{Client, Fault};

/// Attempts in a row that bring nothing new.
const MAX_FAILURES: u32 = 4;
/// Pause after the first failure; triples with each.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// What arrives of one file in one attempt, told to the caller too.
struct Meter<'a> {
    progress: &'a dyn DownloadProgress,
    size_bytes: Cell<u64>,
    arrived_bytes: Cell<u64>,
}

impl Progress for &Meter<'_> {
    fn init(&mut self, size: usize, file: &str) {
        self.size_bytes.set(size as u64);
        self.arrived_bytes.set(0);
        self.progress.start(file, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.arrived_bytes.update(|bytes| bytes + size as u64);
        self.progress.advance(size as u64);
    }

    /// Does nothing: the file is finished when its size is checked.
    fn finish(&mut self) {}
}

impl Client<'_> {
    /// Returns the path of `file` at `commit` in the cache, and fetches it if it is not there.
    pub(super) fn fetch(
        &self,
        file: &str,
        commit: &str,
        progress: &dyn DownloadProgress,
    ) -> Result<PathBuf> {
        let path = self.cache.repo(self.source.repo_at(commit)).pointer_path(commit).join(file);
        if path.is_file() {
            return Ok(path);
        }
        let meter = Meter { progress, size_bytes: Cell::new(0), arrived_bytes: Cell::new(0) };
        let (mut failures, mut most_bytes) = (0, 0);
        let fetched = loop {
            meter.arrived_bytes.set(0);
            let error = match self.attempt(file, commit, &meter) {
                Ok(path) => break Ok(path),
                Err(Fault::Final(error)) => break Err(error),
                Err(Fault::Transient(error)) => error,
            };
            let bytes = meter.arrived_bytes.get();
            failures = if bytes > most_bytes { 1 } else { failures + 1 };
            most_bytes = most_bytes.max(bytes);
            if failures == MAX_FAILURES {
                break Err(anyhow!(
                    "cannot fetch `{file}`: {error}\n\
                     hint: run it again; what is there of the file is continued"
                ));
            }
            tracing::warn!("fetching `{file}` again: {error}");
            thread::sleep(FIRST_PAUSE * 3_u32.pow(failures - 1));
            // the failure may be that another process was fetching it
            if path.is_file() {
                break Ok(path);
            }
        };
        progress.finish();
        fetched
    }

    fn attempt(&self, file: &str, commit: &str, meter: &Meter) -> Result<PathBuf, Fault> {
        let repo = self.api.repo(self.source.repo_at(commit));
        let path = match repo.download_with_progress(file, meter) {
            Ok(path) => path,
            Err(error) => return Err(self.download_fault(error, &repo.url(file), commit, meter)),
        };
        let (found_bytes, size_bytes) = (fs_err::metadata(&path)?.len(), meter.size_bytes.get());
        if found_bytes == size_bytes {
            return Ok(path);
        }
        // say, a server without `Range` sent all of it where the rest was asked for
        fs_err::remove_file(fs_err::canonicalize(&path)?)?;
        if path.is_symlink() {
            fs_err::remove_file(&path)?;
        }
        Err(Fault::Transient(anyhow!("{found_bytes} bytes came where {size_bytes} were announced")))
    }

    /// The error for an attempt that `hf-hub` gave up.
    fn download_fault(&self, error: ApiError, url: &str, commit: &str, meter: &Meter) -> Fault {
        match error {
            ApiError::InvalidResume => self.discard_part(url, commit),
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(416) => self.discard_part(url, commit),
                error => self.request_fault(error),
            },
            ApiError::LockAcquisition(lock) => {
                meter.arrived_bytes.set(len_or_zero(&lock.with_extension("part")));
                let lock = lock.display();
                Fault::Transient(anyhow!("another process holds the lock `{lock}`"))
            }
            ApiError::IoError(error) if is_local(error.kind()) => Fault::Final(anyhow!(
                "cannot write to the Hub's cache `{}`: {error}\n\
                 hint: `HF_HOME` names another place for it",
                self.cache.path().display()
            )),
            ApiError::IoError(error) => Fault::Transient(anyhow!(
                "{} of {} bytes came: {error}",
                meter.arrived_bytes.get(),
                meter.size_bytes.get()
            )),
            error => Fault::Final(anyhow!(
                "`{url}` does not answer as the Hub does: {error}\n\
                 hint: is `HF_ENDPOINT` a full mirror of the Hub?"
            )),
        }
    }

    /// Removes a part that is whole or too long, as a process that is killed may leave it: `hf-hub`
    /// asks for what follows it and fails, each time.
    fn discard_part(&self, url: &str, commit: &str) -> Fault {
        let metadata = match self.api.metadata(url) {
            Ok(metadata) => metadata,
            Err(error) => return Fault::Transient(error.into()),
        };
        let blob = self.cache.repo(self.source.repo_at(commit)).blob_path(metadata.etag());
        Fault::Transient(match fs_err::remove_file(blob.with_extension("part")) {
            Ok(()) => anyhow!("the part that was there does not fit"),
            Err(error) => error.into(),
        })
    }
}

fn len_or_zero(path: &Path) -> u64 {
    fs_err::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Whether an error of this kind is the cache's and not the connection's.
fn is_local(kind: ErrorKind) -> bool {
    use ErrorKind::{
        FileTooLarge, IsADirectory, NotADirectory, PermissionDenied, QuotaExceeded,
        ReadOnlyFilesystem, StorageFull,
    };
    matches!(
        kind,
        FileTooLarge
            | IsADirectory
            | NotADirectory
            | PermissionDenied
            | QuotaExceeded
            | ReadOnlyFilesystem
            | StorageFull
    )
}
