//! Uploads files to a repository of the Hub as one commit, as huggingface_hub 1.x does
//! (`hf_api.py`, `_commit_api.py`).
//!
//! ```text
//! POST {endpoint}/api/repos/create                       409: it exists already
//! POST {endpoint}/api/models/{repo}/preupload/main       which files are large, what is there
//! large files                                            (`lfs`)
//! POST {endpoint}/api/models/{repo}/commit/main          NDJSON: a header, then a line a file
//! ```
//!
//! A file is known by its content: a small one by git's SHA-1 of the blob, and a large one by its
//! SHA-256. What the repository has already is not sent again, so that a push that failed is
//! continued by the same call.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use ureq::http::Response;
use ureq::{Body, SendBody};
use url::Url;

use super::client::Fault;
use super::http::{Http, Method, shown_origin};
use super::names::is_repo;
use super::settings::{DownloadProgress, HubSettings};

/// The branch that is written.
const BRANCH: &str = "main";
/// Number of files in one request, as in huggingface_hub.
const FILES_IN_REQUEST: usize = 256;
/// Number of bytes of a file by which the Hub decides how it is sent.
const SAMPLE_BYTES: u64 = 512;
/// Number of attempts for one request.
const MAX_ATTEMPTS: u32 = 4;
/// Pause after the first failure. It triples with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const JSON: &str = "application/json";

/// A file to upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushFile {
    /// Its path in the repository.
    pub path: String,
    /// Where it is.
    pub file: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What a push did.
#[derive(Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Whether the repository is new.
    pub is_new: bool,
    /// The files that were sent.
    pub sent: Vec<String>,
    /// The files that the repository had already.
    pub unchanged: Vec<String>,
    /// The address of the commit; `None` if nothing had changed.
    pub commit: Option<String>,
}

/// Uploads `files` to the repository `repo` as one commit with the message `summary`.
///
/// - `is_private`: whether a new repository is private
///
/// # Errors
/// No token, a token that may not write, and any answer of the Hub but the expected one. No message
/// shows the token.
pub fn push(
    repo: &str,
    files: &[PushFile],
    is_private: bool,
    summary: &str,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
) -> Result<Pushed> {
    check_name(repo)?;
    if settings.offline {
        bail!("nothing can be uploaded offline\nhint: unset `HF_HUB_OFFLINE`");
    }
    let uploader = Uploader { http: Http::new(settings)?, repo, progress };
    if !uploader.http.has_token {
        bail!("an upload needs a token\nhint: set `HF_TOKEN` to one that may write to `{repo}`");
    }
    let is_new = uploader.create(is_private)?;
    let (mut changed, mut unchanged) = (vec![], vec![]);
    for file in uploader.modes(files)? {
        match file.oid == file.remote_oid.as_deref().unwrap_or_default() {
            true => unchanged.push(file.file.path.clone()),
            false => changed.push(file),
        }
    }
    let large: Vec<&Upload> = changed.iter().filter(|file| file.is_large).collect();
    uploader.send_large(&large)?;
    let commit = match changed.is_empty() {
        true => None,
        false => Some(uploader.commit(&changed, summary)?),
    };
    let sent = changed.into_iter().map(|file| file.file.path.clone()).collect();
    Ok(Pushed { is_new, sent, unchanged, commit })
}

/// Checks the name of a repository to write to.
///
/// # Errors
/// A name that no repository can have.
pub(crate) fn check_name(repo: &str) -> Result<()> {
    if !is_repo(repo) {
        bail!("`{repo}` is not the name of a repository\nhint: it is like `OWNER/NAME`");
    }
    Ok(())
}

/// A file with what the Hub says of it.
pub(super) struct Upload<'a> {
    pub file: &'a PushFile,
    /// Whether it is stored by Git LFS.
    pub is_large: bool,
    /// The name of its content.
    pub oid: String,
    /// The name of the content that the repository has at its path.
    remote_oid: Option<String>,
}

/// Sends the requests of one push.
pub(super) struct Uploader<'a> {
    pub http: Http,
    pub repo: &'a str,
    pub progress: &'a dyn DownloadProgress,
}

/// The answer to a preupload.
#[derive(Deserialize)]
struct Preupload {
    files: Vec<Mode>,
}

/// How one file is sent.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mode {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
    oid: Option<String>,
}

impl Uploader<'_> {
    /// Creates the repository. Returns whether it is new.
    fn create(&self, is_private: bool) -> Result<bool> {
        let (owner, name) = self.repo.split_once('/').expect("the name was checked");
        let visibility = if is_private { "private" } else { "public" };
        let body = json!({ "name": name, "organization": owner, "visibility": visibility });
        let url = self.http.url(["api", "repos", "create"]);
        let make = || {
            let (status, answer) = self.post(&url, JSON, body.to_string().as_bytes())?;
            match status {
                200..=299 => Ok(true),
                409 if answer.contains("another conflicting operation is in progress") => {
                    Err(Fault::Transient(anyhow!("the Hub is busy with another request")))
                }
                409 => Ok(false),
                // a token may be good for one repository that exists, and not for new ones
                403 if self.exists()? => Ok(false),
                _ => Err(self.refusal(&url, status, &answer)),
            }
        };
        repeated(&format!("cannot create `{}`", self.repo), make)
    }

    fn exists(&self) -> Result<bool, Fault> {
        let url = self.http.url(["api", "models"].into_iter().chain(self.repo.split('/')));
        let answer = self.http.get(&self.http.agent(), &url, None);
        Ok(answer.map_err(|error| self.lost(&url, &error))?.status().is_success())
    }

    /// Asks how each file is sent, and names the contents.
    fn modes<'f>(&self, files: &'f [PushFile]) -> Result<Vec<Upload<'f>>> {
        let path = ["api", "models"].into_iter().chain(self.repo.split('/'));
        let url = self.http.url(path.chain(["preupload", BRANCH]));
        let mut uploads = vec![];
        for files in files.chunks(FILES_IN_REQUEST) {
            let listed = files.iter().map(|file| {
                let mut sample = vec![];
                fs_err::File::open(&file.file)?.take(SAMPLE_BYTES).read_to_end(&mut sample)?;
                let sample = BASE64_STANDARD.encode(sample);
                Ok(json!({ "path": file.path, "sample": sample, "size": file.bytes }))
            });
            let body = json!({ "files": listed.collect::<Result<Vec<Value>>>()? }).to_string();
            let found: Preupload = self.ask(&url, JSON, &body)?;
            let found: BTreeMap<String, Mode> =
                found.files.into_iter().map(|mode| (mode.path.clone(), mode)).collect();
            for file in files {
                let mode = found.get(&file.path);
                let mode = mode.with_context(|| self.odd(&url, "it does not name each file"))?;
                if mode.should_ignore {
                    bail!("`.gitignore` of `{}` excludes `{}`", self.repo, file.path);
                }
                let is_large = match mode.upload_mode.as_str() {
                    // there is no large file without content
                    "lfs" => file.bytes > 0,
                    "regular" => false,
                    other => bail!(self.odd(&url, &format!("`uploadMode` is `{other}`"))),
                };
                let oid = if is_large { sha256(file)? } else { blob_sha1(file)? };
                uploads.push(Upload { file, is_large, oid, remote_oid: mode.oid.clone() });
            }
        }
        Ok(uploads)
    }

    /// Commits the changed files. Returns the commit's address.
    fn commit(&self, files: &[Upload<'_>], summary: &str) -> Result<String> {
        let mut body = line(&json!({ "summary": summary, "description": "" }), "header");
        for Upload { file, is_large, oid, .. } in files {
            body += &match is_large {
                true => line(
                    &json!({ "path": file.path, "algo": "sha256", "oid": oid, "size": file.bytes }),
                    "lfsFile",
                ),
                false => {
                    let content = BASE64_STANDARD.encode(fs_err::read(&file.file)?);
                    let value =
                        json!({ "content": content, "path": file.path, "encoding": "base64" });
                    line(&value, "file")
                }
            };
        }
        let path = ["api", "models"].into_iter().chain(self.repo.split('/'));
        let url = self.http.url(path.chain(["commit", BRANCH]));
        let answer: Value = self.ask(&url, "application/x-ndjson", &body)?;
        let commit = answer["commitUrl"].as_str().map(|address| self.http.quoted(address));
        commit.with_context(|| self.odd(&url, "it names no `commitUrl`"))
    }

    /// Posts `body` to the Hub and parses its answer. Failures that may pass are repeated.
    pub fn ask<T: serde::de::DeserializeOwned>(
        &self,
        url: &Url,
        content_type: &str,
        body: &str,
    ) -> Result<T> {
        let request = || match self.post(url, content_type, body.as_bytes())? {
            (200..=299, answer) => Ok(answer),
            (status, answer) => Err(self.refusal(url, status, &answer)),
        };
        let answer = repeated(&format!("cannot upload to `{}`", self.repo), request)?;
        serde_json::from_str(&answer).map_err(|error| self.odd(url, &error.to_string()))
    }

    /// Posts `body`, and returns the status and the text of the answer.
    fn post(&self, url: &Url, content_type: &str, body: &[u8]) -> Result<(u16, String), Fault> {
        let headers = [("content-type", content_type), ("accept", content_type)];
        let headers = if content_type.contains("ndjson") { &headers[..1] } else { &headers[..] };
        let agent = self.http.content_agent();
        let mut bytes = body;
        let body = (SendBody::from_reader(&mut bytes), body.len() as u64);
        let answer = self.http.send(&agent, Method::Post, url, headers, body);
        self.answer(url, answer)
    }

    /// The status and the text of an answer that is no redirect.
    pub fn answer(
        &self,
        url: &Url,
        answer: Result<Response<Body>, ureq::Error>,
    ) -> Result<(u16, String), Fault> {
        let mut answer = answer.map_err(|error| self.lost(url, &error))?;
        let status = answer.status();
        if status.is_redirection() {
            return Err(Fault::Final(anyhow!(
                "`{}` redirects the upload, which is not followed\nhint: has `{}` been renamed?",
                shown_origin(url),
                self.repo
            )));
        }
        let said = answer.headers().get("x-error-message").and_then(|text| text.to_str().ok());
        let said = said.map(str::to_owned);
        let text = answer.body_mut().read_to_string().map_err(|error| self.lost(url, &error))?;
        Ok((status.as_u16(), said.filter(|_| !status.is_success()).unwrap_or(text)))
    }

    /// The error for a request whose answer did not arrive.
    fn lost(&self, url: &Url, error: &ureq::Error) -> Fault {
        let said = self.http.quoted(&error.to_string());
        Fault::Transient(anyhow!("`{}` does not answer: {said}", shown_origin(url)))
    }

    /// The error for an answer that is no success.
    pub fn refusal(&self, url: &Url, status: u16, answer: &str) -> Fault {
        let (host, repo) = (shown_origin(url), self.repo);
        // the Hub's own errors are short; pages of others are not
        let parsed: Option<Value> = serde_json::from_str(answer).ok();
        let said = parsed.and_then(|json| Some(json["error"].as_str()?.to_owned()));
        let said: String = said.unwrap_or_else(|| answer.to_owned()).chars().take(300).collect();
        let said = self.http.quoted(said.trim().trim_end_matches('.'));
        let said = if said.is_empty() { said } else { format!(": {said}") };
        let error = match status {
            408 | 429 | 500.. => {
                return Fault::Transient(anyhow!("`{host}` answers {status}{said}"));
            }
            401 => anyhow!(
                "`{host}` does not accept the token{said}\nhint: is the token in `HF_TOKEN` still \
                 valid?"
            ),
            403 => anyhow!(
                "`{host}` does not let the token write to `{repo}`{said}\nhint: `HF_TOKEN` must be \
                 a token with the permission to write there"
            ),
            _ => anyhow!("`{host}` answers {status} to the upload to `{repo}`{said}"),
        };
        Fault::Final(error)
    }

    /// The error for an answer that the real Hub would not give.
    pub fn odd(&self, url: &Url, fault: &str) -> anyhow::Error {
        let fault = self.http.quoted(fault);
        anyhow!("`{}` does not answer as the Hub does: {fault}", shown_origin(url))
    }
}

/// Repeats a request whose failure may pass.
pub(super) fn repeated<T>(what: &str, request: impl Fn() -> Result<T, Fault>) -> Result<T> {
    for attempt in 1.. {
        match request() {
            Ok(found) => return Ok(found),
            Err(Fault::Final(error)) => return Err(error.context(what.to_owned())),
            Err(Fault::Transient(error)) if attempt == MAX_ATTEMPTS => {
                let hint = "run it again; what has arrived is not sent again";
                return Err(anyhow!("{what}: {error}\nhint: {hint}"));
            }
            Err(Fault::Transient(error)) => tracing::warn!("{what}, trying again: {error}"),
        }
        thread::sleep(FIRST_PAUSE * 3_u32.pow(attempt - 1));
    }
    unreachable!("the last attempt returns")
}

/// A line of a commit.
fn line(value: &Value, key: &str) -> String {
    format!("{}\n", json!({ "key": key, "value": value }))
}

/// The name of a large file's content.
fn sha256(file: &PushFile) -> Result<String> {
    digest::<Sha256>(&file.file, Sha256::new(), file.bytes)
}

/// The name of a small file's content, which git gives it.
fn blob_sha1(file: &PushFile) -> Result<String> {
    digest::<Sha1>(&file.file, Sha1::new_with_prefix(format!("blob {}\0", file.bytes)), file.bytes)
}

fn digest<D: Digest>(path: &Path, mut hasher: D, expected_bytes: u64) -> Result<String> {
    let (mut file, mut buffer) = (fs_err::File::open(path)?, vec![0; 1 << 20]);
    let mut bytes = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        bytes += count as u64;
        hasher.update(&buffer[..count]);
    }
    if bytes != expected_bytes {
        bail!("`{}` has changed: {bytes} bytes instead of {expected_bytes}", path.display());
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
