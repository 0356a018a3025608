//! Says in words what is wrong with the keys and types of a config that cannot be read, by the
//! schema of [`Config`](super::Config): the key, the value found, its line, and what would be
//! right.

use serde_json::Value as Schema;
use toml::{Table, Value};

use super::document::{Document, KeyPath, Part, Place};
use super::guesses;
use super::schema::{
    basic, definition, held, meaning, properties, required, resolved, schema, type_of, variants,
    written,
};

/// The most characters of a value that a message shows.
const MAX_SHOWN: usize = 60;

/// Something wrong with an entry of a config.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    path: KeyPath,
    place: Place,
    /// Whether the entry is not there, so that an override may still supply it.
    pub is_missing: bool,
    text: String,
}

impl Fault {
    fn new(path: KeyPath, place: Place, text: String) -> Self {
        Self { path, place, is_missing: false, text }
    }

    /// A fault of the value at `path` that the schema does not know, in the parser's words.
    pub fn of_parser(path: KeyPath, message: &str) -> Self {
        let text = match path.0.is_empty() {
            true => message.trim().to_owned(),
            false => format!("`{path}`: {}", message.trim()),
        };
        // the key of a table such as `lora.rank_pattern` may be what is wrong
        let is_key = |last: &Part| match last {
            Part::Key(key) => message.starts_with(&format!("`{key}`")),
            Part::Index(_) => false,
        };
        let place = if path.0.last().is_some_and(is_key) { Place::Key } else { Place::Value };
        Self::new(path, place, text)
    }
}

/// The message about `faults`. Those of entries of `document` show their lines.
pub(super) fn message(faults: &[Fault], document: Option<&Document<'_>>) -> String {
    let line = |fault: &Fault| {
        // of an entry that is missing, the line of what should have it is shown
        let (path, place) = match fault.is_missing {
            true => (fault.path.parent(), Place::Key),
            false => (fault.path.clone(), fault.place),
        };
        document.and_then(|document| document.excerpt(&path, place))
    };
    let mut told: Vec<(usize, String)> = vec![];
    for fault in faults {
        let (text, hint) = match fault.text.split_once("\nhint: ") {
            Some((text, hint)) => (text, format!("\nhint: {hint}")),
            None => (fault.text.as_str(), String::new()),
        };
        told.push(match line(fault) {
            Some((number, excerpt)) => (number, format!("line {number}: {text}\n{excerpt}{hint}")),
            None => (usize::MAX, format!("{text}{hint}")),
        });
    }
    told.sort_by_key(|(number, _)| *number);
    told.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("\n")
}

/// What is wrong with the keys and types of `table`, as far as the schema knows.
pub(super) fn faults(table: &Table) -> Vec<Fault> {
    let mut faults = vec![];
    check_keys(schema(), table, &KeyPath::default(), &mut faults);
    faults
}

/// Checks a value.
fn check(found: &Value, wanted: &'static Schema, path: &KeyPath, faults: &mut Vec<Fault>) {
    let schema = resolved(wanted);
    if let Some(choices) = variants(schema) {
        return check_choice(found, choices, path, faults);
    }
    if properties(schema).is_some() {
        return match found {
            Value::Table(table) => check_keys(schema, table, path, faults),
            _ => faults.push(wrong_type(found, "a table".into(), path)),
        };
    }
    if let Some(any) = schema.get("anyOf").and_then(Schema::as_array) {
        let fits = |one: &'static Schema| {
            let mut faults = vec![];
            check(found, one, path, &mut faults);
            faults.is_empty()
        };
        if !any.iter().any(fits) {
            let kinds: Vec<String> = any.iter().map(with_article).collect();
            faults.push(wrong_type(found, kinds.join(" or "), path));
        }
        return;
    }
    check_basic(found, schema, path, faults);
}

/// Checks a value whose type is one of JSON's.
fn check_basic(found: &Value, schema: &'static Schema, path: &KeyPath, faults: &mut Vec<Fault>) {
    let fits = match (found, base_type(schema)) {
        (Value::String(_), "string")
        | (Value::Boolean(_), "boolean")
        | (Value::Float(_) | Value::Integer(_), "number") => true,
        (Value::Integer(number), "integer") => {
            if *number < 0 && schema["minimum"] == 0 {
                let text = format!("`{path}` must be at least 0, got {number}");
                faults.push(Fault::new(path.clone(), Place::Value, text));
            }
            true
        }
        (Value::Array(items), "array") => {
            let count = schema["minItems"].as_u64();
            if let Some(count) = count.filter(|&count| count != items.len() as u64) {
                let text = format!("`{path}` must have {count} entries, got {}", items.len());
                faults.push(Fault::new(path.clone(), Place::Value, text));
            }
            for (index, item) in items.iter().enumerate() {
                check(item, &schema["items"], &path.index(index), faults);
            }
            true
        }
        (Value::Table(table), "object") => {
            for (key, value) in table {
                check(value, &schema["additionalProperties"], &path.key(key), faults);
            }
            true
        }
        _ => false,
    };
    if !fits {
        faults.push(wrong_type(found, with_article(schema), path));
    }
}

/// Checks the keys of a struct and their values.
fn check_keys(schema: &'static Schema, table: &Table, path: &KeyPath, faults: &mut Vec<Fault>) {
    let Some(keys) = properties(schema) else { return };
    for (key, value) in table {
        match keys.get(key) {
            Some(wanted) => check(value, wanted, &path.key(key), faults),
            None => faults.push(unknown(key, value, keys.keys().map(String::as_str), path)),
        }
    }
    for key in required(schema).filter(|key| !table.contains_key(*key)) {
        missing(&keys[key], &path.key(key), faults);
    }
}

/// Adds the fault that a key is missing; of a section, the keys that it must have.
fn missing(wanted: &'static Schema, path: &KeyPath, faults: &mut Vec<Fault>) {
    let schema = resolved(wanted);
    if let Some(keys) = properties(schema) {
        for key in required(schema) {
            missing(&keys[key], &path.key(key), faults);
        }
        return;
    }
    let about = meaning(wanted);
    let about = match about.split_once(". ") {
        Some((first, _)) => first,
        None => about.trim_end_matches('.'),
    };
    let kind = match variants(schema) {
        Some(choices) => one_of(choices),
        None => with_article(schema),
    };
    let text = format!("`{path}` is missing, {kind}: {about}");
    let fault = Fault::new(path.clone(), Place::Key, text);
    faults.push(Fault { is_missing: true, ..fault });
}

/// The fault of a key that does not exist.
fn unknown<'a>(
    key: &str,
    value: &Value,
    siblings: impl Iterator<Item = &'a str> + Clone,
    section: &KeyPath,
) -> Fault {
    let path = section.key(key);
    let text = match guesses::suggestion(section, key, value, siblings.clone()) {
        Some(right) => format!("there is no key `{path}`; did you mean `{right}`?"),
        None => {
            let names: Vec<String> = siblings.map(|name| format!("`{name}`")).collect();
            let of = match section.0.is_empty() {
                true => "the top level".to_owned(),
                false => format!("`{section}`"),
            };
            format!("there is no key `{path}`; the keys of {of} are {}", names.join(", "))
        }
    };
    Fault::new(path, Place::Key, text)
}

/// Checks a value of an enum.
fn check_choice(
    found: &Value,
    choices: &'static [Schema],
    path: &KeyPath,
    faults: &mut Vec<Fault>,
) {
    let names = || choices.iter().filter_map(|choice| choice["const"].as_str());
    let mut right = None;
    match found {
        Value::String(name) if names().any(|known| known == name) => return,
        Value::String(name) => {
            let near = guesses::nearest(&name.to_lowercase(), names());
            right = near.map(|near| format!("\"{near}\""));
        }
        Value::Table(table) if table.len() == 1 => {
            let (key, value) = table.iter().next().expect("it has one entry");
            let holder = choices.iter().filter_map(held).find(|(name, _)| *name == key);
            if let Some((_, wanted)) = holder {
                return check(value, wanted, &path.key(key), faults);
            }
            let near =
                guesses::nearest(key, choices.iter().filter_map(held).map(|(k, _)| k.as_str()));
            right = near.map(|near| format!("{{ {near} = {} }}", shown(value)));
        }
        _ => {}
    }
    let right = right.or_else(|| wrapped(found, choices));
    let mut text = format!("`{path}` must be {}, got `{}`", one_of(choices), shown(found));
    if let Some(right) = right {
        text += &format!("\nhint: did you mean `{}`?", assigned(path, &right));
    }
    faults.push(Fault::new(path.clone(), Place::Value, text));
}

/// The values of an enum in words.
fn one_of(choices: &[Schema]) -> String {
    let values: Vec<String> =
        choices.iter().map(|choice| format!("`{}`", written(choice))).collect();
    match values.len() {
        2 => values.join(" or "),
        _ => format!("one of {}", values.join(", ")),
    }
}

/// The value of an enum that holds what was found instead, as `{ steps = 40 }` for `40`.
fn wrapped(found: &Value, choices: &'static [Schema]) -> Option<String> {
    let holds = |(key, _): &(&String, &Schema)| *key == "hub";
    if let (Value::String(text), true) = (found, choices.iter().filter_map(held).any(|h| holds(&h)))
    {
        return Some(guesses::source(text));
    }
    let (key, _) = choices.iter().filter_map(held).find(|(_, wanted)| {
        let mut faults = vec![];
        // the schema lives as long as the program, and so do its parts
        check(found, wanted, &KeyPath::default(), &mut faults);
        faults.is_empty()
    })?;
    Some(format!("{{ {key} = {} }}", shown(found)))
}

/// The fault of a value of another type.
fn wrong_type(found: &Value, wanted: String, path: &KeyPath) -> Fault {
    let mut text = format!("`{path}` must be {wanted}, got `{}`", shown(found));
    let right = match found {
        _ if wanted.starts_with("a list") && !found.is_array() && !found.is_table() => {
            Some(format!("{}`", assigned(path, &format!("[{}]", shown(found)))))
        }
        Value::String(inner) => {
            let inner = inner.trim();
            let fits = wanted.contains("integer") && inner.parse::<i64>().is_ok()
                || wanted.contains("number") && inner.parse::<f64>().is_ok()
                || wanted.contains("`true`") && inner.parse::<bool>().is_ok();
            fits.then(|| format!("{}`, without quotes", assigned(path, inner)))
        }
        Value::Float(number) if wanted.contains("integer") && number.fract() == 0.0 => {
            Some(format!("{}`", assigned(path, &format!("{number:.0}"))))
        }
        _ => None,
    };
    if let Some(right) = right {
        text += &format!("\nhint: write `{right}");
    }
    Fault::new(path.clone(), Place::Value, text)
}

/// The entry of the key at `path` with a value, as a section has it.
fn assigned(path: &KeyPath, value: &str) -> String {
    let key = path.to_string();
    let name = key.rsplit('.').next().unwrap_or_default();
    if name.ends_with(']') { value.to_owned() } else { format!("{name} = {value}") }
}

/// A value as TOML, cut if it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}

/// The name of a type of JSON.
fn base_type(schema: &Schema) -> &str {
    match &schema["type"] {
        Schema::Array(names) => {
            names.iter().filter_map(Schema::as_str).find(|name| *name != "null").unwrap_or("")
        }
        name => name.as_str().unwrap_or(""),
    }
}

/// A type in words with its article.
fn with_article(schema: &Schema) -> String {
    let own = type_of(schema).map(definition);
    if variants(own.unwrap_or(schema)).is_some() && schema.get("items").is_none() {
        return "a choice".into();
    }
    match (base_type(schema), type_of(schema)) {
        ("array", Some(_)) => "a list of tables".into(),
        ("boolean", _) => basic(schema),
        ("integer", _) => "an integer".into(),
        _ => format!("a {}", basic(own.unwrap_or(schema))),
    }
}
