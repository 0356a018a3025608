//! Fetches one file from the Hub into its cache. Failed attempts are repeated, and the size is
//! checked before the file gets its name, so that a file with that name is complete.
//!
//! ```text
//! locate    GET {endpoint}/{repo}/resolve/{commit}/{file}
//!           answers `ETag` and commit; for a large file, `X-Linked-*` and, in `Location`, the
//!           address of the content
//! content   GET {content}   Range: bytes={length of the partial file}-
//! ```
//!
//! The content is written to `blobs/<etag>.incomplete` under the lock `.locks/<repo>/<etag>.lock`,
//! as in huggingface_hub, so that either program resumes what the other began. Each attempt resumes
//! where the last one stopped.

use std::fs::TryLockError;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use ureq::http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, TRANSFER_ENCODING,
};
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};
use url::Url;

use super::client::{Client, Fault, MAX_REDIRECTS};
use super::http::{redirect, with_least_speed};
use super::settings::DownloadProgress;
use crate::durable::folder::Writing;

/// Number of failed attempts in a row after which a file is given up. An attempt that brings at
/// least [`window_bytes`](super::settings::HubLimits::window_bytes) new bytes starts the count
/// again at 1.
const MAX_FAILURES: u32 = 4;
/// Pause after the first failure. It triples with each further failure in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Pause between two attempts to take a lock that another process holds.
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// Counts the bytes of one file that arrive in one attempt, and reports them to the caller.
struct Meter<'a> {
    progress: &'a dyn DownloadProgress,
    arrived_bytes: AtomicU64,
}

impl Meter<'_> {
    fn start(&self, file: &str, size_bytes: Option<u64>) {
        self.arrived_bytes.store(0, Ordering::Relaxed);
        self.progress.start(file, size_bytes.unwrap_or(0));
    }

    fn advance(&self, bytes: u64) {
        self.arrived_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.progress.advance(bytes);
    }

    fn arrived(&self) -> u64 {
        self.arrived_bytes.load(Ordering::Relaxed)
    }
}

/// The address of a file's content and the content's name in the cache.
struct Located {
    etag: String,
    /// The size that the Hub gives for a large file.
    size_bytes: Option<u64>,
    url: Url,
    /// The answer, if it contains the content itself.
    response: Option<Response<Body>>,
}

/// The paths in the cache that belong to one content.
struct Blob {
    whole: PathBuf,
    part: PathBuf,
    lock: PathBuf,
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
        let meter = Meter { progress, arrived_bytes: AtomicU64::new(0) };
        let (mut failures, mut most_bytes) = (0, 0);
        let fetched = loop {
            meter.arrived_bytes.store(0, Ordering::Relaxed);
            let error = match self.attempt(file, commit, &path, &meter) {
                Ok(()) => break Ok(path),
                Err(Fault::Final(error)) => break Err(error),
                Err(Fault::Transient(error)) => error,
            };
            let new_bytes = meter.arrived().saturating_sub(most_bytes);
            failures = if new_bytes >= self.http.limits.window_bytes { 1 } else { failures + 1 };
            most_bytes += new_bytes;
            if failures == MAX_FAILURES {
                break Err(anyhow!(
                    "cannot fetch `{file}`: {error}\n\
                     hint: run it again; what is there of the file is continued"
                ));
            }
            tracing::warn!("fetching `{file}` again: {error}");
            thread::sleep(FIRST_PAUSE * 3_u32.pow(failures - 1));
        };
        progress.finish();
        fetched
    }

    /// Makes `pointer` a link to the complete content of `file`, which is fetched if necessary.
    fn attempt(
        &self,
        file: &str,
        commit: &str,
        pointer: &Path,
        meter: &Meter,
    ) -> Result<(), Fault> {
        let agent = self.http.content_agent();
        let located = self.locate(&agent, file, commit)?;
        let blob = self.blob(&located.etag, commit);
        let in_cache = |error: anyhow::Error| self.cache_fault(&error);
        for path in [&blob.whole, &blob.lock] {
            make_parent(path).map_err(in_cache)?;
        }
        let lock = fs_err::File::create(&blob.lock).map_err(|error| in_cache(error.into()))?;
        self.wait_for_lock(&lock, &blob)?;
        // the content may be there by now, from another process or another revision
        if !blob.whole.is_file() {
            self.download(&agent, file, located, &blob, meter)?;
        }
        link(pointer, &blob.whole).map_err(in_cache)
    }

    fn blob(&self, etag: &str, commit: &str) -> Blob {
        let repo = self.source.repo_at(commit);
        let folder = repo.folder_name();
        let locks = self.cache.path().join(".locks").join(&folder);
        let whole = self.cache.path().join(folder).join("blobs").join(etag);
        let part = whole.with_file_name(format!("{etag}.incomplete"));
        Blob { whole, part, lock: locks.join(format!("{etag}.lock")) }
    }

    /// Asks the Hub for a file, and follows its redirects up to the host that has the content.
    fn locate(&self, agent: &Agent, file: &str, commit: &str) -> Result<Located, Fault> {
        let path = self.source.path().chain(["resolve", commit]).chain(file.split('/'));
        let mut url = self.http.url(path);
        let (mut etag, mut size_bytes) = (None, None);
        for _ in 0..=MAX_REDIRECTS {
            let response = self
                .http
                .get(agent, &url, None)
                .map_err(|error| self.request_fault(&url, error))?;
            let target = redirect(&response, &url).map_err(Fault::Final)?;
            if target.is_none() && !response.status().is_success() {
                return Err(self.answer_fault(&url, &response));
            }
            self.check_commit(response.headers(), commit)?;
            if let Some(name) = text_of(response.headers(), "x-linked-etag") {
                etag = Some(self.check_etag(name)?);
                size_bytes = text_of(response.headers(), "x-linked-size").and_then(number);
            }
            match target {
                Some(target) if self.http.is_hub(&target) => url = target,
                Some(target) => {
                    let etag =
                        etag.ok_or_else(|| self.not_the_hub("it names no `X-Linked-Etag`"))?;
                    return Ok(Located { etag, size_bytes, url: target, response: None });
                }
                None => {
                    let name = text_of(response.headers(), ETAG.as_str());
                    let etag = match (etag, name) {
                        (Some(etag), _) => etag,
                        (None, Some(name)) => self.check_etag(name)?,
                        (None, None) => return Err(self.not_the_hub("it names no `ETag`")),
                    };
                    return Ok(Located { etag, size_bytes, url, response: Some(response) });
                }
            }
        }
        Err(self.not_the_hub("it redirects without end"))
    }

    /// Checks that an answer belongs to the requested commit, if it names its commit.
    fn check_commit(&self, headers: &HeaderMap, commit: &str) -> Result<(), Fault> {
        match text_of(headers, "x-repo-commit") {
            Some(found) if !found.eq_ignore_ascii_case(commit) => Err(self.not_the_hub(&format!(
                "its `X-Repo-Commit` is {found:?} where `{commit}` was asked for"
            ))),
            _ => Ok(()),
        }
    }

    /// The name of a content by its `ETag`. It is checked because it becomes the name of a file.
    fn check_etag(&self, header: &str) -> Result<String, Fault> {
        let name = header.strip_prefix("W/").unwrap_or(header).trim_matches('"');
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        // 200 leaves space for the suffixes of files in the cache
        if name.is_empty()
            || name.starts_with('.')
            || name.len() > 200
            || !name.chars().all(is_plain)
        {
            return Err(self.not_the_hub(&format!("its `ETag` {header:?} is not a content's name")));
        }
        Ok(name.to_owned())
    }

    /// Waits until no other process fetches the content.
    ///
    /// # Errors
    /// If another process holds the lock while the partial file does not grow.
    fn wait_for_lock(&self, lock: &fs_err::File, blob: &Blob) -> Result<(), Fault> {
        let (mut seen_bytes, mut since) = (len_or_zero(&blob.part), Instant::now());
        loop {
            match lock.file().try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(error)) => return Err(self.cache_fault(&error.into())),
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
            }
            let now_bytes = len_or_zero(&blob.part);
            if now_bytes != seen_bytes {
                (seen_bytes, since) = (now_bytes, Instant::now());
            }
            if since.elapsed() > self.http.limits.window {
                return Err(Fault::Transient(anyhow!(
                    "another process holds the lock `{}`, and nothing has arrived for {:?}",
                    blob.lock.display(),
                    self.http.limits.window
                )));
            }
        }
    }

    /// Fetches the rest of the content, and gives the file its name once it is complete.
    fn download(
        &self,
        agent: &Agent,
        file: &str,
        located: Located,
        blob: &Blob,
        meter: &Meter,
    ) -> Result<(), Fault> {
        let in_cache = |error: std::io::Error| self.cache_fault(&error.into());
        let part_bytes = len_or_zero(&blob.part);
        let fits = located.size_bytes.is_none_or(|size| part_bytes < size);
        if !fits {
            // the partial file is complete or too long, as a killed process may leave it
            fs_err::remove_file(&blob.part).map_err(in_cache)?;
        }
        let from = if fits { part_bytes } else { 0 };
        let at_hand = located.response.filter(|_| from == 0);
        let response = match at_hand {
            Some(response) => response,
            None => self.content(agent, located.url, from)?,
        };
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            fs_err::remove_file(&blob.part).map_err(in_cache)?;
            return Err(Fault::Transient(anyhow!("the part that was there does not fit")));
        }
        if let Some(encoding) = text_of(response.headers(), CONTENT_ENCODING.as_str())
            && encoding != "identity"
        {
            return Err(Fault::Transient(anyhow!("the content came encoded as {encoding:?}")));
        }
        let (from, told_bytes) = extent(&response, from)?;
        // the Hub knows best: a proxy or a login page answers with another length
        let size_bytes = located.size_bytes.or(told_bytes);
        if let (Some(size), Some(told)) = (size_bytes, told_bytes)
            && size != told
        {
            return Err(Fault::Transient(anyhow!(
                "an answer of {told} bytes came where the Hub announces {size}"
            )));
        }
        let is_chunked = text_of(response.headers(), TRANSFER_ENCODING.as_str()).is_some();
        if size_bytes.is_none() && !is_chunked {
            return Err(self.not_the_hub("it does not say how long the content is"));
        }
        meter.start(file, size_bytes);
        let mut part = fs_err::OpenOptions::new();
        let mut part =
            part.create(true).write(true).truncate(false).open(&blob.part).map_err(in_cache)?;
        part.set_len(from).map_err(in_cache)?;
        std::io::Seek::seek(&mut part, std::io::SeekFrom::End(0)).map_err(in_cache)?;
        meter.advance(from);
        let reader = response.into_body().into_reader();
        self.receive(agent, reader, &mut part, size_bytes, meter)?;
        part.sync_all().map_err(in_cache)?;
        let found_bytes = len_or_zero(&blob.part);
        if let Some(size_bytes) = size_bytes.filter(|size| *size != found_bytes) {
            if found_bytes > size_bytes {
                fs_err::remove_file(&blob.part).map_err(in_cache)?;
            }
            return Err(Fault::Transient(anyhow!(
                "{found_bytes} bytes came where {size_bytes} were announced"
            )));
        }
        fs_err::rename(&blob.part, &blob.whole).map_err(in_cache)
    }

    /// The answer that has the content from byte `from` on.
    fn content(&self, agent: &Agent, mut url: Url, from: u64) -> Result<Response<Body>, Fault> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self
                .http
                .get(agent, &url, Some(from))
                .map_err(|error| self.request_fault(&url, error))?;
            match redirect(&response, &url).map_err(Fault::Final)? {
                Some(target) => url = target,
                None if response.status().is_success()
                    || response.status() == StatusCode::RANGE_NOT_SATISFIABLE =>
                {
                    return Ok(response);
                }
                None => return Err(self.answer_fault(&url, &response)),
            }
        }
        Err(self.not_the_hub("it redirects without end"))
    }

    /// Appends everything that `reader` yields to `part`.
    fn receive(
        &self,
        agent: &Agent,
        mut reader: impl Read,
        part: &mut impl Write,
        size_bytes: Option<u64>,
        meter: &Meter,
    ) -> Result<(), Fault> {
        let mut buffer = vec![0; 1 << 16];
        let copy = || loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Fault::Transient(error.into())),
            };
            let written = part.write_all(&buffer[..count]);
            written.map_err(|error| self.cache_fault(&error.into()))?;
            meter.advance(count as u64);
        };
        let limits = &self.http.limits;
        let (copied, too_slow) = with_least_speed(agent, limits, &meter.arrived_bytes, copy);
        let Err(Fault::Transient(error)) = copied else { return copied };
        let size = size_bytes.map_or("an unknown number of".to_owned(), |size| size.to_string());
        let error = match (too_slow, error.downcast_ref::<std::io::Error>().and_then(timeout_of)) {
            (true, _) => format!("fewer than {} in {:?}", limits.window_bytes, limits.window),
            (_, Some(ureq::Timeout::PerRead)) => format!("none for {:?}", limits.silence),
            _ => error.to_string(),
        };
        Err(Fault::Transient(anyhow!("{} of {size} bytes came: {error}", meter.arrived())))
    }

    /// The error for a failed access to the cache.
    fn cache_fault(&self, error: &anyhow::Error) -> Fault {
        Fault::Final(anyhow!(
            "cannot write to the Hub's cache `{}`: {error:#}\n\
             hint: `HF_HOME` names another place for it",
            self.cache.path().display()
        ))
    }
}

/// The offset of an answer's first byte in the file, and the size of the whole file.
fn extent(response: &Response<Body>, from: u64) -> Result<(u64, Option<u64>), Fault> {
    let headers = response.headers();
    if response.status() != StatusCode::PARTIAL_CONTENT {
        // a server that does not support `Range` sends the whole content
        return Ok((0, text_of(headers, CONTENT_LENGTH.as_str()).and_then(number)));
    }
    let range = text_of(headers, CONTENT_RANGE.as_str()).unwrap_or_default();
    let parts = range.strip_prefix("bytes ").and_then(|range| range.split_once('/'));
    let first = parts.and_then(|(span, _)| number(span.split_once('-')?.0));
    match (first, parts) {
        (Some(first), Some((_, size))) if first == from => Ok((from, number(size))),
        _ => Err(Fault::Transient(anyhow!(
            "the bytes from {from} on were asked for, but the answer has {range:?}"
        ))),
    }
}

/// The time limit that caused a read error, if one did.
fn timeout_of(error: &std::io::Error) -> Option<ureq::Timeout> {
    match error.get_ref()?.downcast_ref::<ureq::Error>()? {
        ureq::Error::Timeout(timeout) => Some(*timeout),
        _ => None,
    }
}

/// Makes `pointer` a relative link to `blob` in one step, replacing what was there.
fn link(pointer: &Path, blob: &Path) -> Result<()> {
    make_parent(pointer)?;
    let folder = pointer.parent().context("a file lies in a folder")?;
    let repo = blob.parent().and_then(Path::parent).context("a blob lies in `blobs`")?;
    let depth = folder.strip_prefix(repo)?.components().count();
    let target = Path::new(&"../".repeat(depth)).join(blob.strip_prefix(repo)?);
    let temporary = Writing::new_in(folder)?;
    let made = temporary.path().join("link");
    fs_err::os::unix::fs::symlink(target, &made)?;
    Ok(fs_err::rename(made, pointer)?)
}

fn make_parent(path: &Path) -> Result<()> {
    Ok(path.parent().map_or(Ok(()), fs_err::create_dir_all)?)
}

fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn len_or_zero(path: &Path) -> u64 {
    fs_err::metadata(path).map_or(0, |metadata| metadata.len())
}
