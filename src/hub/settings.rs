//! How to reach the Hub, how long it may take, and how downloads report their progress.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach the Hub.
#[derive(Clone)]
pub struct HubSettings {
    /// The Hub's address (`HF_ENDPOINT`), normally [`HubSettings::DEFAULT_ENDPOINT`].
    pub endpoint: String,
    /// The Hub's cache: `$HF_HUB_CACHE`, or `$HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    pub cache_dir: PathBuf,
    /// The token (`HF_TOKEN`). It is sent only to the origin of `endpoint`.
    pub token: Option<String>,
    /// Whether to use only the cache (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// The time limits of requests.
    pub limits: HubLimits,
}

impl HubSettings {
    /// The address of the Hub itself.
    pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

    /// The Hub at `endpoint`, without a token and with the usual time limits.
    pub fn new(endpoint: impl Into<String>, cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: endpoint.into(),
            cache_dir: cache_dir.into(),
            token: None,
            offline: false,
            limits: HubLimits::default(),
        }
    }

    /// Settings that forbid any request: only local folders and what `cache_dir` holds are found.
    pub fn offline(cache_dir: impl Into<PathBuf>) -> Self {
        Self { offline: true, ..Self::new(Self::DEFAULT_ENDPOINT, cache_dir) }
    }
}

impl HubSettings {
    /// The Hub's address as messages show it, without credentials.
    pub(crate) fn shown_endpoint(&self) -> String {
        without_credentials(self.endpoint.trim()).trim_end_matches('/').to_owned()
    }
}

/// Shows neither the token nor credentials in the address.
impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &without_credentials(&self.endpoint))
            .field("cache_dir", &self.cache_dir)
            .field("token", &self.token.as_ref().map(|_| "***"))
            .field("offline", &self.offline)
            .field("limits", &self.limits)
            .finish()
    }
}

/// Time limits of requests to the Hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubLimits {
    /// The longest time until a connection is made, including encryption.
    pub connect: Duration,
    /// The longest time without a byte from the server.
    pub silence: Duration,
    /// The longest time from a request to the last byte of the answer; for a file's content, to its
    /// first byte.
    pub answer: Duration,
    /// The time in which `window_bytes` bytes of a file's content must arrive.
    pub window: Duration,
    /// The least number of bytes of a file's content that must arrive in each `window`.
    pub window_bytes: u64,
}

impl Default for HubLimits {
    /// 15 s to connect, 30 s of silence, 60 s for an answer, 64 KiB per 60 s.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            silence: Duration::from_secs(30),
            answer: Duration::from_secs(60),
            window: Duration::from_secs(60),
            window_bytes: 64 << 10,
        }
    }
}

/// Receives the progress of downloads or uploads, one file at a time. `()` ignores it.
pub trait DownloadProgress {
    /// A download of `file` begins, with 0 bytes so far. This is called again for each attempt to
    /// fetch the file.
    ///
    /// - `total_bytes`: the size of the file; 0 if it is unknown
    fn start(&self, file: &str, total_bytes: u64);
    /// `bytes` more bytes have arrived. The first call counts the bytes that earlier attempts
    /// fetched.
    fn advance(&self, bytes: u64);
    /// The file is complete, or the download was given up.
    fn finish(&self);
}

impl DownloadProgress for () {
    fn start(&self, _file: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
}

/// `text` as messages may show it, without credentials. It need not be a valid address.
pub(super) fn without_credentials(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").map_or(("", text), |(a, b)| (a, b));
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    let slashes = if scheme.is_empty() { "" } else { "://" };
    format!("{scheme}{slashes}{host}")
}
