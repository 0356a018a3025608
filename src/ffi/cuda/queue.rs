//! Places in a CUDA device's queue: numbers that the host fetches from one, and the time between
//! two of them.

use std::ffi::{c_int, c_void};

use anyhow::Result;
use tch::Tensor;

use super::{Library, library};

/// Numbers on their way from a CUDA device to the host. Work that is queued after them need not end
/// before they arrive.
#[derive(Debug)]
pub(crate) struct Fetch {
    library: &'static Library,
    pointer: *mut c_void,
}

// SAFETY: libtorch guards the device's state, and a copy has one owner at a time
unsafe impl Send for Fetch {}

impl Fetch {
    /// Starts to copy a CUDA tensor, once what is queued so far has ended.
    pub fn new(numbers: &Tensor) -> Result<Self> {
        Self::begin(numbers, false)
    }

    /// The same, but later work does not wait for the copy. Until it has arrived, nothing may
    /// overwrite those of its numbers that will be used. So they must not lie in a graph's memory,
    /// which its replays use for other things as well.
    pub fn aside(numbers: &Tensor) -> Result<Self> {
        Self::begin(numbers, true)
    }

    fn begin(numbers: &Tensor, aside: bool) -> Result<Self> {
        let library = library()?;
        // SAFETY: a live tensor, to which the library keeps its own reference
        let pointer = unsafe { (library.fetch)(numbers.as_ptr(), c_int::from(aside)) };
        Ok(Self { library, pointer: library.made(pointer)? })
    }

    /// Waits for the numbers.
    pub fn wait(mut self) -> Result<Tensor> {
        let pointer = std::mem::replace(&mut self.pointer, std::ptr::null_mut());
        // SAFETY: `begin` made it, and it is taken once
        let numbers = self.library.made(unsafe { (self.library.fetched)(pointer) })?;
        // SAFETY: the library returned a tensor allocated with `new` and gave up its ownership
        Ok(unsafe { Tensor::from_ptr(numbers) })
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        if !self.pointer.is_null() {
            // SAFETY: `begin` made it, and it is taken once; the tensor is freed at once
            let numbers = unsafe { (self.library.fetched)(self.pointer) };
            if !numbers.is_null() {
                // SAFETY: as in `wait`
                drop(unsafe { Tensor::from_ptr(numbers) });
            }
        }
    }
}

/// A place in the queue of a CUDA device, which the device passes at some time.
#[derive(Debug)]
pub(crate) struct Mark {
    library: &'static Library,
    pointer: *mut c_void,
}

// SAFETY: CUDA's events may be used by any thread, and a mark has one owner at a time
unsafe impl Send for Mark {}

impl Mark {
    /// Marks the present end of a device's queue.
    pub fn new(device: usize) -> Result<Self> {
        let library = library()?;
        // SAFETY: the call takes no pointers
        let pointer = unsafe { (library.mark)(device as c_int) };
        Ok(Self { library, pointer: library.made(pointer)? })
    }

    /// The time from when the device passed `earlier` to when it passed this mark, in seconds.
    ///
    /// # Errors
    /// If the device has not passed both.
    pub fn secs_since(&self, earlier: &Self) -> Result<f64> {
        // SAFETY: two live marks
        let secs = unsafe { (self.library.mark_secs)(earlier.pointer, self.pointer) };
        if secs.is_nan() { Err(self.library.error()) } else { Ok(secs) }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: `new` made this mark, and it is freed once
        unsafe { (self.library.mark_free)(self.pointer) }
    }
}
