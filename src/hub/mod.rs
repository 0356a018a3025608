//! Finds the files of a base or an adapter in a local folder or in a repository of the Hugging Face
//! Hub, and the files of a data set there.
//!
//! The Hub is asked once which commit the revision points to and which files that commit has. Only
//! the files that are needed are fetched, all of them at that commit. They go into the cache that
//! Python's `huggingface_hub` and `transformers` use too, so that each program finds what another
//! has fetched:
//!
//! ```text
//! <cache_dir>/models--<owner>--<name>/refs/<revision>            the commit of a branch or tag
//!                                     snapshots/<commit>/<file>  a link to the blob
//!                                     blobs/<etag>               the content
//!                                     blobs/<etag>.incomplete    the content while it is fetched
//! <cache_dir>/datasets--<owner>--<name>/..                       the same of a data set
//! <cache_dir>/.locks/models--<owner>--<name>/<etag>.lock         locked by whoever fetches it
//! ```
//!
//! The crate `hf-hub` provides the layout of the cache, but the requests are made here. hf-hub 0.5
//! sends the token to other hosts too and sets no time limits. hf-hub 1.0 accepts any `ETag` as a
//! file name, neither resumes nor checks an interrupted download, and allows no time limits either.
//!
//! The sizes of files are checked; their hashes are not. [`push`] uploads files.

mod adapter;
mod base;
mod client;
mod dataset;
mod fetch;
mod files;
mod http;
mod lfs;
mod login;
mod names;
mod place;
pub mod push;
mod repo;
mod settings;

use std::path::Path;

use anyhow::{Result, bail};

use crate::config::{AdapterHub, AdapterSource, BaseSource, HubDataset, HubSource};
pub use files::{AdapterFiles, BaseFiles, DatasetFiles, SideFile};
pub use login::{Login, login};
pub use names::is_repo;
use names::{Holds, RepoSource};
use place::Place;
pub use settings::{DownloadProgress, HubLimits, HubSettings};

/// Finds the files of `source`, and fetches the files that the Hub has and the cache lacks.
///
/// If the Hub cannot be reached and the cache holds the revision completely, its files are taken
/// from the cache, and a warning is logged. An interrupted download is resumed by this call or by a
/// later one.
///
/// # Errors
/// If a file is missing or cannot be fetched; the message says which, and what to do.
/// [`BaseSource::Random`] has no files and is an error too: the caller must handle it.
pub fn find_base(
    source: &BaseSource,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
) -> Result<BaseFiles> {
    match source {
        BaseSource::Path(dir) => base::find_in_folder(dir),
        BaseSource::Hub(HubSource { repo, revision }) => {
            let (config_file, option) = (base::CONFIG, base::OPTION);
            let holds = Holds::Model { config_file, option };
            let source = RepoSource { repo, revision, subfolder: "", holds };
            // ask the Hub for a `tokenizer.json` that the cache lacks
            let is_whole = |files: &BaseFiles| files.tokenizer.is_some();
            repo::find(&source, settings, progress, &base::collect, is_whole)
        }
        BaseSource::Random(_) => bail!("a base of random weights has no files"),
    }
}

/// Finds the small files that go with a base, such as its chat template, in the local folder `dir`.
///
/// # Errors
/// A folder that cannot be listed.
pub fn side_files(dir: &Path) -> Result<Vec<SideFile>> {
    base::side_files(&Place::user_folder(dir, "base", "")?)
}

/// Finds the files of an adapter, in the same way as [`find_base`] does.
///
/// # Errors
/// If a file is missing or cannot be fetched; the message says which, and what to do.
pub fn find_adapter(
    source: &AdapterSource,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
) -> Result<AdapterFiles> {
    match source {
        AdapterSource::Path(dir) => adapter::find_in_folder(dir),
        AdapterSource::Hub(AdapterHub { repo, revision, subfolder }) => {
            let (config_file, option) = (adapter::CONFIG, adapter::OPTION);
            let holds = Holds::Model { config_file, option };
            let source = RepoSource { repo, revision, subfolder, holds };
            repo::find(&source, settings, progress, &adapter::collect, |_| true)
        }
    }
}

/// Finds the parquet files of a data set's split, in the same way as [`find_base`] does.
///
/// # Errors
/// If there is no such split, or if a file is missing or cannot be fetched; the message says which,
/// and what to do.
pub fn find_dataset(
    source: &HubDataset,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
) -> Result<DatasetFiles> {
    let HubDataset { dataset: repo, revision, .. } = source;
    let repo_source = RepoSource { repo, revision, subfolder: "", holds: Holds::Dataset };
    repo::find(&repo_source, settings, progress, &|place| dataset::collect(place, source), |_| true)
}
