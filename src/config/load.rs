//! Reads a [`Config`]: parses the TOML file, applies `--set key=value` and checks what types
//! cannot.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_path_to_error::Segment;
use toml::Table;

use super::Config;
use super::document::{Document, KeyPath};
use super::inputs;
use super::overrides::Override;
use super::recipe::add_former_values;
pub use super::validate::validate;
use super::variables::Written;
use super::words::{Fault, faults, message};

/// Reads `path`, applies `overrides` (each `dotted.key=value`) in order and validates the result.
///
/// Relative paths of files to read are relative to the folder of `path` in the file, and to the
/// process's working folder in overrides. `run.dir` is relative to the working folder in both. All
/// are made absolute, so that a run's resolved config works from anywhere.
///
/// # Errors
/// If a key is unknown or has the wrong type (the error shows the line with a caret), if an
/// override is faulty (the error shows its text), or if [`validate`] finds faults (the error lists
/// all of them).
pub fn load(path: &Path, overrides: &[String]) -> Result<Config> {
    let text = fs_err::read_to_string(path).map_err(|error| {
        anyhow!("cannot read the config: {error}\nhint: `configs/` has one for each kind of run")
    })?;
    let read = || {
        let file = std::path::absolute(path)?;
        resolve_in(&text, overrides, file.parent().unwrap_or(Path::new("/")))
    };
    read().with_context(|| format!("in `{}`", path.display()))
}

/// Does the same as [`load`] with the text of a config file in the working folder.
///
/// ```
/// use dylora::config::load;
///
/// let text = r#"
///     run.dir = "runs/mine"
///     base.source = { path = "demo/base" }
///     data.domains = [{ name = "code", train = ["demo/data/code.train.jsonl"] }]
///     data.seq_len = 128
///     train.duration = { epochs = 1 }
///     lora.num_experts = 4
/// "#;
/// let config = load::resolve(text, &["lora.rank=16".to_owned()])?;
/// assert_eq!((config.lora.num_experts, config.lora.rank), (4, 16));
///
/// let error = load::resolve(text, &["lora.rang=16".to_owned()]).unwrap_err();
/// assert!(format!("{error:#}").contains("there is no key `lora.rang`"));
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// As for [`load`].
pub fn resolve(text: &str, overrides: &[String]) -> Result<Config> {
    resolve_in(text, overrides, &working_folder()?)
}

fn working_folder() -> Result<PathBuf> {
    std::env::current_dir().context("there is no working folder")
}

fn resolve_in(text: &str, overrides: &[String], folder: &Path) -> Result<Config> {
    let folders = Folders { file: folder.to_owned(), overrides: working_folder()? };
    let mut config = read(text, overrides, Some(&folders))?;
    config.fill_defaults();
    validate(&config)?;
    config.run.dir = std::path::absolute(&config.run.dir)
        .with_context(|| format!("no absolute form of `{}`", config.run.dir.display()))?;
    Ok(config)
}

/// Parses `text` and applies `overrides`, without validation. Paths stay as they are written.
pub fn parse(text: &str, overrides: &[String]) -> Result<Config> {
    read(text, overrides, None)
}

/// The folders in which the paths of input files begin.
struct Folders {
    file: PathBuf,
    overrides: PathBuf,
}

fn read(text: &str, overrides: &[String], folders: Option<&Folders>) -> Result<Config> {
    let document = Document::parse(text)?;
    let mut table: Table = text.parse()?;
    let mut written = Written::default();
    if let Err((path, fault)) = written.expand(&mut table) {
        bail!(message(&[Fault::of_parser(path, &fault)], Some(&document)));
    }
    if let Some(folders) = folders {
        inputs::make_absolute(&mut table, &folders.file, &mut written)?;
    }
    add_former_values(&mut table);
    let mut parsed = parse_table(&table);
    // a fault in the file is reported with its line, except for a missing key, which `--set` may
    // supply
    if let Err(faults) = &parsed
        && (overrides.is_empty() || faults.iter().any(|fault| !fault.is_missing))
    {
        bail!(message(faults, Some(&document)));
    }
    for item in overrides {
        let mut change = Override::parse(item)?;
        let path = change.path();
        if let Err((path, fault)) = written.expand_value(&mut change.value, &path) {
            bail!("in `--set {item}`: {}", message(&[Fault::of_parser(path, &fault)], None));
        }
        change.apply(&mut table)?;
        if let Some(folders) = folders {
            // what is still relative comes from the override
            inputs::make_absolute(&mut table, &folders.overrides, &mut written)?;
        }
        let next = parse_table(&table);
        if let Err(faults) = &next {
            let own: Vec<_> = faults.iter().filter(|fault| !fault.is_missing).cloned().collect();
            let own = if parsed.is_ok() { faults.clone() } else { own };
            if !own.is_empty() {
                bail!("in `--set {item}`: {}", message(&own, None));
            }
        }
        parsed = next;
    }
    let mut config = parsed.map_err(|faults| anyhow!(message(&faults, None)))?;
    config.written = written;
    Ok(config)
}

/// The config in `table`, or what is wrong with its keys and types.
fn parse_table(table: &Table) -> Result<Config, Vec<Fault>> {
    let parsed = serde_path_to_error::deserialize(table.clone());
    parsed.map_err(|error: serde_path_to_error::Error<toml::de::Error>| {
        let faults = faults(table);
        if !faults.is_empty() {
            return faults;
        }
        let path = error.path().iter().fold(KeyPath::default(), |path, part| match part {
            Segment::Map { key } => path.key(key),
            Segment::Seq { index } => path.index(*index),
            Segment::Enum { variant } => path.key(variant),
            Segment::Unknown => path,
        });
        vec![Fault::of_parser(path, error.inner().message())]
    })
}

/// The config as TOML, with every default filled in. Texts with variables are as they were written.
pub fn to_toml(config: &Config) -> String {
    let mut table = Table::try_from(config).expect("every config value has a TOML form");
    config.written.restore(&mut table);
    toml::to_string(&table).expect("every config value has a TOML form")
}
