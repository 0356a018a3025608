//! Compiles the C++ shim (`csrc/`) against the libtorch that torch-sys was built with, and sets the
//! run-time search path, so that the binary finds libtorch without `LD_LIBRARY_PATH`.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    // torch-sys declares `links = "tch"`; its metadata reaches direct dependents only
    let lib = env::var("DEP_TCH_LIBTORCH_LIB")
        .expect("torch-sys did not say where libtorch is; run `scripts/setup` first");
    let root = PathBuf::from(&lib).parent().expect("libtorch's lib folder has a parent").to_owned();
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .debug(false)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-isystem")
        .flag(root.join("include").to_str().expect("libtorch's path is UTF-8"))
        .flag("-isystem")
        .flag(root.join("include/torch/csrc/api/include").to_str().expect("checked above"))
        .file("csrc/shim.cpp")
        .compile("dylora_shim");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
