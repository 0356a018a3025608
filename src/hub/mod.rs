//! The files of a base: from a local folder, or from a repository of the Hugging Face Hub.
//!
//! The Hub is asked once which commit the revision stands at and which files it has; only the
//! files that a GPT-2 needs are fetched, all at that commit. The crate `hf-hub` fetches them into
//! the cache that Python's `huggingface_hub` and `transformers` share, so that each finds what the
//! other has fetched:
//!
//! ```text
//! <cache_dir>/models--<owner>--<name>/refs/<revision>            the commit of a branch or tag
//!                                     snapshots/<commit>/<file>  links to
//!                                     blobs/<etag>               the content
//!                                     blobs/<etag>.part, .lock   the same while it is fetched
//! ```
//!
//! Limits of `hf-hub` 0.5, whose downloads cannot be set up otherwise: a token is sent to the host
//! that the Hub redirects large files to, too; a server that falls silent amid a file is waited for
//! without end; sizes are checked but hashes are not; a file that did not change from one commit to
//! the next is fetched again.

mod client;
mod fetch;
mod folder;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use hf_hub::api::RepoInfo;
use hf_hub::{Cache, Repo, RepoType};

use crate::config::{BaseSource, HubSource};
use client::{Client, Fault};

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
    /// Sent to `endpoint`, and to the host that it redirects large files to (`HF_TOKEN`).
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
    let cached = find_in_cache(source, &settings.cache_dir);
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
        && is_commit(&source.revision)
        && files.tokenizer.is_some()
    {
        return cached;
    }
    let client = Client::new(source, settings)?;
    match client.info() {
        Ok(info) => fetch_all(source, &info, &client, progress),
        Err(Fault::Final(error)) => Err(error),
        Err(Fault::Transient(error)) => match cached {
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
fn find_in_cache(source: &HubSource, cache_dir: &Path) -> Result<BaseFiles> {
    let label = label(source);
    let cache = Cache::new(cache_dir.to_owned()).repo(repo_at(source, &source.revision));
    let snapshot = if is_commit(&source.revision) {
        Some(cache.pointer_path(&source.revision)).filter(|dir| dir.is_dir())
    } else {
        cache.get(CONFIG).and_then(|path| path.parent().map(Path::to_owned))
    };
    let commit = snapshot.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    let (Some(snapshot), Some(commit)) = (&snapshot, commit.filter(|name| is_commit(name))) else {
        bail!("`{label}` is not in the cache `{}`", cache_dir.display());
    };
    let layout = folder::layout(snapshot).map_err(|error| {
        anyhow!("the cache `{}` has no whole copy of `{label}`: {error}", cache_dir.display())
    })?;
    Ok(layout.into_base(label, Some(commit.to_owned())))
}

/// Fetches what the cache lacks of `info`'s commit.
fn fetch_all(
    source: &HubSource,
    info: &RepoInfo,
    client: &Client,
    progress: &dyn DownloadProgress,
) -> Result<BaseFiles> {
    let label = label(source);
    let place = format!("`{label}` on `{}`", client.endpoint());
    let names: Vec<String> = info.siblings.iter().map(|file| file.rfilename.clone()).collect();
    let has = |file: &str| names.iter().any(|name| name == file);
    let get = |file: &str| client.fetch(file, &info.sha, progress);

    if !has(CONFIG) {
        return Err(folder::no_config(&place, &names));
    }
    let single = has(WEIGHTS);
    if !single && !has(WEIGHTS_INDEX) {
        return Err(folder::no_weights(&place, &names));
    }
    let config = get(CONFIG)?;
    let tokenizer = if has(TOKENIZER) { Some(get(TOKENIZER)?) } else { None };
    let weights = if single {
        vec![get(WEIGHTS)?]
    } else {
        let shards = folder::shards(&get(WEIGHTS_INDEX)?)?;
        if let Some(shard) = shards.iter().find(|shard| !has(shard)) {
            bail!("{place} has no `{shard}`, which its `{WEIGHTS_INDEX}` names");
        }
        shards.iter().map(|shard| get(shard)).collect::<Result<_>>()?
    };
    // last, so that a reference never leads to a snapshot that was not whole
    client.write_ref(&info.sha);
    Ok(BaseFiles { label, commit: Some(info.sha.clone()), config, weights, tokenizer })
}

fn repo_at(source: &HubSource, revision: &str) -> Repo {
    Repo::with_revision(source.repo.clone(), RepoType::Model, revision.to_owned())
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

/// Whether `revision` is a full commit hash: 40 hexadecimal digits.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}
