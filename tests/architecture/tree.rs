//! The modules of a crate, and the module that an import leads to.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::code::{Token, tokens, without_tests};
use crate::imports::{Import, imports};

/// The largest number of `use` declarations through which a name is followed.
const MAX_HOPS: usize = 8;

/// A source file without its unit tests.
#[derive(Debug)]
pub struct Module {
    /// The path of the module from the crate's root, which is empty for the root itself. `main`
    /// counts as a module here.
    pub path: Vec<String>,
    /// The path of the file, such as `src/a/mod.rs`.
    pub file: String,
    pub imports: Vec<Import>,
    /// The tokens outside of `use` declarations.
    pub code: Vec<Token>,
}

impl Module {
    /// Reads a module of the crate `dylora` from the text of its file.
    pub fn new(file: &str, source: &str) -> Self {
        let (imports, code) = imports(&without_tests(&tokens(source)));
        Self { path: module_path(file), file: file.to_owned(), imports, code }
    }

    /// Whether the name occurs in the file's code outside of `use` declarations.
    pub fn has_word(&self, name: &str) -> bool {
        self.code.iter().any(|token| token.text == name)
    }

    /// The import that brings `name` into the file's scope.
    fn binding(&self, name: &str) -> Option<&Import> {
        self.imports.iter().find(|import| import.name.as_deref() == Some(name))
    }
}

/// The module of a file: `a::b` for `src/a/b.rs` and `src/a/b/mod.rs`, the root for `src/lib.rs`.
fn module_path(file: &str) -> Vec<String> {
    let name = file.trim_start_matches("src/").trim_end_matches(".rs");
    let mut path: Vec<String> = name.split('/').map(str::to_owned).collect();
    path.pop_if(|last| last == "mod" || last == "lib");
    path
}

/// All modules of the crate, by their paths.
#[derive(Debug)]
pub struct Tree {
    modules: BTreeMap<Vec<String>, Module>,
}

impl Tree {
    /// Reads `src` in the folder `root`, without the files that only contain tests (`tests.rs`).
    pub fn read(root: &Path) -> Result<Self> {
        let files = crate::files::below(root, "src", &["rs"])?;
        let files = files.iter().filter(|file| !file.ends_with("/tests.rs"));
        let modules = files.map(|file| {
            let source = fs_err::read_to_string(root.join(file)).context("cannot read a module")?;
            Ok(Module::new(file, &source))
        });
        Ok(Self::new(modules.collect::<Result<_>>()?))
    }

    /// The tree of `modules`.
    pub fn new(modules: Vec<Module>) -> Self {
        Self { modules: modules.into_iter().map(|module| (module.path.clone(), module)).collect() }
    }

    /// All modules, parents before children.
    pub fn modules(&self) -> impl Iterator<Item = &Module> {
        self.modules.values()
    }

    /// The module at a path.
    pub fn get(&self, path: &[String]) -> Option<&Module> {
        self.modules.get(path)
    }

    /// Whether the module at `path` has modules below it.
    pub fn is_folder(&self, path: &[String]) -> bool {
        self.modules.keys().any(|other| other.len() > path.len() && other.starts_with(path))
    }

    /// The module whose file defines what an import of the module `from` names; `None` if it is
    /// outside of the crate, or if the import names a module around `from` itself.
    ///
    /// If a module around `from` only re-exports the item, the result is the module that defines
    /// it.
    pub fn target(&self, from: &Module, import: &Import) -> Option<&Module> {
        let path = self.follow(from, &from.path, &import.path, MAX_HOPS)?;
        self.modules.get(&path)
    }

    /// Follows `path`, as it is named in the module at `at`, to the path of its module.
    fn follow(
        &self,
        from: &Module,
        at: &[String],
        path: &[String],
        hops: usize,
    ) -> Option<Vec<String>> {
        let (mut at, path) = self.start(at, path)?;
        for (i, segment) in path.iter().enumerate() {
            let child = [at.as_slice(), std::slice::from_ref(segment)].concat();
            if self.modules.contains_key(&child) {
                at = child;
                continue;
            }
            let module = self.modules.get(&at)?;
            let binding =
                module.binding(segment).filter(|_| from.path.starts_with(&at) && hops > 0);
            let Some(binding) = binding else { return Some(at) };
            if binding.path.first() == Some(segment) {
                return None; // a crate of the name that it brings into scope
            }
            let path = [binding.path.as_slice(), &path[i + 1..]].concat();
            return self.follow(from, &at, &path, hops - 1);
        }
        (!from.path.starts_with(&at)).then_some(at)
    }

    /// The module at which a path begins, and the rest of the path.
    fn start<'a>(&self, at: &[String], path: &'a [String]) -> Option<(Vec<String>, &'a [String])> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" | "dylora" => Some((Vec::new(), rest)),
            "self" => Some((at.to_vec(), rest)),
            "super" => {
                let ups = path.iter().take_while(|segment| *segment == "super").count();
                Some((at[..at.len().checked_sub(ups)?].to_vec(), &path[ups..]))
            }
            name => {
                let child = [at, std::slice::from_ref(first)].concat();
                let known = self.modules.contains_key(&child)
                    || self.modules.get(at).is_some_and(|module| module.binding(name).is_some());
                known.then(|| (at.to_vec(), path))
            }
        }
    }
}

/// A line `file -> the file that it uses` for every import in a tree of snippets.
fn targets(files: &[(&str, &str)]) -> Vec<String> {
    let modules = files.iter().map(|(file, source)| Module::new(file, source)).collect();
    let tree = Tree::new(modules);
    let mut found = Vec::new();
    for module in tree.modules() {
        let targets = module.imports.iter().filter_map(|import| tree.target(module, import));
        found.extend(targets.map(|target| format!("{} -> {}", module.file, target.file)));
    }
    found
}

#[test]
fn every_way_to_name_a_module_leads_to_its_file() {
    let uses = "use crate::b::X; use super::super::b; use self::d::Y; use d::Z; use std::fs;\n\
                fn f() { d::g(); crate::b::h(); fs::read() }";
    let files = [("src/lib.rs", ""), ("src/b.rs", ""), ("src/a/mod.rs", "")];
    let files = [files.as_slice(), &[("src/a/c/mod.rs", uses), ("src/a/c/d.rs", "")]].concat();
    let (b, d) = ("src/a/c/mod.rs -> src/b.rs", "src/a/c/mod.rs -> src/a/c/d.rs");
    assert_eq!(targets(&files), [b, b, d, d, d, b]);
}

#[test]
fn a_parent_counts_only_for_items_that_it_defines() {
    let parent = "mod c; mod d; pub use d::Moved; use crate::b::Far; pub struct Own;";
    let child = "use super::{Moved, Far, Own}; fn f() { super::d::g() }";
    let files =
        [("src/b.rs", ""), ("src/a/mod.rs", parent), ("src/a/c.rs", child), ("src/a/d.rs", "")];
    let found = targets(&files).into_iter().filter(|line| line.starts_with("src/a/c.rs"));
    let found: Vec<_> = found.map(|line| line.replace("src/a/c.rs -> ", "")).collect();
    assert_eq!(found, ["src/a/d.rs", "src/b.rs", "src/a/mod.rs", "src/a/d.rs"]);
}

#[test]
fn crates_are_no_modules() {
    let source = "use anyhow::anyhow; use env::{self, var}; fn f() { anyhow::bail(); env::var() }";
    assert_eq!(targets(&[("src/a.rs", source)]), Vec::<String>::new());
}
