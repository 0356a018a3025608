//! `--set KEY=VALUE`: changes one key of a config before it is parsed.
//!
//! The key is a dotted path as in TOML, in which the entries of a list have their index from 0:
//! `data.domains.0.weight=2`.

use anyhow::{Result, anyhow, bail};
use toml::{Table, Value};

use super::document::KeyPath;

/// The most parts that the dotted path of a key has, with some to spare.
const MAX_KEY_PARTS: usize = 16;

/// One `dotted.key=value`.
pub(super) struct Override<'a> {
    item: &'a str,
    parts: Vec<&'a str>,
    /// The value. One that is not valid TOML is a string.
    pub value: Value,
}

impl<'a> Override<'a> {
    /// Parses an override.
    ///
    /// # Errors
    /// A text without `=`, and a path of far too many parts.
    pub fn parse(item: &'a str) -> Result<Self> {
        let Some((key, value)) = item.split_once('=') else {
            bail!("`--set {item}` has no `=`; write `--set lora.rank=16`");
        };
        let value = match format!("value = {value}").parse::<Table>() {
            Ok(mut parsed) => parsed.remove("value").expect("the key was just written"),
            Err(_) => Value::String(value.trim().to_owned()),
        };
        Ok(Self { item, parts: parts(key)?, value })
    }

    /// The path of the key.
    pub fn path(&self) -> KeyPath {
        self.parts.iter().fold(KeyPath::default(), |path, part| match part.parse::<usize>() {
            Ok(index) => path.index(index),
            Err(_) => path.key(part),
        })
    }

    /// Sets the value in `table`.
    ///
    /// # Errors
    /// A path that leads through a value that is neither a section nor a list, or through an entry
    /// that a list does not have.
    pub fn apply(self, table: &mut Table) -> Result<()> {
        let mut root = Value::Table(std::mem::take(table));
        let result = insert(&mut root, &self.parts, 0, self.value);
        if let Value::Table(changed) = root {
            *table = changed;
        }
        result.map_err(|error| anyhow!("in `--set {}`: {error}", self.item))
    }
}

/// The parts of a dotted key.
fn parts(key: &str) -> Result<Vec<&str>> {
    let parts: Vec<&str> = key.trim().split('.').collect();
    if parts.len() > MAX_KEY_PARTS {
        let (count, start) = (parts.len(), parts[..3].join("."));
        bail!("`--set` names a key of {count} parts, `{start}..`; no key has over {MAX_KEY_PARTS}");
    }
    Ok(parts)
}

/// Sets the value at `parts[depth..]` below `at`, which is at `parts[..depth]`. Sections that do
/// not exist are made.
fn insert(at: &mut Value, parts: &[&str], depth: usize, value: Value) -> Result<()> {
    let (part, is_last) = (parts[depth], depth + 1 == parts.len());
    let path = parts[..depth].join(".");
    let kind = at.type_str();
    let inner = match at {
        Value::Table(table) if is_last => {
            table.insert(part.to_owned(), value);
            return Ok(());
        }
        Value::Table(table) => {
            table.entry(part.to_owned()).or_insert_with(|| Value::Table(Table::new()))
        }
        Value::Array(items) => {
            let count = items.len();
            let entry = part.parse::<usize>().ok().and_then(|index| items.get_mut(index));
            entry.ok_or_else(|| match count {
                0 => anyhow!("`{path}` is an empty list"),
                1 => anyhow!("`{path}` is a list whose only entry is `{path}.0`, got `{part}`"),
                _ => {
                    let last = count - 1;
                    anyhow!(
                        "the entries of `{path}` are `{path}.0` to `{path}.{last}`, got `{part}`"
                    )
                }
            })?
        }
        _ => bail!("`{path}` is a TOML {kind}, not a section"),
    };
    if is_last {
        *inner = value;
        return Ok(());
    }
    insert(inner, parts, depth + 1, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(item: &str) -> Result<String> {
        let mut table: Table = "a = 1\nlist = [{ weight = 1 }, { weight = 1 }]".parse()?;
        Override::parse(item)?.apply(&mut table)?;
        Ok(toml::to_string(&table)?)
    }

    #[test]
    fn an_index_names_an_entry_of_a_list() {
        let text = changed("list.1.weight=2.5").expect("the entry exists");
        assert_eq!(text, "a = 1\n\n[[list]]\nweight = 1\n\n[[list]]\nweight = 2.5\n");
        let text = changed("list.0={weight = 3}").expect("the entry exists");
        assert!(text.contains("weight = 3\n\n[[list]]\nweight = 1\n"), "{text}");
    }

    #[test]
    fn a_path_that_leads_nowhere_is_refused() {
        let fault = |item: &str| changed(item).expect_err("it is refused").to_string();
        assert_eq!(
            fault("list.2.weight=1"),
            "in `--set list.2.weight=1`: the entries of `list` are `list.0` to `list.1`, got `2`"
        );
        assert!(fault("list.law.weight=1").ends_with("`list.1`, got `law`"));
        assert_eq!(fault("a.b=1"), "in `--set a.b=1`: `a` is a TOML integer, not a section");
    }
}
