//! The Hub's HTTP interface, as far as one model repository needs it:
//!
//! ```text
//! GET  <endpoint>/api/models/<repo>/revision/<revision>   {"sha": .., "siblings": [{"rfilename": ..}, ..]}
//! HEAD <endpoint>/<repo>/resolve/<commit>/<file>          X-Linked-Etag or ETag, X-Linked-Size or Content-Length
//! GET  <endpoint>/<repo>/resolve/<commit>/<file>          the content, as a rule by way of another host; takes Range
//! ```
//!
//! Large files have an etag that is the SHA-256 of their content. Faults come with `X-Error-Code`
//! and `X-Error-Message`. Redirects are followed here and not by the HTTP client, because the first
//! answer has the headers, and because the token goes to the endpoint's own origin only.

use std::time::Duration;

use anyhow::{Error, Result, anyhow, bail};
use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::cache::is_commit;
use super::{HubSettings, is_inside};
use crate::config::HubSource;

const MAX_REDIRECTS: usize = 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence of a server, before or amid an answer.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_INFO_BYTES: u64 = 64 << 20;

/// Why a request failed.
pub(super) enum RequestError {
    /// The network's or the server's state: another attempt, or the cache, may help.
    Transient(Error),
    /// An answer that will stay the same.
    Final(Error),
}

/// A local fault (say, a full disk) does not go away by asking again.
impl From<Error> for RequestError {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl From<std::io::Error> for RequestError {
    fn from(error: std::io::Error) -> Self {
        Self::Final(error.into())
    }
}

/// A revision of the repository.
pub(super) struct RepoInfo {
    /// The commit at which it stands.
    pub(super) commit: String,
    /// The paths of its files.
    pub(super) files: Vec<String>,
}

impl RepoInfo {
    pub(super) fn has(&self, file: &str) -> bool {
        self.files.iter().any(|name| name == file)
    }
}

/// What the Hub says of a file.
pub(super) struct FileInfo {
    /// Names the content; fit for a file's name.
    pub(super) etag: String,
    pub(super) size_bytes: u64,
}

enum Method {
    Get,
    Head,
}

/// Asks the Hub about one repository.
pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: &'a str,
    origin: String,
    token: Option<&'a str>,
    source: &'a HubSource,
}

impl<'a> Client<'a> {
    pub(super) fn new(source: &'a HubSource, settings: &'a HubSettings) -> Result<Self> {
        let endpoint = settings.endpoint.trim().trim_end_matches('/');
        let Some(origin) = origin(endpoint) else {
            bail!(
                "the Hub's address `{endpoint}` is not of the form `https://HOST`\n\
                 hint: it comes from `HF_ENDPOINT`; the default is `{}`",
                HubSettings::DEFAULT_ENDPOINT
            );
        };
        let token = settings.token.as_deref().map(str::trim).filter(|token| !token.is_empty());
        if token.is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            bail!("the Hub's token has characters that no token has\nhint: check `HF_TOKEN`");
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT))
            .user_agent(concat!("dylora/", env!("CARGO_PKG_VERSION")))
            // a compressed answer has no length to check and no range to continue from
            .accept_encoding("identity")
            .build()
            .new_agent();
        Ok(Self { agent, endpoint, origin, token, source })
    }

    /// The Hub's address, without a slash at its end.
    pub(super) fn endpoint(&self) -> &str {
        self.endpoint
    }

    /// Which commit the revision stands at and what files it has.
    pub(super) fn repo_info(&self) -> Result<RepoInfo, RequestError> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }

        let HubSource { repo, revision } = self.source;
        let url = format!("{}/api/models/{repo}/revision/{}", self.endpoint, encode(revision));
        let mut response = self.send(Method::Get, &url, 0)?;
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_INFO_BYTES)
            .read_to_string()
            .map_err(|error| self.transport_error(&url, error))?;
        let not_the_hub = |fault: String| {
            RequestError::Final(anyhow!(
                "`{url}` does not answer as the Hub does: {fault}\n\
                 hint: check `HF_ENDPOINT`, and whether a proxy or a login page is in between"
            ))
        };
        let info: Info =
            serde_json::from_str(&text).map_err(|error| not_the_hub(error.to_string()))?;
        if !is_commit(&info.sha) {
            return Err(not_the_hub(format!("`{}` is not a commit", info.sha)));
        }
        let files = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(RepoInfo { commit: info.sha, files })
    }

    /// Etag and size of `file` at `commit`.
    pub(super) fn file_info(&self, file: &str, commit: &str) -> Result<FileInfo, RequestError> {
        let url = self.file_url(file, commit);
        let response = self.send(Method::Head, &url, 0)?;
        let headers = response.headers();
        let etag = text_of(headers, "x-linked-etag").or_else(|| text_of(headers, "etag"));
        let etag = etag.map(etag_name).filter(|etag| !etag.is_empty());
        let linked_size = text_of(headers, "x-linked-size");
        // a redirect's own length is not the file's
        let own_size = || text_of(headers, "content-length").filter(|_| response.status() == 200);
        let size = linked_size.or_else(own_size).and_then(|size| size.parse().ok());
        match (etag, size) {
            (Some(etag), Some(size_bytes)) => Ok(FileInfo { etag, size_bytes }),
            (etag, _) => {
                let missing = if etag.is_none() { "etag" } else { "size" };
                Err(RequestError::Final(anyhow!(
                    "`{url}` has no {missing}\nhint: is `HF_ENDPOINT` a full mirror of the Hub?"
                )))
            }
        }
    }

    /// The content of `file` at `commit` from `start_bytes` on (status 206), or all of it (200).
    pub(super) fn content(
        &self,
        file: &str,
        commit: &str,
        start_bytes: u64,
    ) -> Result<Response<Body>, RequestError> {
        self.send(Method::Get, &self.file_url(file, commit), start_bytes)
    }

    fn file_url(&self, file: &str, commit: &str) -> String {
        assert!(is_inside(file), "names of shards are checked where they are read");
        let file: Vec<String> = file.split('/').map(encode).collect();
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.source.repo, file.join("/"))
    }

    /// Sends a request and follows redirects. HEAD stops at one that leads to another origin and
    /// itself names the content: there a redirect is the answer.
    fn send(
        &self,
        method: Method,
        url: &str,
        start_bytes: u64,
    ) -> Result<Response<Body>, RequestError> {
        let mut at = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = match method {
                Method::Get => self.agent.get(&at),
                Method::Head => self.agent.head(&at),
            };
            let at_origin = origin(&at);
            let at_endpoint = at_origin.as_ref() == Some(&self.origin);
            if let Some(token) = self.token.filter(|_| at_endpoint) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            if start_bytes > 0 {
                request = request.header(header::RANGE, format!("bytes={start_bytes}-"));
            }
            let response = request.call().map_err(|error| self.transport_error(&at, error))?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if !status.is_redirection() {
                return Err(if at_endpoint {
                    self.refusal(&at, &response)
                } else {
                    let host = at_origin.unwrap_or(at);
                    let error = anyhow!("`{host}`, where `{url}` leads, answers {status}");
                    RequestError::Transient(error)
                });
            }
            let next = text_of(response.headers(), "location")
                .and_then(|location| resolve(&at, location))
                .ok_or_else(|| anyhow!("`{at}` answers {status} without saying where to go"))?;
            let is_answer = response.headers().contains_key("x-linked-etag");
            if matches!(method, Method::Head) && is_answer && origin(&next) != at_origin {
                return Ok(response);
            }
            at = next;
        }
        Err(RequestError::Final(anyhow!("`{url}` leads in circles: {MAX_REDIRECTS} redirects")))
    }

    /// The error for an answer that did not come, or not whole.
    pub(super) fn transport_error(&self, url: &str, error: ureq::Error) -> RequestError {
        let host = origin(url).unwrap_or_else(|| url.to_owned());
        match error {
            ureq::Error::Io(error) => {
                RequestError::Transient(anyhow!("cannot reach `{host}`: {error}"))
            }
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                RequestError::Final(anyhow!("cannot ask for `{url}`: {error}"))
            }
            error => RequestError::Transient(anyhow!("cannot reach `{host}`: {error}")),
        }
    }

    /// The error for an answer of the endpoint that is not a success.
    fn refusal(&self, url: &str, response: &Response<Body>) -> RequestError {
        let HubSource { repo, revision } = self.source;
        let endpoint = self.endpoint;
        let status = response.status();
        let code = text_of(response.headers(), "x-error-code").unwrap_or_default();
        let said = text_of(response.headers(), "x-error-message")
            .map(|message| format!(": {}", message.trim_end_matches('.')))
            .unwrap_or_default();
        let answer = format!("answers {status}{said}");
        let is_denied = status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN;

        if status.is_server_error()
            || status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT
        {
            return RequestError::Transient(anyhow!("`{endpoint}` {answer}"));
        }
        RequestError::Final(if code == "RevisionNotFound" {
            anyhow!(
                "`{repo}` on `{endpoint}` has no revision `{revision}`\n\
                 hint: `base.source.hub.revision` is a branch (as a rule `main`), a tag or a \
                 full commit"
            )
        } else if code == "GatedRepo" {
            anyhow!(
                "`{repo}` on `{endpoint}` is gated: it {answer}\n\
                 hint: accept its terms at `{endpoint}/{repo}`, and set `HF_TOKEN` to a token of \
                 the account that did"
            )
        } else if code == "RepoNotFound" || (status == StatusCode::NOT_FOUND && code.is_empty()) {
            anyhow!(
                "`{endpoint}` shows no `{repo}` at `{revision}`: it {answer}\n\
                 hint: check `base.source.hub`; {}",
                match self.token {
                    None => "a private repository needs a token that may read it in `HF_TOKEN`",
                    Some(_) => "if it is private, may the token in `HF_TOKEN` read it?",
                }
            )
        } else if is_denied && self.token.is_none() {
            anyhow!(
                "`{endpoint}` refuses `{repo}` without a token: it {answer}\n\
                 hint: set `HF_TOKEN` to a token that may read it"
            )
        } else if is_denied {
            anyhow!(
                "`{endpoint}` refuses `{repo}` with the given token: it {answer}\n\
                 hint: is the token in `HF_TOKEN` still valid, and may it read this repository?"
            )
        } else {
            anyhow!("`{url}` {answer}")
        })
    }
}

/// A header's value, if it is text.
pub(super) fn text_of<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Scheme, host and port of a URL, in lower case; the whole of it decides who gets the token.
fn origin(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str().filter(|scheme| ["http", "https"].contains(scheme))?;
    Some(format!("{scheme}://{}", uri.authority()?).to_lowercase())
}

/// The URL to which a `Location` of `url` leads.
fn resolve(url: &str, location: &str) -> Option<String> {
    let origin_at = origin(url)?;
    let scheme = origin_at.split_once(':').map_or("https", |(scheme, _)| scheme);
    let next = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{origin_at}{location}")
    } else {
        location.to_owned()
    };
    origin(&next).map(|_| next)
}

/// The etag without quotes and weakness mark, as a file's name.
fn etag_name(etag: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    etag.trim_start_matches("W/").trim_matches('"').chars().map(plain).collect()
}

/// Percent-encodes one segment of a path, `/` included (RFC 3986, section 2.3).
fn encode(segment: &str) -> String {
    let mut encoded = String::new();
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port_and_nothing_else() {
        let hub = origin("https://Hub.example/a/b?c");
        assert_eq!(hub.as_deref(), Some("https://hub.example"));
        for other in [
            "http://hub.example/",
            "https://hub.example:8443/",
            "https://hub.example.evil/",
            "https://hub.example@evil/",
        ] {
            assert_ne!(origin(other), hub, "{other}");
        }
        assert_eq!(origin("ftp://hub.example"), None);
        assert_eq!(origin("hub.example"), None);
    }

    #[test]
    fn locations_are_absolute_or_relative_to_the_host() {
        let from = |location| resolve("https://hub.example/a/b", location);
        assert_eq!(from("/c?d").as_deref(), Some("https://hub.example/c?d"));
        assert_eq!(from("//cdn.example/c").as_deref(), Some("https://cdn.example/c"));
        assert_eq!(from("http://cdn.example/c").as_deref(), Some("http://cdn.example/c"));
        assert_eq!(from("file:///etc/passwd"), None);
    }

    #[test]
    fn etags_become_names_of_files() {
        assert_eq!(etag_name("W/\"a1b2\""), "a1b2");
        assert_eq!(etag_name("\"../../x\""), "______x");
    }

    #[test]
    fn a_branch_with_a_slash_is_one_segment() {
        assert_eq!(encode("refs/pr/1"), "refs%2Fpr%2F1");
    }
}
