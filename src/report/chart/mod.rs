//! Charts as inline SVG, each with a title, a description and a table of the exact numbers. What a
//! colour says is also said by a letter, a number or a pattern.

pub mod bars;
pub mod heat;
pub mod lines;
mod scale;

pub use lines::{Line, LineChart, Mark};

/// A length or a position in an SVG, in its own units.
fn px(length: f64) -> String {
    let text = format!("{length:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}
