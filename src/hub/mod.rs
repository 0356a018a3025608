//! The files of a base or an adapter: from a local folder, or from a repository of the Hugging Face
//! Hub.
//!
//! The Hub is asked once which commit the revision stands at and which files it has; only the
//! files that are needed are fetched, all at that commit, into the cache that Python's
//! `huggingface_hub` and `transformers` share, so that each finds what the other has fetched:
//!
//! ```text
//! <cache_dir>/models--<owner>--<name>/refs/<revision>            the commit of a branch or tag
//!                                     snapshots/<commit>/<file>  links to
//!                                     blobs/<etag>               the content
//!                                     blobs/<etag>.incomplete    the same while it is fetched
//! <cache_dir>/.locks/models--<owner>--<name>/<etag>.lock         held by the process that fetches it
//! ```
//!
//! The crate `hf-hub` knows the cache; requests are this folder's own. Those of hf-hub 0.5 send the
//! token to other hosts and have no limits of time, and hf-hub 1.0 takes any `ETag` for the name of a
//! file, neither continues nor checks a download that broke, and lets no limit be set either.
//!
//! Sizes are checked; hashes are not.

mod adapter;
mod base;
mod client;
mod fetch;
mod http;
mod place;
mod repo;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::config::{AdapterHub, AdapterSource, BaseSource, HubSource};
pub use http::HubLimits;
use repo::RepoSource;

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
            .field("endpoint", &http::without_credentials(&self.endpoint))
            .field("cache_dir", &self.cache_dir)
            .field("token", &self.token.as_ref().map(|_| "***"))
            .field("offline", &self.offline)
            .field("limits", &self.limits)
            .finish()
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

/// The files of a base; all of them exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseFiles {
    /// What to call it: the folder's path, or `repo@revision`.
    pub label: String,
    /// The commit that the revision stood at; absent for a folder.
    pub commit: Option<String>,
    /// `config.json`.
    pub config: PathBuf,
    /// `model.safetensors`, or the shards that `model.safetensors.index.json` names, each once,
    /// sorted.
    pub weights: Vec<PathBuf>,
    /// `tokenizer.json`, if there is one.
    pub tokenizer: Option<PathBuf>,
}

/// The files of an adapter; both exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    /// What to call it: the folder's path, `repo@revision` or `repo@revision/subfolder`.
    pub label: String,
    /// The commit that the revision stood at; absent for a folder.
    pub commit: Option<String>,
    /// `adapter_config.json`.
    pub config: PathBuf,
    /// `adapter_model.safetensors`.
    pub weights: PathBuf,
}

/// Finds the files of `source`, and fetches those that the Hub has and the cache lacks.
///
/// Without a network, a revision that the cache holds in full is taken from there, with a warning
/// in the log. An interrupted download is continued, by this call or a later one.
///
/// # Errors
/// [`BaseSource::Random`] has no files: the caller handles it. Otherwise the message says what is
/// missing and what to do.
pub fn find_base(
    source: &BaseSource,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
) -> Result<BaseFiles> {
    match source {
        BaseSource::Path(dir) => base::find_in_folder(dir),
        BaseSource::Hub(HubSource { repo, revision }) => {
            let (config_file, option) = (base::CONFIG, base::OPTION);
            let source = RepoSource { repo, revision, subfolder: "", config_file, option };
            // a missing tokenizer.json is worth a question to the Hub
            let is_whole = |files: &BaseFiles| files.tokenizer.is_some();
            repo::find(&source, settings, progress, base::collect, is_whole)
        }
        BaseSource::Random(_) => bail!("a base of random weights has no files"),
    }
}

/// Finds the files of an adapter, as [`find_base`] finds those of a base.
///
/// # Errors
/// The message says what is missing and what to do.
pub fn find_adapter(
    source: &AdapterSource,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
) -> Result<AdapterFiles> {
    match source {
        AdapterSource::Path(dir) => adapter::find_in_folder(dir),
        AdapterSource::Hub(AdapterHub { repo, revision, subfolder }) => {
            let (config_file, option) = (adapter::CONFIG, adapter::OPTION);
            let source = RepoSource { repo, revision, subfolder, config_file, option };
            repo::find(&source, settings, progress, adapter::collect, |_| true)
        }
    }
}
