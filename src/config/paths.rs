//! Linear layers of single blocks, and patterns that name linear layers.
//!
//! ```text
//! self_attn.q_proj                  a module in every layer
//! q_proj                            the end of its name, as in PEFT's `target_modules`
//! layers.0.self_attn.q_proj         a module in one layer
//! model.layers.0.self_attn.q_proj   the same, by its full name
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Error, Result, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::modules::TargetModule;
use super::names::ModuleName;

/// A target module of one layer, written as `h.0.attn.c_attn` or `layers.0.self_attn.q_proj`. When
/// it is read, it may begin with `transformer.` or `model.`, as in the files of transformers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
pub struct ModulePath {
    /// The index of the layer, from 0.
    pub layer: usize,
    /// The target module in that layer.
    pub module: TargetModule,
}

impl fmt::Display for ModulePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.module.block_list(), self.layer, self.module.name())
    }
}

impl FromStr for ModulePath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let path = text.strip_prefix("transformer.").or_else(|| text.strip_prefix("model."));
            let (list, rest) = path.unwrap_or(text).split_once('.')?;
            let (layer, name) = rest.split_once('.')?;
            let is_named =
                |module: &TargetModule| module.name() == name && module.block_list() == list;
            let module = TargetModule::ALL.into_iter().find(is_named)?;
            Some(Self { layer: layer.parse().ok()?, module })
        };
        parse().ok_or_else(|| {
            anyhow!(
                "`{text}` is no module of a layer, as `layers.0.self_attn.q_proj` or \
                 `h.0.attn.c_attn` is"
            )
        })
    }
}

impl TryFrom<String> for ModulePath {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ModulePath> for String {
    fn from(path: ModulePath) -> Self {
        path.to_string()
    }
}

/// Target modules of every layer, written as `q_proj` or `attn.c_attn`, or one of one layer,
/// written as `layers.0.self_attn.q_proj` or `h.0.attn.c_attn`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "String", into = "String")]
pub enum ModulePattern {
    /// The modules in every layer.
    Every(ModuleName),
    /// The module in one layer.
    One(ModulePath),
}

impl ModulePattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// A text that is no pattern; the message lists the names of modules.
    pub fn parse(text: &str) -> Result<Self> {
        let name = text.parse().map(Self::Every);
        name.or_else(|error| text.parse().map(Self::One).map_err(|_: Error| error))
    }

    /// The value that `patterns` has for a module. A pattern for its layer overrides those for
    /// every layer, and of these the one with the longest name counts.
    pub fn find<T: Copy>(patterns: &BTreeMap<Self, T>, path: ModulePath) -> Option<T> {
        let fits = patterns.iter().filter(|(pattern, _)| pattern.contains(path));
        let precise = |(pattern, _): &(&Self, &T)| match **pattern {
            Self::One(_) => usize::MAX,
            Self::Every(name) if name == ModuleName::ALL_LINEAR => 0,
            Self::Every(name) => name.as_str().len(),
        };
        fits.max_by_key(precise).map(|(_, value)| *value)
    }

    /// Whether the pattern stands for a module.
    pub fn contains(self, path: ModulePath) -> bool {
        match self {
            Self::Every(name) => name.contains(path.module),
            Self::One(one) => one == path,
        }
    }

    /// Whether the pattern stands for a module in some layer.
    pub fn names(self, module: TargetModule) -> bool {
        match self {
            Self::Every(name) => name.contains(module),
            Self::One(path) => path.module == module,
        }
    }
}

impl TryFrom<String> for ModulePattern {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text).map_err(|_| {
            anyhow!(
                "`{text}` is neither a module, as `q_proj`, nor one of a layer, as \
                 `layers.0.self_attn.q_proj`"
            )
        })
    }
}

impl From<ModulePattern> for String {
    fn from(pattern: ModulePattern) -> Self {
        match pattern {
            ModulePattern::Every(name) => name.into(),
            ModulePattern::One(path) => path.to_string(),
        }
    }
}
