//! Reads a [`Config`]: parses the TOML file, applies `--set key=value` and checks what types
//! cannot.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::recipe::add_former_values;
pub use super::validate::validate;
use super::{AdapterSource, BaseSource, Config, Validation};

/// Reads `path`, applies `overrides` (each `dotted.key=value`) in order and validates the result.
///
/// Relative paths, in the file and in overrides, are relative to the process's working folder. They
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
    resolve(&text, overrides).with_context(|| format!("in `{}`", path.display()))
}

/// Does the same as [`load`] with the text of a config file.
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
/// assert!(format!("{error:#}").contains("unknown field `rang`"));
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// As for [`load`].
pub fn resolve(text: &str, overrides: &[String]) -> Result<Config> {
    let mut config = parse(text, overrides)?;
    config.fill_defaults();
    validate(&config)?;
    make_absolute(&mut config)?;
    Ok(config)
}

/// Parses `text` and applies `overrides`, without validation.
pub fn parse(text: &str, overrides: &[String]) -> Result<Config> {
    let mut parsed = toml::from_str::<Config>(text);
    // a fault in the file is reported with its line, except for a missing key, which `--set` may
    // supply
    if let Err(error) = &parsed
        && (overrides.is_empty() || !error.message().starts_with("missing field"))
    {
        bail!("{error}");
    }
    let mut table: toml::Table = text.parse()?;
    add_former_values(&mut table);
    if parsed.is_ok() {
        parsed = table.clone().try_into::<Config>();
    }
    for item in overrides {
        set(&mut table, item)?;
        let next = table.clone().try_into::<Config>();
        if let (Ok(_), Err(error)) = (&parsed, &next) {
            bail!("in `--set {item}`: {}", error.to_string().trim_end());
        }
        parsed = next;
    }
    Ok(parsed?)
}

/// The most parts that the dotted path of a key has, with some to spare.
const MAX_KEY_PARTS: usize = 16;

/// Sets one `dotted.key=value` in `table`. A value that is not valid TOML is a string.
fn set(table: &mut toml::Table, item: &str) -> Result<()> {
    let Some((key, value)) = item.split_once('=') else {
        bail!("`--set {item}` has no `=`; write `--set lora.rank=16`");
    };
    let value = match format!("value = {value}").parse::<toml::Table>() {
        Ok(mut parsed) => parsed.remove("value").expect("the key was just written"),
        Err(_) => toml::Value::String(value.trim().to_owned()),
    };
    let parts: Vec<&str> = key.trim().split('.').collect();
    if parts.len() > MAX_KEY_PARTS {
        let (count, start) = (parts.len(), parts[..3].join("."));
        bail!("`--set` names a key of {count} parts, `{start}..`; no key has over {MAX_KEY_PARTS}");
    }
    let (last, sections) = parts.split_last().expect("split yields at least one part");
    let mut at = table;
    for (depth, section) in sections.iter().enumerate() {
        let entry =
            at.entry(section.to_string()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let kind = entry.type_str();
        at = entry.as_table_mut().ok_or_else(|| {
            let path = parts[..=depth].join(".");
            anyhow!("in `--set {item}`: `{path}` is a TOML {kind}, not a section")
        })?;
    }
    at.insert(last.to_string(), value);
    Ok(())
}

/// The config as TOML, with every default filled in.
pub fn to_toml(config: &Config) -> String {
    toml::to_string(config).expect("every config value has a TOML form")
}

/// Makes every path absolute, relative to the working folder.
fn make_absolute(config: &mut Config) -> Result<()> {
    let absolute = |path: &Path| -> Result<PathBuf> {
        std::path::absolute(path)
            .with_context(|| format!("no absolute form of `{}`", path.display()))
    };
    config.run.dir = absolute(&config.run.dir)?;
    if let BaseSource::Path(path) = &mut config.base.source {
        *path = absolute(path)?;
    }
    for path in [&mut config.base.tokenizer, &mut config.base.chat_template].into_iter().flatten() {
        *path = absolute(path)?;
    }
    for expert in &mut config.lora.experts {
        if let Some(AdapterSource::Path(path)) = &mut expert.source {
            *path = absolute(path)?;
        }
    }
    if let Some(path) = &mut config.router.source {
        *path = absolute(path)?;
    }
    for domain in &mut config.data.domains {
        let files = match &mut domain.validation {
            Some(Validation::Files(files)) => files.iter_mut(),
            _ => [].iter_mut(),
        };
        for file in domain.train.iter_mut().chain(files) {
            *file = absolute(Path::new(file.as_str()))?
                .into_os_string()
                .into_string()
                .map_err(|path| anyhow!("`{}` is not valid UTF-8", path.display()))?;
        }
    }
    Ok(())
}
