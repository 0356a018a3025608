//! Compiles the C++ shim (`csrc/*.cpp`) against the libtorch that torch-sys was built with, and
//! sets the run-time search path, so that the binary finds libtorch without `LD_LIBRARY_PATH`. What
//! needs CUDA (`csrc/cuda.cpp` and `csrc/nccl.cpp`) becomes a shared object that the binary holds
//! and loads where there is CUDA; of CUDA it needs headers alone.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=build.rs");
    // torch-sys declares `links = "tch"`; its metadata reaches direct dependents only
    let lib = env::var("DEP_TCH_LIBTORCH_LIB")
        .expect("torch-sys did not say where libtorch is; run `scripts/setup` first");
    let root = PathBuf::from(&lib).parent().expect("libtorch's lib folder has a parent").to_owned();
    let sources = ["shim", "block", "step", "head_loss", "memory", "dist"];
    compiler(&root)
        .include("csrc/gloo_headers")
        .files(sources.map(|name| format!("csrc/{name}.cpp")))
        .compile("dylora_shim");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    let library = out.join("dylora_cuda.so");
    compile_cuda(&root, &library);
    println!("cargo:rustc-env=DYLORA_CUDA_LIBRARY={}", library.display());
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
    let places = [libtorch.join("cuda/include"), PathBuf::from("/usr/local/cuda/include")];
    let is_whole = |place: &&PathBuf| {
        ["cuda.h", "cuda_runtime_api.h"].iter().all(|header| place.join(header).exists())
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
