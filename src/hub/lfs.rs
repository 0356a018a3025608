//! Uploads large files by Git LFS, as huggingface_hub 1.x does (`lfs.py`).
//!
//! ```text
//! POST {endpoint}/{repo}.git/info/lfs/objects/batch      the SHA-256 and size of each content
//! PUT  {upload}                                          a content, whole
//! PUT  {part 1}, {part 2} ..                             or in parts of `chunk_size` bytes
//! POST {upload}                                          and then the parts' `ETag`s
//! POST {verify}                                          whether it has arrived
//! ```
//!
//! A content that the Hub has already has no `actions`. The addresses may be of other hosts, which
//! are sent no token.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::SendBody;
use url::Url;

use super::client::Fault;
use super::http::Method;
use super::push::{Upload, Uploader, repeated};
use super::settings::DownloadProgress;

/// Number of contents in one request, as in huggingface_hub.
const OBJECTS_IN_REQUEST: usize = 256;
const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// The answer to a batch.
#[derive(Deserialize)]
struct Batch {
    objects: Vec<Object>,
}

/// What is to be done for one content.
#[derive(Deserialize)]
struct Object {
    oid: String,
    actions: Option<Actions>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

/// A request to make.
#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: BTreeMap<String, Value>,
}

impl Uploader<'_> {
    /// Uploads the contents of large files that the Hub lacks.
    pub(crate) fn send_large(&self, files: &[&Upload<'_>]) -> Result<()> {
        let (owner, name) = self.repo.split_once('/').expect("the name was checked");
        let git = format!("{name}.git");
        let url = self.http.url([owner, &git, "info", "lfs", "objects", "batch"]);
        for files in files.chunks(OBJECTS_IN_REQUEST) {
            let objects = files.iter().map(|f| json!({ "oid": f.oid, "size": f.file.bytes }));
            let body = json!({
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "objects": objects.collect::<Vec<_>>(),
                "hash_algo": "sha256",
                "ref": { "name": "main" },
            });
            let batch: Batch = self.ask(&url, LFS_JSON, &body.to_string())?;
            for file in files {
                let object = batch.objects.iter().find(|object| object.oid == file.oid);
                let object =
                    object.with_context(|| self.odd(&url, "it does not name each file"))?;
                if let Some(error) = &object.error {
                    let said = self.http.quoted(error["message"].as_str().unwrap_or("no reason"));
                    bail!("the Hub does not take `{}`: {said}", file.file.path);
                }
                if let Some(actions) = &object.actions {
                    self.progress.start(&file.file.path, file.file.bytes);
                    let done = self.send_one(file, actions);
                    self.progress.finish();
                    done.with_context(|| format!("cannot upload `{}`", file.file.path))?;
                }
            }
        }
        Ok(())
    }

    fn send_one(&self, file: &Upload<'_>, actions: &Actions) -> Result<()> {
        if let Some(upload) = &actions.upload {
            let url = self.address(&upload.href)?;
            match upload.header.get("chunk_size") {
                None => {
                    self.put(file, &url, 0, file.file.bytes)?;
                }
                Some(size) => self.send_parts(file, upload, &url, size)?,
            }
        }
        if let Some(verify) = &actions.verify {
            let body = json!({ "oid": file.oid, "size": file.file.bytes });
            self.confirm(&self.address(&verify.href)?, &body)?;
        }
        Ok(())
    }

    /// An address that the Hub sends contents to.
    ///
    /// # Errors
    /// One without encryption, if the Hub itself is encrypted.
    fn address(&self, text: &str) -> Result<Url> {
        let hub = self.http.url([]);
        match Url::parse(text) {
            Ok(url) if url.scheme() == "https" || url.scheme() == hub.scheme() => Ok(url),
            Ok(url) => bail!(self.odd(&hub, &format!("it sends contents to {}:", url.scheme()))),
            Err(_) => bail!(self.odd(&hub, "it sends contents to an address that is none")),
        }
    }

    /// Uploads a content in parts, and then says which there were.
    fn send_parts(
        &self,
        file: &Upload<'_>,
        upload: &Action,
        complete: &Url,
        size: &Value,
    ) -> Result<()> {
        let number = |value: &Value| match value {
            Value::String(text) => text.parse().ok(),
            value => value.as_u64(),
        };
        let size = number(size).filter(|size| *size > 0);
        let size = size.with_context(|| self.odd(complete, "`chunk_size` is no number"))?;
        // the keys are the numbers of the parts; other keys are settings
        let mut parts: Vec<(u64, &str)> = upload
            .header
            .iter()
            .filter_map(|(key, value)| Some((key.parse().ok()?, value.as_str()?)))
            .collect();
        parts.sort_unstable();
        if parts.len() as u64 != file.file.bytes.div_ceil(size) {
            let fault = format!("it names {} parts of {size} bytes", parts.len());
            return Err(self.odd(complete, &fault));
        }
        let mut done = vec![];
        for (index, (_, address)) in parts.into_iter().enumerate() {
            let url = self.address(address)?;
            let from = index as u64 * size;
            let etag = self.put(file, &url, from, size.min(file.file.bytes - from))?;
            let etag = etag.with_context(|| self.odd(&url, "it sends no `ETag`"))?;
            done.push(json!({ "partNumber": index + 1, "etag": etag }));
        }
        self.confirm(complete, &json!({ "oid": file.oid, "parts": done }))
    }

    /// Puts `bytes` bytes of a file, from byte `from` on. Returns the `ETag` of the answer.
    fn put(&self, file: &Upload<'_>, url: &Url, from: u64, bytes: u64) -> Result<Option<String>> {
        let path = &file.file.file;
        repeated("the content is not accepted", || {
            let mut content = fs_err::File::open(path)?;
            content.seek(SeekFrom::Start(from))?;
            let mut part = Counted { inner: content.take(bytes), progress: self.progress };
            let body = (SendBody::from_reader(&mut part), bytes);
            let agent = self.http.content_agent();
            let answer = self.http.send(&agent, Method::Put, url, &[], body);
            if part.inner.limit() > 0 && answer.is_ok() {
                let fault = format!("`{}` has become shorter meanwhile", path.display());
                return Err(Fault::Final(anyhow!(fault)));
            }
            let etag = answer
                .as_ref()
                .ok()
                .and_then(|answer| Some(answer.headers().get("etag")?.to_str().ok()?.to_owned()));
            match self.answer(url, answer)? {
                (200..=299, _) => Ok(etag),
                (status, text) => Err(self.refusal(url, status, &text)),
            }
        })
    }

    fn confirm(&self, url: &Url, body: &Value) -> Result<()> {
        let body = body.to_string();
        repeated("the content is not confirmed", || {
            let headers = [("content-type", LFS_JSON), ("accept", LFS_JSON)];
            let mut bytes = body.as_bytes();
            let sent = (SendBody::from_reader(&mut bytes), body.len() as u64);
            let answer =
                self.http.send(&self.http.content_agent(), Method::Post, url, &headers, sent);
            match self.answer(url, answer)? {
                (200..=299, _) => Ok(()),
                (status, text) => Err(self.refusal(url, status, &text)),
            }
        })
    }
}

/// Reports what is read from a file.
struct Counted<'a> {
    inner: std::io::Take<fs_err::File>,
    progress: &'a dyn DownloadProgress,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.progress.advance(count as u64);
        Ok(count)
    }
}
