//! The rules about modules. Each function returns the violations of a rule, one line for each.

use crate::circles::{Edge, circles};
use crate::code::{STRING, Token};
use crate::imports::{Import, Kind};
use crate::tree::{Module, Tree};

const PRINTING: [&str; 5] = ["print", "println", "eprint", "eprintln", "dbg"];
const ENVIRONMENT: [&str; 6] = ["var", "var_os", "vars", "vars_os", "args", "args_os"];

/// The uses of modules that do not stand before the user in `layers`, and the modules that are not
/// in `layers`.
pub fn layer_violations(tree: &Tree, layers: &[&str]) -> Vec<String> {
    let place = |name: &str| layers.iter().position(|layer| *layer == name);
    let mut found = Vec::new();
    for module in tree.modules().filter(|module| !module.path.is_empty()) {
        let name = module.path[0].as_str();
        let Some(own_place) = place(name) else {
            found.push(format!("{}:1: `{name}` stands in no layer; add it to LAYERS", module.file));
            continue;
        };
        for import in &module.imports {
            let Some(target) = tree.target(module, import) else { continue };
            let other = target.path.first().map_or("lib", String::as_str);
            if other != name && place(other).is_none_or(|place| place > own_place) {
                let path = import.path.join("::");
                found.push(format!(
                    "{}:{}: `{name}` uses `{other}` (`{path}`), which does not stand before it; \
                     move what both need below `{name}`",
                    module.file, import.line
                ));
            }
        }
    }
    found.dedup();
    found
}

/// The layers whose module is not in the tree.
pub fn absent_layers(tree: &Tree, layers: &[&str]) -> Vec<String> {
    let is_absent = |layer: &&&str| tree.get(&[(**layer).to_owned()]).is_none();
    let absent = layers.iter().filter(is_absent);
    absent.map(|layer| format!("src/{layer}: no such module; remove it from LAYERS")).collect()
}

/// The circles among the parts of each folder. The parts are the folder's own file (`mod.rs`), its
/// other files, and the folders in it, each as a whole. The root is not checked, since it has
/// layers.
pub fn folder_circles(tree: &Tree) -> Vec<String> {
    let folders = tree.modules().filter(|module| tree.is_folder(&module.path));
    let folders = folders.filter(|folder| !folder.path.is_empty());
    let found = folders.flat_map(|folder| circles(&edges_inside(tree, folder)));
    found
        .map(|circle| format!("{circle}\n    move what both need into a file below both"))
        .collect()
}

fn edges_inside(tree: &Tree, folder: &Module) -> Vec<Edge> {
    let mut found = Vec::new();
    for module in tree.modules().filter(|module| module.path.starts_with(&folder.path)) {
        for import in &module.imports {
            let target = tree.target(module, import);
            let Some(target) = target.filter(|target| target.path.starts_with(&folder.path)) else {
                continue;
            };
            if !is_mere_reexport(module, target, import) {
                let at = format!("{}:{}", module.file, import.line);
                let (from, to) = (part(tree, folder, module), part(tree, folder, target));
                if !is_within_front(folder, &from, &to) {
                    found.push(Edge { from, to, at });
                }
            }
        }
    }
    found
}

/// Whether a use is between a folder's `mod.rs` and a file beside it. Such uses are allowed in both
/// directions: `mod.rs` is the folder's front, which defines what the files share, and also calls
/// them. Circles between `mod.rs` and a folder inside the folder are not allowed.
fn is_within_front(folder: &Module, from: &str, to: &str) -> bool {
    let other = match (from == folder.file, to == folder.file) {
        (true, false) => to,
        (false, true) => from,
        _ => return false,
    };
    !other.ends_with('/')
}

/// Whether an import only re-exports an item of a module below, which the module's own code does
/// not use.
fn is_mere_reexport(module: &Module, target: &Module, import: &Import) -> bool {
    let used = import.name.as_ref().is_some_and(|name| module.has_word(name));
    import.kind == Kind::Reexport && target.path.starts_with(&module.path) && !used
}

/// The part of `folder` that a module in it belongs to: the path of a file, or of a folder with a
/// `/` at its end.
fn part(tree: &Tree, folder: &Module, module: &Module) -> String {
    let depth = folder.path.len();
    if module.path.len() == depth {
        return folder.file.clone();
    }
    let child = &module.path[..=depth];
    match tree.get(child) {
        Some(file) if !file.file.ends_with("/mod.rs") && !tree.is_folder(child) => {
            file.file.clone()
        }
        _ => format!("src/{}/", child.join("/")),
    }
}

/// The places of `unsafe` and of `extern` with an ABI in a file, given all its tokens.
pub fn unsafe_words(file: &str, tokens: &[Token]) -> Vec<String> {
    let mut found = Vec::new();
    for (token, next) in tokens.iter().zip(tokens.iter().skip(1)) {
        if token.text == "unsafe" || token.text == "extern" && next.text == STRING {
            found.push(format!(
                "{file}:{}: `{}` outside of src/ffi; move it behind a safe function in src/ffi",
                token.line, token.text
            ));
        }
    }
    found
}

/// The places where a module prints by a macro, which panics if standard output cannot be written.
pub fn prints(module: &Module, instead: &str) -> Vec<String> {
    let prints = print_macros(module);
    prints.map(|(line, name)| format!("{}:{line}: {name}!; {instead}", module.file)).collect()
}

fn print_macros(module: &Module) -> impl Iterator<Item = (usize, &str)> {
    let prints = module.code.windows(2).filter(|pair| {
        let is_macro = PRINTING.contains(&pair[0].text.as_str());
        is_macro && pair[1].text == "!"
    });
    prints.map(|pair| (pair[0].line, pair[0].text.as_str()))
}

/// The places where a module prints, exits or reads the environment.
pub fn effects(module: &Module) -> Vec<String> {
    let prints = print_macros(module).map(|(line, name)| {
        (line, format!("{name}!"), "return the text, or log it with `tracing`")
    });
    let calls = module.imports.iter().filter_map(|import| {
        let path: Vec<_> = import.path.iter().map(String::as_str).collect();
        let instead = match path.as_slice() {
            [.., "process", "exit" | "abort"] => "return an error; `cli` makes the exit code of it",
            [.., "env", name] if ENVIRONMENT.contains(name) => "take the value as a parameter",
            _ => return None,
        };
        Some((import.line, path.join("::"), instead))
    });
    let violation = |(line, what, instead)| {
        let file = &module.file;
        format!("{file}:{line}: `{what}` outside of src/cli and src/main.rs; {instead}")
    };
    prints.chain(calls).map(violation).collect()
}

fn tree(files: &[(&str, &str)]) -> Tree {
    Tree::new(files.iter().map(|(file, source)| Module::new(file, source)).collect())
}

#[test]
fn a_use_of_a_higher_layer_is_reported_with_its_line() {
    let files = [("src/low.rs", "\nuse crate::high::X;"), ("src/high.rs", "use crate::low::Y;")];
    let found = layer_violations(&tree(&files), &["low", "high"]);
    let message = "src/low.rs:2: `low` uses `high` (`crate::high::X`), which does not stand \
                   before it; move what both need below `low`";
    assert_eq!(found, [message]);
    assert_eq!(layer_violations(&tree(&files[1..]), &["low", "high"]), Vec::<String>::new());
    let unknown = layer_violations(&tree(&files[..1]), &["high"]);
    assert_eq!(unknown, ["src/low.rs:1: `low` stands in no layer; add it to LAYERS"]);
    assert_eq!(absent_layers(&tree(&files[..1]), &["low", "high"]).len(), 1);
}

#[test]
fn a_file_may_use_the_front_of_its_folder() {
    let files = [
        ("src/a/mod.rs", "mod b; pub struct Own; fn f() { b::g() }"),
        ("src/a/b.rs", "use super::Own;"),
    ];
    assert_eq!(folder_circles(&tree(&files)), Vec::<String>::new());
}

#[test]
fn a_folder_that_uses_its_parent_closes_a_circle_if_the_parent_uses_it() {
    let child = ("src/a/b/mod.rs", "use super::Own;");
    let circles = |parent: &str| {
        folder_circles(&tree(&[("src/a/mod.rs", parent), child, ("src/a/b/c.rs", "")])).len()
    };
    assert_eq!(circles("mod b; pub struct Own; pub use b::Name;"), 0);
    assert_eq!(circles("mod b; pub struct Own; pub use b::Name; fn f(x: Name) {}"), 1);
    assert_eq!(circles("mod b; pub struct Own; use b::Trait;"), 1);
    assert_eq!(circles("mod b; pub struct Own; fn f() { b::g() }"), 1);
    assert_eq!(circles("mod b; pub use crate::c::Own; fn f() { b::g() }"), 0);
}

#[test]
fn a_folder_in_a_folder_counts_as_a_whole() {
    let files = [
        ("src/a/mod.rs", ""),
        ("src/a/b/mod.rs", ""),
        ("src/a/b/c.rs", "use crate::a::d::X;"),
        ("src/a/b/e.rs", ""),
        ("src/a/d.rs", "\n\nuse super::b::e::Y;"),
    ];
    let found = folder_circles(&tree(&files));
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("src/a/b/ -> src/a/d.rs -> src/a/b/\n    src/a/b/c.rs:1: "));
    assert!(found[0].contains("src/a/d.rs:3: "));
}

#[test]
fn the_rules_ignore_unit_tests() {
    let source = "#[cfg(test)]\nmod tests { use super::super::c::X; fn f() { println!() } }";
    let files = [("src/a/b.rs", source), ("src/a/c.rs", "use super::b::Y;"), ("src/a/mod.rs", "")];
    let tree = tree(&files);
    assert_eq!(folder_circles(&tree), Vec::<String>::new());
    assert_eq!(tree.modules().flat_map(effects).count(), 0);
}

#[test]
fn unsafe_words_are_found_in_code_alone() {
    let source = "// unsafe\nextern crate a; unsafe fn f() {}\nextern \"C\" { fn g(); }";
    let found = unsafe_words("src/a.rs", &crate::code::tokens(source));
    assert_eq!(found.len(), 2);
    assert!(found[0].starts_with("src/a.rs:2: `unsafe` outside of src/ffi; "));
    assert!(found[1].starts_with("src/a.rs:3: `extern` outside of src/ffi; "));
}

#[test]
fn effects_are_found_however_they_are_named() {
    let source = "use std::env::{self, var_os}; use std::process;\n\
                  fn f() { eprintln!(); env::var(x); std::process::exit(1); env::temp_dir() }";
    let found = effects(&Module::new("src/a.rs", source));
    let words: Vec<_> = found.iter().filter_map(|line| line.split('`').nth(1)).collect();
    assert_eq!(words, ["eprintln!", "std::env::var_os", "env::var", "std::process::exit"]);
}
