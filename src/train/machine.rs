//! `machine.json` in a run's folder: what the run was last started on, and by which versions.

use std::path::Path;
use std::thread::available_parallelism;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{durable, ffi};

/// The name of the file in a run's folder.
pub(crate) const MACHINE_FILE: &str = "machine.json";

/// What a run was started on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The version of dylora.
    pub dylora_version: String,
    /// The version of libtorch.
    pub libtorch_version: String,
    /// The device: `cpu` or `cuda:N`.
    pub device: String,
    /// The model of the device, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_model: Option<String>,
    /// Number of CPU cores that the process may use.
    pub cpu_cores: usize,
    /// Number of CPU threads that libtorch computes with.
    pub cpu_threads: usize,
    /// The time of the start, with the offset of its zone.
    pub started_at: String,
}

impl Machine {
    /// The present machine and the present time.
    pub fn present(device: Device) -> Self {
        Self {
            dylora_version: env!("CARGO_PKG_VERSION").into(),
            libtorch_version: ffi::torch_version().into(),
            device: match device {
                Device::Cuda(index) => format!("cuda:{index}"),
                _ => "cpu".into(),
            },
            device_model: ffi::device_model(device),
            cpu_cores: available_parallelism().map_or(1, usize::from),
            cpu_threads: tch::get_num_threads().max(1) as usize,
            started_at: jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S %:z").to_string(),
        }
    }

    /// Writes the file into a run's folder. An earlier one is replaced.
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        durable::replace(&run_dir.join(MACHINE_FILE), text.as_bytes())
    }
}
