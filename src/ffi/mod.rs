//! Bindings to the parts of libtorch that tch does not cover, through the C++ shim in
//! `csrc/shim.cpp`. This folder also loads libtorch's CUDA part at run time, and contains all
//! `unsafe` code of the crate.

pub mod cuda;
pub mod dist;
pub mod driver;
pub mod fused;
mod memory;
pub mod nccl;
mod outcome;
pub mod quantised;
pub mod route;
pub mod signals;
pub mod step;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

pub use self::memory::{FileBytes, with_bytes};
use self::outcome::{check, last_error, owned, pair, taken};

type TensorPtr = *const C_tensor;
type SegmentRun = extern "C" fn(*mut c_void, *const *mut C_tensor, usize) -> *mut C_tensor;

unsafe extern "C" {
    fn dylora_torch_version() -> *const c_char;
    fn dylora_libtorch_path(out: *mut c_char, capacity: usize) -> c_int;
    fn dylora_differentiate(
        outputs: *const TensorPtr,
        weights: *const TensorPtr,
        n: usize,
        inputs: *const TensorPtr,
        m: usize,
        grads: *mut *mut C_tensor,
    ) -> c_int;
    fn dylora_adamw(
        params: *const TensorPtr,
        grads: *const TensorPtr,
        exp_avgs: *const TensorPtr,
        exp_avg_sqs: *const TensorPtr,
        n: usize,
        step: TensorPtr,
        lr: TensorPtr,
        found_inf: TensorPtr,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
    fn dylora_clip_grad_norm(grads: *const TensorPtr, n: usize, max_norm: f64) -> *mut C_tensor;
    fn dylora_rng_state(device: c_int) -> *mut C_tensor;
    fn dylora_set_rng_state(device: c_int, state: TensorPtr) -> c_int;
    fn dylora_device_memory(device: c_int, out: *mut i64) -> c_int;
    fn dylora_memory_stats(device: c_int, out: *mut i64) -> c_int;
    fn dylora_reset_peak_memory(device: c_int) -> c_int;
    fn dylora_cuda_name(device: c_int, out: *mut c_char, capacity: c_int) -> c_int;
    fn dylora_use_device(device: c_int) -> c_int;
    fn dylora_pinned(tensor: TensorPtr) -> *mut C_tensor;
    fn dylora_synchronize(device: c_int) -> c_int;
    fn dylora_empty_cache() -> c_int;
    fn dylora_checkpoint(
        run: SegmentRun,
        drop: extern "C" fn(*mut c_void),
        data: *mut c_void,
        num_activations: usize,
        inputs: *const TensorPtr,
        n: usize,
    ) -> *mut C_tensor;
    fn dylora_permute(
        rows: TensorPtr,
        tokens: TensorPtr,
        inverse: TensorPtr,
        dispatch: c_int,
    ) -> *mut C_tensor;
}

fn pointers(tensors: &[Tensor]) -> Vec<TensorPtr> {
    tensors.iter().map(Tensor::as_ptr).collect()
}

fn index(device: Device) -> c_int {
    match device {
        Device::Cuda(index) => index as c_int,
        _ => -1,
    }
}

/// The version of the libtorch headers that this binary was compiled with, such as `2.11.0`.
pub fn torch_version() -> &'static str {
    // SAFETY: the shim returns a string literal
    unsafe { CStr::from_ptr(dylora_torch_version()) }.to_str().expect("a version is ASCII")
}

/// The gradients of `sum_i <outputs_i, weights_i>` with respect to `inputs`; `None` for an input on
/// which the outputs do not depend. The graph between them is freed.
pub(crate) fn differentiate(
    outputs: &[Tensor],
    weights: &[Tensor],
    inputs: &[Tensor],
) -> Result<Vec<Option<Tensor>>> {
    assert_eq!(outputs.len(), weights.len());
    let mut grads = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: the arrays hold live tensors, of which the shim keeps none, and it writes one pointer
    // for each input: null, or a tensor whose ownership it gives up
    unsafe {
        check(dylora_differentiate(
            pointers(outputs).as_ptr(),
            pointers(weights).as_ptr(),
            outputs.len(),
            pointers(inputs).as_ptr(),
            inputs.len(),
            grads.as_mut_ptr(),
        ))?;
        Ok(grads.into_iter().map(|at| (!at.is_null()).then(|| Tensor::from_ptr(at))).collect())
    }
}

/// The hyperparameters of AdamW for one group of tensors.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
}

/// The values that change from update to update. They are 0-dim tensors, so that the host need not
/// know them.
#[derive(Debug)]
pub(crate) struct AdamWUpdate {
    /// The number of the update, from 1; f32.
    pub number: Tensor,
    /// The learning rate; f64 on the CPU, f32 on CUDA.
    pub lr: Tensor,
    /// 1 if a gradient is not finite, so that nothing must be updated, and otherwise 0; f32.
    pub found_inf: Tensor,
}

/// Makes one AdamW update in place (`at::_fused_adamw_`, arXiv:1711.05101, algorithm 2).
///
/// - `exp_avgs`, `exp_avg_sqs`: the moments, with the shapes, dtypes and layouts of `params` and
///   `grads`
/// - `update`: the values for this update, on the same device as the parameters
pub(crate) fn adamw(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    update: &AdamWUpdate,
    settings: AdamW,
) -> Result<()> {
    let n = params.len();
    assert!(grads.len() == n && exp_avgs.len() == n && exp_avg_sqs.len() == n);
    // SAFETY: the arrays hold `n` live tensors each, and the shim keeps none of them
    check(unsafe {
        dylora_adamw(
            pointers(params).as_ptr(),
            pointers(grads).as_ptr(),
            pointers(exp_avgs).as_ptr(),
            pointers(exp_avg_sqs).as_ptr(),
            n,
            update.number.as_ptr(),
            update.lr.as_ptr(),
            update.found_inf.as_ptr(),
            settings.betas[0],
            settings.betas[1],
            settings.weight_decay,
            settings.eps,
        )
    })
}

/// The 2-norm of all `grads` together, as a 0-dim tensor, without waiting for the device. If it is
/// larger than `max_norm`, the gradients are scaled down to `max_norm` in place.
pub(crate) fn clip_grad_norm(grads: &[Tensor], max_norm: Option<f64>) -> Result<Tensor> {
    // SAFETY: the array holds live tensors, and the shim keeps none of them
    owned(unsafe {
        dylora_clip_grad_norm(pointers(grads).as_ptr(), grads.len(), max_norm.unwrap_or(0.0))
    })
}

/// The message of a panic, without libtorch's stack trace. tch's operations panic when they fail.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    text.split("\nException raised from").next().unwrap_or(text)
}

/// Runs `f` and turns a panic into an error. tch's operations panic when they fail, as when memory
/// runs out.
pub(crate) fn caught<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|panic| Err(anyhow!("{}", panic_message(panic.as_ref()).trim())))
}

/// Whether the process ignores a signal, as it does under `nohup` and in background jobs of
/// scripts.
pub(crate) fn ignores_signal(signal: i32) -> bool {
    // SAFETY: a `sigaction` of zeros is valid, and the call only writes to it
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// The state of a device's random number generator, as a `u8` tensor on the CPU.
pub fn rng_state(device: Device) -> Result<Tensor> {
    // SAFETY: the call takes no pointers
    owned(unsafe { dylora_rng_state(index(device)) })
}

/// Restores a state that [`rng_state`] returned.
pub(crate) fn set_rng_state(device: Device, state: &Tensor) -> Result<()> {
    // SAFETY: `state` is alive during the call
    check(unsafe { dylora_set_rng_state(index(device), state.as_ptr()) })
}

/// The largest memory use so far, in bytes: the resident memory of the process on the CPU, and the
/// memory allocated by libtorch on CUDA.
pub fn peak_memory_bytes(device: Device) -> Result<u64> {
    match device {
        Device::Cuda(index) => Ok(cuda_memory(index)?[1] as u64),
        _ => process_memory("VmHWM:"),
    }
}

/// The present memory use in bytes, measured as in [`peak_memory_bytes`].
pub(crate) fn memory_bytes(device: Device) -> Result<u64> {
    match device {
        Device::Cuda(index) => Ok(cuda_memory(index)?[0] as u64),
        _ => process_memory("VmRSS:"),
    }
}

/// The memory of a GPU as a whole, whoever uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// The memory that no process holds, in bytes.
    pub free_bytes: u64,
    /// All memory, in bytes.
    pub total_bytes: u64,
}

/// The memory of the CUDA device with this index.
pub fn device_memory(index: usize) -> Result<DeviceMemory> {
    let mut sizes = [0i64; 2];
    // SAFETY: the shim writes two numbers into `sizes`
    check(unsafe { dylora_device_memory(index as c_int, sizes.as_mut_ptr()) })?;
    Ok(DeviceMemory { free_bytes: sizes[0] as u64, total_bytes: sizes[1] as u64 })
}

/// Frees memory that is held but not used, and restarts [`peak_memory_bytes`] from the present use.
///
/// # Errors
/// On the CPU, if the kernel does not let the process write to `/proc/self/clear_refs`.
pub(crate) fn reset_peak_memory(device: Device) -> Result<()> {
    if let Device::Cuda(index) = device {
        // SAFETY: the call takes no pointers
        return check(unsafe { dylora_reset_peak_memory(index as c_int) });
    }
    // SAFETY: the call takes no pointers
    unsafe { libc::malloc_trim(0) };
    Ok(fs_err::write("/proc/self/clear_refs", "5")?)
}

/// `[allocated, peak allocated]`, in bytes.
fn cuda_memory(index: usize) -> Result<[i64; 2]> {
    let mut stats = [0i64; 2];
    // SAFETY: the shim writes two numbers into `stats`
    check(unsafe { dylora_memory_stats(index as c_int, stats.as_mut_ptr()) })?;
    Ok(stats)
}

/// The value of a line of `/proc/self/status`, in bytes.
fn process_memory(key: &str) -> Result<u64> {
    let status = fs_err::read_to_string("/proc/self/status")?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| anyhow!("`/proc/self/status` has no `{key}`"))
}

/// The model of a device: `NVIDIA H100 80GB HBM3`, for example, or the name of the processor;
/// `None` if the system does not give it.
pub fn device_model(device: Device) -> Option<String> {
    let Device::Cuda(index) = device else {
        let info = fs_err::read_to_string("/proc/cpuinfo").ok()?;
        let line = info.lines().find(|line| line.starts_with("model name"))?;
        return Some(line.split_once(':')?.1.trim().to_owned());
    };
    let mut buffer = [0u8; 256];
    // SAFETY: the driver writes a C string within the capacity of `buffer`
    let status = unsafe {
        dylora_cuda_name(index as c_int, buffer.as_mut_ptr().cast(), buffer.len() as c_int)
    };
    let name = CStr::from_bytes_until_nul(&buffer).ok()?.to_str().ok()?;
    (status == 0 && !name.is_empty()).then(|| name.to_owned())
}

/// Makes a CUDA device the current one, on which this thread creates streams, kernels and graphs.
/// Does nothing for the CPU.
pub(crate) fn use_device(device: Device) -> Result<()> {
    match device {
        // SAFETY: the call takes no pointers
        Device::Cuda(index) => check(unsafe { dylora_use_device(index as c_int) }),
        _ => Ok(()),
    }
}

/// Copies a tensor into pinned memory if `device` is a GPU, which can then fetch it without the
/// host waiting. For the CPU, or if there is no pinned memory, returns the tensor itself.
pub(crate) fn staged(tensor: Tensor, device: Device) -> Tensor {
    if !device.is_cuda() {
        return tensor;
    }
    // SAFETY: `tensor` is alive during the call
    owned(unsafe { dylora_pinned(tensor.as_ptr()) }).unwrap_or(tensor)
}

/// Waits until a CUDA device has finished all its work. Does nothing for the CPU.
pub fn synchronize(device: Device) -> Result<()> {
    match device {
        // SAFETY: the call takes no pointers
        Device::Cuda(index) => check(unsafe { dylora_synchronize(index as c_int) }),
        _ => Ok(()),
    }
}

/// Returns memory that a CUDA device's allocator caches to the device. Does nothing for the CPU.
pub(crate) fn empty_cache(device: Device) -> Result<()> {
    match device {
        // SAFETY: the call takes no pointers
        Device::Cuda(_) => check(unsafe { dylora_empty_cache() }),
        _ => Ok(()),
    }
}

/// A part of the forward pass that can be run twice: a function from activations to one output.
pub type Segment = Box<dyn Fn(&[Tensor]) -> Tensor + Send>;

/// Runs `segment` without keeping its intermediate results. The backward pass runs it again
/// (gradient checkpointing, arXiv:1604.06174).
///
/// - `activations`: the arguments of the segment
/// - `parameters`: the leaf tensors that the segment captures and that receive gradients
///
/// If the segment panics in the forward pass, this is an error; in the backward pass, it is a
/// panic.
pub fn checkpoint(
    segment: Segment,
    activations: &[Tensor],
    parameters: &[Tensor],
) -> Result<Tensor> {
    let data: *mut Segment = Box::into_raw(Box::new(segment));
    let mut inputs = pointers(activations);
    inputs.extend(pointers(parameters));
    // SAFETY: the shim owns `data` from here on and passes it to `drop_segment` exactly once in
    // every case; the inputs are live tensors, to which the shim keeps its own references
    owned(unsafe {
        dylora_checkpoint(
            run_segment,
            drop_segment,
            data.cast(),
            activations.len(),
            inputs.as_ptr(),
            inputs.len(),
        )
    })
}

extern "C" fn run_segment(
    data: *mut c_void,
    activations: *const *mut C_tensor,
    n: usize,
) -> *mut C_tensor {
    let run = || {
        // SAFETY: `data` is the `Segment` of `checkpoint`, which lives until `drop_segment`; the
        // shim passes `n` live tensors, and `clone_from_ptr` takes its own references to them
        let (segment, activations) = unsafe {
            let pointers = std::slice::from_raw_parts(activations, n);
            let tensors: Vec<_> = pointers.iter().map(|&at| Tensor::clone_from_ptr(at)).collect();
            (&*data.cast::<Segment>(), tensors)
        };
        let output = segment(&activations).shallow_clone();
        let pointer = output.as_ptr().cast_mut();
        std::mem::forget(output);
        pointer
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or(std::ptr::null_mut())
}

extern "C" fn drop_segment(data: *mut c_void) {
    // SAFETY: called once, with the pointer that `checkpoint` got from `Box::into_raw`
    drop(unsafe { Box::from_raw(data.cast::<Segment>()) });
}

/// The direction of [`permute`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permutation {
    /// Each assignment gets the row of its token: `[n, d]` to `[n k, d]`.
    Dispatch,
    /// Each token gets the sum of the rows of its assignments: `[n k, d]` to `[n, d]`.
    Combine,
}

/// Moves rows from tokens to assignments or back. Each direction is the gradient of the other. Both
/// only gather, so unlike `index_add`, the same input gives the same result to the bit, on CUDA
/// too.
///
/// - `tokens`: the token of each assignment, `[n k]`, int64
/// - `inverse`: the rows of each token's assignments, `[n, k]`, int64
pub(crate) fn permute(
    rows: &Tensor,
    tokens: &Tensor,
    inverse: &Tensor,
    way: Permutation,
) -> Result<Tensor> {
    let dispatch = c_int::from(way == Permutation::Dispatch);
    // SAFETY: three live tensors, to which the graph keeps its own references
    owned(unsafe { dylora_permute(rows.as_ptr(), tokens.as_ptr(), inverse.as_ptr(), dispatch) })
}

/// Maps a file into memory, read-only. The file must not be modified while it is mapped. dylora
/// replaces files by renaming, which does not affect a map.
pub(crate) fn map_file(path: &Path) -> Result<memmap2::Mmap> {
    let file = fs_err::File::open(path)?;
    // SAFETY: the map is read-only; a writer that shrinks the file could end the process
    // ([`signals`]), but not corrupt its memory
    let map = unsafe { memmap2::Mmap::map(file.file()) };
    map.map_err(|error| anyhow!("cannot map `{}`: {error}", path.display()))
}

static CUDA: OnceLock<std::result::Result<(), String>> = OnceLock::new();

/// Loads libtorch's CUDA part if it is in the same folder as the CPU part. The error says why CUDA
/// cannot be used. This must run before any other call of libtorch, since libtorch looks for CUDA
/// only once.
pub fn load_cuda() -> std::result::Result<(), &'static str> {
    CUDA.get_or_init(|| try_load_cuda().map_err(|error| error.to_string()))
        .as_ref()
        .copied()
        .map_err(String::as_str)
}

fn try_load_cuda() -> Result<()> {
    let library = libtorch_path()?.with_file_name("libtorch_cuda.so");
    if !library.exists() {
        bail!("this libtorch is a CPU build: `{}` is absent", library.display());
    }
    open_globally(&library)?;
    if !tch::Cuda::is_available() {
        bail!("libtorch's CUDA part is loaded, but finds no usable GPU and driver");
    }
    Ok(())
}

/// The path of the `libtorch_cpu.so` that this process uses.
pub fn libtorch_path() -> Result<PathBuf> {
    let mut buffer = vec![0u8; 4096];
    // SAFETY: the shim writes a C string within the capacity of `buffer`
    check(unsafe { dylora_libtorch_path(buffer.as_mut_ptr().cast(), buffer.len()) })?;
    let path = CStr::from_bytes_until_nul(&buffer)?.to_str()?;
    Ok(PathBuf::from(path))
}

fn open_globally(library: &Path) -> Result<()> {
    let name = CString::new(library.as_os_str().as_encoded_bytes())?;
    let loaded = try_open(&name, libc::RTLD_NOW | libc::RTLD_GLOBAL);
    loaded.map(|_| ()).context("cannot load libtorch's CUDA part")
}

fn try_open(name: &CStr, flags: c_int) -> Result<*mut c_void> {
    // SAFETY: `name` is a C string; the library's constructors register it with libtorch, as in
    // Python
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if handle.is_null() {
        // SAFETY: dlopen has just failed, so dlerror returns a C string
        let message = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
        bail!(message);
    }
    Ok(handle)
}
