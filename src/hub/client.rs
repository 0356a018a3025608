//! Asks the Hub about one repository: which files a revision has, and what a refusal means. The Hub
//! explains a refusal by its status and the header `X-Error-Code`, and to people by
//! `X-Error-Message`.

use anyhow::{Error, Result, anyhow};
use hf_hub::Cache;
use serde::Deserialize;
use ureq::Body;
use ureq::http::{Response, StatusCode};
use url::Url;

use super::http::{Http, redirect, shown_origin};
use super::names::{Holds, RepoSource, is_commit};
use super::settings::HubSettings;

/// The largest number of redirects that are followed for one request, as in `huggingface_hub`.
pub(super) const MAX_REDIRECTS: usize = 10;

/// Why a request failed.
pub(super) enum Fault {
    /// The network or the server failed. Another attempt or the cache may help.
    Transient(Error),
    /// A fault that stays the same in another attempt.
    Final(Error),
}

/// An error of the local machine is final: asking the Hub again does not help.
impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Self::Final(error.into())
    }
}

/// Asks the Hub about one repository.
pub(super) struct Client<'a> {
    pub(super) http: Http,
    pub(super) cache: Cache,
    pub(super) source: &'a RepoSource<'a>,
}

/// What a repository has at one revision.
#[derive(Debug, Deserialize)]
pub(super) struct RepoInfo {
    /// The commit that the revision points to.
    pub(super) sha: String,
    /// Its files.
    pub(super) siblings: Vec<RepoFile>,
}

/// A file of a repository.
#[derive(Debug, Deserialize)]
pub(super) struct RepoFile {
    /// The file's path in the repository.
    pub(super) rfilename: String,
}

impl<'a> Client<'a> {
    pub(super) fn new(source: &'a RepoSource<'a>, settings: &HubSettings) -> Result<Self> {
        let http = Http::new(settings)?;
        Ok(Self { http, cache: Cache::new(settings.cache_dir.clone()), source })
    }

    /// The Hub's address for messages.
    pub(super) fn endpoint(&self) -> &str {
        self.http.endpoint()
    }

    /// Fetches the commit that the revision points to and the list of its files.
    pub(super) fn info(&self) -> Result<RepoInfo, Fault> {
        let source = self.source;
        let mut url = self.http.url(source.api_path().chain(["revision", source.revision]));
        let agent = self.http.agent();
        for _ in 0..=MAX_REDIRECTS {
            let response = self
                .http
                .get(&agent, &url, None)
                .map_err(|error| self.request_fault(&url, error))?;
            if let Some(target) = redirect(&response, &url).map_err(Fault::Final)? {
                url = target;
                continue;
            }
            if !response.status().is_success() {
                return Err(self.answer_fault(&url, &response));
            }
            return self.read_info(&url, response);
        }
        Err(self.not_the_hub("it redirects without end"))
    }

    fn read_info(&self, url: &Url, mut response: Response<Body>) -> Result<RepoInfo, Fault> {
        let info: RepoInfo = response.body_mut().read_json().map_err(|error| match error {
            ureq::Error::Json(error) if !error.is_io() => self.not_the_hub(&error.to_string()),
            error => self.request_fault(url, error),
        })?;
        if let Some(file) =
            info.siblings.iter().find(|file| file.rfilename.contains(char::is_control))
        {
            return Err(self.not_the_hub(&format!("{:?} is not a file's name", file.rfilename)));
        }
        match is_commit(&info.sha) {
            true => Ok(info),
            false => Err(self.not_the_hub(&format!("`{}` is not a commit", info.sha))),
        }
    }

    /// The error for an answer that the real Hub would not give.
    pub(super) fn not_the_hub(&self, fault: &str) -> Fault {
        let fault = self.http.quoted(fault);
        Fault::Final(anyhow!(
            "`{}` does not answer as the Hub does: {fault}\n\
             hint: check `HF_ENDPOINT`, and whether a proxy or a login page is in between",
            self.endpoint()
        ))
    }

    /// Records in the cache which commit the revision points to. Only offline runs need this, so a
    /// failure is logged as a warning and is not an error.
    pub(super) fn write_ref(&self, commit: &str) {
        let revision = self.source.revision;
        let cache = self.cache.repo(self.source.repo_at(revision));
        let is_noted = match self.source.holds {
            Holds::Model { config_file, .. } => {
                let config = self.source.path_of(config_file);
                cache.get(&config) == Some(cache.pointer_path(commit).join(&config))
            }
            Holds::Dataset => false,
        };
        if is_noted || is_commit(revision) {
            return;
        }
        if let Err(error) = cache.create_ref(commit) {
            tracing::warn!("offline runs will not find `{revision}`: {error}");
        }
    }

    /// The error for an answer of `url` that did not arrive, or not completely.
    pub(super) fn request_fault(&self, url: &Url, error: ureq::Error) -> Fault {
        let host = self.shown(url);
        let limits = &self.http.limits;
        match error {
            ureq::Error::Io(error) => Fault::Transient(anyhow!("cannot reach `{host}`: {error}")),
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                Fault::Final(anyhow!("cannot ask `{host}`: {error}"))
            }
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
                Fault::Transient(anyhow!(
                    "cannot reach `{host}`: no connection within {:?}",
                    limits.connect
                ))
            }
            ureq::Error::Timeout(ureq::Timeout::PerRead) => {
                Fault::Transient(anyhow!("`{host}` has sent nothing for {:?}", limits.silence))
            }
            ureq::Error::Timeout(_) => {
                Fault::Transient(anyhow!("`{host}` has not answered within {:?}", limits.answer))
            }
            error => Fault::Transient(anyhow!("cannot reach `{host}`: {error}")),
        }
    }

    /// The part of `url` that messages show: the Hub's address, or the origin of another host.
    fn shown(&self, url: &Url) -> String {
        if self.http.is_hub(url) { self.endpoint().to_owned() } else { shown_origin(url) }
    }

    /// The error for an answer of `url` that is neither a success nor a redirect.
    pub(super) fn answer_fault<B>(&self, url: &Url, response: &Response<B>) -> Fault {
        let status = response.status();
        if !self.http.is_hub(url) {
            // an address signed by the Hub expires, and the next attempt gets a new one
            return Fault::Transient(anyhow!("`{}` answers {status}", self.shown(url)));
        }
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let code = header("x-error-code").unwrap_or_default();
        self.refusal(status, code, header("x-error-message"))
    }

    /// The error for an answer of the Hub whose `status` is not a success and whose `X-Error-Code`
    /// is `code`.
    fn refusal(&self, status: StatusCode, code: &str, message: Option<&str>) -> Fault {
        let RepoSource { repo, revision, .. } = self.source;
        let (endpoint, key) = (self.endpoint(), self.source.key());
        let said = message.map(|text| self.http.quoted(text));
        let said = said.map(|text| format!(": {}", text.trim_end_matches('.')));
        let answer = format!("answers {status}{}", said.unwrap_or_default());

        if status.is_server_error()
            || status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT
        {
            return Fault::Transient(anyhow!("`{endpoint}` {answer}"));
        }
        Fault::Final(if code == "RevisionNotFound" {
            anyhow!(
                "`{repo}` on `{endpoint}` has no revision `{revision}`\n\
                 hint: `{key}.revision` is a branch (as a rule `main`), a tag or a \
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
                 hint: check `{key}`; {}",
                match self.http.has_token {
                    false => "a private repository needs a token that may read it in `HF_TOKEN`",
                    true => "if it is private, may the token in `HF_TOKEN` read it?",
                }
            )
        } else if is_denied(status) && !self.http.has_token {
            anyhow!(
                "`{endpoint}` refuses `{repo}` without a token: it {answer}\n\
                 hint: set `HF_TOKEN` to a token that may read it"
            )
        } else if is_denied(status) {
            anyhow!(
                "`{endpoint}` refuses `{repo}` with the given token: it {answer}\n\
                 hint: is the token in `HF_TOKEN` still valid, and may it read this repository?"
            )
        } else {
            anyhow!("`{endpoint}` {answer} for `{repo}` at `{revision}`")
        })
    }
}

fn is_denied(status: StatusCode) -> bool {
    status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN
}
