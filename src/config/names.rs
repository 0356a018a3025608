//! Names of target modules as PEFT's `target_modules` has them, and lists of such names.

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, Result, anyhow};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::modules::TargetModule;

/// All linear layers of a block, in PEFT's words.
const ALL_LINEAR: &str = "all-linear";

/// A name for linear layers of a block: their full name, such as `self_attn.q_proj`, or the end of
/// it, such as `q_proj`. `c_proj` names two layers of GPT-2. `all-linear` names every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(into = "String")]
#[schemars(with = "String")]
pub struct ModuleName(&'static str);

impl ModuleName {
    /// The name of every linear layer.
    pub const ALL_LINEAR: Self = Self(ALL_LINEAR);

    /// The name as it is written.
    pub fn as_str(self) -> &'static str {
        self.0
    }

    /// Whether the name is one of `module`.
    pub fn contains(self, module: TargetModule) -> bool {
        self.0 == ALL_LINEAR || self.0 == module.name() || self.0 == last_part(module)
    }
}

/// The last part of a module's name, such as `q_proj`.
fn last_part(module: TargetModule) -> &'static str {
    module.name().rsplit_once('.').map_or(module.name(), |(_, last)| last)
}

impl FromStr for ModuleName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.eq_ignore_ascii_case(ALL_LINEAR) {
            return Ok(Self::ALL_LINEAR);
        }
        let names = TargetModule::ALL.into_iter().flat_map(|m| [m.name(), last_part(m)]);
        names.into_iter().find(|name| *name == text).map(Self).ok_or_else(|| {
            let known = TargetModule::ALL.map(|module| format!("`{}`", module.name()));
            anyhow!(
                "`{text}` names no linear layer\nhint: the layers are {}; the last part of a name \
                 is enough, and `all-linear` names them all",
                known.join(", ")
            )
        })
    }
}

// not derived, because the derived one would be for texts that live for ever
impl<'de> Deserialize<'de> for ModuleName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = ModuleName;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a linear layer")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ModuleName, E> {
                text.parse().map_err(|error| E::custom(format!("{error:#}")))
            }
        }

        // within the visitor, an error knows its place in the file
        deserializer.deserialize_str(Name)
    }
}

impl From<ModuleName> for String {
    fn from(name: ModuleName) -> Self {
        name.0.to_owned()
    }
}

impl From<TargetModule> for ModuleName {
    fn from(module: TargetModule) -> Self {
        Self(module.name())
    }
}

/// The linear layers that get experts: a list of names, or one name alone. A name must match a
/// layer of the base.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct TargetModules(pub Vec<ModuleName>);

impl TargetModules {
    /// All linear layers.
    pub fn all() -> Self {
        Self(vec![ModuleName::ALL_LINEAR])
    }

    /// Whether a name is one of `module`.
    pub fn contain(&self, module: TargetModule) -> bool {
        self.0.iter().any(|name| name.contains(module))
    }
}

impl From<&[TargetModule]> for TargetModules {
    fn from(modules: &[TargetModule]) -> Self {
        Self(modules.iter().copied().map(ModuleName::from).collect())
    }
}

impl<const N: usize> From<[TargetModule; N]> for TargetModules {
    fn from(modules: [TargetModule; N]) -> Self {
        modules.as_slice().into()
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;

        impl<'a> Visitor<'a> for Names {
            type Value = TargetModules;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of names of linear layers, or one name")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let name = text.parse().map_err(|error| E::custom(format!("{error:#}")))?;
                Ok(TargetModules(vec![name]))
            }

            fn visit_seq<A: SeqAccess<'a>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut names = vec![];
                while let Some(name) = items.next_element::<ModuleName>()? {
                    names.push(name);
                }
                Ok(TargetModules(names))
            }
        }

        deserializer.deserialize_any(Names)
    }
}

impl JsonSchema for TargetModules {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "TargetModules".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Vec::<String>::json_schema(generator)
    }
}
