//! What `dylora doctor` thinks of what it found, and what to do about it.

use serde::Serialize;

use super::doctor_facts::{Answer, Cpu, Cuda, Facts, Folder, Gpu, Hub, Libtorch, Memory};
use super::table;
use crate::config::DeviceChoice;

const GIB: u64 = 1 << 30;

/// How a part of the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing is to be done.
    Ok,
    /// It is fine for most uses.
    Note,
    /// Something works worse than it could.
    Warning,
    /// dylora cannot work, or not as it was asked to.
    Broken,
}

impl State {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Broken => "broken",
        }
    }
}

/// A finding.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Check {
    fn new(name: &'static str, state: State, found: impl Into<String>, hint: &str) -> Self {
        let hint = (!hint.is_empty()).then(|| hint.to_owned());
        Self { name, state, found: found.into(), hint }
    }
}

/// Judges the facts. `device` is the one that is meant to compute.
pub fn checks(facts: &Facts, device: DeviceChoice) -> Vec<Check> {
    let mut found = vec![
        libtorch(&facts.libtorch),
        chosen(&facts.cpu, &facts.cuda, device),
        cuda(&facts.cuda, device),
    ];
    found.extend(kernels(&facts.cuda));
    found.extend([
        threads(&facts.cpu),
        memory(facts.memory),
        disk(&facts.working_folder),
        cache(&facts.cache),
        hub(&facts.hub),
    ]);
    found
}

fn libtorch(libtorch: &Libtorch) -> Check {
    let (name, file) = ("libtorch", libtorch.file.display());
    let compiled = &libtorch.compiled_with;
    if let Some(loaded) = libtorch.loaded.as_ref().filter(|loaded| *loaded != compiled) {
        let found = format!("`{file}` is {loaded}, and dylora was compiled with {compiled}");
        let hint =
            format!("put libtorch {compiled} in its place, or `pip install torch=={compiled}`");
        return Check::new(name, State::Broken, found, &hint);
    }
    match &libtorch.fault {
        Some(fault) => Check::new(
            name,
            State::Broken,
            format!("`{file}` does not compute on this processor: {fault}"),
            "install dylora again, or another build of libtorch",
        ),
        None => Check::new(name, State::Ok, format!("{compiled}, loaded from `{file}`"), ""),
    }
}

/// The number of GPUs that libtorch can use.
fn usable(cuda: &Cuda) -> usize {
    if cuda.fault.is_none() { cuda.gpus.len() } else { 0 }
}

fn gpu_name(index: usize, gpu: &Gpu) -> String {
    let [major, minor] = gpu.capability;
    let memory = table::bytes(gpu.memory_bytes as i64);
    format!("cuda:{index} {}, {memory}, compute capability {major}.{minor}", gpu.name)
}

/// The device that computes.
fn chosen(cpu: &Cpu, cuda: &Cuda, device: DeviceChoice) -> Check {
    let index = match device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => (usable(cuda) > 0).then_some(0),
        DeviceChoice::Cuda(index) => Some(index),
    };
    let model = cpu.model.as_deref().unwrap_or("a processor without a name");
    let Some(index) = index else {
        return Check::new("device", State::Ok, format!("cpu: {model}, {} cores", cpu.cores), "");
    };
    let Some(gpu) = cuda.gpus.get(index).filter(|_| index < usable(cuda)) else {
        let found = format!("there is no `cuda:{index}` that libtorch can use");
        return Check::new("device", State::Broken, found, "see CUDA below, or use `--device cpu`");
    };
    match &gpu.fault {
        None => Check::new("device", State::Ok, gpu_name(index, gpu), ""),
        Some(fault) => Check::new(
            "device",
            State::Broken,
            format!("{} does not compute: {fault}", gpu_name(index, gpu)),
            "where it says `no kernel image`, the GPU is too old for this libtorch: use a build of \
             PyTorch for an older CUDA, or `--device cpu`",
        ),
    }
}

fn version([major, minor]: [i32; 2]) -> String {
    format!("{major}.{minor}")
}

/// The way to a GPU, and where it ends.
fn cuda(cuda: &Cuda, device: DeviceChoice) -> Check {
    let Some(fault) = &cuda.fault else {
        let shown = |found: Option<[i32; 2]>| found.map_or_else(|| "unknown".into(), version);
        let [driver, runtime] = [cuda.driver, cuda.runtime].map(shown);
        let gpus = cuda.gpus.iter().enumerate().map(|(index, gpu)| gpu_name(index, gpu));
        let gpus = gpus.collect::<Vec<_>>().join("; ");
        let found = format!("libtorch has {runtime}, the driver can run {driver}; {gpus}");
        return Check::new("CUDA", State::Ok, found, "");
    };
    let (state, found, hint) = match cuda.driver {
        Some(driver) if !cuda.gpus.is_empty() => unused_gpu(cuda, driver, fault),
        driver => no_gpu(cuda, driver.is_some()),
    };
    let is_needed = matches!(device, DeviceChoice::Cuda(_));
    Check::new("CUDA", if is_needed { State::Broken } else { state }, found, hint)
}

/// Why the driver shows no GPU.
fn no_gpu(cuda: &Cuda, has_driver: bool) -> (State, String, &'static str) {
    if let Some(fault) = &cuda.driver_fault {
        let hint = "`nvidia-smi` has to work first: restart after an update of the driver, start \
                    a container with `--gpus all`, and look at `CUDA_VISIBLE_DEVICES`";
        return (State::Warning, format!("NVIDIA's driver is there, but {fault}"), hint);
    }
    if has_driver {
        let found = "NVIDIA's driver is there, but finds no GPU".into();
        let hint = "look at `CUDA_VISIBLE_DEVICES`; start a container with `--gpus all`";
        return (State::Warning, found, hint);
    }
    let more = if cuda.libtorch_has_cuda { "" } else { ", and this libtorch is a CPU build" };
    let found = format!("none: there is no NVIDIA driver (`libcuda.so.1`){more}");
    let hint = "nothing to do on a CPU; for a GPU, install its driver, start a container with \
                `--gpus all`, and use a libtorch with CUDA (`scripts/setup --cuda`, or PyTorch's \
                wheel with CUDA)";
    (State::Note, found, hint)
}

/// Why libtorch does not use the GPUs of the driver.
fn unused_gpu(cuda: &Cuda, driver: [i32; 2], fault: &str) -> (State, String, &'static str) {
    let gpus = format!("the driver finds {}", gpu_name(0, &cuda.gpus[0]));
    let (found, hint) = match cuda.runtime.filter(|runtime| runtime[0] > driver[0]) {
        _ if !cuda.libtorch_has_cuda => (
            format!("{gpus}, but this libtorch is a CPU build"),
            "`scripts/setup --cuda` and build again, or install dylora beside a PyTorch with CUDA",
        ),
        Some(runtime) => {
            let [can, has] = [driver, runtime].map(version);
            (
                format!("{gpus}, but it is too old: it can run CUDA {can}, and libtorch has {has}"),
                "update NVIDIA's driver, or use a build of PyTorch for an older CUDA",
            )
        }
        None => (
            format!("{gpus}, but libtorch cannot use it: {fault}"),
            "a library that is not found belongs to PyTorch's `nvidia-*` packages: install \
             PyTorch again with all that it needs",
        ),
    };
    (State::Warning, found, hint)
}

/// dylora's own kernels, if there is a GPU for them.
fn kernels(cuda: &Cuda) -> Option<Check> {
    let works = cuda.gpus.iter().take(usable(cuda)).find(|gpu| gpu.fault.is_none())?;
    Some(match &works.kernels_fault {
        None => Check::new("kernels", State::Ok, "NVRTC compiles dylora's own kernels", ""),
        Some(fault) => Check::new(
            "kernels",
            State::Warning,
            format!("dylora's own kernels cannot be made, so that steps take longer: {fault}"),
            "libtorch's folder needs `libcaffe2_nvrtc.so`, and PyTorch's `nvidia-cuda-nvrtc` must \
             know the GPU; a build without CUDA's headers has no kernels",
        ),
    })
}

fn threads(cpu: &Cpu) -> Check {
    let Cpu { cores, threads, asked_threads, .. } = cpu;
    let from =
        asked_threads.as_ref().map_or_else(String::new, |n| format!(" (`OMP_NUM_THREADS={n}`)"));
    let found = format!("libtorch computes with {threads} on {cores} cores{from}");
    match threads > cores {
        true => Check::new(
            "threads",
            State::Warning,
            found,
            &format!("more threads than cores wait for each other: set `OMP_NUM_THREADS={cores}`"),
        ),
        false => Check::new("threads", State::Ok, found, ""),
    }
}

fn memory(memory: Memory) -> Check {
    let [free, total] =
        [memory.available_bytes, memory.total_bytes].map(|bytes| table::bytes(bytes as i64));
    let found = format!("{free} of {total} are free");
    match memory.available_bytes < GIB {
        true => Check::new(
            "memory",
            State::Warning,
            found,
            "end other programs; `dylora train --dry-run` estimates what a run needs",
        ),
        false => Check::new("memory", State::Ok, found, ""),
    }
}

fn free(folder: &Folder) -> String {
    match folder.free_bytes {
        Some(bytes) => format!("{} are free", table::bytes(bytes as i64)),
        None => "free space unknown".into(),
    }
}

fn disk(folder: &Folder) -> Check {
    let path = folder.path.display();
    if let Some(fault) = &folder.fault {
        return Check::new(
            "disk",
            State::Warning,
            format!("no file can be written in this folder, `{path}`: {fault}"),
            "start dylora elsewhere, or name folders by `run.dir` and `--out`",
        );
    }
    let found = format!("{} in this folder, `{path}`", free(folder));
    match folder.free_bytes.is_some_and(|bytes| bytes < GIB) {
        true => Check::new(
            "disk",
            State::Warning,
            found,
            "make room, or name another disk by `run.dir`: a run keeps several checkpoints",
        ),
        false => Check::new("disk", State::Ok, found, ""),
    }
}

fn size(folder: &Folder) -> String {
    match folder.bytes {
        None | Some(0) => "nothing".into(),
        Some(bytes) => table::bytes(bytes as i64),
    }
}

fn cache(folder: &Folder) -> Check {
    let path = folder.path.display();
    match &folder.fault {
        Some(fault) => Check::new(
            "cache",
            State::Warning,
            format!("no file can be written in `{path}`: {fault}"),
            "set `DYLORA_CACHE` to a folder that you may write to; without it, data is tokenized \
             again and kernels are compiled again for each run",
        ),
        None => Check::new(
            "cache",
            State::Ok,
            format!("{} of tokens and kernels in `{path}`; {}", size(folder), free(folder)),
            "",
        ),
    }
}

fn hub(hub: &Hub) -> Check {
    let kept = format!("{} in `{}`", size(&hub.cache), hub.cache.path.display());
    let check = |state, found: String, hint: &str| {
        Check::new("Hub", state, format!("{found}; {kept}"), hint)
    };
    if let Some(fault) = &hub.cache.fault {
        return check(
            State::Warning,
            format!("bases cannot be fetched, because the cache takes no file: {fault}"),
            "set `HF_HOME` to a folder that you may write to",
        );
    }
    let endpoint = &hub.endpoint;
    let log_in = "for gated bases and `dylora push`, run `hf auth login` or set `HF_TOKEN`";
    let from = hub.token_from.as_deref().unwrap_or("nowhere");
    match &hub.answer {
        Some(Answer::Unreachable(fault)) => check(
            State::Broken,
            format!("{endpoint} cannot be reached: {fault}"),
            "look at the network, a proxy (`HTTPS_PROXY`) and `HF_ENDPOINT`; without a network, \
             name bases by their folder",
        ),
        Some(Answer::Refused) => check(
            State::Broken,
            format!("{endpoint} refuses the token from {from}"),
            "log in again with `hf auth login`, or unset `HF_TOKEN`",
        ),
        Some(Answer::Account(name)) => {
            check(State::Ok, format!("{endpoint} knows the token from {from} as `{name}`"), "")
        }
        Some(Answer::Anonymous) => {
            check(State::Ok, format!("{endpoint} answers; there is no token"), log_in)
        }
        None if hub.offline => check(
            State::Note,
            "`HF_HUB_OFFLINE` forbids requests".into(),
            "unset it to fetch a base that the cache lacks",
        ),
        None if hub.token_from.is_some() => {
            check(State::Ok, format!("{endpoint}, with the token from {from}"), "")
        }
        None => check(State::Ok, format!("{endpoint}, without a token"), log_in),
    }
}
