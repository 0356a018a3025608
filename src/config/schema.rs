//! What the JSON schema of [`Config`] says of its keys. The schema is made from the types of this
//! module and their doc comments, so that messages, `dylora config` and the reference agree.

use std::sync::OnceLock;

use schemars::generate::SchemaSettings;
use schemars::schema_for;
use serde_json::{Map, Value};

use super::Config;

/// The JSON schema of a config.
pub fn schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schema_for!(Config).to_value())
}

/// The JSON schema of a config in the version that editors know, draft 7.
pub fn for_editors() -> Value {
    let generator = SchemaSettings::draft07().into_generator();
    generator.into_root_schema_for::<Config>().to_value()
}

/// The config's own type `name`.
pub(super) fn definition(name: &str) -> &'static Value {
    &schema()["$defs"][name]
}

/// The name of the config's own type that a key holds directly, optionally or in a list; `None` if
/// the key holds a type of JSON.
pub(super) fn type_of(value: &Value) -> Option<&str> {
    let own = value.get("$ref").and_then(Value::as_str);
    let optional =
        || value.get("anyOf")?.as_array()?.iter().find_map(|any| any.get("$ref")?.as_str());
    let in_list = || value.get("items")?.get("$ref")?.as_str();
    own.or_else(optional).or_else(in_list)?.strip_prefix("#/$defs/")
}

/// The schema that a value must have: without a reference to one of the config's own types, and
/// without `null`, which TOML does not have.
pub(super) fn resolved(value: &'static Value) -> &'static Value {
    let Some(any) = value.get("anyOf").and_then(Value::as_array) else {
        return match type_of(value) {
            Some(name) if value.get("items").is_none() => definition(name),
            _ => value,
        };
    };
    let mut others = any.iter().filter(|one| one["type"] != "null");
    match (others.next(), others.next()) {
        (Some(only), None) => resolved(only),
        _ => value,
    }
}

/// The keys of a struct.
pub(super) fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema.get("properties")?.as_object()
}

/// The values of an enum.
pub(super) fn variants(schema: &Value) -> Option<&Vec<Value>> {
    schema.get("oneOf")?.as_array()
}

/// The key of a value of an enum that holds something, such as `steps` of `{ steps = 40 }`, and
/// what it holds.
pub(super) fn held(variant: &Value) -> Option<(&String, &Value)> {
    properties(variant)?.iter().next()
}

/// The keys of a struct that must be there.
pub(super) fn required(schema: &Value) -> impl Iterator<Item = &str> {
    schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// What a type, a key or a value of an enum is for.
pub(super) fn description(schema: &Value) -> &str {
    schema.get("description").and_then(Value::as_str).unwrap_or_default()
}

/// The description of a key. A type that has no description of its own place, such as that of
/// `run.device`, is described with the key.
pub(super) fn meaning(value: &Value) -> String {
    let mut text = description(value).to_owned();
    if let Some(name) = type_of(value).filter(|name| !has_place(name)) {
        text += &format!(" {}", description(definition(name)));
    }
    untitled(&one_line(&text)).to_owned()
}

/// A description without the section at its beginning, as in "`[run]`: where ..".
fn untitled(text: &str) -> &str {
    let title = text.starts_with("`[").then(|| text.split_once("]`: ")).flatten();
    title.map_or(text, |(_, text)| text)
}

/// A text without line breaks.
pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a type is a struct.
pub(super) fn is_struct(name: &str) -> bool {
    properties(definition(name)).is_some()
}

/// Whether a type has keys or values of its own. Other types, such as plain strings, are described
/// at their keys.
pub(super) fn has_place(name: &str) -> bool {
    is_struct(name) || variants(definition(name)).is_some()
}

/// The default of a key as TOML, `required` or `None`.
///
/// - `owner`: the struct that has the key
pub(super) fn default_of(key: &str, value: &Value, owner: &Value) -> Option<String> {
    match value.get("default") {
        Some(default) => Some(format!("`{}`", toml_of(default))),
        None => required(owner).any(|name| name == key).then(|| "required".to_owned()),
    }
}

/// A type of JSON in words, or the types of which a value may have any.
pub(super) fn basic(value: &Value) -> String {
    if let Some(any) = value.get("anyOf").and_then(Value::as_array) {
        return any.iter().map(basic).collect::<Vec<_>>().join(" or ");
    }
    let name = match &value["type"] {
        Value::String(name) => name.as_str(),
        Value::Array(names) => {
            names.iter().filter_map(Value::as_str).find(|n| *n != "null").unwrap_or("")
        }
        _ => "",
    };
    match name {
        "boolean" => "`true` or `false`".into(),
        "array" => format!("list of {}s", basic(&value["items"])),
        "object" => format!("table of {}s", basic(&value["additionalProperties"])),
        other => other.into(),
    }
}

/// A value of an enum as it is written, such as `"auto"` or `{ steps = N }`.
pub(super) fn written(variant: &Value) -> String {
    match (variant.get("const"), held(variant)) {
        (Some(name), _) => toml_of(name),
        (None, Some((key, inside))) => format!("{{ {key} = {} }}", placeholder(inside)),
        (None, None) => "..".into(),
    }
}

/// The placeholder for a value in an example.
fn placeholder(value: &Value) -> String {
    if type_of(value).is_some() {
        return "{ .. }".into();
    }
    match basic(value).as_str() {
        "string" => "\"..\"".into(),
        "integer" => "N".into(),
        "number" => "X".into(),
        list if list.starts_with("list") => "[..]".into(),
        other => other.into(),
    }
}

/// A JSON value as TOML writes it in one line.
pub(super) fn toml_of(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            format!("[{}]", items.iter().map(toml_of).collect::<Vec<_>>().join(", "))
        }
        Value::Object(entries) => {
            let entry = |(key, value): (&String, &Value)| format!("{key} = {}", toml_of(value));
            format!("{{ {} }}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// The path of a key in a section, such as `lora.rank`.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}
