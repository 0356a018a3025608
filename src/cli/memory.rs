//! Refuses a model whose weights cannot fit on its GPU, before they are read.

use anyhow::{Result, bail};
use tch::{Device, Kind};

use super::table;
use crate::base::Base;
use crate::config::{Config, Method};
use crate::ffi::{self, DeviceMemory};
use crate::model::decoder::precision::wide;
use crate::model::experts::spec::ExpertSpec;
use crate::model::kind_of;
use crate::train::plan::{ParameterCounts, quantised_bytes};

/// The memory that a model needs on its device whatever the data, in bytes.
#[derive(Debug, Clone, Copy)]
struct Need {
    /// Number of the base's parameters.
    parameters: i64,
    /// The data type in which the device holds them.
    kind: Kind,
    /// Trained parameters other than the base's, gradients and moments, in bytes.
    training: i64,
    /// The base's quantised weights, in bytes.
    quantised: i64,
    /// Whether the base is trained as a whole.
    trains_base: bool,
}

/// The data type of the base's weights in a run of `config`.
pub fn base_kind(config: &Config) -> Kind {
    let kind = kind_of(config.base.dtype);
    if config.method == Method::Full { wide(kind) } else { kind }
}

/// Checks that a base whose weights are held in `kind` fits on `device`.
pub fn check_base_fits(base: &Base, kind: Kind, device: Device) -> Result<()> {
    let parameters = base.spec.num_parameters();
    check(base, Need { parameters, kind, training: 0, quantised: 0, trains_base: false }, device)
}

/// Checks that the base of a run, and what its training adds whatever the size of a batch, fit on
/// `device`.
pub fn check_run_fits(
    config: &Config,
    specs: &[ExpertSpec],
    base: &Base,
    device: Device,
) -> Result<()> {
    let counts = ParameterCounts::new(config, specs, &base.spec);
    let trains_base = config.method == Method::Full;
    let kind = base_kind(config);
    let training = counts.training_bytes(config.method);
    let quantised = quantised_bytes(config, &base.spec);
    check(base, Need { parameters: counts.base, kind, training, quantised, trains_base }, device)
}

fn check(base: &Base, need: Need, device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => {
            judge(&base.label, need, ffi::device_memory(index)?, &format!("cuda:{index}"))
        }
        // a system may lend memory that it does not have, and weights in f32 stay in their files
        _ => Ok(()),
    }
}

/// Compares what is needed with what is free on the device called `name`.
fn judge(label: &str, need: Need, memory: DeviceMemory, name: &str) -> Result<()> {
    let weights = need.parameters * need.kind.elt_size_in_bytes() as i64;
    if weights + need.training + need.quantised <= memory.free_bytes as i64 {
        return Ok(());
    }
    let training = match need.training {
        0 => String::new(),
        bytes => {
            format!(" and {} for trained parameters, gradients and moments", table::bytes(bytes))
        }
    };
    let quantised = match need.quantised {
        0 => String::new(),
        bytes => format!(" and {} for its linear layers in FP8", table::bytes(bytes)),
    };
    let mut hints = vec![];
    if need.quantised > 0 {
        hints.push("`train.base_products = \"exact\"` needs no weights in FP8");
    }
    if matches!(need.kind, Kind::Float | Kind::Double) && !need.trains_base {
        hints.push("`base.dtype = \"bf16\"` takes half of the memory of f32");
    }
    if need.trains_base {
        hints.push("`method = \"routed_lora\"` trains adapters on a frozen base");
    }
    if memory.free_bytes < memory.total_bytes / 10 * 9 {
        hints.push("other processes hold a part of this GPU, as `nvidia-smi` shows");
    }
    hints.push(
        "a smaller base, a GPU with more memory or `--device cpu`; more processes do not help, \
         because each holds the whole base",
    );
    bail!(
        "base `{label}` does not fit on {name}: its {} parameters take {} in \
         {}{quantised}{training}, and {} of the GPU's {} are free\nhint: {}",
        table::count(need.parameters),
        table::bytes(weights),
        kind_name(need.kind),
        table::bytes(memory.free_bytes as i64),
        table::bytes(memory.total_bytes as i64),
        hints.join("; or "),
    )
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Double => "f64",
        _ => "f32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn need(kind: Kind) -> Need {
        Need { parameters: 8_030_261_248, kind, training: 0, quantised: 0, trains_base: false }
    }

    #[test]
    fn a_base_that_does_not_fit_is_refused_with_both_numbers_and_what_helps() {
        let memory = DeviceMemory { free_bytes: 23 * GIB, total_bytes: 24 * GIB };
        assert!(judge("llama", need(Kind::BFloat16), memory, "cuda:0").is_ok());
        let in_fp8 = Need { quantised: 13_958_643_712, ..need(Kind::BFloat16) };
        let error = judge("llama", in_fp8, memory, "cuda:0").unwrap_err().to_string();
        assert!(error.contains("take 14.96 GiB in bf16 and 13.00 GiB for its linear"), "{error}");
        assert!(error.contains("hint: `train.base_products = \"exact\"`"), "{error}");
        let error = judge("llama", need(Kind::Float), memory, "cuda:0").unwrap_err();
        assert_eq!(
            error.to_string(),
            "base `llama` does not fit on cuda:0: its 8,030,261,248 parameters take 29.92 GiB in \
             f32, and 23.00 GiB of the GPU's 24.00 GiB are free\n\
             hint: `base.dtype = \"bf16\"` takes half of the memory of f32; or a smaller base, a \
             GPU with more memory or `--device cpu`; more processes do not help, because each \
             holds the whole base"
        );
    }

    #[test]
    fn what_training_adds_counts_and_a_busy_gpu_is_named() {
        let memory = DeviceMemory { free_bytes: 15 * GIB, total_bytes: 24 * GIB };
        assert!(judge("llama", need(Kind::BFloat16), memory, "cuda:1").is_ok());
        let need = Need { training: 1 << 30, ..need(Kind::BFloat16) };
        let error = judge("llama", need, memory, "cuda:1").unwrap_err().to_string();
        assert!(error.contains("14.96 GiB in bf16 and 1.00 GiB for trained parameters"), "{error}");
        assert!(error.contains("hint: other processes hold a part of this GPU"), "{error}");
    }
}
