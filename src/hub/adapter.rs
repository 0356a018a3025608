//! Finds the files of a LoRA adapter as PEFT's `save_pretrained` writes it: `adapter_config.json`
//! and `adapter_model.safetensors`.

use std::path::Path;

use anyhow::{Result, bail};

use super::files::AdapterFiles;
use super::place::Place;

pub(super) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLED_WEIGHTS: &str = "adapter_model.bin";

/// The config key of an adapter, for messages.
pub(super) const OPTION: &str = "source";

const HINT: &str = "hint: `source.path` is a folder with `adapter_config.json` and \
                    `adapter_model.safetensors`; an adapter of the Hub is \
                    `source = { hub = { repo = \"OWNER/NAME\" } }`";

/// The largest number of a folder's entries that an error lists.
const MAX_LISTED: usize = 8;

/// Finds the adapter in the user's folder `dir`.
pub(super) fn find_in_folder(dir: &Path) -> Result<AdapterFiles> {
    collect(&Place::user_folder(dir, "adapter", HINT)?)
}

/// The files of the adapter in `place`. It is an error if one of them is missing.
pub(super) fn collect(place: &Place) -> Result<AdapterFiles> {
    if !place.has(CONFIG) {
        bail!("{place} has no `{CONFIG}`; {}{}", contents(place)?, subfolder_hint(place)?);
    }
    if !place.has(WEIGHTS) && place.has(PICKLED_WEIGHTS) {
        bail!(
            "{place} has no `{WEIGHTS}`, only pickled weights, `{PICKLED_WEIGHTS}`, which are not \
             read\nhint: convert them with PEFT: `AutoPeftModelForCausalLM.from_pretrained(SOURCE)\
             .save_pretrained(DIR, safe_serialization=True)`"
        );
    }
    if !place.has(WEIGHTS) {
        bail!("{place} has no `{WEIGHTS}`; {}", contents(place)?);
    }
    Ok(AdapterFiles {
        label: place.label.clone(),
        commit: place.commit.clone(),
        config: place.get(CONFIG)?,
        weights: place.get(WEIGHTS)?,
    })
}

/// A clause for messages that says what `place` contains.
fn contents(place: &Place) -> Result<String> {
    let entries = place.entries()?;
    Ok(match entries.len() {
        0 => "it is empty".into(),
        _ => format!("it has {}", listed(entries.into_iter().collect())),
    })
}

/// A hint that names the folders in `place` that are adapters; empty if there are none.
fn subfolder_hint(place: &Place) -> Result<String> {
    let mut folders: Vec<String> = place.entries()?.into_iter().collect();
    folders.retain(|folder| place.has(&format!("{folder}/{CONFIG}")));
    if folders.is_empty() {
        return Ok(String::new());
    }
    Ok(format!(
        "\nhint: these folders in it are adapters; name one of them (on the Hub, by \
         `{OPTION}.hub.subfolder`): {}",
        listed(folders)
    ))
}

fn listed(names: Vec<String>) -> String {
    let quoted: Vec<_> = names.iter().take(MAX_LISTED).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(MAX_LISTED) {
        0 => quoted.join(", "),
        more => format!("{} and {more} more", quoted.join(", ")),
    }
}
