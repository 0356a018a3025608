//! The fields of a request, taken one by one, so that an error names the field at fault and no
//! field is overlooked.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// The longest value that a message repeats, in characters.
const SHOWN: usize = 80;

/// The fields of a request's body that were not taken yet. A `null` counts as no field.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// A body that is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self::of(map)),
            Ok(other) => {
                Err(ApiError::invalid(format!("the body must be an object, got {}", shown(&other))))
            }
            Err(error) => Err(ApiError::invalid(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// The fields of an object.
    pub fn of(mut map: Map<String, Value>) -> Self {
        map.retain(|_, value| !value.is_null());
        Self(map)
    }

    /// A field of any type.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// A text.
    ///
    /// # Errors
    /// Another type.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, "a string", &other)),
        }
    }

    /// `true` or `false`; `false` if it is not there.
    ///
    /// # Errors
    /// Another type.
    pub fn boolean(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(wrong(name, "`true` or `false`", &other)),
        }
    }

    /// A number.
    ///
    /// # Errors
    /// Another type.
    pub fn number(&mut self, name: &str) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| wrong(name, "a number", &value))
    }

    /// A whole number.
    ///
    /// # Errors
    /// Another type, and a number that is not in the range.
    pub fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let what = match (*range.start(), *range.end()) {
            (i64::MIN, i64::MAX) => "a whole number".to_owned(),
            (low, i64::MAX) => format!("a whole number of at least {low}"),
            (low, high) => format!("a whole number from {low} to {high}"),
        };
        let found = value.as_i64().filter(|number| range.contains(number));
        found.map(Some).ok_or_else(|| wrong(name, &what, &value))
    }

    /// An object.
    ///
    /// # Errors
    /// Another type.
    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong(name, "an object", &other)),
        }
    }

    /// Drops fields that have no effect on the answer.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.take(name);
        }
    }

    /// Refuses a field, unless its value is the one that has no effect.
    ///
    /// # Errors
    /// Another value.
    pub fn refuse(
        &mut self,
        name: &str,
        has_no_effect: impl Fn(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !has_no_effect(&value) => {
                let message = format!("`{name}` is not supported, got {}", shown(&value));
                Err(ApiError::unsupported(name, message))
            }
            _ => Ok(()),
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// A field that was not taken.
    pub fn end(self) -> Result<(), ApiError> {
        let Some(name) = self.0.keys().next() else { return Ok(()) };
        let error = ApiError::field(name, format!("there is no field `{name}`"));
        Err(ApiError { code: Some("unknown_parameter"), ..error })
    }
}

/// The error of a value that is not what it should be.
pub fn wrong(name: &str, what: &str, found: &Value) -> ApiError {
    ApiError::field(name, format!("`{name}` must be {what}, got {}", shown(found)))
}

/// A value in a message.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}
