//! The files of a base: from a local folder, or from a repository of the Hugging Face Hub.
//!
//! The Hub is asked once which commit the revision stands at and which files it has; only the
//! files that a GPT-2 needs are fetched, all at that commit. They go into the cache that Python's
//! `huggingface_hub` and `transformers` share, so that each finds what the other has fetched:
//!
//! ```text
//! <cache_dir>/models--<owner>--<name>/refs/<revision>            the commit of a branch or tag
//!                                     snapshots/<commit>/<file>  links to
//!                                     blobs/<etag>               the content
//!                                     blobs/<etag>.part, .lock   the same while it is fetched
//! ```

mod cache;
mod client;
mod fetch;
mod folder;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

use crate::config::{BaseSource, HubSource};
use cache::RepoCache;
use client::{Client, RepoInfo, RequestError};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";

/// How to reach the Hub.
#[derive(Clone)]
pub struct HubSettings {
    /// The Hub's address (`HF_ENDPOINT`), [`HubSettings::DEFAULT_ENDPOINT`] as a rule.
    pub endpoint: String,
    /// The Hub's cache: `$HF_HUB_CACHE`, or `$HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    pub cache_dir: PathBuf,
    /// Sent to `endpoint` and to no other host (`HF_TOKEN`).
    pub token: Option<String>,
    /// Use the cache alone (`HF_HUB_OFFLINE`).
    pub offline: bool,
}

impl HubSettings {
    /// The Hub itself.
    pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
}

/// Without the token.
impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache_dir", &self.cache_dir)
            .field("token", &self.token.as_ref().map(|_| "***"))
            .field("offline", &self.offline)
            .finish()
    }
}

/// Is told about downloads, one file at a time; `()` is silent.
pub trait DownloadProgress {
    /// `file`, of `total_bytes`, is now fetched. Comes again for the same file if the server cannot
    /// continue where it stopped.
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
        BaseSource::Path(dir) => folder::find(dir),
        BaseSource::Hub(source) => find_on_hub(source, settings, progress),
        BaseSource::Random(_) => bail!("a base of random weights has no files"),
    }
}

fn find_on_hub(
    source: &HubSource,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
) -> Result<BaseFiles> {
    check_names(source)?;
    let cache = RepoCache::new(&settings.cache_dir, &source.repo);
    let cached = find_in_cache(source, &cache);
    if settings.offline {
        return cached.map_err(|error| {
            anyhow!(
                "{error}; `HF_HUB_OFFLINE` forbids to fetch it\n\
                 hint: fetch it once without `HF_HUB_OFFLINE`, or use a folder: \
                 `base.source = {{ path = \"DIR\" }}`"
            )
        });
    }
    // a commit never changes; only a missing tokenizer.json is worth a question to the Hub
    if let Ok(files) = &cached
        && cache::is_commit(&source.revision)
        && files.tokenizer.is_some()
    {
        return cached;
    }
    let client = Client::new(source, settings)?;
    match client.repo_info() {
        Ok(info) => fetch_all(source, &info, &client, &cache, progress),
        Err(RequestError::Final(error)) => Err(error),
        Err(RequestError::Transient(error)) => match cached {
            Ok(files) => {
                let commit = files.commit.as_deref().unwrap_or_default();
                tracing::warn!("{error}; taking `{}` from the cache: {commit}", files.label);
                Ok(files)
            }
            Err(fault) => Err(anyhow!(
                "{error}; {fault}\n\
                 hint: check the network (a proxy is named by `HTTPS_PROXY`, a mirror of the Hub \
                 by `HF_ENDPOINT`), or use a folder: `base.source = {{ path = \"DIR\" }}`"
            )),
        },
    }
}

/// The cached files of the commit at which `source`'s revision last stood.
fn find_in_cache(source: &HubSource, cache: &RepoCache) -> Result<BaseFiles> {
    let label = label(source);
    let Some(commit) = cache.commit_of(&source.revision) else {
        bail!("`{label}` is not in the cache `{}`", cache.dir().display());
    };
    let snapshot = cache.snapshot(&commit);
    let layout = folder::layout(&snapshot).map_err(|error| {
        anyhow!("the cache `{}` has no whole copy of `{label}`: {error}", cache.dir().display())
    })?;
    Ok(layout.into_base(label, Some(commit)))
}

/// Fetches what the cache lacks of `info`'s commit.
fn fetch_all(
    source: &HubSource,
    info: &RepoInfo,
    client: &Client,
    cache: &RepoCache,
    progress: &dyn DownloadProgress,
) -> Result<BaseFiles> {
    let label = label(source);
    let place = format!("`{label}` on `{}`", client.endpoint());
    let get = |file: &str| fetch::fetch(file, &info.commit, client, cache, progress);

    if !info.has(CONFIG) {
        return Err(folder::no_config(&place, &info.files));
    }
    let single = info.has(WEIGHTS);
    if !single && !info.has(WEIGHTS_INDEX) {
        return Err(folder::no_weights(&place, &info.files));
    }
    let config = get(CONFIG)?;
    let tokenizer = if info.has(TOKENIZER) { Some(get(TOKENIZER)?) } else { None };
    let weights = if single {
        vec![get(WEIGHTS)?]
    } else {
        let shards = folder::shards(&get(WEIGHTS_INDEX)?)?;
        if let Some(shard) = shards.iter().find(|shard| !info.has(shard)) {
            bail!("{place} has no `{shard}`, which its `{WEIGHTS_INDEX}` names");
        }
        shards.iter().map(|shard| get(shard)).collect::<Result<_>>()?
    };
    // last, so that a reference never leads to a snapshot that was not whole
    cache.write_ref(&source.revision, &info.commit);
    Ok(BaseFiles { label, commit: Some(info.commit.clone()), config, weights, tokenizer })
}

fn label(source: &HubSource) -> String {
    format!("{}@{}", source.repo, source.revision)
}

/// Refuses a repository or revision that cannot exist, which also keeps both inside the cache.
fn check_names(source: &HubSource) -> Result<()> {
    let HubSource { repo, revision } = source;
    let is_name = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.contains("..")
            && !part.contains("--")
    };
    if repo.split('/').count() > 2 || !repo.split('/').all(is_name) {
        bail!(
            "`{repo}` is not the name of a repository\n\
             hint: `base.source.hub.repo` is like `openai-community/gpt2`; a folder is \
             `base.source = {{ path = \"DIR\" }}`"
        );
    }
    let is_step = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains("..");
    let odd = |c: char| c.is_control() || c.is_whitespace() || "\\:?*[~^".contains(c);
    if !revision.split('/').all(is_step) || revision.contains(odd) {
        bail!(
            "`{revision}` is not the name of a revision\n\
             hint: `base.source.hub.revision` is a branch (as a rule `main`), a tag or a commit"
        );
    }
    Ok(())
}

/// Whether `name`, from a file or the network, stays inside the folder that it is joined to.
fn is_inside(name: &str) -> bool {
    let plain = |part| matches!(part, std::path::Component::Normal(_));
    !name.is_empty() && !name.contains('\\') && Path::new(name).components().all(plain)
}
