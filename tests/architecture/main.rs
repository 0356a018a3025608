//! Checks the structure of the source tree: the layers, circles of imports, the lengths of files
//! and lines, and where unsafe code and side effects are allowed.
//!
//! These tests read the project's files as text, with only as much knowledge of Rust as they need.

mod circles;
mod code;
mod files;
mod imports;
mod python;
mod rules;
mod tree;

use std::path::Path;

use anyhow::{Context, Result};

use crate::tree::{Module, Tree};

/// The modules of `src`, lowest first. A module uses only modules that stand before it.
const LAYERS: [&str; 26] = [
    "config",
    "durable",
    "ffi",
    "dist",
    "tensor_file",
    "gguf",
    "hub",
    "chat_template",
    "data",
    "model",
    "peft",
    "base",
    "mixture",
    "eval",
    "growth",
    "generate",
    "checkpoint",
    "export",
    "train",
    "lifecycle",
    "bench",
    "study",
    "report",
    "serve",
    "cli",
    "main",
];
const MAX_FILE_LINES: usize = 500;
const MAX_LINE_CHARS: usize = 100;
const FOLDERS: [&str; 6] = ["src", "csrc", "tests", "examples", "benches", "packaging"];
const CODE: [&str; 6] = ["rs", "h", "cpp", "cu", "cuh", "py"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Panics with all violations of a rule, if there are any.
fn hold(rule: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{rule}\n{}\n", violations.join("\n"));
}

#[test]
fn a_module_uses_only_what_stands_below_it() -> Result<()> {
    let tree = Tree::read(root())?;
    let mut violations = rules::layer_violations(&tree, &LAYERS);
    violations.extend(rules::absent_layers(&tree, &LAYERS));
    hold("a module of src uses only modules that stand before it in LAYERS", &violations);
    Ok(())
}

#[test]
fn files_of_a_folder_do_not_import_each_other_in_a_circle() -> Result<()> {
    let violations = rules::folder_circles(&Tree::read(root())?);
    hold("the files of a folder do not import each other in a circle", &violations);
    Ok(())
}

#[test]
fn scripts_do_not_import_each_other_in_a_circle() -> Result<()> {
    let violations = circles::circles(&python::edges(root(), "scripts")?);
    hold("the scripts do not import each other in a circle", &violations);
    Ok(())
}

#[test]
fn files_and_lines_are_short() -> Result<()> {
    let mut violations = Vec::new();
    for folder in FOLDERS {
        let max_lines = (folder == "src").then_some(MAX_FILE_LINES);
        for file in files::below(root(), folder, &CODE)? {
            let text = fs_err::read_to_string(root().join(&file)).context("cannot read a file")?;
            violations.extend(files::too_long(&file, &text, max_lines, MAX_LINE_CHARS));
        }
    }
    hold("files and lines are short", &violations);
    Ok(())
}

#[test]
fn unsafe_code_stays_in_ffi() -> Result<()> {
    let mut violations = Vec::new();
    for file in files::below(root(), "src", &["rs"])? {
        if !file.starts_with("src/ffi/") {
            let text = fs_err::read_to_string(root().join(&file)).context("cannot read a file")?;
            violations.extend(rules::unsafe_words(&file, &code::tokens(&text)));
        }
    }
    hold("`unsafe` and `extern \"C\"` stand in src/ffi only", &violations);
    Ok(())
}

#[test]
fn the_library_does_not_print_exit_or_read_the_environment() -> Result<()> {
    let tree = Tree::read(root())?;
    let layer = |module: &Module| module.path.first().cloned().unwrap_or_default();
    let library = tree.modules().filter(|module| !["cli", "main"].contains(&&*layer(module)));
    let violations: Vec<_> = library.flat_map(rules::effects).collect();
    hold("only src/cli and src/main.rs print, exit or read the environment", &violations);
    Ok(())
}

#[test]
fn the_command_line_prints_by_functions_whose_errors_reach_the_user() -> Result<()> {
    let tree = Tree::read(root())?;
    let cli = tree.modules().filter(|module| module.path.first().is_some_and(|name| name == "cli"));
    let instead = "use `print_result`, or `tracing` for standard error";
    let violations: Vec<_> = cli.flat_map(|module| rules::prints(module, instead)).collect();
    hold("src/cli does not use the macros that print", &violations);
    Ok(())
}
