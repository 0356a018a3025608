//! Every key of a config with its type, its default and its meaning.

use std::sync::OnceLock;

use serde_json::Value;

use super::schema::{
    basic, default_of, definition, description, held, is_struct, join, meaning, one_line,
    properties, resolved, schema, type_of, variants, written,
};

/// A key of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The dotted path, such as `lora.rank` or, in each entry of a list, `data.domains[].weight`.
    pub path: String,
    /// The type in words, such as `integer` or `list of strings`.
    pub kind: String,
    /// The default as TOML, `required`, or `None` if the key may be left out.
    pub default: Option<String>,
    /// What the key is for.
    pub meaning: String,
    /// The values of a choice, as they are written, each with what it means.
    pub values: Vec<(String, String)>,
    /// Whether the key holds keys of its own.
    pub is_section: bool,
}

impl Key {
    /// The last part of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or_default().trim_end_matches("[]")
    }
}

/// All keys, each section followed by its keys, in the order of the reference.
pub fn all() -> &'static [Key] {
    static KEYS: OnceLock<Vec<Key>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let mut keys = vec![];
        add("", schema(), &mut keys);
        keys
    })
}

/// Adds the keys of the struct `owner`, which is at `path`, and the keys in them.
fn add(path: &str, owner: &'static Value, keys: &mut Vec<Key>) {
    for (name, value) in properties(owner).into_iter().flatten() {
        let inner = resolved(value);
        let own_struct = type_of(value).filter(|name| is_struct(name));
        let is_list = value.get("items").is_some();
        let path = join(path, name) + if is_list && own_struct.is_some() { "[]" } else { "" };
        let values = variants(inner).into_iter().flatten();
        let about = |variant: &Value| (written(variant), one_line(description(variant)));
        keys.push(Key {
            kind: kind(value, inner, own_struct.is_some()),
            default: default_of(name, value, owner),
            meaning: meaning(value),
            values: values.map(about).collect(),
            is_section: own_struct.is_some(),
            path: path.clone(),
        });
        if let Some(name) = own_struct {
            add(&path, definition(name), keys);
        }
        for (key, inside) in variants(inner).into_iter().flatten().filter_map(held) {
            if let Some(name) = type_of(inside).filter(|name| is_struct(name)) {
                add(&join(&path, key), definition(name), keys);
            }
        }
    }
}

fn kind(value: &Value, inner: &Value, is_section: bool) -> String {
    match value.get("items").is_some() {
        true if is_section => "list of tables".into(),
        false if is_section => "table".into(),
        _ if variants(inner).is_some() => "choice".into(),
        _ => basic(inner),
    }
}
