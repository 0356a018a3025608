//! Environment variables in the texts of a config: `${NAME}` stands for the value of `NAME`, and
//! `$${` for `${` itself. Any other `$` stands for itself.
//!
//! The library does not read the environment: whoever calls it says where values come from
//! ([`provide`]), as the command line does. A run saves its config as it was written, with
//! `${NAME}` in it, so that neither secrets nor a machine's folders get into it by a variable.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use anyhow::{Result, anyhow, bail};
use toml::{Table, Value};

use super::document::KeyPath;

/// Finds the value of a variable.
pub type Lookup = fn(&str) -> Option<String>;

static LOOKUP: OnceLock<Lookup> = OnceLock::new();

/// Sets where the values of variables come from, for the whole process. The first call counts.
/// Without it, no variable is set.
pub fn provide(lookup: Lookup) {
    LOOKUP.get_or_init(|| lookup);
}

/// The texts of a config that were written with variables: the key, with `[]` for every index, and
/// the text that it stands for, with the text as it was written.
#[derive(Debug, Clone, Default)]
pub struct Written(BTreeMap<(String, String), String>);

/// How a config was written does not change what it means.
impl PartialEq for Written {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Written {
    /// Replaces the variables in all texts of `table`, and notes how they were written.
    ///
    /// # Errors
    /// A variable that is not set, and `${` without the name of one, with the key.
    pub(super) fn expand(&mut self, table: &mut Table) -> Result<(), (KeyPath, String)> {
        visit(table, &KeyPath::default(), &mut |path, text| self.expand_text(path, text))
    }

    /// Does the same with the value at `path`.
    pub(super) fn expand_value(
        &mut self,
        value: &mut Value,
        path: &KeyPath,
    ) -> Result<(), (KeyPath, String)> {
        visit_value(value, path, &mut |path, text| self.expand_text(path, text))
    }

    fn expand_text(&mut self, path: &KeyPath, text: &mut String) -> Result<(), (KeyPath, String)> {
        if !text.contains("${") {
            return Ok(());
        }
        let lookup = |name: &str| LOOKUP.get().and_then(|lookup| lookup(name));
        let expanded =
            expanded(text, &lookup).map_err(|fault| (path.clone(), fault.to_string()))?;
        let written = std::mem::replace(text, expanded.clone());
        self.0.insert((path.of_all_entries(), expanded), written);
        Ok(())
    }

    /// Notes that the text `before` at `key` has become `after`, in which the beginning was added.
    pub(super) fn moved(&mut self, key: &str, before: &str, after: &str) {
        let Some(written) = self.0.get(&(key.to_owned(), before.to_owned())) else { return };
        if let Some(start) = after.strip_suffix(before) {
            let written = escaped(start) + written;
            self.0.insert((key.to_owned(), after.to_owned()), written);
        }
    }

    /// Writes the texts of `table` as [`Self::expand`] found them, and escapes `${` in the others.
    pub(super) fn restore(&self, table: &mut Table) {
        let restored = visit::<()>(table, &KeyPath::default(), &mut |path, text| {
            let known = (path.of_all_entries(), text.clone());
            *text = self.0.get(&known).cloned().unwrap_or_else(|| escaped(text));
            Ok(())
        });
        restored.expect("nothing fails");
    }
}

/// A text in which `${` stands for itself.
fn escaped(text: &str) -> String {
    text.replace("${", "$${")
}

/// Calls `change` with each text below `table` and its key.
fn visit<E>(
    table: &mut Table,
    path: &KeyPath,
    change: &mut dyn FnMut(&KeyPath, &mut String) -> Result<(), E>,
) -> Result<(), E> {
    table.iter_mut().try_for_each(|(key, value)| visit_value(value, &path.key(key), change))
}

fn visit_value<E>(
    value: &mut Value,
    path: &KeyPath,
    change: &mut dyn FnMut(&KeyPath, &mut String) -> Result<(), E>,
) -> Result<(), E> {
    match value {
        Value::String(text) => change(path, text),
        Value::Table(table) => visit(table, path, change),
        Value::Array(items) => items
            .iter_mut()
            .enumerate()
            .try_for_each(|(index, item)| visit_value(item, &path.index(index), change)),
        _ => Ok(()),
    }
}

/// A text with the values of its variables.
fn expanded(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let (mut done, mut rest) = (String::new(), text);
    while let Some(at) = rest.find("${") {
        let (before, after) = (&rest[..at], &rest[at + 2..]);
        if let Some(before) = before.strip_suffix('$') {
            done += before;
            done += "${";
            rest = after;
            continue;
        }
        let Some((name, behind)) = after.split_once('}') else {
            bail!("`{text}` has `${{` without `}}`\nhint: write `$${{` for `${{` itself");
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || !name.chars().all(is_name) {
            bail!("`${{{name}}}` is no variable\nhint: write `$${{` for `${{` itself");
        }
        let value = lookup(name).ok_or_else(|| {
            anyhow!(
                "the environment variable `{name}` is not set, which `{text}` needs\nhint: set it, \
                 or write `$${{` for `${{` itself"
            )
        })?;
        done += before;
        done += &value;
        rest = behind;
    }
    Ok(done + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<String> {
        expanded(text, &|name| (name == "DATA").then(|| "/data".to_owned()))
    }

    #[test]
    fn variables_are_replaced_and_escapes_are_taken_away() {
        let is = |text: &str, value: &str| assert_eq!(of(text).expect("it is sound"), value);
        is("${DATA}/law.jsonl", "/data/law.jsonl");
        is("a${DATA}b${DATA}", "a/datab/data");
        is("$${DATA} and ${DATA}", "${DATA} and /data");
        is("costs $5 or $", "costs $5 or $");
        is(&escaped("x ${A} ${"), "x ${A} ${");
    }

    #[test]
    fn faulty_variables_are_refused() {
        let fault = |text: &str| of(text).expect_err("it is refused").to_string();
        assert!(fault("${OTHER}/x").starts_with("the environment variable `OTHER` is not set"));
        assert!(fault("${OTHER").contains("without `}`"));
        assert!(fault("${a b}").starts_with("`${a b}` is no variable"));
    }
}
