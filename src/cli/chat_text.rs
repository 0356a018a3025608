//! How a chat shows answers: whether in colours, and two beside each other.

use std::io::IsTerminal;

use comfy_table::{ContentArrangement, Table};

use super::terminal;

/// Whether standard output may be coloured.
pub fn may_colour() -> bool {
    terminal::has_colours(std::io::stdout().is_terminal())
}

/// Two texts beside each other under their names, as wide as the terminal.
pub fn columns(names: [&str; 2], texts: [&str; 2]) -> String {
    let width = u16::try_from(terminal::width()).unwrap_or(u16::MAX);
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_content_arrangement(ContentArrangement::DynamicFullWidth).set_width(width);
    table.set_header(names).add_row(texts);
    table.to_string()
}
