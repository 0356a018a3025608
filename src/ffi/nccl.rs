//! Processes that add up tensors on their GPUs by NCCL, through `csrc/nccl.cpp`. It is part of the
//! shared object that [`super::cuda`] loads.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use tch::Tensor;

use super::cuda::{self, symbol};
use super::{TensorPtr, pointers, taken};

/// The bytes by which the processes of a new group know each other.
pub type UniqueId = [u8; 128];

type OnTensors = unsafe extern "C" fn(*mut c_void, *const TensorPtr, usize) -> c_int;

/// The functions of the shared object.
#[derive(Debug)]
struct Library {
    take_error: unsafe extern "C" fn() -> *mut c_char,
    version: unsafe extern "C" fn() -> c_int,
    unique_id: unsafe extern "C" fn(*mut u8) -> c_int,
    new: unsafe extern "C" fn(c_int, *const u8, c_int, c_int) -> *mut c_void,
    all_reduce: OnTensors,
    broadcast: OnTensors,
    join: unsafe extern "C" fn(*mut c_void) -> c_int,
    check: unsafe extern "C" fn(*mut c_void) -> c_int,
    abort: unsafe extern "C" fn(*mut c_void) -> c_int,
    free: unsafe extern "C" fn(*mut c_void) -> c_int,
}

static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();

fn library() -> Result<&'static Library> {
    let library = LIBRARY.get_or_init(|| open().map_err(|error| format!("{error:#}")));
    library.as_ref().map_err(|error| anyhow!("{error}"))
}

fn open() -> Result<Library> {
    let handle = cuda::handle()?;
    // SAFETY: the shared object belongs to this build, so its functions have these types
    unsafe {
        Ok(Library {
            take_error: symbol(handle, c"dylora_cuda_take_error")?,
            version: symbol(handle, c"dylora_nccl_version")?,
            unique_id: symbol(handle, c"dylora_nccl_unique_id")?,
            new: symbol(handle, c"dylora_nccl_new")?,
            all_reduce: symbol(handle, c"dylora_nccl_all_reduce")?,
            broadcast: symbol(handle, c"dylora_nccl_broadcast")?,
            join: symbol(handle, c"dylora_nccl_join")?,
            check: symbol(handle, c"dylora_nccl_check")?,
            abort: symbol(handle, c"dylora_nccl_abort")?,
            free: symbol(handle, c"dylora_nccl_free")?,
        })
    }
}

impl Library {
    fn check(&self, status: c_int) -> Result<()> {
        if status < 0 { Err(self.error()) } else { Ok(()) }
    }

    fn error(&self) -> anyhow::Error {
        // SAFETY: the library gives up the ownership of a string from strdup, or returns null
        unsafe { taken((self.take_error)()) }
    }
}

/// NCCL's version, such as `2.27.3`.
pub fn version() -> Result<String> {
    let library = library()?;
    // SAFETY: the call takes no pointers
    let version = unsafe { (library.version)() };
    library.check(version)?;
    Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// Makes NCCL take its buffers by `cudaMalloc` (`NCCL_CUMEM_ENABLE=0`). With the memory that it
/// takes by default (`cuMemCreate`), the kernels of CUDA graphs begin later under a profiler, and
/// steps are slower without one too. To be called before there are other threads.
pub fn take_plain_memory() {
    // SAFETY: no other thread reads the environment yet
    unsafe { std::env::set_var("NCCL_CUMEM_ENABLE", "0") }
}

/// The bytes for a new group. One process makes them and gives them to the others.
pub fn unique_id() -> Result<UniqueId> {
    let library = library()?;
    let mut id = [0; 128];
    // SAFETY: the library writes 128 bytes
    library.check(unsafe { (library.unique_id)(id.as_mut_ptr()) })?;
    Ok(id)
}

/// A group of processes, each with a GPU of its own.
///
/// A group that is dropped is not freed, because NCCL would wait for work that may never end once a
/// process has failed. [`Nccl::close`] frees it.
#[derive(Debug)]
pub struct Nccl {
    library: &'static Library,
    pointer: *mut c_void,
}

// SAFETY: one thread runs operations; another one may only abort them, which NCCL allows
unsafe impl Send for Nccl {}
// SAFETY: as above
unsafe impl Sync for Nccl {}

impl Nccl {
    /// Meets the other processes of a group, and waits until all are there.
    ///
    /// - `device`: the index of this process's GPU
    pub fn new(device: usize, id: &UniqueId, dist_rank: usize, size: usize) -> Result<Self> {
        let library = library()?;
        // SAFETY: the library reads 128 bytes
        let pointer = unsafe {
            (library.new)(device as c_int, id.as_ptr(), dist_rank as c_int, size as c_int)
        };
        if pointer.is_null() { Err(library.error()) } else { Ok(Self { library, pointer }) }
    }

    /// Queues one operation that replaces contiguous tensors on the GPU by their sums over all
    /// processes. It begins after the work that the current stream has so far. Work that the stream
    /// gets later may run at the same time, and must not use the tensors before [`Self::join`].
    pub fn all_reduce(&self, tensors: &[Tensor]) -> Result<()> {
        self.on_tensors(self.library.all_reduce, tensors)
    }

    /// Replaces contiguous tensors on the GPU by those of process 0, as [`Self::all_reduce`] does.
    pub fn broadcast(&self, tensors: &[Tensor]) -> Result<()> {
        self.on_tensors(self.library.broadcast, tensors)
    }

    fn on_tensors(&self, run: OnTensors, tensors: &[Tensor]) -> Result<()> {
        // SAFETY: a live group; the array holds live tensors, to which the group keeps references
        // until `join`
        self.library.check(unsafe { run(self.pointer, pointers(tensors).as_ptr(), tensors.len()) })
    }

    /// Makes what the current stream queues from now on wait for all operations so far.
    pub fn join(&self) -> Result<()> {
        // SAFETY: a live group
        self.library.check(unsafe { (self.library.join)(self.pointer) })
    }

    /// Fails if NCCL has found that a connection is broken.
    pub fn check(&self) -> Result<()> {
        // SAFETY: a live group
        self.library.check(unsafe { (self.library.check)(self.pointer) })
    }

    /// Ends all operations, so that a host that waits for them goes on. Their results are lost.
    pub fn abort(&self) -> Result<()> {
        // SAFETY: a live group, which any thread may abort
        self.library.check(unsafe { (self.library.abort)(self.pointer) })
    }

    /// Frees the group. All its work must have ended well.
    pub fn close(self) -> Result<()> {
        // SAFETY: `new` made it, and `self` is used up
        self.library.check(unsafe { (self.library.free)(self.pointer) })
    }
}
