//! How a chat shows answers: whether in colours, and two beside each other.

use std::io::IsTerminal;

use comfy_table::{ContentArrangement, Table};

/// The width of columns where the terminal does not say its own.
const WIDTH: u16 = 80;

/// Whether standard output may be coloured.
pub fn may_colour(no_color: bool) -> bool {
    std::io::stdout().is_terminal() && !no_color
}

/// Two texts beside each other under their names, as wide as the terminal.
pub fn columns(names: [&str; 2], texts: [&str; 2]) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_content_arrangement(ContentArrangement::DynamicFullWidth).set_width(width());
    table.set_header(names).add_row(texts);
    table.to_string()
}

fn width() -> u16 {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.ok().map(|size| size.ws_col).filter(|width| *width > 0).unwrap_or(WIDTH)
}
