//! The project's text files.

use std::path::Path;

use anyhow::{Context, Result};

/// The sorted paths from `root` of the files with one of the `endings` in the folder `folder`, at
/// any depth. There are none if the folder does not exist.
pub fn below(root: &Path, folder: &str, endings: &[&str]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop().filter(|folder| folder.exists()) {
        for entry in fs_err::read_dir(&folder)? {
            let path = entry?.path();
            let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            if path.is_dir() {
                folders.push(path);
            } else if endings.contains(&ending) {
                let path = path.strip_prefix(root).expect("the file was found below the root");
                found.push(path.to_str().context("a file's name is not UTF-8")?.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The violations of the rules about length: a file may have `max_lines` lines of `max_width`
/// characters each.
pub fn too_long(file: &str, text: &str, max_lines: Option<usize>, max_width: usize) -> Vec<String> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if let Some(most) = max_lines.filter(|&most| lines > most) {
        found.push(format!(
            "{file}:{lines}: the file has {lines} lines, at most {most} are allowed; \
             move its second idea into a file of its own"
        ));
    }
    for (line, number) in text.lines().zip(1..) {
        let width = line.chars().count();
        if width > max_width {
            found.push(format!(
                "{file}:{number}: the line has {width} characters, \
                 at most {max_width} are allowed; break it"
            ));
        }
    }
    found
}

#[test]
fn lengths_count_characters_and_name_the_line() {
    let found = too_long("src/a.rs", "é\nab\nabc\n", Some(2), 2);
    let rule =
        "the file has 3 lines, at most 2 are allowed; move its second idea into a file of its own";
    assert_eq!(found[0], format!("src/a.rs:3: {rule}"));
    assert_eq!(found[1], "src/a.rs:3: the line has 3 characters, at most 2 are allowed; break it");
    assert_eq!(found.len(), 2);
    assert_eq!(too_long("src/a.rs", "é\nab\nabc\n", None, 3), Vec::<String>::new());
}
