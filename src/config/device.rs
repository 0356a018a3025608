//! The choice of a device.

use std::fmt;
use std::str::FromStr;

use anyhow::bail;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `auto` takes the first CUDA device if there is one, and the CPU otherwise. `cpu`, `cuda` (the
/// first CUDA device) and `cuda:N` name a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first CUDA device if there is one, and the CPU otherwise.
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device with this index.
    Cuda(usize),
}

/// The largest index of a CUDA device, which libtorch keeps in 8 bits.
const MAX_CUDA_INDEX: usize = 127;

impl FromStr for DeviceChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
                Some(index) if index <= MAX_CUDA_INDEX => Ok(Self::Cuda(index)),
                _ => bail!(
                    "`{text}` is no device; use `auto`, `cpu`, `cuda` or `cuda:N` with N up to \
                     {MAX_CUDA_INDEX}"
                ),
            },
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        device.to_string()
    }
}
