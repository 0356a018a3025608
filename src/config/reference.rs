//! The page of the config in the reference: every key with its type, default and description.
//!
//! Each struct gets a heading and a table of its keys, and each enum a heading and a table of its
//! values. A type that several keys share is described at the first of them, and the other keys
//! link to that heading.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::schema::{
    basic, default_of, definition, description, has_place, held, is_struct, join, meaning,
    one_line, properties, schema, type_of, variants, written,
};

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

/// The text of the page, in Markdown.
pub fn page() -> String {
    let mut page = Page { places: BTreeMap::new(), text: HEAD.to_owned() };
    let sections = keys_of(schema());
    let is_section = |value: &Value| type_of(value).is_some_and(is_struct);
    let (sections, top): (Vec<_>, Vec<_>) = sections.iter().partition(|(_, v)| is_section(v));
    page.text += "\n## Top level\n\n";
    let top: Map<String, Value> = top.into_iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    page.keys("", &top, schema());
    for (name, value) in sections {
        let path = name.clone();
        page.place(type_of(value).expect("a section is a struct"), &path, 2, Is::Section);
    }
    page.text
}

fn keys_of(schema: &Value) -> &Map<String, Value> {
    properties(schema).expect("it is the schema of a struct")
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

struct Page {
    /// The path under which each type is described.
    places: BTreeMap<String, String>,
    text: String,
}

impl Page {
    /// Has the type `name` described under `path`, unless it already has another path.
    fn claim(&mut self, name: &str, path: &str) {
        self.places.entry(name.to_owned()).or_insert_with(|| path.to_owned());
    }

    /// Describes the type `name` if `path` is the path under which it is to be described.
    fn place(&mut self, name: &str, path: &str, level: usize, is: Is) {
        self.claim(name, path);
        if !has_place(name) || self.places[name] != path {
            return;
        }
        let definition = definition(name);
        let title = match is {
            Is::Section => format!("[{path}]"),
            Is::Repeated => format!("[[{path}]]"),
            Is::Inline => path.to_owned(),
        };
        let hashes = "#".repeat(level);
        let about = paragraphs(description(definition), &title);
        self.text += &format!("\n{hashes} `{title}`\n\n{about}\n\n");
        match variants(definition) {
            Some(values) => self.values(path, values),
            None => self.keys(path, keys_of(definition), definition),
        }
    }

    /// Writes a table of keys, and then the keys' types that have a heading of their own.
    fn keys(&mut self, path: &str, keys: &Map<String, Value>, owner: &Value) {
        for (key, value) in keys {
            if let Some(name) = type_of(value) {
                self.claim(name, &join(path, key));
            }
        }
        self.text += "| key | type | default | meaning |\n|---|---|---|---|\n";
        for (key, value) in keys {
            let kind = self.kind(value);
            let default = default_of(key, value, owner).unwrap_or_else(|| "*none*".into());
            self.text += &format!("| `{key}` | {kind} | {default} | {} |\n", cell(&meaning(value)));
        }
        for (key, value) in keys {
            if let Some(name) = type_of(value) {
                let is_list = value.get("items").is_some() && is_struct(name);
                let is = if is_list { Is::Repeated } else { Is::Inline };
                self.place(name, &join(path, key), 3, is);
            }
        }
    }

    /// Writes a table of an enum's values, and then the types that the values hold.
    fn values(&mut self, path: &str, values: &[Value]) {
        self.text += "| value | meaning |\n|---|---|\n";
        let mut types = vec![];
        for value in values {
            if let Some((key, inside)) = held(value) {
                types.extend(type_of(inside).map(|name| (name.to_owned(), join(path, key))));
            }
            self.text += &format!("| `{}` | {} |\n", written(value), cell(description(value)));
        }
        for (name, path) in types {
            self.place(&name, &path, 4, Is::Inline);
        }
    }

    /// The type of a key in words, with a link to the type's description.
    fn kind(&self, value: &Value) -> String {
        let link = |name: &str, text: &str| format!("[{text}](#{})", anchor(&self.places[name]));
        let is_list = value.get("items").is_some();
        match type_of(value) {
            Some(name) if is_struct(name) && is_list => link(name, "list of tables"),
            Some(name) if is_struct(name) => link(name, "table"),
            Some(name) if has_place(name) && is_list => {
                format!("list of {}", link(name, "choices"))
            }
            Some(name) if has_place(name) => link(name, "choice"),
            Some(name) => basic(definition(name)),
            None => basic(value),
        }
    }
}

/// The anchor that both MkDocs and GitHub give a heading: its text without dots and brackets.
fn anchor(path: &str) -> String {
    path.chars().filter(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Text for a cell of a table: one line, in which bars are escaped.
fn cell(text: &str) -> String {
    one_line(text).replace('|', "\\|")
}

/// A type's doc without the title at its beginning, as in "`[run]`: where ..".
fn paragraphs(text: &str, title: &str) -> String {
    let text = text.strip_prefix(&format!("`{title}`: ")).unwrap_or(text);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
