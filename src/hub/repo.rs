//! A folder of a repository at one revision: from the cache, or from the Hub into it.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use hf_hub::{Cache, Repo, RepoType};

use super::client::{Client, Fault, RepoInfo};
use super::place::Place;
use super::{DownloadProgress, HubSettings};

/// What is looked for on the Hub.
pub(super) struct RepoSource<'a> {
    pub(super) repo: &'a str,
    pub(super) revision: &'a str,
    /// The folder in the repository; empty for its root.
    pub(super) subfolder: &'a str,
    /// The file in the folder without which the cache has nothing of it.
    pub(super) config_file: &'static str,
    /// The config's key for it, such as `base.source`, in messages.
    pub(super) option: &'static str,
}

impl RepoSource<'_> {
    /// Its name in messages: `repo@revision`, and the folder behind a slash if there is one.
    pub(super) fn label(&self) -> String {
        let Self { repo, revision, subfolder, .. } = self;
        let slash = if subfolder.is_empty() { "" } else { "/" };
        format!("{repo}@{revision}{slash}{subfolder}")
    }

    /// The path in the repository of the folder's `file`.
    pub(super) fn path_of(&self, file: &str) -> String {
        match self.subfolder {
            "" => file.to_owned(),
            subfolder => format!("{subfolder}/{file}"),
        }
    }

    /// The repository at `revision`, as `hf-hub` names it.
    pub(super) fn repo_at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.to_owned(), RepoType::Model, revision.to_owned())
    }

    /// Refuses names that cannot exist, which also keeps them inside the cache.
    fn check_names(&self) -> Result<()> {
        let Self { repo, revision, subfolder, option, .. } = self;
        let is_name = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !part.contains("..")
                && !part.contains("--")
        };
        if repo.split('/').count() > 2 || !repo.split('/').all(is_name) {
            bail!(
                "`{repo}` is not the name of a repository\n\
                 hint: `{option}.hub.repo` is like `openai-community/gpt2`; a folder is \
                 `{option} = {{ path = \"DIR\" }}`"
            );
        }
        let is_step =
            |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains("..");
        let odd = |c: char| c.is_control() || c.is_whitespace() || "\\:?*[~^".contains(c);
        if !revision.split('/').all(is_step) || revision.contains(odd) {
            bail!(
                "`{revision}` is not the name of a revision\n\
                 hint: `{option}.hub.revision` is a branch (as a rule `main`), a tag or a commit"
            );
        }
        // the Hub has no such folders, and they would mean other ones in an address
        let odd = |c: char| odd(c) || "#%".contains(c);
        if !subfolder.is_empty() && (!subfolder.split('/').all(is_step) || subfolder.contains(odd))
        {
            bail!(
                "`{subfolder}` is not the name of a folder\n\
                 hint: `{option}.hub.subfolder` is a path in the repository, like `expert_0`"
            );
        }
        Ok(())
    }
}

/// What `collect` makes of the folder's files, which are fetched as far as the cache lacks them.
///
/// - `is_whole`: whether a commit's files that are in the cache are all that it can have, so that
///   the Hub is not asked
pub(super) fn find<F>(
    source: &RepoSource,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
    collect: fn(&Place) -> Result<F>,
    is_whole: fn(&F) -> bool,
) -> Result<F> {
    source.check_names()?;
    let option = source.option;
    let cached = find_in_cache(source, &settings.cache_dir, collect);
    if settings.offline {
        return cached.map(|(_, files)| files).map_err(|error| {
            anyhow!(
                "{error}; `HF_HUB_OFFLINE` forbids to fetch it\n\
                 hint: fetch it once without `HF_HUB_OFFLINE`, or use a folder: \
                 `{option} = {{ path = \"DIR\" }}`"
            )
        });
    }
    let cached = match cached {
        // a commit never changes
        Ok((_, files)) if is_commit(source.revision) && is_whole(&files) => return Ok(files),
        cached => cached,
    };
    let client = Client::new(source, settings)?;
    match client.info() {
        Ok(info) => fetch_all(info, &client, progress, collect),
        Err(Fault::Final(error)) => Err(error),
        Err(Fault::Transient(error)) => match cached {
            Ok((commit, files)) => {
                tracing::warn!("{error}; taking `{}` from the cache: {commit}", source.label());
                Ok(files)
            }
            Err(fault) => Err(anyhow!(
                "{error}; {fault}\n\
                 hint: check the network (a proxy is named by `HTTPS_PROXY`, a mirror of the Hub \
                 by `HF_ENDPOINT`), or use a folder: `{option} = {{ path = \"DIR\" }}`"
            )),
        },
    }
}

/// The commit at which `source`'s revision last stood, and its cached files.
fn find_in_cache<F>(
    source: &RepoSource,
    cache_dir: &Path,
    collect: fn(&Place) -> Result<F>,
) -> Result<(String, F)> {
    let label = source.label();
    let cache = Cache::new(cache_dir.to_owned()).repo(source.repo_at(source.revision));
    let dir = if is_commit(source.revision) {
        let snapshot = cache.pointer_path(source.revision);
        Some(snapshot.join(source.subfolder)).filter(|dir| dir.is_dir())
    } else {
        let config = cache.get(&source.path_of(source.config_file));
        config.and_then(|path| path.parent().map(Path::to_owned))
    };
    // <cache>/models--<owner>--<name>/snapshots/<commit>/<subfolder>
    let snapshots = cache.pointer_path("");
    let below = dir.as_ref().and_then(|dir| dir.strip_prefix(&snapshots).ok());
    let commit = below.and_then(|path| path.iter().next()?.to_str()).filter(|name| is_commit(name));
    let (Some(dir), Some(commit)) = (&dir, commit) else {
        bail!("`{label}` is not in the cache `{}`", cache_dir.display());
    };
    let place = Place::cached(label, commit, dir.clone());
    let files = collect(&place).map_err(|error| {
        let (cache, label) = (cache_dir.display(), &place.label);
        anyhow!("the cache `{cache}` has no whole copy of `{label}`: {error}")
    })?;
    Ok((commit.to_owned(), files))
}

/// Fetches what the cache lacks of `info`'s commit.
fn fetch_all<F>(
    info: RepoInfo,
    client: &Client,
    progress: &dyn DownloadProgress,
    collect: fn(&Place) -> Result<F>,
) -> Result<F> {
    let files = info.siblings.into_iter().map(|file| file.rfilename);
    let files = collect(&Place::on_hub(client, &info.sha, files, progress)?)?;
    // last, so that a reference never leads to a snapshot that was not whole
    client.write_ref(&info.sha);
    Ok(files)
}

/// Whether `revision` is a full commit hash: 40 hexadecimal digits.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}
