//! What `dylora doctor` finds out about the machine, before it judges.

use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::{Result, bail};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{describe, hf_home, hub_settings, own_cache, variable};
use crate::ffi;
use crate::ffi::cuda::KernelSet;
use crate::ffi::driver;
use crate::hub::{self, Login};

/// What is known about this machine.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// The version of dylora.
    pub dylora: String,
    pub libtorch: Libtorch,
    pub cpu: Cpu,
    pub cuda: Cuda,
    pub memory: Memory,
    /// The folder in which the command was started.
    pub working_folder: Folder,
    /// dylora's own cache.
    pub cache: Folder,
    pub hub: Hub,
}

/// The libtorch of this process.
#[derive(Debug, Clone, Serialize)]
pub struct Libtorch {
    /// The version of the headers that the binary was compiled with.
    pub compiled_with: String,
    /// The version that was loaded; absent if it does not say.
    pub loaded: Option<String>,
    /// The file that was loaded.
    pub file: PathBuf,
    /// Why a product of two matrices fails on the CPU; absent if it does not.
    pub fault: Option<String>,
}

/// The processor.
#[derive(Debug, Clone, Serialize)]
pub struct Cpu {
    pub model: Option<String>,
    /// Number of cores that the process may use.
    pub cores: usize,
    /// Number of threads that libtorch computes with.
    pub threads: usize,
    /// `OMP_NUM_THREADS`.
    pub asked_threads: Option<String>,
}

/// What stands between dylora and a GPU.
#[derive(Debug, Clone, Serialize)]
pub struct Cuda {
    /// Why libtorch has no CUDA; absent if it has.
    pub fault: Option<String>,
    /// Whether libtorch's CUDA part lies beside its CPU part.
    pub libtorch_has_cuda: bool,
    /// The version of libtorch's CUDA runtime, as `[major, minor]`.
    pub runtime: Option<[i32; 2]>,
    /// The newest CUDA that the driver can run; absent without a driver.
    pub driver: Option<[i32; 2]>,
    /// Why the driver does not start; absent if it does or if there is none.
    pub driver_fault: Option<String>,
    /// The GPUs that the driver finds.
    pub gpus: Vec<Gpu>,
}

/// A GPU.
#[derive(Debug, Clone, Serialize)]
pub struct Gpu {
    pub name: String,
    pub capability: [i32; 2],
    pub memory_bytes: u64,
    /// Why libtorch cannot compute on it; absent if it can or was not asked.
    pub fault: Option<String>,
    /// Why dylora's own kernels cannot be made for it; likewise.
    pub kernels_fault: Option<String>,
}

/// Memory of the host.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    /// All of it, or the limit of the container if that is smaller.
    pub total_bytes: u64,
    /// What is left.
    pub available_bytes: u64,
}

/// A folder that dylora writes to.
#[derive(Debug, Clone, Serialize)]
pub struct Folder {
    pub path: PathBuf,
    /// The size of the files in it; absent where it does not matter.
    pub bytes: Option<u64>,
    /// Free space of its file system.
    pub free_bytes: Option<u64>,
    /// Why no file can be written there; absent if one can.
    pub fault: Option<String>,
}

/// The Hugging Face Hub.
#[derive(Debug, Clone, Serialize)]
pub struct Hub {
    pub endpoint: String,
    /// Whether `HF_HUB_OFFLINE` forbids requests.
    pub offline: bool,
    pub cache: Folder,
    /// Where the token is from; absent without a token.
    pub token_from: Option<String>,
    /// What the Hub answers; absent unless it was asked.
    pub answer: Option<Answer>,
}

/// What the Hub answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It can be reached, and there is no token.
    Anonymous,
    /// The token belongs to this account.
    Account(String),
    /// The token is refused.
    Refused,
    /// It cannot be reached, for this reason.
    Unreachable(String),
}

impl Facts {
    /// Looks at the machine. The Hub is asked only with `online`.
    pub fn collect(online: bool) -> Result<Self> {
        let working_folder = std::env::current_dir()?;
        Ok(Self {
            dylora: env!("CARGO_PKG_VERSION").into(),
            libtorch: libtorch()?,
            cpu: Cpu {
                model: ffi::device_model(Device::Cpu),
                cores: available_parallelism().map_or(1, usize::from),
                threads: tch::get_num_threads().max(1) as usize,
                asked_threads: variable("OMP_NUM_THREADS"),
            },
            cuda: cuda()?,
            memory: memory()?,
            working_folder: Folder { bytes: None, ..folder(working_folder) },
            cache: folder(own_cache()),
            hub: hub(online),
        })
    }
}

fn libtorch() -> Result<Libtorch> {
    Ok(Libtorch {
        compiled_with: ffi::torch_version().into(),
        loaded: driver::loaded_torch_version(),
        file: ffi::libtorch_path()?,
        fault: fault_of(|| multiply(Device::Cpu)),
    })
}

/// The reason why `f` fails; `None` if it does not.
fn fault_of(f: impl FnOnce() -> Result<()>) -> Option<String> {
    ffi::caught(f).err().map(|error| describe(&error))
}

/// Multiplies two matrices, the result of which is known.
fn multiply(device: Device) -> Result<()> {
    let ones = Tensor::ones([64, 64], (Kind::Float, device));
    let sum = ones.matmul(&ones).sum(Kind::Double).double_value(&[]);
    match sum == f64::from(64 * 64 * 64) {
        true => Ok(()),
        false => bail!("a product of two matrices is wrong"),
    }
}

fn cuda() -> Result<Cuda> {
    let loaded = ffi::load_cuda();
    let (found, driver_fault) = match driver::driver() {
        Ok(found) => (found, None),
        Err(error) => (None, Some(describe(&error))),
    };
    let fault = loaded.err().map(str::to_owned);
    let usable = if fault.is_none() { tch::Cuda::device_count().max(0) as usize } else { 0 };
    let of_driver = |(index, gpu): (usize, &driver::Gpu)| {
        let works = index < usable;
        let compile = || ffi::cuda::prepare_kernels(index, 128, KernelSet::Base);
        Gpu {
            name: gpu.name.clone(),
            capability: gpu.capability,
            memory_bytes: gpu.memory_bytes,
            fault: works.then(|| fault_of(|| multiply(Device::Cuda(index)))).flatten(),
            kernels_fault: works.then(|| fault_of(compile)).flatten(),
        }
    };
    let gpus = found.as_ref().map(|driver| driver.gpus.iter().enumerate().map(of_driver));
    let libtorch_has_cuda = ffi::libtorch_path()?.with_file_name("libtorch_cuda.so").exists();
    Ok(Cuda {
        fault,
        libtorch_has_cuda,
        runtime: libtorch_has_cuda.then(driver::runtime).flatten(),
        driver: found.as_ref().map(|driver| driver.cuda),
        driver_fault,
        gpus: gpus.into_iter().flatten().collect(),
    })
}

/// Where the kernel says what a container may use (cgroup v2).
const CGROUP: &str = "/sys/fs/cgroup";

/// The memory of the host.
pub fn memory() -> Result<Memory> {
    let info = fs_err::read_to_string("/proc/meminfo")?;
    let value = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    };
    let total = value("MemTotal:").unwrap_or(0);
    let available = value("MemAvailable:").unwrap_or(total);
    let of_container = |name: &str| -> Option<u64> {
        fs_err::read_to_string(Path::new(CGROUP).join(name)).ok()?.trim().parse().ok()
    };
    let limit = of_container("memory.max").filter(|limit| *limit < total);
    Ok(match limit {
        None => Memory { total_bytes: total, available_bytes: available },
        Some(limit) => {
            let left = limit.saturating_sub(of_container("memory.current").unwrap_or(0));
            Memory { total_bytes: limit, available_bytes: available.min(left) }
        }
    })
}

/// A folder, which need not exist.
fn folder(path: PathBuf) -> Folder {
    let nearest = path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let free_bytes = rustix::fs::statvfs(nearest).ok().map(|stat| stat.f_bavail * stat.f_frsize);
    let fault = tempfile::tempfile_in(nearest).err().map(|error| error.to_string());
    Folder { bytes: Some(bytes_in(&path)), free_bytes, fault, path }
}

/// The size of the files below a folder. Links are not followed.
fn bytes_in(dir: &Path) -> u64 {
    let (mut bytes, mut folders) = (0, vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(data) if data.is_dir() => folders.push(entry.path()),
                Ok(data) if data.is_file() => bytes += data.len(),
                _ => {}
            }
        }
    }
    bytes
}

fn hub(online: bool) -> Hub {
    let settings = hub_settings();
    let token_from = settings.token.as_ref().map(|_| match variable("HF_TOKEN") {
        Some(_) => "`HF_TOKEN`".to_owned(),
        None => format!("`{}`", hf_home().join("token").display()),
    });
    let ask = || match hub::login(&settings) {
        Ok(Login::Anonymous) => Answer::Anonymous,
        Ok(Login::Account(name)) => Answer::Account(name),
        Ok(Login::Refused) => Answer::Refused,
        Err(error) => Answer::Unreachable(describe(&error)),
    };
    Hub {
        endpoint: settings.shown_endpoint(),
        offline: settings.offline,
        cache: folder(settings.cache_dir.clone()),
        token_from,
        answer: (online && !settings.offline).then(ask),
    }
}
