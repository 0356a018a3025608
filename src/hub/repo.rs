//! Finds a folder of a repository at one revision in the cache, and fetches what is missing there
//! from the Hub.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use hf_hub::Cache;

use super::client::{Client, Fault, RepoInfo};
use super::names::{Holds, RepoSource, is_commit};
use super::place::Place;
use super::settings::{DownloadProgress, HubSettings};

/// Finds the folder of `source` and returns what `collect` makes of it. Files that `collect` asks
/// for and the cache lacks are fetched.
///
/// - `is_whole`: whether the result for a cached commit has everything that the commit can have, so
///   that the Hub need not be asked
pub(super) fn find<F>(
    source: &RepoSource,
    settings: &HubSettings,
    progress: &dyn DownloadProgress,
    collect: &dyn Fn(&Place) -> Result<F>,
    is_whole: fn(&F) -> bool,
) -> Result<F> {
    source.check_names()?;
    let instead = source.instead();
    let cached = find_in_cache(source, &settings.cache_dir, collect);
    if settings.offline {
        return cached.map(|(_, files)| files).map_err(|error| {
            anyhow!(
                "{error}; `HF_HUB_OFFLINE` forbids fetching it\n\
                 hint: fetch it once without `HF_HUB_OFFLINE`, or {instead}"
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
                 by `HF_ENDPOINT`), or {instead}"
            )),
        },
    }
}

/// The commit that the revision of `source` pointed to when it was last fetched, and its cached
/// files.
fn find_in_cache<F>(
    source: &RepoSource,
    cache_dir: &Path,
    collect: &dyn Fn(&Place) -> Result<F>,
) -> Result<(String, F)> {
    let label = source.label();
    let cache = Cache::new(cache_dir.to_owned()).repo(source.repo_at(source.revision));
    // <cache>/models--<owner>--<name>/snapshots/<commit>/<subfolder>
    let snapshots = cache.pointer_path("");
    let dir = if is_commit(source.revision) {
        let snapshot = cache.pointer_path(source.revision);
        Some(snapshot.join(source.subfolder)).filter(|dir| dir.is_dir())
    } else if let Holds::Model { config_file, .. } = source.holds {
        let config = cache.get(&source.path_of(config_file));
        config.and_then(|path| path.parent().map(Path::to_owned))
    } else {
        // no file is in every data set
        let noted = snapshots.parent().map(|repo| repo.join("refs").join(source.revision));
        let commit = noted.and_then(|noted| fs_err::read_to_string(noted).ok());
        commit.map(|commit| snapshots.join(commit.trim())).filter(|dir| dir.is_dir())
    };
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

/// Fetches the files of `info`'s commit that the cache lacks.
fn fetch_all<F>(
    info: RepoInfo,
    client: &Client,
    progress: &dyn DownloadProgress,
    collect: &dyn Fn(&Place) -> Result<F>,
) -> Result<F> {
    let files = info.siblings.into_iter().map(|file| file.rfilename);
    let files = collect(&Place::on_hub(client, &info.sha, files, progress)?)?;
    // comes last, so that a reference never points to an incomplete snapshot
    client.write_ref(&info.sha);
    Ok(files)
}
