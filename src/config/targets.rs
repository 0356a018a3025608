//! The linear layers that get experts, as a list of names or patterns.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::modules::TargetModule;
use super::names::ModuleName;
use super::paths::{ModulePath, ModulePattern};

/// The linear layers that get experts: a list of names, or one name alone. A name must match a
/// layer of the base.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct TargetModules(pub Vec<ModulePattern>);

impl TargetModules {
    /// All linear layers.
    pub fn all() -> Self {
        Self(vec![ModulePattern::Every(ModuleName::ALL_LINEAR)])
    }

    /// Whether a name stands for a module.
    pub fn contain(&self, path: ModulePath) -> bool {
        self.0.iter().any(|pattern| pattern.contains(path))
    }
}

impl From<&[TargetModule]> for TargetModules {
    fn from(modules: &[TargetModule]) -> Self {
        let every = |module: &TargetModule| ModulePattern::Every((*module).into());
        Self(modules.iter().map(every).collect())
    }
}

impl<const N: usize> From<[TargetModule; N]> for TargetModules {
    fn from(modules: [TargetModule; N]) -> Self {
        modules.as_slice().into()
    }
}

/// One name in a list.
struct Name(ModulePattern);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a linear layer")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Name, E> {
                visit_name(text).map(Name)
            }
        }

        deserializer.deserialize_str(Text)
    }
}

/// Parses a name within a visitor, where an error knows its place in the file.
fn visit_name<E: serde::de::Error>(text: &str) -> Result<ModulePattern, E> {
    ModulePattern::parse(text).map_err(|error| E::custom(format!("{error:#}")))
}

struct Names;

impl<'a> Visitor<'a> for Names {
    type Value = TargetModules;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of names of linear layers, or one name")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(TargetModules(vec![visit_name(text)?]))
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut names = vec![];
        while let Some(Name(name)) = items.next_element()? {
            names.push(name);
        }
        Ok(TargetModules(names))
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Names)
    }
}

impl JsonSchema for TargetModules {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "TargetModules".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (one, several) =
            (String::json_schema(generator), Vec::<String>::json_schema(generator));
        json_schema!({ "anyOf": [several, one] })
    }
}
