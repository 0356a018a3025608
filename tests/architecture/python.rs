//! The imports of the Python scripts.

use std::path::Path;

use anyhow::{Context, Result};

use crate::circles::Edge;

/// The imports among the scripts of `folder` in `root`, at the top of a file or in a function.
pub fn edges(root: &Path, folder: &str) -> Result<Vec<Edge>> {
    let files = crate::files::below(root, folder, &["py"])?;
    let mut found = Vec::new();
    for file in &files {
        let text = fs_err::read_to_string(root.join(file)).context("cannot read a script")?;
        for (module, line) in imported(&text) {
            let to = format!("{folder}/{module}.py");
            if files.contains(&to) {
                found.push(Edge { from: file.clone(), to, at: format!("{file}:{line}") });
            }
        }
    }
    Ok(found)
}

/// The modules that a script imports, each with its line. Lines inside `"""` are ignored.
fn imported(text: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    let mut in_string = false;
    for (line, number) in text.lines().zip(1..) {
        let code = line.split(" #").next().unwrap_or_default().trim();
        let modules = match code.split_once(' ') {
            Some(("import", modules)) => modules,
            Some(("from", module)) => module.split(' ').next().unwrap_or_default(),
            _ => "",
        };
        if !in_string {
            let names = modules.split(',').filter_map(|module| module.split_whitespace().next());
            found.extend(names.map(|name| (name.to_owned(), number)));
        }
        in_string ^= line.matches("\"\"\"").count() % 2 == 1;
    }
    found
}

#[test]
fn imports_are_found_at_any_depth_but_not_in_strings() {
    let text = "\"\"\"Reads\nimport a\n\"\"\"\nimport b, c as d\nfrom e import f  # and g\n\
                def h():\n    import i  # which imports this\n    from_j = 1\n";
    let found = imported(text);
    let names: Vec<_> = found.iter().map(|(name, line)| (name.as_str(), *line)).collect();
    assert_eq!(names, [("b", 4), ("c", 4), ("e", 5), ("i", 7)]);
}
