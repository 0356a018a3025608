//! Heat maps: a shade and a number for each cell of a table.

use maud::{Markup, html};

use super::px;
use crate::report::palette::level;
use crate::report::text::exact;

/// The width of a character of a name, and the room around a name.
const CHARACTER: f64 = 6.4;
const ROOM: f64 = 14.0;
const TOP: f64 = 22.0;
const CELL: f64 = 42.0;
/// The height of a row, and that of maps with many rows, whose cells have no room for a number.
const ROW: [f64; 2] = [18.0, 7.0];
const MANY_ROWS: usize = 60;
/// The size of a map on the page, relative to its own units.
const SIZE: f64 = 1.15;
/// The width from which on a map needs a row of its own.
const WIDE: f64 = 280.0;
/// Most characters of a row's name in the drawing.
const NAME: usize = 27;

/// A heat map. All values lie between 0 and 1.
#[derive(Debug, Clone)]
pub(crate) struct HeatMap {
    /// Its title.
    pub title: String,
    /// What the columns are, such as `expert`.
    pub columns: Vec<String>,
    /// The rows' names and their values; `None` where there is no such cell.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

impl HeatMap {
    /// The drawing. Its numbers stand in a table of the page.
    pub fn render(&self, id: &str) -> Markup {
        let row_height = ROW[usize::from(self.rows.len() > MANY_ROWS)];
        let left = self.left();
        let width = left + CELL * self.columns.len() as f64 + 4.0;
        let height = TOP + row_height * self.rows.len() as f64 + 4.0;
        let (title_id, desc_id) = (format!("{id}-t"), format!("{id}-d"));
        html! {
            svg class="heat" viewBox={ "0 0 " (px(width)) " " (px(height)) } role="img"
                style={ "width:" (px(width * SIZE)) "px" }
                aria-labelledby={ (title_id) " " (desc_id) } {
                title id=(title_id) { (self.title) }
                desc id=(desc_id) { (self.description()) }
                @for (column, name) in self.columns.iter().enumerate() {
                    text class="tick" text-anchor="middle" y=(px(TOP - 7.0))
                        x=(px(left + CELL * (column as f64 + 0.5))) { (name) }
                }
                @for (row, (name, values)) in self.rows.iter().enumerate() {
                    @let top = TOP + row_height * row as f64;
                    // low rows have room for every second name
                    @if row_height >= ROW[0] || row % 2 == 0 {
                        text class="tick" text-anchor="end" x=(px(self.left() - 6.0))
                            y=(px(top + row_height / 2.0 + 4.0)) { (shortened(name)) }
                    }
                    (self.row(name, values, top, row_height))
                }
            }
        }
    }

    /// Whether it is too wide to stand beside another.
    pub(crate) fn is_wide(&self) -> bool {
        self.left() + CELL * self.columns.len() as f64 > WIDE
    }

    /// The width of the names.
    fn left(&self) -> f64 {
        let longest = self.rows.iter().map(|(name, _)| shortened(name).chars().count()).max();
        ROOM + CHARACTER * longest.unwrap_or(0) as f64
    }

    fn row(&self, name: &str, values: &[Option<f64>], top: f64, height: f64) -> Markup {
        let is_tall = height >= ROW[0];
        html! {
            @for (column, value) in values.iter().enumerate() {
                @if let Some(value) = value {
                    @let left = self.left() + CELL * column as f64;
                    g {
                        title { (name) ", " (self.columns[column]) ": " (exact(*value)) }
                        rect class={ "h" (level(*value, 1.0)) } x=(px(left)) y=(px(top))
                            width=(px(CELL)) height=(px(height)) {}
                        @if is_tall {
                            text class={ "cell t" (level(*value, 1.0)) } text-anchor="middle"
                                x=(px(left + CELL / 2.0)) y=(px(top + height / 2.0 + 4.0)) {
                                (format!("{value:.2}"))
                            }
                        }
                    }
                }
            }
        }
    }

    /// What the map shows, in words: the largest cell of each row.
    fn description(&self) -> String {
        let of = |(name, values): &(String, Vec<Option<f64>>)| {
            let cells = values.iter().enumerate().filter_map(|(i, value)| Some((i, (*value)?)));
            let (column, value) = cells.max_by(|a, b| a.1.total_cmp(&b.1))?;
            Some(format!("{name}: most at {}, {value:.2}.", self.columns[column]))
        };
        self.rows.iter().filter_map(of).collect::<Vec<_>>().join(" ")
    }
}

/// The end of a name, which tells the layers and modules of a family apart.
fn shortened(name: &str) -> String {
    let count = name.chars().count();
    if count <= NAME {
        return name.to_owned();
    }
    let head: String = name.chars().take(9).collect();
    let tail: String = name.chars().skip(count - (NAME - 10)).collect();
    format!("{head}…{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_has_a_shade_a_number_and_an_exact_title() {
        let map = HeatMap {
            title: "law".into(),
            columns: vec!["0".into(), "1".into()],
            rows: vec![("h.0".into(), vec![Some(0.125), None])],
        };
        let text = map.render("m").into_string();
        assert!(text.contains("<title>h.0, 0: 0.125</title><rect class=\"h1\""), "{text}");
        assert!(text.contains(">0.13</text>") || text.contains(">0.12</text>"), "{text}");
        assert_eq!(text.matches("<rect").count(), 1);
    }

    #[test]
    fn a_long_name_keeps_its_ends() {
        assert_eq!(shortened("layers.27.self_attn.q_proj"), "layers.27.self_attn.q_proj");
        assert_eq!(shortened("layers.127.self_attn.q_proj.x"), "layers.12…elf_attn.q_proj.x");
    }
}
