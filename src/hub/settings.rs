//! How to reach the Hub, how long it may take, and who is told about downloads.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How to reach the Hub.
#[derive(Clone)]
pub struct HubSettings {
    /// The Hub's address (`HF_ENDPOINT`), [`HubSettings::DEFAULT_ENDPOINT`] as a rule.
    pub endpoint: String,
    /// The Hub's cache: `$HF_HUB_CACHE`, or `$HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    pub cache_dir: PathBuf,
    /// Sent to the origin of `endpoint` alone (`HF_TOKEN`).
    pub token: Option<String>,
    /// Use the cache alone (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// How long the Hub may take.
    pub limits: HubLimits,
}

impl HubSettings {
    /// The Hub itself.
    pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
}

/// Without the token and without credentials in the address.
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

/// How long the Hub may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubLimits {
    /// For a connection to stand, encryption included.
    pub connect: Duration,
    /// Without a byte from the server.
    pub silence: Duration,
    /// For an answer that is not a file's content, from the request to its last byte.
    pub answer: Duration,
    /// Span over which a file's content has to bring `window_bytes`.
    pub window: Duration,
    /// Least number of bytes that a `window` of a file's content brings.
    pub window_bytes: u64,
}

impl Default for HubLimits {
    /// Connect 15 s, silence 30 s, answer 60 s, 64 KiB a minute.
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

/// Is told about downloads, one file at a time; `()` is silent.
pub trait DownloadProgress {
    /// `file`, of `total_bytes`, is now fetched, and nothing of it is there yet. Comes again for the
    /// same file with each attempt.
    fn start(&self, file: &str, total_bytes: u64);
    /// `bytes` more are there; first those that an earlier attempt left.
    fn advance(&self, bytes: u64);
    /// The file is whole or given up.
    fn finish(&self);
}

impl DownloadProgress for () {
    fn start(&self, _file: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
}

/// An address as a message may show it, whether or not it is one.
pub(super) fn without_credentials(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").map_or(("", text), |(a, b)| (a, b));
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    let slashes = if scheme.is_empty() { "" } else { "://" };
    format!("{scheme}{slashes}{host}")
}
