//! The generated pages of the reference are up to date and describe every key and option.

use std::path::Path;

use anyhow::Result;
use dylora::config::reference;

#[path = "../examples/docs_reference/commands.rs"]
mod commands;

#[test]
fn the_reference_of_the_config_is_up_to_date() -> Result<()> {
    assert_up_to_date("docs/reference/config.md", &reference::page())
}

#[test]
fn the_reference_of_the_commands_is_up_to_date() -> Result<()> {
    assert_up_to_date("docs/reference/commands.md", &commands::page())
}

/// A key, value or option without a description would leave an empty cell or an empty entry.
#[test]
fn everything_in_the_reference_is_described() {
    let (config, commands) = (reference::page(), commands::page());
    let is_bare = |line: &&str| line.contains("|  |") || line.ends_with("`: .");
    let bare: Vec<&str> = config.lines().chain(commands.lines()).filter(is_bare).collect();
    assert!(bare.is_empty(), "without a description: {bare:#?}");
}

/// Checks that a page equals what the generator makes. The panic names the first line that differs.
#[track_caller]
fn assert_up_to_date(name: &str, generated: &str) -> Result<()> {
    let checked_in = fs_err::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name))?;
    if checked_in == generated {
        return Ok(());
    }
    let (found, made): (Vec<_>, Vec<_>) =
        (checked_in.lines().collect(), generated.lines().collect());
    let line = (0..).find(|&i| found.get(i) != made.get(i)).expect("they differ somewhere");
    let shown =
        |lines: &[&str]| lines.get(line).map_or("(the end)".to_owned(), ToString::to_string);
    panic!(
        "`{name}` is out of date: line {} should be\n    {}\nand is\n    {}\n\
         hint: run `cargo run --example docs_reference` and commit what it writes",
        line + 1,
        shown(&made),
        shown(&found),
    );
}
