//! JSON as Python's `json.dumps` writes it, for the filter `tojson`.
//!
//! transformers passes the arguments of `tojson` on to `json.dumps`, with `ensure_ascii` off. A
//! chat template was trained with exactly these texts, so separators and numbers are Python's:
//! `{"a": [1, 2.0, 1e-05]}`. Unlike Jinja's own filter, it escapes nothing for HTML.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// The most levels of nesting that are written.
const MAX_DEPTH: usize = 128;

/// The arguments of `json.dumps`.
struct Style {
    ensure_ascii: bool,
    /// What a level is indented by; without it, all is on one line.
    indent: Option<String>,
    /// Stands between items; with an indent, a line end follows.
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if args.len() > names.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut values = [const { None }; 4];
    for (at, name) in names.into_iter().enumerate() {
        let named: Option<Value> = kwargs.get(name)?;
        values[at] = args.get(at).cloned().or(named).filter(|value| !value.is_none());
    }
    kwargs.assert_all_used()?;
    let [ensure_ascii, indent, separators, sort_keys] = values;
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indent = indent.map(|indent| indent_text(&indent)).transpose()?;
    let item = if indent.is_some() { "," } else { ", " };
    let separators = separators.map(|pair| separator_texts(&pair)).transpose()?;
    let (item_separator, key_separator) = separators.unwrap_or((item.into(), ": ".into()));
    let style = Style {
        ensure_ascii: is_true(ensure_ascii),
        indent,
        item_separator,
        key_separator,
        sort_keys: is_true(sort_keys),
    };
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(out)
}

fn invalid(fault: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, fault.into())
}

/// `indent` as a number of spaces or as the text itself.
fn indent_text(indent: &Value) -> Result<String, Error> {
    if let Some(text) = indent.as_str() {
        return Ok(text.to_owned());
    }
    let spaces = indent.as_i64().filter(|spaces| *spaces <= 1000);
    let spaces = spaces.ok_or_else(|| {
        invalid(format!("`indent` of `tojson` must be a number of spaces, got `{indent}`"))
    })?;
    Ok(" ".repeat(spaces.max(0) as usize))
}

fn separator_texts(pair: &Value) -> Result<(String, String), Error> {
    let texts: Option<Vec<String>> = pair
        .try_iter()
        .ok()
        .and_then(|texts| texts.map(|text| text.as_str().map(str::to_owned)).collect());
    match texts.as_deref() {
        Some([item, key]) => Ok((item.clone(), key.clone())),
        _ => Err(invalid(format!("`separators` of `tojson` must be two strings, got `{pair}`"))),
    }
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("`tojson` of a value that is nested {depth} times")));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                let write = |item: &Value, out: &mut String| self.write(item, depth + 1, out);
                self.write_items('[', &items, ']', depth, out, write)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    items.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    items.sort_by(|(one, _), (other, _)| one.cmp(other));
                }
                let write = |(key, item): &(String, Value), out: &mut String| {
                    self.write_string(key, out);
                    out.push_str(&self.key_separator);
                    self.write(item, depth + 1, out)
                };
                self.write_items('{', &items, '}', depth, out, write)?;
            }
            kind => return Err(invalid(format!("a value of type {kind} has no JSON form"))),
        }
        Ok(())
    }

    fn write_items<T>(
        &self,
        open: char,
        items: &[T],
        close: char,
        depth: usize,
        out: &mut String,
        write: impl Fn(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line_end = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent.as_ref().filter(|_| !items.is_empty()) {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push(open);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                out.push_str(&self.item_separator);
            }
            line_end(depth + 1, out);
            write(item, out)?;
        }
        line_end(depth, out);
        out.push(close);
        Ok(())
    }

    fn write_string(&self, text: &str, out: &mut String) {
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..'\u{20}' => escape(character, out),
                '\u{7f}'.. if self.ensure_ascii => escape(character, out),
                _ => out.push(character),
            }
        }
        out.push('"');
    }
}

/// Writes a character as `\uXXXX`, or as two of them if it lies beyond U+FFFF.
fn escape(character: char, out: &mut String) {
    for unit in character.encode_utf16(&mut [0; 2]) {
        write!(out, "\\u{unit:04x}").expect("a string takes any text");
    }
}

/// A key of an object. Python turns `None`, booleans and numbers into strings.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => Ok(number(key)),
        kind => Err(invalid(format!("a value of type {kind} is no key of a JSON object"))),
    }
}

/// A number as Python writes it in JSON.
fn number(value: &Value) -> String {
    match float(value) {
        None => value.to_string(),
        Some(float) if float.is_nan() => "NaN".into(),
        Some(f64::INFINITY) => "Infinity".into(),
        Some(f64::NEG_INFINITY) => "-Infinity".into(),
        Some(float) => float_repr(float),
    }
}

/// The float that a value is, if it is one.
pub(super) fn float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    f64::try_from(value.clone()).ok().filter(|_| is_float)
}

/// Python's `repr` of a finite float: the shortest digits that read back, with an exponent below
/// 1e-4 and from 1e16 on.
pub(super) fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let parsed = scientific.split_once('e').and_then(|(digits, exponent)| {
        let exponent: i32 = exponent.parse().ok()?;
        Some((digits, exponent))
    });
    match parsed {
        Some((digits, exponent)) if !(-4..16).contains(&exponent) && float != 0.0 => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> String {
        let mut env = minijinja::Environment::new();
        env.add_filter("tojson", tojson);
        env.render_str(template, ()).map_err(|error| error.to_string()).unwrap_or_else(|e| e)
    }

    /// The expected texts are those of `json.dumps` in Python 3.
    #[test]
    fn tojson_is_json_dumps() {
        for (template, expected) in [
            (
                r#"{{ {"b": [1, 2.0, true, none], "a": {}} | tojson }}"#,
                r#"{"b": [1, 2.0, true, null], "a": {}}"#,
            ),
            (r#"{{ "<é'\u{1f600}&>" | tojson }}"#, r#""<é'\u{1f600}&>""#),
            (r#"{{ ["é", "😀"] | tojson(ensure_ascii=true) }}"#, r#"["\u00e9", "\ud83d\ude00"]"#),
            (
                r#"{{ {"b": 1, "a": [1, {}]} | tojson(indent=2, sort_keys=true) }}"#,
                "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": 1\n}",
            ),
            (r#"{{ [1, {"a": 2}] | tojson(separators=(",", ":")) }}"#, r#"[1,{"a":2}]"#),
            (r#"{{ [] | tojson(indent=4) }}{{ {} | tojson(false, 4) }}"#, "[]{}"),
            (r#"{{ [1, [2]] | tojson(indent="\t") }}"#, "[\n\t1,\n\t[\n\t\t2\n\t]\n]"),
            (r#"{{ {1: 2, true: 3, none: 4} | tojson }}"#, r#"{"1": 3, "null": 4}"#),
        ] {
            let template = template.replace(r"\u{1f600}", "😀");
            assert_eq!(render(&template), expected.replace(r"\u{1f600}", "😀"), "{template}");
        }
        let control = Value::from("\u{1}\u{1f}\u{7f}\u{8}\u{c}\n\r\t\"\\/");
        let mut env = minijinja::Environment::new();
        env.add_filter("tojson", tojson);
        let found = env.render_str("{{ x | tojson }}", minijinja::context!(x => control));
        assert_eq!(found.unwrap(), "\"\\u0001\\u001f\u{7f}\\b\\f\\n\\r\\t\\\"\\\\/\"");
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (float, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.25e100, "-1.25e+100"),
            (123_456_789.125, "123456789.125"),
        ] {
            assert_eq!(float_repr(float), expected);
        }
    }

    #[test]
    fn what_has_no_json_form_is_refused() {
        assert!(render("{{ x | tojson }}").contains("a value of type undefined has no JSON form"));
        assert!(render("{{ 1 | tojson(indent={}) }}").contains("must be a number of spaces"));
        assert!(render("{{ 1 | tojson(separators=1) }}").contains("must be two strings"));
        assert!(render("{{ 1 | tojson(tabs=1) }}").contains("tabs"));
    }
}
