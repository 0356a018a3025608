//! Compiles the C++ shim (`csrc/*.cpp`) against the libtorch that torch-sys was built with, and
//! sets the run-time search path, so that the binary finds libtorch without `LD_LIBRARY_PATH`. What
//! needs CUDA (`csrc/cuda.cpp` and `csrc/nccl.cpp`) becomes a shared object that the binary holds
//! and loads where there is CUDA; of CUDA it needs headers alone.
//!
//! With the feature `doc-only` nothing is compiled, so that the library's docs need no libtorch.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The version of libtorch that tch 0.24 and the shim are written for; a patch release has the same
/// interface.
const LIBTORCH: &str = "2.11";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    let library = out.join("dylora_cuda.so");
    println!("cargo:rustc-env=DYLORA_CUDA_LIBRARY={}", library.display());
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() {
        fs_err::write(library, []).expect("cargo's folder can be written");
        return ExitCode::SUCCESS;
    }
    match libtorch() {
        Ok(lib) => build(&lib, &library),
        Err(why) => {
            println!("cargo::error={why}");
            println!(
                "cargo::error=hint: in the source tree, run `scripts/setup`; elsewhere, set \
                 LIBTORCH to the folder of a libtorch {LIBTORCH}, or set LIBTORCH_USE_PYTORCH=1 to \
                 use the PyTorch {LIBTORCH} of `python3`"
            );
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// The `lib` folder of the libtorch that torch-sys was compiled against. The error says what is
/// wrong with it.
fn libtorch() -> Result<PathBuf, String> {
    // torch-sys declares `links = "tch"`; its metadata reaches direct dependents only
    let lib = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from);
    let lib = lib.ok_or("torch-sys did not say where libtorch is")?;
    let cpu = lib.join("libtorch_cpu.so");
    if !cpu.exists() {
        return Err(format!("libtorch is not there: `{}` is absent", cpu.display()));
    }
    let header = lib.with_file_name("include/torch/headeronly/version.h");
    let text = fs_err::read_to_string(header)
        .map_err(|error| format!("libtorch has no headers: {error}"))?;
    let number = |part: &str| {
        let name = format!("#define TORCH_VERSION_{part} ");
        let number = text.lines().find_map(|line| line.strip_prefix(&name));
        number.unwrap_or("?").trim().to_owned()
    };
    let found = format!("{}.{}", number("MAJOR"), number("MINOR"));
    if found != LIBTORCH {
        return Err(format!("`{}` is libtorch {found}, not {LIBTORCH}", lib.display()));
    }
    Ok(lib)
}

/// Compiles the C++ code and links the libtorch in the folder `lib`.
///
/// - `library`: where the part that needs CUDA goes
fn build(lib: &Path, library: &Path) {
    let root = lib.parent().expect("libtorch's lib folder has a parent");
    let sources = ["shim", "block", "step", "route", "head_loss", "memory", "dist"];
    compiler(root)
        .include("csrc/gloo_headers")
        .files(sources.map(|name| format!("csrc/{name}.cpp")))
        .compile("dylora_shim");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    // the path as it was given, which may be a link that changes, and where it leads now, which
    // stays when the source tree is deleted
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    match fs_err::canonicalize(lib) {
        Ok(target) if target != lib => {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{}", target.display());
        }
        _ => {}
    }
    compile_cuda(root, library);
}

fn compiler(libtorch: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false).debug(false);
    build.define("_GLIBCXX_USE_CXX11_ABI", "1");
    for headers in ["include", "include/torch/csrc/api/include"] {
        build.flag("-isystem").flag(libtorch.join(headers).to_str().expect("the path is UTF-8"));
    }
    build
}

/// Makes `library`, which is empty if CUDA's headers are not there.
fn compile_cuda(libtorch: &Path, library: &Path) {
    let places = [
        // where `scripts/setup` puts them
        libtorch.join("cuda/include"),
        // NVIDIA's packages for Python, beside a PyTorch that pip installed
        libtorch.with_file_name("nvidia/cu13/include"),
        PathBuf::from("/usr/local/cuda/include"),
    ];
    let is_whole = |place: &&PathBuf| {
        let needed = ["cuda.h", "cuda_runtime_api.h", "crt/host_config.h"];
        needed.iter().all(|header| place.join(header).exists())
    };
    let Some(headers) = places.iter().find(is_whole) else {
        println!(
            "cargo:warning=CUDA's headers are absent: the binary will have no fast path on CUDA"
        );
        fs_err::write(library, []).expect("cargo's folder can be written");
        return;
    };
    let mut command = compiler(libtorch).pic(true).opt_level(2).get_compiler().to_command();
    command.arg("-isystem").arg(headers);
    // symbols of libtorch's CUDA part stay open until it is loaded
    command.args([
        "-shared",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wl,-z,lazy",
        "-s",
    ]);
    let done = command.arg("-o").arg(library).args(["csrc/cuda.cpp", "csrc/nccl.cpp"]).status();
    assert!(done.is_ok_and(|status| status.success()), "the code for CUDA does not compile");
}
