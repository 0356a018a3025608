//! What needs CUDA itself, through the shared object that build.rs makes of `csrc/cuda.cpp`: it is part of
//! the binary and loaded once libtorch's CUDA part is.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

use anyhow::{Result, anyhow, bail};

use super::{taken, try_open};

static IMAGE: &[u8] = include_bytes!(env!("DYLORA_CUDA_LIBRARY"));

/// The functions of the shared object.
#[derive(Debug)]
struct Library {
    take_error: unsafe extern "C" fn() -> *mut c_char,
    graph_new: unsafe extern "C" fn() -> *mut c_void,
    graph_enter: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_leave: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_begin: unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int,
    graph_end: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_replay: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_free: unsafe extern "C" fn(*mut c_void),
}

static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();

fn library() -> Result<&'static Library> {
    let library = LIBRARY.get_or_init(|| open().map_err(|error| format!("{error:#}")));
    library.as_ref().map_err(|error| anyhow!("{error}"))
}

/// Loads the shared object, once.
///
/// # Errors
/// A libtorch whose CUDA part is not loaded ([`super::load_cuda`]) or of another version.
pub fn load() -> Result<()> {
    library().map(|_| ())
}

fn open() -> Result<Library> {
    if IMAGE.is_empty() {
        bail!("this binary was built without CUDA's headers");
    }
    // SAFETY: a C string; the result is checked, and owned from here on
    let mut file = unsafe {
        let fd = libc::memfd_create(c"dylora_cuda".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            bail!("cannot make a file in memory: {}", std::io::Error::last_os_error());
        }
        std::fs::File::from_raw_fd(fd)
    };
    file.write_all(IMAGE)?;
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let handle = try_open(&path, libc::RTLD_LAZY | libc::RTLD_LOCAL)?;
    // SAFETY: the shared object is this build's, so that its functions have these types
    unsafe {
        Ok(Library {
            take_error: symbol(handle, c"dylora_cuda_take_error")?,
            graph_new: symbol(handle, c"dylora_cuda_graph_new")?,
            graph_enter: symbol(handle, c"dylora_cuda_graph_enter")?,
            graph_leave: symbol(handle, c"dylora_cuda_graph_leave")?,
            graph_begin: symbol(handle, c"dylora_cuda_graph_begin")?,
            graph_end: symbol(handle, c"dylora_cuda_graph_end")?,
            graph_replay: symbol(handle, c"dylora_cuda_graph_replay")?,
            graph_free: symbol(handle, c"dylora_cuda_graph_free")?,
        })
    }
}

/// A function of a loaded shared object.
///
/// # Safety
/// `F` must be the function's type.
unsafe fn symbol<F: Copy>(handle: *mut c_void, name: &CStr) -> Result<F> {
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: a live handle and a C string
    let pointer = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if pointer.is_null() {
        bail!("the CUDA part of this binary lacks `{}`", name.to_string_lossy());
    }
    // SAFETY: a pointer to a function of type `F`, says the caller
    Ok(unsafe { std::mem::transmute_copy(&pointer) })
}

/// A sequence of kernels that runs as one (CUDA graph). It holds addresses: the tensors that it reads and
/// writes must live as long.
#[derive(Debug)]
pub struct Graph {
    library: &'static Library,
    pointer: *mut c_void,
}

// SAFETY: libtorch guards the device's state, and a graph is used by one owner at a time
unsafe impl Send for Graph {}

impl Graph {
    /// An empty graph on the current device.
    pub fn new() -> Result<Self> {
        let library = library()?;
        // SAFETY: no pointers go in
        let pointer = unsafe { (library.graph_new)() };
        if pointer.is_null() {
            return Err(library.error());
        }
        Ok(Self { library, pointer })
    }

    /// Runs `f` on the graph's stream without capturing, which makes the handles and workspaces that a
    /// capture must not make.
    pub fn warm_up<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        // SAFETY: a live graph
        self.check(unsafe { (self.library.graph_enter)(self.pointer) })?;
        let result = f();
        // SAFETY: as above
        self.check(unsafe { (self.library.graph_leave)(self.pointer) })?;
        result
    }

    /// Captures the kernels that `f` launches, which do not run yet. What `f` returns lives in the
    /// graph's memory and has its values after each [`Graph::replay`].
    ///
    /// - `memory_of`: another graph whose memory this one shares. The two must not run at the same
    ///   time, and what the one leaves there is lost when the other runs.
    ///
    /// # Errors
    /// `f`'s own, and anything in it that cannot be captured, such as a value read by the host.
    pub fn capture<T>(&self, memory_of: Option<&Self>, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let memory = memory_of.map_or(std::ptr::null_mut(), |graph| graph.pointer);
        // SAFETY: live graphs, or null
        self.check(unsafe { (self.library.graph_begin)(self.pointer, memory) })?;
        let result = f();
        // SAFETY: a live graph
        let ended = self.check(unsafe { (self.library.graph_end)(self.pointer) });
        let result = result?;
        ended.map(|()| result)
    }

    /// Runs what was captured; returns once it is in the queue.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: a live graph
        self.check(unsafe { (self.library.graph_replay)(self.pointer) })
    }

    fn check(&self, status: c_int) -> Result<()> {
        if status < 0 { Err(self.library.error()) } else { Ok(()) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `graph_new`, freed once
        unsafe { (self.library.graph_free)(self.pointer) }
    }
}

impl Library {
    fn error(&self) -> anyhow::Error {
        // SAFETY: as `taken` wants
        unsafe { taken((self.take_error)()) }
    }
}
