//! One repository of the Hub, asked through `hf-hub`: what a revision has, and what a refusal means.
//! The Hub explains one by its status and `X-Error-Code`, with `X-Error-Message` for people.

use std::time::Duration;

use anyhow::{Error, Result, anyhow, bail};
use hf_hub::Cache;
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder};
use ureq::http::StatusCode;

use super::HubSettings;
use super::repo::{RepoSource, is_commit};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// For the list of files; `hf-hub` lets no timeout be set for a file.
const INFO_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a request failed.
pub(super) enum Fault {
    /// The network's or the server's state: another attempt, or the cache, may help.
    Transient(Error),
    /// An answer that will stay the same.
    Final(Error),
}

/// A local fault does not go away by asking again.
impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Self::Final(error.into())
    }
}

/// Asks the Hub about one repository.
pub(super) struct Client<'a> {
    pub(super) api: Api,
    pub(super) cache: Cache,
    endpoint: &'a str,
    has_token: bool,
    pub(super) source: &'a RepoSource<'a>,
}

impl<'a> Client<'a> {
    pub(super) fn new(source: &'a RepoSource<'a>, settings: &'a HubSettings) -> Result<Self> {
        let endpoint = settings.endpoint.trim().trim_end_matches('/');
        let host = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
        if host.is_none_or(str::is_empty) {
            bail!(
                "the Hub's address `{endpoint}` is not of the form `https://HOST`\n\
                 hint: it comes from `HF_ENDPOINT`; the default is `{}`",
                HubSettings::DEFAULT_ENDPOINT
            );
        }
        let token = settings.token.as_deref().map(str::trim).filter(|token| !token.is_empty());
        if token.is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            bail!("the Hub's token has characters that no token has\nhint: check `HF_TOKEN`");
        }
        let cache = Cache::new(settings.cache_dir.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.to_owned())
            .with_token(token.map(str::to_owned))
            .with_retries(0)
            .with_user_agent("dylora", env!("CARGO_PKG_VERSION"))
            .build()?;
        Ok(Self { api, cache, endpoint, has_token: token.is_some(), source })
    }

    /// The Hub's address, without a slash at its end.
    pub(super) fn endpoint(&self) -> &str {
        self.endpoint
    }

    /// Which commit the revision stands at and what files it has.
    ///
    /// `ApiRepo::info` does the same, but hides the headers in which the Hub says why it refuses.
    pub(super) fn info(&self) -> Result<RepoInfo, Fault> {
        let repo = self.source.repo_at(self.source.revision);
        let request = self.api.repo(repo).info_request().config();
        let request = request
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(INFO_TIMEOUT))
            .build();
        let mut response = request.call().map_err(|error| self.request_fault(error))?;
        let status = response.status();
        if !status.is_success() {
            let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
            let code = header("x-error-code").unwrap_or_default();
            return Err(self.refusal(status, code, header("x-error-message")));
        }
        let not_the_hub = |fault: String| {
            Fault::Final(anyhow!(
                "`{}` does not answer as the Hub does: {fault}\n\
                 hint: check `HF_ENDPOINT`, and whether a proxy or a login page is in between",
                self.endpoint
            ))
        };
        let info: RepoInfo = response.body_mut().read_json().map_err(|error| match error {
            ureq::Error::Json(error) if !error.is_io() => not_the_hub(error.to_string()),
            error => self.request_fault(error),
        })?;
        if !is_commit(&info.sha) {
            return Err(not_the_hub(format!("`{}` is not a commit", info.sha)));
        }
        Ok(info)
    }

    /// Notes the commit at which the revision stands. Only offline runs need the note, so a cache
    /// that cannot be written is no error.
    pub(super) fn write_ref(&self, commit: &str) {
        let revision = self.source.revision;
        let cache = self.cache.repo(self.source.repo_at(revision));
        let config = self.source.path_of(self.source.config_file);
        let is_noted = cache.get(&config) == Some(cache.pointer_path(commit).join(&config));
        if is_noted || is_commit(revision) {
            return;
        }
        if let Err(error) = cache.create_ref(commit) {
            tracing::warn!("offline runs will not find `{revision}`: {error}");
        }
    }

    /// The error for an answer that did not come, or not whole, or is a refusal to hand out a file.
    pub(super) fn request_fault(&self, error: ureq::Error) -> Fault {
        let endpoint = self.endpoint;
        match error {
            ureq::Error::StatusCode(status) => {
                let status = StatusCode::from_u16(status).expect("it came as a status");
                // `hf-hub` drops the headers, but a repository that is shown exists
                let code = if is_denied(status) { "GatedRepo" } else { "EntryNotFound" };
                self.refusal(status, code, None)
            }
            ureq::Error::Io(error) => {
                Fault::Transient(anyhow!("cannot reach `{endpoint}`: {error}"))
            }
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                Fault::Final(anyhow!("cannot ask `{endpoint}`: {error}"))
            }
            error => Fault::Transient(anyhow!("cannot reach `{endpoint}`: {error}")),
        }
    }

    /// The error for a `status` that is not a success, with the Hub's `code` for it.
    fn refusal(&self, status: StatusCode, code: &str, message: Option<&str>) -> Fault {
        let RepoSource { repo, revision, option, .. } = self.source;
        let endpoint = self.endpoint;
        let said = message.map(|text| format!(": {}", text.trim_end_matches('.')));
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
                 hint: `{option}.hub.revision` is a branch (as a rule `main`), a tag or a \
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
                 hint: check `{option}.hub`; {}",
                match self.has_token {
                    false => "a private repository needs a token that may read it in `HF_TOKEN`",
                    true => "if it is private, may the token in `HF_TOKEN` read it?",
                }
            )
        } else if is_denied(status) && !self.has_token {
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
