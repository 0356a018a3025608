//! Names of target modules as PEFT's `target_modules` has them.

use std::str::FromStr;

use anyhow::{Error, Result, anyhow};

use super::modules::TargetModule;

/// All linear layers of a block, in PEFT's words.
const ALL_LINEAR: &str = "all-linear";

/// A name for linear layers of a block: their full name, such as `self_attn.q_proj`, or the end of
/// it, such as `q_proj`. `c_proj` names two layers of GPT-2. `all-linear` names every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
