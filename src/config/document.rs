//! The text of a config with the place of each key and value, for messages.

use std::fmt;
use std::ops::Range;

use anyhow::{Result, anyhow};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One step on the way to a key: the key of a table or the index of an entry of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Key(String),
    Index(usize),
}

/// The dotted path of a key, as `data.domains[0].weight`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct KeyPath(pub Vec<Part>);

impl KeyPath {
    /// The path of a key below this one.
    pub fn key(&self, key: &str) -> Self {
        self.and(Part::Key(key.to_owned()))
    }

    /// The path of an entry of the list at this path.
    pub fn index(&self, index: usize) -> Self {
        self.and(Part::Index(index))
    }

    fn and(&self, part: Part) -> Self {
        Self(self.0.iter().cloned().chain([part]).collect())
    }

    /// The path with `[]` for every index.
    pub fn of_all_entries(&self) -> String {
        let step = |text: String, part: &Part| match part {
            Part::Index(_) => text + "[]",
            Part::Key(key) if text.is_empty() => key.clone(),
            Part::Key(key) => format!("{text}.{key}"),
        };
        self.0.iter().fold(String::new(), step)
    }

    /// The path without its last step.
    pub fn parent(&self) -> Self {
        Self(self.0[..self.0.len().saturating_sub(1)].to_vec())
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_bare = |key: &str| {
            !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
        };
        for (i, part) in self.0.iter().enumerate() {
            let dot = if i == 0 { "" } else { "." };
            match part {
                Part::Key(key) if is_bare(key) => write!(f, "{dot}{key}")?,
                Part::Key(key) => write!(f, "{dot}\"{key}\"")?,
                Part::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// A config's text, parsed as TOML.
pub(super) struct Document<'a> {
    text: &'a str,
    root: Spanned<DeTable<'a>>,
}

/// The first line of a span with a caret under the span, and the line's number, from 1.
fn excerpt(text: &str, span: Range<usize>) -> (usize, String) {
    let start = text[..span.start].rfind('\n').map_or(0, |at| at + 1);
    let number = text[..span.start].matches('\n').count() + 1;
    let line = text[start..].lines().next().unwrap_or_default();
    let column = text[start..span.start].chars().count();
    let end = span.end.min(start + line.len());
    let width = text[span.start..end.max(span.start)].chars().count().max(1);
    let margin = " ".repeat(number.to_string().len());
    let (indent, caret) = (" ".repeat(column), "^".repeat(width));
    (number, format!("{margin} |\n{number} | {line}\n{margin} | {indent}{caret}"))
}

/// Which part of an entry a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Key,
    Value,
}

impl<'a> Document<'a> {
    /// Parses a text.
    ///
    /// # Errors
    /// A text that is not TOML; the message shows the line.
    pub fn parse(text: &'a str) -> Result<Self> {
        let fault = |error: toml::de::Error| {
            let message = error.message().trim();
            match error.span() {
                Some(span) => {
                    let (number, excerpt) = excerpt(text, span);
                    anyhow!("line {number}: this is no TOML: {message}\n{excerpt}")
                }
                None => anyhow!("this is no TOML: {message}"),
            }
        };
        Ok(Self { text, root: DeTable::parse(text).map_err(fault)? })
    }

    /// The line of the entry at `path`, with a caret under the key or the value, and the line's
    /// number, from 1. `None` if the text has no such entry.
    pub fn excerpt(&self, path: &KeyPath, place: Place) -> Option<(usize, String)> {
        Some(excerpt(self.text, self.span(path, place)?))
    }

    fn span(&self, path: &KeyPath, place: Place) -> Option<Range<usize>> {
        let mut inside: Option<&Spanned<DeValue<'a>>> = None;
        let mut span = None;
        for part in &path.0 {
            let (key_span, value) = match part {
                Part::Key(name) => {
                    let table = match inside {
                        None => self.root.get_ref(),
                        Some(value) => value.get_ref().as_table()?,
                    };
                    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
                    (key.span(), value)
                }
                Part::Index(index) => {
                    let value = inside?.get_ref().as_array()?.get(*index)?;
                    (value.span(), value)
                }
            };
            span = Some(if place == Place::Key { key_span } else { value.span() });
            inside = Some(value);
        }
        span
    }
}
