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
mod files;
mod http;
mod names;
mod place;
mod repo;
mod settings;

use anyhow::{Result, bail};

use crate::config::{AdapterHub, AdapterSource, BaseSource, HubSource};
pub use files::{AdapterFiles, BaseFiles};
use names::RepoSource;
pub use settings::{DownloadProgress, HubLimits, HubSettings};

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
