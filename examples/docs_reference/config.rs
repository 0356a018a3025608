//! The page of the config: every key with its type, default and description. They come from the
//! JSON schema of [`Config`], whose descriptions are the doc comments of the config's types.
//!
//! Each struct gets a heading and a table of its keys, and each enum a heading and a table of its
//! values. A type that several keys share is described at the first of them, and the other keys
//! link to that heading.

use std::collections::BTreeMap;

use dylora::config::Config;
use schemars::schema_for;
use serde_json::{Map, Value};

const HEAD: &str = "\
# The config

<!-- Made by `cargo run --example docs_reference` from the doc comments of `src/config`. Edit \
those. -->

A run is described by one TOML file. Each section below is a section of that file; `base` and \
`data` are
required, and every other section may be left out. An unknown key is an error that shows its line \
and the
keys that would be right. `dylora train --dry-run` prints a config with every default filled in, \
and a
run saves its own in that form as `config.toml`.

`--set KEY=VALUE` overrides one key on the command line, with the key as it is written here, for \
example
`--set lora.rank=16` or `--set 'train.duration={steps=500}'`. The entries of a list have their \
index from
0, as in `--set data.domains.0.weight=2`.

Relative paths of files that a run reads begin at the folder of the config, wherever the command \
runs. Only
`run.dir`, which is written, begins in the working folder, and so do all paths in `--set`. A \
config that a
run saves has absolute paths.

A *choice* links to the values that the key can have. A default of *none* means that the key may \
be left
out; its description says what happens then.
";

/// The text of the page.
pub fn page() -> String {
    let schema = schema_for!(Config).to_value();
    let definitions = schema["$defs"].as_object().expect("the config has types of its own");
    let mut page = Page { definitions, places: BTreeMap::new(), text: HEAD.to_owned() };
    let sections = properties(&schema);
    let is_section = |value: &Value| type_of(value).is_some_and(|name| page.is_struct(name));
    let (sections, top): (Vec<_>, Vec<_>) = sections.iter().partition(|(_, v)| is_section(v));
    page.text += "\n## Top level\n\n";
    let top: Map<String, Value> = top.into_iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    page.keys("", &top, &schema);
    for (name, value) in sections {
        let path = name.clone();
        page.place(type_of(value).expect("a section is a struct"), &path, 2, Is::Section);
    }
    page.text
}

/// How a key that holds a struct is written in TOML.
#[derive(Clone, Copy, PartialEq)]
enum Is {
    /// `[run]`
    Section,
    /// `[[data.domains]]`
    Repeated,
    /// `base.source.hub`
    Inline,
}

struct Page<'a> {
    definitions: &'a Map<String, Value>,
    /// The path under which each type is described.
    places: BTreeMap<String, String>,
    text: String,
}

impl Page<'_> {
    fn is_struct(&self, name: &str) -> bool {
        self.definitions[name].get("properties").is_some()
    }

    /// Whether a type has a heading of its own on the page. Other types, such as plain strings, are
    /// described at their keys.
    fn has_place(&self, name: &str) -> bool {
        self.is_struct(name) || self.definitions[name].get("oneOf").is_some()
    }

    /// Has the type `name` described under `path`, unless it already has another path.
    fn claim(&mut self, name: &str, path: &str) {
        self.places.entry(name.to_owned()).or_insert_with(|| path.to_owned());
    }

    /// Describes the type `name` if `path` is the path under which it is to be described.
    fn place(&mut self, name: &str, path: &str, level: usize, is: Is) {
        self.claim(name, path);
        if !self.has_place(name) || self.places[name] != path {
            return;
        }
        let definition = self.definitions[name].clone();
        let title = match is {
            Is::Section => format!("[{path}]"),
            Is::Repeated => format!("[[{path}]]"),
            Is::Inline => path.to_owned(),
        };
        let hashes = "#".repeat(level);
        let about = paragraphs(description(&definition), &title);
        self.text += &format!("\n{hashes} `{title}`\n\n{about}\n\n");
        match definition.get("oneOf").and_then(Value::as_array) {
            Some(values) => self.values(path, values),
            None => self.keys(path, properties(&definition), &definition),
        }
    }

    /// Writes a table of keys, and then the keys' types that have a heading of their own.
    fn keys(&mut self, path: &str, keys: &Map<String, Value>, owner: &Value) {
        let required: Vec<&str> =
            owner["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for (key, value) in keys {
            if let Some(name) = type_of(value) {
                self.claim(name, &join(path, key));
            }
        }
        self.text += "| key | type | default | meaning |\n|---|---|---|---|\n";
        for (key, value) in keys {
            let kind = self.kind(value);
            let default = match value.get("default") {
                Some(default) => format!("`{}`", toml_of(default)),
                None if required.contains(&key.as_str()) => "required".to_owned(),
                None => "*none*".to_owned(),
            };
            let mut meaning = description(value).to_owned();
            if let Some(name) = type_of(value).filter(|name| !self.has_place(name)) {
                meaning += &format!(" {}", description(&self.definitions[name]));
            }
            self.text += &format!("| `{key}` | {kind} | {default} | {} |\n", cell(&meaning));
        }
        for (key, value) in keys {
            if let Some(name) = type_of(value) {
                let is = if value.get("items").is_some() && self.is_struct(name) {
                    Is::Repeated
                } else {
                    Is::Inline
                };
                self.place(name, &join(path, key), 3, is);
            }
        }
    }

    /// Writes a table of an enum's values, and then the types that the values hold.
    fn values(&mut self, path: &str, values: &[Value]) {
        self.text += "| value | meaning |\n|---|---|\n";
        let mut held = vec![];
        for value in values {
            let written = match value.get("const") {
                Some(name) => toml_of(name),
                None => {
                    let (key, inside) = properties(value).iter().next().expect("a variant has one");
                    held.extend(type_of(inside).map(|name| (name.to_owned(), join(path, key))));
                    format!("{{ {key} = {} }}", placeholder(inside))
                }
            };
            self.text += &format!("| `{written}` | {} |\n", cell(description(value)));
        }
        for (name, path) in held {
            self.place(&name, &path, 4, Is::Inline);
        }
    }

    /// The type of a key in words, with a link to the type's description.
    fn kind(&self, value: &Value) -> String {
        let link = |name: &str, text: &str| format!("[{text}](#{})", anchor(&self.places[name]));
        let is_list = value.get("items").is_some();
        match type_of(value) {
            Some(name) if self.is_struct(name) && is_list => link(name, "list of tables"),
            Some(name) if self.is_struct(name) => link(name, "table"),
            Some(name) if self.has_place(name) && is_list => {
                format!("list of {}", link(name, "choices"))
            }
            Some(name) if self.has_place(name) => link(name, "choice"),
            Some(name) => basic(&self.definitions[name]),
            None => basic(value),
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The anchor that both MkDocs and GitHub give a heading: its text without dots and brackets.
fn anchor(path: &str) -> String {
    path.chars().filter(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn properties(schema: &Value) -> &Map<String, Value> {
    schema["properties"].as_object().expect("it is the schema of a struct")
}

fn description(schema: &Value) -> &str {
    schema.get("description").and_then(Value::as_str).unwrap_or_default()
}

/// The name of the config's own type that a key holds directly, optionally or in a list; `None` if
/// the key holds a type of JSON.
fn type_of(value: &Value) -> Option<&str> {
    let own = value.get("$ref").and_then(Value::as_str);
    let optional =
        || value.get("anyOf")?.as_array()?.iter().find_map(|any| any.get("$ref")?.as_str());
    let in_list = || value.get("items")?.get("$ref")?.as_str();
    own.or_else(optional).or_else(in_list)?.strip_prefix("#/$defs/")
}

/// A type of JSON in words, or the types of which a value may have any.
fn basic(value: &Value) -> String {
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
        "integer" => "integer".into(),
        "number" => "number".into(),
        "boolean" => "`true` or `false`".into(),
        "array" => format!("list of {}s", basic(&value["items"])),
        "object" => format!("table of {}s", basic(&value["additionalProperties"])),
        other => other.into(),
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
fn toml_of(value: &Value) -> String {
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

/// Text for a cell of a table: one line, in which bars are escaped.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// A type's doc without the title at its beginning, as in "`[run]`: where ..".
fn paragraphs(text: &str, title: &str) -> String {
    let text = text.strip_prefix(&format!("`{title}`: ")).unwrap_or(text);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
