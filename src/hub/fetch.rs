//! One file from the Hub into the cache, so that what carries its name is always whole.
//!
//! The content is appended to `blobs/<etag>.part` under the lock `blobs/<etag>.lock`, the names that
//! the `hf-hub` crate uses too. A part that an earlier attempt left is continued with `Range`: the
//! etag in its name says that the content has not changed since. Size and, where the etag is one,
//! SHA-256 are checked before the part gets its final name.

use std::fs::TryLockError;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use fs_err::{File, OpenOptions};
use sha2::{Digest, Sha256};
use ureq::http::{Response, StatusCode};
use ureq::{Body, BodyReader};

use super::DownloadProgress;
use super::cache::{RepoCache, ignore_not_found};
use super::client::{Client, FileInfo, RequestError, text_of};

/// Attempts in a row that bring nothing new.
const MAX_FAILURES: u32 = 4;
/// Pause after the first failure; triples with each.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const CHUNK_BYTES: usize = 1 << 16;

/// Returns the path of `file` at `commit` in the cache, and fetches it if it is not there.
pub(super) fn fetch(
    file: &str,
    commit: &str,
    client: &Client,
    cache: &RepoCache,
    progress: &dyn DownloadProgress,
) -> Result<PathBuf> {
    let path = cache.snapshot(commit).join(file);
    if path.is_file() {
        return Ok(path);
    }
    let info = insist(file, || client.file_info(file, commit), || Ok(0))?;
    let blob = cache.blob(&info.etag);
    let parent = blob.parent().expect("a blob is in a folder");
    let lock_path = blob.with_extension("lock");
    let locked = fs_err::create_dir_all(parent).and_then(|()| lock(&lock_path));
    let _lock = locked.map_err(|error| {
        let hint = "hint: `HF_HOME` names another place for it";
        anyhow!("cannot write to the Hub's cache: {error}\n{hint}")
    })?;

    let is_whole = fs_err::metadata(&blob).is_ok_and(|meta| meta.len() == info.size_bytes);
    if !is_whole {
        let part = blob.with_extension("part");
        let download = Download { file, commit, info: &info, part, client, progress };
        let done = download.run();
        progress.finish();
        done?;
        fs_err::rename(&download.part, &blob)?;
    }
    cache.link(&blob, commit, file)
}

/// Takes the lock, which ends with the returned file; waits for a process that has it.
fn lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            tracing::info!("waiting for another process to fetch `{}`", path.display());
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    Ok(file)
}

/// Repeats `attempt` after transient failures, until some in a row have added nothing to
/// `arrived_bytes`.
fn insist<T>(
    file: &str,
    mut attempt: impl FnMut() -> Result<T, RequestError>,
    arrived_bytes: impl Fn() -> io::Result<u64>,
) -> Result<T> {
    let (mut failures, mut most_bytes) = (0, arrived_bytes()?);
    loop {
        let error = match attempt() {
            Ok(value) => return Ok(value),
            Err(RequestError::Final(error)) => return Err(error),
            Err(RequestError::Transient(error)) => error,
        };
        let bytes = arrived_bytes()?;
        failures = if bytes > most_bytes { 1 } else { failures + 1 };
        most_bytes = most_bytes.max(bytes);
        if failures == MAX_FAILURES {
            return Err(anyhow!(
                "cannot fetch `{file}`: {error}\n\
                 hint: what has arrived is kept, and the next run continues from there"
            ));
        }
        tracing::warn!("fetching `{file}` again: {error}");
        thread::sleep(FIRST_PAUSE * 3_u32.pow(failures - 1));
    }
}

/// A content on its way into `part`.
struct Download<'a> {
    file: &'a str,
    commit: &'a str,
    info: &'a FileInfo,
    part: PathBuf,
    client: &'a Client<'a>,
    progress: &'a dyn DownloadProgress,
}

impl Download<'_> {
    /// Leaves the whole content in `part`.
    fn run(&self) -> Result<()> {
        self.progress.start(self.file, self.info.size_bytes);
        self.progress.advance(self.part_bytes()?.min(self.info.size_bytes));
        insist(self.file, || self.attempt(), || self.part_bytes())
    }

    fn part_bytes(&self) -> io::Result<u64> {
        match fs_err::metadata(&self.part) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) => ignore_not_found(error).map(|()| 0),
        }
    }

    fn attempt(&self) -> Result<(), RequestError> {
        let size_bytes = self.info.size_bytes;
        let mut start_bytes = self.part_bytes()?;
        if start_bytes > size_bytes {
            self.start_over()?;
            start_bytes = 0;
        }
        if start_bytes < size_bytes || size_bytes == 0 {
            self.receive(start_bytes)?;
        }
        if self.has_right_hash()? {
            return Ok(());
        }
        self.start_over()?;
        let (file, etag) = (self.file, &self.info.etag);
        let error = anyhow!("the content of `{file}` does not have the SHA-256 `{etag}`");
        // what was wrong may be the part that an earlier run left
        Err(if start_bytes > 0 {
            RequestError::Transient(error)
        } else {
            RequestError::Final(error)
        })
    }

    /// Appends what follows `start_bytes`, until the part is whole.
    fn receive(&self, start_bytes: u64) -> Result<(), RequestError> {
        let size_bytes = self.info.size_bytes;
        let mut file = OpenOptions::new().create(true).append(true).open(&self.part)?;
        let mut response = self.client.content(self.file, self.commit, start_bytes)?;
        let mut arrived_bytes = start_bytes;
        if response.status() != StatusCode::PARTIAL_CONTENT && start_bytes > 0 {
            file.set_len(0)?;
            arrived_bytes = 0;
            self.progress.start(self.file, size_bytes);
        }
        self.check_range(&response, arrived_bytes)?;
        let mut body = response.body_mut().as_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = self.read(&mut body, &mut chunk, arrived_bytes)?;
            if count == 0 {
                break;
            }
            arrived_bytes += count as u64;
            file.write_all(&chunk[..count])?;
            self.progress.advance(count as u64);
        }
        if arrived_bytes < size_bytes {
            return Err(self.lost(arrived_bytes, "the connection was closed"));
        }
        file.sync_all()?;
        Ok(())
    }

    /// Reads into `chunk`; an error if the content goes on past its size.
    fn read(
        &self,
        body: &mut BodyReader,
        chunk: &mut [u8],
        arrived_bytes: u64,
    ) -> Result<usize, RequestError> {
        let count = body.read(chunk).map_err(|error| self.lost(arrived_bytes, error))?;
        if arrived_bytes + count as u64 > self.info.size_bytes {
            self.start_over()?;
            let (file, size_bytes) = (self.file, self.info.size_bytes);
            let error = anyhow!("`{file}` is longer than the {size_bytes} bytes announced");
            return Err(RequestError::Final(error));
        }
        Ok(count)
    }

    /// A partial answer must continue where the part ends, and be of a content of the same size.
    fn check_range(&self, response: &Response<Body>, start_bytes: u64) -> Result<(), RequestError> {
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(());
        }
        let range = text_of(response.headers(), "content-range").unwrap_or_default();
        let size_bytes = self.info.size_bytes;
        let is_right = range.starts_with(&format!("bytes {start_bytes}-"))
            && (range.ends_with(&format!("/{size_bytes}")) || range.ends_with("/*"));
        if is_right {
            return Ok(());
        }
        let file = self.file;
        Err(RequestError::Final(anyhow!(
            "the server sent the range `{range}` of `{file}` where `bytes {start_bytes}-` of \
             {size_bytes} was asked for"
        )))
    }

    fn lost(&self, arrived_bytes: u64, error: impl std::fmt::Display) -> RequestError {
        let size_bytes = self.info.size_bytes;
        RequestError::Transient(anyhow!("{arrived_bytes} of {size_bytes} bytes came: {error}"))
    }

    fn start_over(&self) -> Result<()> {
        fs_err::remove_file(&self.part).or_else(ignore_not_found)?;
        self.progress.start(self.file, self.info.size_bytes);
        Ok(())
    }

    /// Whether the part has the SHA-256 that its etag is; other etags tell nothing.
    fn has_right_hash(&self) -> Result<bool> {
        let etag = &self.info.etag;
        if etag.len() != 64 || !etag.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(true);
        }
        let mut hasher = Sha256::new();
        io::copy(&mut File::open(&self.part)?, &mut hasher)?;
        let hash: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(hash.eq_ignore_ascii_case(etag))
    }
}
