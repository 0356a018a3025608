//! Reads the keys of a `config.json`, with errors that name the key and the value found.

use anyhow::{Result, bail};
use serde_json::{Map, Value};

/// The largest number of layers. It is far above that of any base.
const MAX_LAYERS: i64 = 10_000;
/// The largest width of a layer or number of heads.
pub(super) const MAX_WIDTH: i64 = 1 << 20;
/// The largest vocabulary or number of positions. With these limits, no product of sizes overflows.
const MAX_COUNT: i64 = 1 << 30;

/// A JSON object. A key that is null counts as absent, unless a method says otherwise.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys<'a>(pub &'a Map<String, Value>);

impl<'a> Keys<'a> {
    /// The value of a key, unless it is absent or null.
    pub fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// Whether a key is there, even if it is null.
    pub fn has(self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// A number of layers.
    pub fn layers(self, key: &str, default: i64) -> Result<i64> {
        self.whole(key, default, MAX_LAYERS)
    }

    /// A width or a number of heads.
    pub fn width(self, key: &str, default: i64) -> Result<i64> {
        self.whole(key, default, MAX_WIDTH)
    }

    /// Another size, such as that of the vocabulary.
    pub fn size(self, key: &str, default: i64) -> Result<i64> {
        self.whole(key, default, MAX_COUNT)
    }

    /// A whole number from 1 to `max`.
    fn whole(self, key: &str, default: i64, max: i64) -> Result<i64> {
        let value = self.get(key);
        match value.map_or(Some(default), Value::as_i64) {
            Some(size) if (1..=max).contains(&size) => Ok(size),
            found => {
                let found = value.map_or_else(|| format!("{found:?}"), Value::to_string);
                bail!("`{key}` must be a whole number from 1 to {max}, got {found}")
            }
        }
    }

    /// True or false.
    pub fn flag(self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => bail!("`{key}` must be true or false, got {other}"),
        }
    }

    /// A finite number above 0; `None` if the key is absent.
    pub(crate) fn positive(self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
                _ => bail!("`{key}` must be a number above 0, got {value}"),
            },
        }
    }

    /// A finite number of at least 0.
    pub(crate) fn at_least_zero(self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() && number >= 0.0 => Ok(number),
                _ => bail!("`{key}` must be a number of at least 0, got {value}"),
            },
        }
    }

    /// A text; `None` if the key is absent.
    pub fn text(self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => bail!("`{key}` must be a text, got {other}"),
        }
    }

    /// A list; `None` if the key is absent.
    pub fn list(self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => bail!("`{key}` must be a list, got {other}"),
        }
    }

    /// An object; `None` if the key is absent or the object is empty.
    pub fn object(self, key: &str) -> Result<Option<Keys<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(entries)) if entries.is_empty() => Ok(None),
            Some(Value::Object(entries)) => Ok(Some(Keys(entries))),
            Some(other) => bail!("`{key}` must be an object, got {other}"),
        }
    }

    /// The token ids of a key that holds one or a list. Those outside the vocabulary are left out.
    pub(crate) fn token_ids(
        self,
        key: &str,
        default: Option<i64>,
        vocab_size: i64,
    ) -> Result<Vec<u32>> {
        let ids: Vec<Option<i64>> = match self.0.get(key) {
            None => vec![default],
            Some(Value::Null) => vec![],
            Some(Value::Array(items)) => items.iter().map(Value::as_i64).collect(),
            Some(value) => vec![value.as_i64()],
        };
        if self.has(key) && ids.contains(&None) {
            bail!("`{key}` must be a token id or a list of them, got {}", self.0[key]);
        }
        let known = ids.into_iter().flatten().filter(|id| (0..vocab_size).contains(id));
        Ok(known.map(|id| id as u32).collect())
    }
}
