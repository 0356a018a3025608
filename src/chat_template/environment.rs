//! The environment in which templates are rendered: transformers' one
//! (`transformers/utils/chat_template_utils.py` of 5.17), as far as minijinja differs from it.
//!
//! One difference is left: a loop over `none` runs zero times, which is an error in Python.

use std::fmt;

use jiff::civil::DateTime;
use jiff::fmt::strtime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::json::{float, float_repr, tojson};

/// What a template says by `raise_exception`. It is the source of the rendering's error.
#[derive(Debug)]
pub(super) struct Refusal(pub String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// An environment without templates.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are the default ones"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    // errors then name the undefined variable in a release build too
    environment.set_debug(true);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| match float(value) {
        Some(float) if float.is_finite() => Ok(out.write_str(&float_repr(float))?),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("trim", trim);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", raise_exception);
    environment
}

/// The function `strftime_now`, for which it is `now`.
pub(super) fn strftime_now(now: DateTime) -> Value {
    Value::from_function(move |format: &str| {
        strtime::format(format, now).map_err(|error| {
            let fault = format!("`strftime_now` cannot write `{format}`: {error}");
            Error::new(ErrorKind::InvalidOperation, fault)
        })
    })
}

fn raise_exception(message: String) -> Result<(), Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Refusal(message)))
}

/// Jinja's test: what has a length and items. minijinja counts neither strings nor maps.
fn is_sequence(value: &Value) -> bool {
    let kinds = [ValueKind::Seq, ValueKind::String, ValueKind::Map, ValueKind::Undefined];
    kinds.contains(&value.kind())
}

/// Jinja's test: what `iter` takes. minijinja counts `none`.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Whether Python counts a character as white space. Rust does not count the four separators from
/// U+001C to U+001F.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Removes white space, or the given characters, from the ends of a text.
fn strip(text: &str, characters: Option<&str>, at_start: bool, at_end: bool) -> String {
    let is_stripped = |character| match characters {
        None => is_space(character),
        Some(characters) => characters.contains(character),
    };
    let text = if at_start { text.trim_start_matches(is_stripped) } else { text };
    let text = if at_end { text.trim_end_matches(is_stripped) } else { text };
    text.to_owned()
}

/// The filter `trim`.
fn trim(value: &Value, characters: Option<String>) -> String {
    strip(&value.to_string(), characters.as_deref(), true, true)
}

/// Methods of Python's types.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    let ends = match name {
        "strip" => (true, true),
        "lstrip" => (true, false),
        "rstrip" => (false, true),
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            return Ok(text.strip_prefix(prefix).unwrap_or(text).into());
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            return Ok(text.strip_suffix(suffix).unwrap_or(text).into());
        }
        "rsplit" => return rsplit(text, args),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    };
    let (characters,): (Option<&str>,) = from_args(args)?;
    Ok(strip(text, characters, ends.0, ends.1).into())
}

/// `str.rsplit` with a separator.
fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, rest): (&str, Rest<i64>) = from_args(args)?;
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    let most = rest.first().and_then(|most| usize::try_from(*most).ok());
    let mut parts: Vec<&str> = match most {
        Some(most) => text.rsplitn(most.saturating_add(1), separator).collect(),
        None => text.rsplit(separator).collect(),
    };
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}
