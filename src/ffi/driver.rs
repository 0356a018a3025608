//! What NVIDIA's driver says by itself, without libtorch: the version of CUDA that it has, and its
//! GPUs (CUDA Driver API, `cuda.h`). `dylora doctor` needs it to tell a missing driver from a
//! libtorch without CUDA.

use std::ffi::{CStr, c_char, c_int, c_void};

use anyhow::{Context, Result, bail};

use super::try_open;

/// The driver's library, which comes with the driver and not with CUDA.
const LIBRARY: &CStr = c"libcuda.so.1";
/// `CUdevice_attribute` of `cuda.h`: compute capability, major and minor.
const CAPABILITY: [c_int; 2] = [75, 76];

type Status = c_int;

/// NVIDIA's driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA that it can run, as `[major, minor]`.
    pub cuda: [i32; 2],
    /// Its GPUs.
    pub gpus: Vec<Gpu>,
}

/// A GPU as the driver knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its compute capability, as `[major, minor]`.
    pub capability: [i32; 2],
    /// Its memory.
    pub memory_bytes: u64,
}

/// The driver of this machine; `None` if `libcuda.so.1` cannot be opened.
///
/// # Errors
/// A driver that does not start, as when its kernel module is absent, or has another version.
pub fn driver() -> Result<Option<Driver>> {
    let Ok(library) = try_open(LIBRARY, libc::RTLD_NOW | libc::RTLD_LOCAL) else {
        return Ok(None);
    };
    // SAFETY: these are the functions of `cuda.h` with their types, and each pointer is to a
    // variable of the type that the function writes
    unsafe {
        let init: extern "C" fn(u32) -> Status = function(library, c"cuInit")?;
        let version: extern "C" fn(*mut c_int) -> Status =
            function(library, c"cuDriverGetVersion")?;
        let count: extern "C" fn(*mut c_int) -> Status = function(library, c"cuDeviceGetCount")?;
        check(library, init(0), "does not start")?;
        let mut number = 0;
        check(library, version(&raw mut number), "does not say its version")?;
        let cuda = version_parts(number);
        check(library, count(&raw mut number), "does not count its GPUs")?;
        let gpus = (0..number).map(|index| gpu(library, index)).collect::<Result<_>>()?;
        Ok(Some(Driver { cuda, gpus }))
    }
}

/// The version of the CUDA runtime that libtorch has loaded, as `[major, minor]`; `None` if it has
/// loaded none.
pub fn runtime() -> Option<[i32; 2]> {
    // SAFETY: the function of `cuda_runtime_api.h` with its type, which writes one number
    unsafe {
        let get: extern "C" fn(*mut c_int) -> Status =
            function(libc::RTLD_DEFAULT, c"cudaRuntimeGetVersion").ok()?;
        let mut number = 0;
        (get(&raw mut number) == 0).then(|| version_parts(number))
    }
}

/// The version of the libtorch that this process has loaded, such as `2.11.0`; `None` if it does
/// not say. It may be another than the one whose headers this binary was compiled with.
pub fn loaded_torch_version() -> Option<String> {
    // SAFETY: the function of libtorch's `shim.h` with its type
    let number = unsafe {
        let get: extern "C" fn() -> u64 =
            function(libc::RTLD_DEFAULT, c"aoti_torch_abi_version").ok()?;
        get()
    };
    // `TORCH_ABI_VERSION` of libtorch's `version.h`: a byte each from the highest
    let [major, minor, patch, ..] = number.to_be_bytes();
    Some(format!("{major}.{minor}.{patch}"))
}

/// A version as CUDA counts it, `1000 major + 10 minor`.
fn version_parts(number: c_int) -> [i32; 2] {
    [number / 1000, number % 1000 / 10]
}

fn gpu(library: *mut c_void, index: c_int) -> Result<Gpu> {
    let (mut device, mut name, mut capability, mut memory) = (0, [0u8; 256], [0; 2], 0usize);
    // SAFETY: as in `driver`; the driver writes a C string within the capacity of `name`
    unsafe {
        let get: extern "C" fn(*mut c_int, c_int) -> Status = function(library, c"cuDeviceGet")?;
        let get_name: extern "C" fn(*mut c_char, c_int, c_int) -> Status =
            function(library, c"cuDeviceGetName")?;
        let get_attribute: extern "C" fn(*mut c_int, c_int, c_int) -> Status =
            function(library, c"cuDeviceGetAttribute")?;
        let get_memory: extern "C" fn(*mut usize, c_int) -> Status =
            function(library, c"cuDeviceTotalMem_v2")?;
        let fault = "does not describe a GPU";
        check(library, get(&raw mut device, index), fault)?;
        let length = name.len() as c_int;
        check(library, get_name(name.as_mut_ptr().cast(), length, device), fault)?;
        for (part, attribute) in capability.iter_mut().zip(CAPABILITY) {
            check(library, get_attribute(part, attribute, device), fault)?;
        }
        check(library, get_memory(&raw mut memory, device), fault)?;
    }
    let name = CStr::from_bytes_until_nul(&name)?.to_string_lossy().into_owned();
    Ok(Gpu { name, capability, memory_bytes: memory as u64 })
}

/// Turns a status of the driver into an error with the driver's own words.
fn check(library: *mut c_void, status: Status, what: &str) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the function of `cuda.h` with its type, which points to a string literal or null
    let reason = unsafe {
        let words: extern "C" fn(Status, *mut *const c_char) -> Status =
            function(library, c"cuGetErrorString")?;
        let mut text = std::ptr::null();
        let found = words(status, &raw mut text) == 0 && !text.is_null();
        found.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    bail!("the driver {what}: {}", reason.unwrap_or_else(|| format!("error {status}")))
}

/// Looks up a function of a loaded library.
///
/// # Safety
/// `F` must be the type of the function.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F> {
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: a live handle and a C string
    let pointer = unsafe { libc::dlsym(library, name.as_ptr()) };
    let found = (!pointer.is_null()).then_some(pointer);
    let pointer = found.with_context(|| format!("there is no `{}`", name.to_string_lossy()))?;
    // SAFETY: the caller guarantees that the pointer is a function of type `F`
    Ok(unsafe { std::mem::transmute_copy(&pointer) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_of_cuda_has_two_parts() {
        assert_eq!([version_parts(13000), version_parts(12040)], [[13, 0], [12, 4]]);
    }

    #[test]
    fn the_loaded_libtorch_is_the_one_of_the_headers() {
        // a call of tch, so that libtorch is linked
        let _ = tch::get_num_threads();
        assert_eq!(loaded_torch_version().as_deref(), Some(super::super::torch_version()));
    }
}
