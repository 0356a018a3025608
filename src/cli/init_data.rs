//! The data of `dylora init`: which files belong to which domain, what they hold, and which files
//! are for validation.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::init_plan::{PlanDomain, PlanValidation, validation_fraction};
use super::table::{count, table};
use crate::config::RecordConfig;
use crate::data::{Detected, detect};

/// Names of files that say nothing about their domain.
const COMMON_NAMES: [&str; 6] = ["data", "dataset", "records", "samples", "train", "training"];
/// What a file of validation data has in its name instead of `train`.
const VALIDATION_NAMES: [&str; 5] = ["validation", "valid", "val", "dev", "eval"];

/// A value of `--data`: files of a domain.
#[derive(Debug, Clone)]
pub struct DataFiles {
    /// The domain's name.
    pub name: String,
    /// The path or glob, absolute.
    pub path: PathBuf,
    /// The files with what they hold.
    pub files: Vec<(PathBuf, Detected)>,
}

impl DataFiles {
    /// Looks at the files of `[NAME=]FILE`. Without a name, the file's is taken up to its first
    /// dot, or that of its folder if the file's says nothing.
    ///
    /// # Errors
    /// A path that no file has, and a file that training would refuse.
    pub fn open(argument: &str) -> Result<Self> {
        let (name, path) = match argument.split_once('=') {
            Some((name, path)) if !name.contains('/') && !name.is_empty() => (Some(name), path),
            _ => (None, argument),
        };
        let path = std::path::absolute(path).with_context(|| format!("`{path}`"))?;
        let mut files = vec![];
        for file in matches(&path)? {
            let detected = detect(&file, &RecordConfig::default())?;
            files.push((file, detected));
        }
        let name = match name {
            Some(name) => name.to_owned(),
            None => name_of(&path).with_context(|| {
                format!("`{argument}` has no name for a domain\nhint: `NAME={argument}`")
            })?,
        };
        Ok(Self { name, path, files })
    }

    /// The files in a line each, for people.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let row = |(file, found): &(PathBuf, Detected)| {
            let about = if found.is_exact { "" } else { "about " };
            vec![
                self.name.clone(),
                file.file_name().unwrap_or_default().display().to_string(),
                found.format.name().into(),
                found.shape.map_or("document", |shape| shape.name()).into(),
                format!("{about}{}", count(found.num_records)),
            ]
        };
        self.files.iter().map(row).collect()
    }
}

/// The table of all files.
pub fn files_table(data: &[DataFiles]) -> String {
    let rows = data.iter().flat_map(DataFiles::rows).collect();
    table(&["domain", "file", "format", "records are", "records"], rows)
}

/// The files of a path or glob, of which there is at least one.
fn matches(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if path.is_dir() {
        bail!("`{0}` is a folder\nhint: name its files, as `'{0}/*.jsonl'`", path.display());
    }
    let pattern = path.to_str().with_context(|| format!("`{}` is not UTF-8", path.display()))?;
    let found = glob::glob(pattern).into_iter().flatten().filter_map(Result::ok);
    let files: Vec<PathBuf> = found.filter(|path| path.is_file()).collect();
    match files.is_empty() {
        true => bail!("`{}` does not exist", path.display()),
        false => Ok(files),
    }
}

/// The name that a file gives its domain.
fn name_of(path: &Path) -> Option<String> {
    let stem = |path: &Path| -> Option<String> {
        let name = path.file_name()?.to_str()?.trim_start_matches('.');
        let stem = name.split('.').next()?;
        let is_name = !stem.is_empty() && !stem.contains(['*', '?', '[']);
        let says_nothing = COMMON_NAMES.contains(&stem.to_lowercase().as_str());
        (is_name && !says_nothing).then(|| stem.replace('=', "_"))
    };
    stem(path).or_else(|| stem(path.parent()?))
}

/// The domains of some files. Those with the same name are one domain.
pub fn domains(data: &[DataFiles]) -> Vec<PlanDomain> {
    let mut domains: Vec<PlanDomain> = vec![];
    for DataFiles { name, path, files } in data {
        let records: u64 = files.iter().map(|(_, found)| found.num_records).sum();
        match domains.iter_mut().find(|domain| domain.name == *name) {
            Some(domain) => {
                domain.train.push(path.clone());
                domain.records += records;
            }
            None => domains.push(PlanDomain {
                name: name.clone(),
                train: vec![path.clone()],
                validation: PlanValidation::Fraction(0.0),
                records,
            }),
        }
    }
    for domain in &mut domains {
        let beside: Option<Vec<PathBuf>> = domain.train.iter().map(|path| beside(path)).collect();
        domain.validation = match beside {
            Some(files) => PlanValidation::Files(files),
            None => PlanValidation::Fraction(validation_fraction(domain.records)),
        };
    }
    domains
}

/// The file of validation data beside `NAME.train.jsonl`, such as `NAME.validation.jsonl`.
fn beside(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let parts: Vec<&str> = name.split('.').collect();
    let at = parts.iter().position(|part| *part == "train")?;
    let with = |other: &str| {
        let mut parts = parts.clone();
        parts[at] = other;
        path.with_file_name(parts.join("."))
    };
    VALIDATION_NAMES.into_iter().map(with).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_has_the_name_of_its_file_or_of_the_folder() {
        for (path, name) in [
            ("/data/law.jsonl", Some("law")),
            ("/data/law.train.jsonl.zst", Some("law")),
            ("/data/law/train.jsonl", Some("law")),
            ("/data/law/*.parquet", Some("law")),
            ("/train.csv", None),
        ] {
            assert_eq!(name_of(Path::new(path)).as_deref(), name, "{path}");
        }
    }

    #[test]
    fn files_of_one_name_are_one_domain_and_validation_files_are_found() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let line = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
        for name in ["law.train.jsonl", "law.valid.jsonl", "code.jsonl", "more.jsonl"] {
            fs_err::write(dir.path().join(name), line.repeat(40))?;
        }
        let open = |argument: &str| {
            let path = dir.path().display();
            DataFiles::open(&argument.replace("DIR", &path.to_string()))
        };
        let data =
            [open("DIR/law.train.jsonl")?, open("DIR/code.jsonl")?, open("code=DIR/more.jsonl")?];
        let found = domains(&data);
        assert_eq!(found.len(), 2);
        let valid = dir.path().join("law.valid.jsonl");
        assert_eq!(found[0].validation, PlanValidation::Files(vec![valid]));
        assert_eq!((found[1].train.len(), found[1].records), (2, 80));
        assert_eq!(found[1].validation, PlanValidation::Fraction(0.1));
        insta::assert_snapshot!(files_table(&data), @r"
        | domain |            file | format |       records are | records |
        |--------|-----------------|--------|-------------------|---------|
        | law    | law.train.jsonl |  jsonl | prompt_completion |      40 |
        | code   |      code.jsonl |  jsonl | prompt_completion |      40 |
        | code   |      more.jsonl |  jsonl | prompt_completion |      40 |
        ");
        for (argument, expected) in [
            ("DIR/none.jsonl", "none.jsonl` does not exist"),
            ("DIR", "is a folder\nhint: name its files"),
            ("DIR/*.csv", "*.csv` does not exist"),
        ] {
            let error = open(argument).expect_err(argument).to_string();
            assert!(error.contains(expected), "{error}");
        }
        Ok(())
    }
}
