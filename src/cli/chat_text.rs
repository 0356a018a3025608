//! How a chat shows answers: piece by piece, coloured by expert, or in two columns.

use std::io::IsTerminal;

use comfy_table::{ContentArrangement, Table};

/// The colours of experts, as ANSI codes; they repeat.
const COLOURS: [u8; 12] = [36, 33, 35, 32, 34, 31, 96, 93, 95, 92, 94, 91];
/// The width of columns where the terminal does not say its own.
const WIDTH: u16 = 80;

/// Whether standard output may be coloured.
pub fn may_colour(no_color: bool) -> bool {
    std::io::stdout().is_terminal() && !no_color
}

/// A piece of text in the colour of an expert.
pub fn coloured(piece: &str, expert: usize) -> String {
    match piece.is_empty() {
        true => String::new(),
        false => format!("\x1b[{}m{piece}\x1b[0m", COLOURS[expert % COLOURS.len()]),
    }
}

/// The index of the largest weight.
pub fn largest(weights: &[f64]) -> usize {
    let by_weight = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
    weights.iter().enumerate().max_by(by_weight).map_or(0, |(index, _)| index)
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
