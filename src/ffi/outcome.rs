//! What a call of the shim returned: tensors, or an error.

use std::ffi::{CStr, c_char, c_int};

use anyhow::{Result, anyhow};
use tch::Tensor;
use torch_sys::C_tensor;

unsafe extern "C" {
    fn dylora_take_error() -> *mut c_char;
}

pub(super) fn last_error() -> anyhow::Error {
    // SAFETY: the shim gives up the ownership of a string from strdup, or returns null
    unsafe { taken(dylora_take_error()) }
}

/// Converts a message of the shim into an error.
///
/// # Safety
/// `pointer` must be null or a string from strdup whose ownership the caller gives up.
pub(super) unsafe fn taken(pointer: *mut c_char) -> anyhow::Error {
    if pointer.is_null() {
        return anyhow!("libtorch failed without a message");
    }
    // SAFETY: a C string that this function owns
    let message = unsafe {
        let message = CStr::from_ptr(pointer).to_string_lossy().into_owned();
        libc::free(pointer.cast());
        message
    };
    anyhow!("libtorch: {}", message.trim())
}

pub(super) fn check(status: c_int) -> Result<()> {
    if status < 0 { Err(last_error()) } else { Ok(()) }
}

pub(super) fn owned(pointer: *mut C_tensor) -> Result<Tensor> {
    if pointer.is_null() {
        return Err(last_error());
    }
    // SAFETY: the shim returned a tensor allocated with `new` and gave up its ownership
    Ok(unsafe { Tensor::from_ptr(pointer) })
}

/// Calls a function of the shim that returns two tensors, and takes these over. `call` gets the
/// place where the function writes them.
pub(super) fn pair(call: impl FnOnce(*mut *mut C_tensor) -> c_int) -> Result<(Tensor, Tensor)> {
    let mut out = [std::ptr::null_mut(); 2];
    check(call(out.as_mut_ptr()))?;
    // SAFETY: the shim returned two tensors allocated with `new` and gave up their ownership
    Ok(unsafe { (Tensor::from_ptr(out[0]), Tensor::from_ptr(out[1])) })
}
