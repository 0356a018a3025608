//! The functions that need CUDA itself. build.rs compiles `csrc/cuda.cpp` into a shared object,
//! which is part of this binary and is loaded after libtorch's CUDA part.

mod queue;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use torch_sys::C_tensor;

use super::{TensorPtr, libtorch_path, taken, try_open};
use crate::durable;
pub(crate) use queue::{Fetch, Mark};

static IMAGE: &[u8] = include_bytes!(env!("DYLORA_CUDA_LIBRARY"));

/// The functions of the shared object.
#[derive(Debug)]
struct Library {
    take_error: unsafe extern "C" fn() -> *mut c_char,
    open_compiler: unsafe extern "C" fn(*const c_char) -> c_int,
    target: unsafe extern "C" fn(c_int, *mut c_int) -> c_int,
    compile:
        unsafe extern "C" fn(*const c_char, *const *const c_char, c_int, *mut usize) -> *mut c_char,
    free: unsafe extern "C" fn(*mut c_void),
    load_kernels: unsafe extern "C" fn(*const c_char, c_int, i64, c_int) -> c_int,
    kernels: unsafe extern "C" fn() -> *const c_void,
    graph_new: unsafe extern "C" fn(c_int) -> *mut c_void,
    graph_enter: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_leave: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_begin: unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int,
    graph_end: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_replay: unsafe extern "C" fn(*mut c_void) -> c_int,
    graph_free: unsafe extern "C" fn(*mut c_void),
    fetch: unsafe extern "C" fn(TensorPtr, c_int) -> *mut c_void,
    fetched: unsafe extern "C" fn(*mut c_void) -> *mut C_tensor,
    mark: unsafe extern "C" fn(c_int) -> *mut c_void,
    mark_secs: unsafe extern "C" fn(*mut c_void, *mut c_void) -> f64,
    mark_free: unsafe extern "C" fn(*mut c_void),
}

static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();

/// The shared object, which the first call loads. libtorch's CUDA part must be loaded already
/// ([`super::load_cuda`]).
fn library() -> Result<&'static Library> {
    let library = LIBRARY.get_or_init(|| open().map_err(|error| format!("{error:#}")));
    library.as_ref().map_err(|error| anyhow!("{error}"))
}

/// Writes all of `bytes` to a file in memory, which has no path for error messages.
fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let count = rustix::io::write(file, bytes).context("cannot fill a file in memory")?;
        bytes = &bytes[count..];
    }
    Ok(())
}

static HANDLE: OnceLock<std::result::Result<Handle, String>> = OnceLock::new();

/// A loaded shared object, which is never closed.
#[derive(Debug, Clone, Copy)]
struct Handle(*mut c_void);

// SAFETY: `dlsym` may be called from any thread
unsafe impl Send for Handle {}
// SAFETY: as above
unsafe impl Sync for Handle {}

/// The loaded shared object.
pub(super) fn handle() -> Result<*mut c_void> {
    let handle = HANDLE.get_or_init(|| load().map(Handle).map_err(|error| format!("{error:#}")));
    handle.as_ref().map(|handle| handle.0).map_err(|error| anyhow!("{error}"))
}

fn load() -> Result<*mut c_void> {
    if IMAGE.is_empty() {
        bail!("this binary was built without CUDA's headers");
    }
    // SAFETY: the name is a C string; the descriptor is checked and then owned
    let file = unsafe {
        let fd = libc::memfd_create(c"dylora_cuda".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            bail!("cannot make a file in memory: {}", std::io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    write_all(&file, IMAGE)?;
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    try_open(&path, libc::RTLD_LAZY | libc::RTLD_LOCAL)
}

fn open() -> Result<Library> {
    let handle = handle()?;
    // SAFETY: the shared object belongs to this build, so its functions have these types
    unsafe {
        Ok(Library {
            take_error: symbol(handle, c"dylora_cuda_take_error")?,
            open_compiler: symbol(handle, c"dylora_cuda_open_compiler")?,
            target: symbol(handle, c"dylora_cuda_target")?,
            compile: symbol(handle, c"dylora_cuda_compile")?,
            free: symbol(handle, c"dylora_cuda_free")?,
            load_kernels: symbol(handle, c"dylora_cuda_load_kernels")?,
            kernels: symbol(handle, c"dylora_cuda_kernels")?,
            graph_new: symbol(handle, c"dylora_cuda_graph_new")?,
            graph_enter: symbol(handle, c"dylora_cuda_graph_enter")?,
            graph_leave: symbol(handle, c"dylora_cuda_graph_leave")?,
            graph_begin: symbol(handle, c"dylora_cuda_graph_begin")?,
            graph_end: symbol(handle, c"dylora_cuda_graph_end")?,
            graph_replay: symbol(handle, c"dylora_cuda_graph_replay")?,
            graph_free: symbol(handle, c"dylora_cuda_graph_free")?,
            fetch: symbol(handle, c"dylora_cuda_fetch")?,
            fetched: symbol(handle, c"dylora_cuda_fetched")?,
            mark: symbol(handle, c"dylora_cuda_mark")?,
            mark_secs: symbol(handle, c"dylora_cuda_mark_secs")?,
            mark_free: symbol(handle, c"dylora_cuda_mark_free")?,
        })
    }
}

/// Looks up a function of a loaded shared object.
///
/// # Safety
/// `F` must be the type of the function.
pub(super) unsafe fn symbol<F: Copy>(handle: *mut c_void, name: &CStr) -> Result<F> {
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: a live handle and a C string
    let pointer = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if pointer.is_null() {
        bail!("the CUDA part of this binary lacks `{}`", name.to_string_lossy());
    }
    // SAFETY: the caller guarantees that the pointer is a function of type `F`
    Ok(unsafe { std::mem::transmute_copy(&pointer) })
}

/// Kernels that are compiled and loaded together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelSet {
    /// Those that training, evaluation and generation use.
    Base,
    /// Those of steps of generation ([`super::step`]). They need the others.
    Steps,
}

/// A file of kernels. They are joined in the order of their names here.
macro_rules! source {
    ($name:literal) => {
        include_str!(concat!("../../csrc/kernels/", $name, ".cuh"))
    };
}

impl KernelSet {
    /// The source of the kernels.
    fn source(self) -> String {
        let base = [
            source!("pack"),
            source!("norm"),
            source!("experts"),
            source!("dropout"),
            source!("quantise"),
            source!("mlp"),
            source!("heads"),
            source!("cluster"),
            source!("loss"),
            source!("choice"),
            source!("route"),
            source!("table"),
        ];
        match self {
            Self::Base => base.join("\n"),
            Self::Steps => {
                let steps = [
                    source!("step/finish"),
                    source!("step/attention"),
                    source!("step/multiply"),
                    source!("step/thin"),
                    source!("step/many"),
                    source!("step/table"),
                ];
                ["#define STEP\n", &base.join("\n"), &steps.join("\n")].concat()
            }
        }
    }
}

/// The compute capability of a device whose kernels are prepared, as `[major, minor]`.
pub(crate) fn capability(device: usize) -> Result<[c_int; 2]> {
    let [major, minor, ..] = library()?.target_of(device)?;
    Ok([major, minor])
}

static CODE_CACHE: OnceLock<PathBuf> = OnceLock::new();

/// Sets the folder in which compiled kernels are cached. Without it, every process compiles them,
/// which takes 1 to 2 s, and some seconds more for those of steps. Only the first call has an
/// effect.
pub(crate) fn keep_code_in(dir: &Path) {
    let _ = CODE_CACHE.set(dir.to_owned());
}

/// A device, a width, and the kernels that are loaded for them.
type Prepared = (usize, i64, KernelSet);

/// The kernels that are loaded, and the time that this took in total.
static PREPARED: Mutex<(Vec<Prepared>, Duration)> = Mutex::new((vec![], Duration::ZERO));

/// The time that this process has spent so far on compiling kernels or reading them from the cache,
/// and on loading them.
pub(crate) fn kernels_took() -> Duration {
    PREPARED.lock().expect("nothing panics while it is held").1
}

unsafe extern "C" {
    fn dylora_set_kernels(table: *const c_void);
}

/// Makes the kernels for activations of `width` columns on a CUDA device, so that [`super::fused`]
/// uses them there. The machine code is cached under a hash of the source, the GPU's architecture,
/// the compiler's version and the width.
///
/// # Errors
/// If libtorch has no CUDA or no NVRTC, or if NVRTC does not know the GPU.
pub fn prepare_kernels(device: usize, width: i64, set: KernelSet) -> Result<()> {
    if set == KernelSet::Steps {
        prepare_kernels(device, width, KernelSet::Base)?;
    }
    let started = Instant::now();
    let mut guard = PREPARED.lock().expect("nothing panics while it is held");
    let (prepared, took) = &mut *guard;
    if prepared.contains(&(device, width, set)) {
        return Ok(());
    }
    let library = library()?;
    if prepared.is_empty() {
        let nvrtc = libtorch_path()?.with_file_name("libcaffe2_nvrtc.so");
        let nvrtc = CString::new(nvrtc.as_os_str().as_encoded_bytes())?;
        // SAFETY: `nvrtc` is a C string
        library.check(unsafe { (library.open_compiler)(nvrtc.as_ptr()) })?;
    }
    let target = library.target_of(device)?;
    let [major, minor, ..] = target;
    let options = [
        format!("-arch=sm_{major}{minor}"),
        format!("-DWIDTH={width}"),
        "-DINFINITY=__int_as_float(0x7f800000)".to_owned(),
        "-std=c++17".to_owned(),
    ];
    let load = |code: &[u8]| {
        // SAFETY: NVRTC made this machine code, or it is from a file named by the hash of its
        // inputs
        library.check(unsafe {
            let (code, of_steps) = (code.as_ptr().cast(), c_int::from(set == KernelSet::Steps));
            (library.load_kernels)(code, device as c_int, width, of_steps)
        })
    };
    let kept = Library::kept_code(set, &options, target);
    if kept.is_none_or(|code| load(&code).is_err()) {
        load(&library.new_code(set, &options, target)?)?;
    }
    // SAFETY: the table lives as long as the process
    unsafe { dylora_set_kernels((library.kernels)()) };
    prepared.push((device, width, set));
    *took += started.elapsed();
    Ok(())
}

/// A sequence of kernels that runs as one (a CUDA graph). It contains addresses, so the tensors
/// that it reads and writes must live as long as the graph.
#[derive(Debug)]
pub struct Graph {
    library: &'static Library,
    pointer: *mut c_void,
}

// SAFETY: libtorch guards the device's state, and a graph has one owner at a time
unsafe impl Send for Graph {}

impl Graph {
    /// An empty graph on a CUDA device.
    pub fn new(device: usize) -> Result<Self> {
        let library = library()?;
        // SAFETY: the call takes no pointers
        let pointer = unsafe { (library.graph_new)(device as c_int) };
        Ok(Self { library, pointer: library.made(pointer)? })
    }

    /// Runs `f` on the graph's stream without capturing. This creates the handles and workspaces
    /// that must not be created during a capture.
    pub(crate) fn warm_up<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        // SAFETY: `self.pointer` is a live graph
        self.check(unsafe { (self.library.graph_enter)(self.pointer) })?;
        let result = catch_unwind(AssertUnwindSafe(f));
        // SAFETY: `self.pointer` is a live graph
        let left = self.check(unsafe { (self.library.graph_leave)(self.pointer) });
        let result = result.unwrap_or_else(|panic| resume_unwind(panic))?;
        left.map(|()| result)
    }

    /// Captures the kernels that `f` launches; they do not run yet. The tensors that `f` returns
    /// live in the graph's memory and get their values in each [`Graph::replay`].
    ///
    /// - `memory_of`: another graph whose memory this one shares. The two graphs must not run at
    ///   the same time, and running one overwrites what the other left there.
    ///
    /// # Errors
    /// If `f` fails, or if something in it cannot be captured, such as the host reading a value.
    pub fn capture<T>(&self, memory_of: Option<&Self>, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let memory = memory_of.map_or(std::ptr::null_mut(), |graph| graph.pointer);
        // SAFETY: both pointers are live graphs, or `memory` is null
        self.check(unsafe { (self.library.graph_begin)(self.pointer, memory) })?;
        let result = f();
        // SAFETY: `self.pointer` is a live graph
        let ended = self.check(unsafe { (self.library.graph_end)(self.pointer) });
        let result = result?;
        ended.map(|()| result)
    }

    /// Runs the captured kernels. Returns once they are queued.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: `self.pointer` is a live graph
        self.check(unsafe { (self.library.graph_replay)(self.pointer) })
    }

    fn check(&self, status: c_int) -> Result<()> {
        self.library.check(status)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: `graph_new` made this graph, and it is freed once
        unsafe { (self.library.graph_free)(self.pointer) }
    }
}

impl Library {
    /// What a function of the library has made; it returns null if it failed.
    fn made<T>(&self, pointer: *mut T) -> Result<*mut T> {
        if pointer.is_null() { Err(self.error()) } else { Ok(pointer) }
    }

    fn check(&self, status: c_int) -> Result<()> {
        if status < 0 { Err(self.error()) } else { Ok(()) }
    }

    /// What identifies compiled code: a device's compute capability and NVRTC's version.
    fn target_of(&self, device: usize) -> Result<[c_int; 4]> {
        let mut target = [0; 4];
        // SAFETY: the library writes four numbers into `target`
        self.check(unsafe { (self.target)(device as c_int, target.as_mut_ptr()) })?;
        Ok(target)
    }

    /// The path under which the machine code for a target is cached, if there is a cache.
    fn place(set: KernelSet, options: &[String], target: [c_int; 4]) -> Option<PathBuf> {
        let key = format!("{}\0{options:?}\0{target:?}", set.source());
        let name = format!("{}.cubin", blake3::hash(key.as_bytes()).to_hex());
        CODE_CACHE.get().map(|dir| dir.join(name))
    }

    /// The machine code that an earlier process cached.
    fn kept_code(set: KernelSet, options: &[String], target: [c_int; 4]) -> Option<Vec<u8>> {
        fs_err::read(Self::place(set, options, target)?).ok().filter(|code| !code.is_empty())
    }

    /// Compiles the kernels for a target and caches their code.
    fn new_code(&self, set: KernelSet, options: &[String], target: [c_int; 4]) -> Result<Vec<u8>> {
        tracing::info!("compiling the kernels for this GPU");
        let code = self.compile(set, options)?;
        if let Some(path) = Self::place(set, options, target) {
            let dir = path.parent().expect("a file lies in a folder");
            let kept = fs_err::create_dir_all(dir).map_err(anyhow::Error::from);
            if let Err(error) = kept.and_then(|()| durable::replace(&path, &code)) {
                tracing::warn!("the compiled kernels cannot be kept: {error:#}");
            }
        }
        Ok(code)
    }

    fn compile(&self, set: KernelSet, options: &[String]) -> Result<Vec<u8>> {
        let source = CString::new(set.source())?;
        let options =
            options.iter().map(|o| CString::new(o.as_str())).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut size = 0;
        // SAFETY: all strings are C strings; the library returns `size` bytes, which are freed
        // below
        unsafe {
            let (n, options) = (pointers.len() as c_int, pointers.as_ptr());
            let code = (self.compile)(source.as_ptr(), options, n, &mut size);
            let code = self.made(code).context("cannot compile the kernels")?;
            let copy = std::slice::from_raw_parts(code.cast::<u8>(), size).to_vec();
            (self.free)(code.cast());
            Ok(copy)
        }
    }

    fn error(&self) -> anyhow::Error {
        // SAFETY: the library gives up the ownership of a string from strdup, or returns null
        unsafe { taken((self.take_error)()) }
    }
}
