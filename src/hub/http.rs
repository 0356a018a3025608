//! HTTP requests to the Hub and to the hosts that it redirects to. All requests go through
//! [`Http`], so that these rules hold for each:
//!
//! - The authorisation is sent only to the endpoint's own origin: the same scheme, host and port.
//! - The caller follows redirects one by one. A redirect from https to http is refused.
//! - Connecting, silence and slow transfers have time limits ([`HubLimits`]).
//! - Credentials in the endpoint's address are sent as HTTP basic authorisation and are never
//!   shown.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION, RANGE};
use ureq::http::{HeaderValue, Response};
use ureq::{Agent, Body, SendBody};
use url::Url;

use super::settings::{HubLimits, HubSettings, without_credentials};

/// Sends requests to the Hub and to the hosts that it redirects to.
pub(super) struct Http {
    endpoint: Url,
    /// The endpoint for messages, without credentials and without a trailing slash.
    shown: String,
    authorization: Option<HeaderValue>,
    /// The token, or the credentials as they are sent, which no message shows.
    secrets: Vec<String>,
    pub(super) has_token: bool,
    pub(super) limits: HubLimits,
}

impl Http {
    pub(super) fn new(settings: &HubSettings) -> Result<Self> {
        let mut endpoint = parse_endpoint(&settings.endpoint)?;
        let credentials = take_credentials(&mut endpoint)?;
        let shown = endpoint.as_str().trim_end_matches('/').to_owned();
        let token = settings.token.as_deref().map(str::trim).filter(|token| !token.is_empty());
        if token.is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            bail!("the Hub's token has characters that no token has\nhint: check `HF_TOKEN`");
        }
        let authorization = match (token, credentials) {
            (Some(_), Some(_)) => bail!(
                "`HF_ENDPOINT` has a user name or a password, and there is a token too, but a \
                 request carries only one of them\n\
                 hint: take the credentials out of `HF_ENDPOINT`, or unset `HF_TOKEN` and log out \
                 with `hf auth logout`"
            ),
            (Some(token), None) => Some(format!("Bearer {token}")),
            (None, Some(credentials)) => {
                Some(format!("Basic {}", BASE64_STANDARD.encode(credentials)))
            }
            (None, None) => None,
        };
        let secrets = authorization.iter().filter_map(|text| text.split(' ').nth(1));
        let secrets = secrets.map(str::to_owned).collect();
        let authorization = authorization.map(|text| {
            let mut value = HeaderValue::try_from(text).expect("its characters were checked");
            value.set_sensitive(true);
            value
        });
        let (has_token, limits) = (token.is_some(), settings.limits);
        Ok(Self { endpoint, shown, authorization, secrets, has_token, limits })
    }

    /// The Hub's address for messages.
    pub(super) fn endpoint(&self) -> &str {
        &self.shown
    }

    /// What a server has said, for a message: without the token, which it may send back, and
    /// without control characters, which a terminal would obey.
    pub(super) fn quoted(&self, text: &str) -> String {
        // the messages' own line breaks stay
        let is_odd = |c: char| c.is_control() && c != '\n';
        let mut text: String =
            text.chars().map(|c| if is_odd(c) { '\u{fffd}' } else { c }).collect();
        for secret in &self.secrets {
            text = text.replace(secret, "***");
        }
        text
    }

    /// The endpoint's address followed by `path`. Each item of `path` is one segment and is
    /// escaped.
    pub(super) fn url<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        url.path_segments_mut().expect("it is http or https").pop_if_empty().extend(path);
        url
    }

    /// Whether `url` has the same origin as the Hub.
    pub(super) fn is_hub(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    /// An agent for short answers, which must arrive completely within [`HubLimits::answer`].
    pub(super) fn agent(&self) -> Agent {
        self.config().timeout_global(Some(self.limits.answer)).build().into()
    }

    /// An agent for the content of a file, which may take any time as long as it makes progress.
    pub(super) fn content_agent(&self) -> Agent {
        self.config().timeout_recv_response(Some(self.limits.answer)).build().into()
    }

    fn config(&self) -> ureq::config::ConfigBuilder<ureq::typestate::AgentScope> {
        Agent::config_builder()
            .user_agent(concat!("dylora/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(self.limits.connect))
            .timeout_connect(Some(self.limits.connect))
            .timeout_per_read(Some(self.limits.silence))
            .timeout_per_write(Some(self.limits.silence))
    }

    /// Requests `url` without following a redirect.
    ///
    /// - `from`: the first byte that is wanted; with `None`, the request has no `Range` and asks
    ///   for the whole content
    pub(super) fn get(
        &self,
        agent: &Agent,
        url: &Url,
        from: Option<u64>,
    ) -> Result<Response<Body>, ureq::Error> {
        let mut request = agent.get(url.as_str());
        if let Some(value) = self.authorization.as_ref().filter(|_| self.is_hub(url)) {
            request = request.header(AUTHORIZATION, value);
        }
        if let Some(from) = from {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        request.call()
    }

    /// Sends a body and its length to `url`, without following a redirect.
    pub(super) fn send(
        &self,
        agent: &Agent,
        method: Method,
        url: &Url,
        headers: &[(&str, &str)],
        (body, bytes): (SendBody<'_>, u64),
    ) -> Result<Response<Body>, ureq::Error> {
        let mut request = match method {
            Method::Post => agent.post(url.as_str()),
            Method::Put => agent.put(url.as_str()),
        };
        if let Some(value) = self.authorization.as_ref().filter(|_| self.is_hub(url)) {
            request = request.header(AUTHORIZATION, value);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        // without it, the body would be sent in chunks, which storage does not take
        request.header(CONTENT_LENGTH, bytes).send(body)
    }
}

/// A method of a request with a body.
#[derive(Debug, Clone, Copy)]
pub(super) enum Method {
    Post,
    Put,
}

/// The address that an answer of `url` redirects to; `None` if the answer is not a redirect.
///
/// # Errors
/// If a redirect has no valid address, leads from https to http, or leads to another scheme.
pub(super) fn redirect<B>(response: &Response<B>, url: &Url) -> Result<Option<Url>> {
    if !response.status().is_redirection() {
        return Ok(None);
    }
    let host = shown_origin(url);
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let location =
        location.with_context(|| format!("`{host}` redirects, but does not say where"))?;
    let target = url.join(location).with_context(|| {
        format!("`{host}` redirects to an address that is none: `{}`", shown_location(location))
    })?;
    match (url.scheme(), target.scheme()) {
        (_, "https") | ("http", "http") => Ok(Some(target)),
        (from, to) => bail!("`{host}` redirects from {from} to {to}, which is not followed"),
    }
}

/// The scheme, host and port of `url`. Messages show only these, since the path and the query may
/// contain a signature.
pub(super) fn shown_origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// A redirect's address without its query, which may contain a signature.
fn shown_location(location: &str) -> &str {
    location.split(['?', '#']).next().unwrap_or_default()
}

/// Runs `read`, and shuts `agent` down if `arrived` grows by less than `limits.window_bytes` in a
/// `limits.window`; a read that is waiting then fails. Returns the result of `read` and whether the
/// agent was shut down.
pub(super) fn with_least_speed<T>(
    agent: &Agent,
    limits: &HubLimits,
    arrived: &AtomicU64,
    read: impl FnOnce() -> T,
) -> (T, bool) {
    let (done, waits) = channel::<()>();
    thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let mut before = arrived.load(Ordering::Relaxed);
            while waits.recv_timeout(limits.window) == Err(RecvTimeoutError::Timeout) {
                let now = arrived.load(Ordering::Relaxed);
                if now - before < limits.window_bytes {
                    agent.clone().shutdown();
                    return true;
                }
                before = now;
            }
            false
        });
        let result = read();
        drop(done);
        (result, watch.join().expect("the watch does not panic"))
    })
}

fn parse_endpoint(text: &str) -> Result<Url> {
    let url = Url::parse(text.trim()).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https") && url.has_host() && url.query().is_none()
    });
    url.ok_or_else(|| {
        anyhow!(
            "the Hub's address `{}` is not of the form `https://HOST`\n\
             hint: it comes from `HF_ENDPOINT`; the default is `{}`",
            without_credentials(text.trim()),
            HubSettings::DEFAULT_ENDPOINT
        )
    })
}

/// Removes `user:password` from an address and returns it decoded.
fn take_credentials(url: &mut Url) -> Result<Option<Vec<u8>>> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let text = format!("{}:{}", url.username(), url.password().unwrap_or_default());
    let cleared = url.set_username("").and_then(|()| url.set_password(None));
    cleared.map_err(|()| anyhow!("the Hub's address has credentials that cannot be read"))?;
    Ok(Some(percent_encoding::percent_decode_str(&text).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redirected(from: &str, location: Option<&str>) -> Result<Option<Url>> {
        let mut response = Response::builder().status(302);
        if let Some(location) = location {
            response = response.header(LOCATION, location);
        }
        redirect(&response.body(())?, &Url::parse(from)?)
    }

    #[test]
    fn a_redirect_leads_to_the_address_that_it_names() -> Result<()> {
        for (from, location, to) in [
            ("https://hub/a/b", "/c?x=1", "https://hub/c?x=1"),
            ("https://hub/a/b", "c", "https://hub/a/c"),
            ("https://hub/a", "//cdn/c", "https://cdn/c"),
            ("http://hub/a", "https://cdn/c", "https://cdn/c"),
            ("http://hub/a", "http://cdn:81/c", "http://cdn:81/c"),
        ] {
            assert_eq!(redirected(from, Some(location))?, Some(Url::parse(to)?));
        }
        assert_eq!(redirect(&Response::new(()), &Url::parse("https://hub/a")?)?, None);
        Ok(())
    }

    #[test]
    fn a_redirect_to_an_unencrypted_or_odd_address_is_refused() {
        for (location, expected) in [
            (
                Some("http://cdn/c?signature=s"),
                "`https://hub` redirects from https to http, which is not followed",
            ),
            (
                Some("file:///etc/passwd"),
                "`https://hub` redirects from https to file, which is not followed",
            ),
            (
                Some("https://?s=1"),
                "`https://hub` redirects to an address that is none: `https://`",
            ),
            (None, "`https://hub` redirects, but does not say where"),
        ] {
            let error = redirected("https://hub/a", location).expect_err("it is refused");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn credentials_are_taken_out_of_every_address_that_is_shown() {
        for (text, shown) in [
            ("https://u:p@hub.example/x", "https://hub.example/x"),
            ("u:p@hub.example", "hub.example"),
            ("ftp://u:p@ss@hub", "ftp://hub"),
            ("hub.example", "hub.example"),
        ] {
            assert_eq!(without_credentials(text), shown);
        }
    }

    fn settings(endpoint: &str, token: Option<&str>) -> HubSettings {
        HubSettings { token: token.map(str::to_owned), ..HubSettings::new(endpoint, "cache") }
    }

    #[test]
    fn a_token_and_credentials_exclude_each_other() -> Result<()> {
        let http = Http::new(&settings("https://user:pass%20word@hub/", None))?;
        let sent = http.authorization.as_ref().and_then(|value| value.to_str().ok());
        assert_eq!(sent, Some("Basic dXNlcjpwYXNzIHdvcmQ="));
        assert_eq!(http.endpoint(), "https://hub");
        assert_eq!(http.url(["a b", "c"]).as_str(), "https://hub/a%20b/c");
        let error = Http::new(&settings("https://user:secret@hub", Some("hf_token"))).err();
        let error = error.expect("it is ambiguous").to_string();
        assert!(error.starts_with("`HF_ENDPOINT` has a user name or a password"), "{error}");
        assert!(!error.contains("secret") && !error.contains("hf_token"), "{error}");
        Ok(())
    }

    #[test]
    fn authorisation_belongs_to_one_scheme_host_and_port() -> Result<()> {
        let http = Http::new(&settings("https://hub.example", Some("hf_token")))?;
        assert!(http.is_hub(&Url::parse("https://hub.example:443/x")?));
        for other in ["http://hub.example/x", "https://cdn.hub.example", "https://hub.example:444"]
        {
            assert!(!http.is_hub(&Url::parse(other)?), "{other}");
        }
        Ok(())
    }
}
