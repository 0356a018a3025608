//! Finds the parquet files of one split of a data set.
//!
//! Their paths say which split and configuration they belong to, as the Hub's own tools write them:
//!
//! ```text
//! data/train-00000-of-00002.parquet         split `train` of the only configuration
//! main/train-00000-of-00001.parquet         split `train` of the configuration `main`
//! main/train/0000.parquet                   the same on the branch `refs/convert/parquet`
//! train.parquet                             a split in one file
//! ```
//!
//! The numbers tell whether all files of a split are there. Those without a total are fetched last
//! file first, so that a cache with the first file has all of them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Error, Result, anyhow, bail};

use super::files::DatasetFiles;
use super::place::Place;
use crate::config::HubDataset;

/// The branch with the parquet files that the Hub makes of other files.
const CONVERTED: &str = "refs/convert/parquet";

/// The largest number of files that an error lists.
const MAX_LISTED: usize = 8;

/// Where a parquet file belongs.
#[derive(Debug, PartialEq)]
struct Shard<'a> {
    path: &'a str,
    config: Option<&'a str>,
    split: &'a str,
    /// The index of the file, and the number of files, as far as the path says them.
    index: Option<usize>,
    total: Option<usize>,
}

/// The files of `source` in `place`.
pub(super) fn collect(place: &Place, source: &HubDataset) -> Result<DatasetFiles> {
    let all = place.all_files()?;
    let shards: Vec<Shard> = all.iter().filter_map(|path| Shard::new(path)).collect();
    if shards.is_empty() {
        bail!(
            "{place} has no parquet files\nhint: `revision = \"{CONVERTED}\"` has those that the \
             Hub has made of other files, as a rule with the configuration `default`; or download \
             its files, and name them by `train`"
        );
    }
    let HubDataset { split, config, .. } = source;
    let of_split: Vec<&Shard> = shards.iter().filter(|shard| shard.split == split).collect();
    let mut by_config: BTreeMap<Option<&str>, Vec<&Shard>> = BTreeMap::new();
    for shard in of_split {
        by_config.entry(shard.config).or_default().push(shard);
    }
    let chosen = match config.as_deref() {
        Some(config) => by_config.remove(&Some(config)),
        None if by_config.len() == 1 => by_config.pop_first().map(|(_, shards)| shards),
        None => by_config.remove(&Some("default")),
    };
    let Some(mut chosen) = chosen else {
        return Err(not_found(place, source, &shards, by_config.keys().flatten().copied()));
    };
    chosen.sort_by_key(|shard| (shard.index, shard.path));
    let wanted = chosen.iter().find_map(|shard| shard.total).unwrap_or(chosen.len());
    let is_numbered = |(at, shard): (usize, &&Shard)| shard.index.is_none_or(|index| index == at);
    if chosen.len() != wanted || !chosen.iter().enumerate().all(is_numbered) {
        bail!("{place} has {} files of the split `{split}`, but not all of them", chosen.len());
    }
    let fetched = chosen.iter().rev().map(|shard| place.get(shard.path));
    let mut files = fetched.collect::<Result<Vec<_>>>()?;
    files.reverse();
    Ok(DatasetFiles { label: place.label.clone(), commit: place.commit.clone(), files })
}

/// The error for a split or a configuration that is not there, or a choice of several.
///
/// - `configs`: those that have the split
fn not_found<'a>(
    place: &Place,
    source: &HubDataset,
    shards: &[Shard],
    configs: impl Iterator<Item = &'a str>,
) -> Error {
    let split = &source.split;
    let configs: Vec<String> = configs.map(|config| format!("`{config}`")).collect();
    let splits: BTreeSet<String> = shards
        .iter()
        .map(|shard| match shard.config {
            None => format!("`{}`", shard.split),
            Some(config) => format!("`{}` of `{config}`", shard.split),
        })
        .collect();
    let shown: Vec<String> = splits.iter().take(MAX_LISTED).cloned().collect();
    let more = match splits.len().saturating_sub(MAX_LISTED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let seen = format!("its parquet files are of the splits {}{more}", shown.join(", "));
    match (&source.config, configs.is_empty()) {
        (None, false) => anyhow!(
            "{place} has the split `{split}` in several configurations\nhint: name one of them, as \
             `config`: {}",
            configs.join(", ")
        ),
        (Some(config), _) => {
            anyhow!("{place} has no split `{split}` of a configuration `{config}`; {seen}")
        }
        (None, true) => anyhow!("{place} has no split `{split}`; {seen}"),
    }
}

impl<'a> Shard<'a> {
    /// Where the file at `path` belongs; `None` if it is no parquet file.
    fn new(path: &'a str) -> Option<Self> {
        let stem = path.strip_suffix(".parquet")?;
        let (folder, name) = stem.rsplit_once('/').unwrap_or(("", stem));
        let mut folders: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
        if folders.first() == Some(&"data") {
            folders.remove(0);
        }
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if is_number(name) {
            let split = folders.pop()?;
            let (config, index) = (folders.last().copied(), name.parse().ok());
            return Some(Self { path, config, split, index, total: None });
        }
        let config = folders.last().copied();
        // NAME-00000-of-00002, in older data sets with a hash behind it
        let numbered = name.split_once("-of-").and_then(|(front, back)| {
            let (split, index) = front.rsplit_once('-')?;
            let total = back.split('-').next().filter(|total| is_number(total))?;
            Some((split, Some(index.parse().ok()?), Some(total.parse().ok()?)))
        });
        let (split, index, total) = numbered.unwrap_or((name, None, None));
        Some(Self { path, config, split, index, total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_split_and_configuration() {
        for (path, config, split, index, total) in [
            ("data/train-00000-of-00002.parquet", None, "train", Some(0), Some(2)),
            ("data/a/test-00001-of-00002-0f3b.parquet", Some("a"), "test", Some(1), Some(2)),
            ("main/train-00000-of-00001.parquet", Some("main"), "train", Some(0), Some(1)),
            ("main/train/0003.parquet", Some("main"), "train", Some(3), None),
            ("train_sft.parquet", None, "train_sft", None, None),
        ] {
            assert_eq!(Shard::new(path), Some(Shard { path, config, split, index, total }));
        }
        assert_eq!(Shard::new("0000.parquet"), None);
        assert_eq!(Shard::new("train.csv"), None);
    }
}
