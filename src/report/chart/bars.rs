//! Bars with their numbers, and intervals around 0.

use maud::{Markup, html};

use super::px;
use super::scale::Scale;
use crate::report::palette::HUES;
use crate::report::text::short;

const WIDTH: f64 = 420.0;
const LEFT: f64 = 110.0;
const RIGHT: f64 = 70.0;
const ROW: f64 = 22.0;
const TOP: f64 = 6.0;

/// A bar.
#[derive(Debug, Clone)]
pub struct Bar {
    /// Its name.
    pub name: String,
    /// Its length.
    pub value: f64,
    /// The index of its hue.
    pub hue: usize,
}

/// Horizontal bars from 0.
///
/// - `id`: that of the figure, by which its texts are found
pub fn bars(id: &str, title: &str, bars: &[Bar]) -> Markup {
    let values = || bars.iter().map(|bar| bar.value).chain([0.0]);
    let ends = [LEFT, WIDTH - RIGHT];
    let scale = Scale::new(values(), ends, 4).filter(|_| values().any(|value| value > 0.0));
    let length = |value: f64| match &scale {
        Some(scale) if value.is_finite() => scale.place(value) - LEFT,
        _ => 0.0,
    };
    let (title_id, desc_id) = (format!("{id}-t"), format!("{id}-d"));
    let words = bars.iter().map(|bar| format!("{}: {}.", bar.name, short(bar.value)));
    html! {
        svg class="bars" viewBox={ "0 0 " (px(WIDTH)) " " (px(height(bars.len()))) } role="img"
            aria-labelledby={ (title_id) " " (desc_id) } {
            title id=(title_id) { (title) }
            desc id=(desc_id) { (words.collect::<Vec<_>>().join(" ")) }
            @for (row, bar) in bars.iter().enumerate() {
                @let top = TOP + ROW * row as f64;
                text class="tick" text-anchor="end" x=(px(LEFT - 6.0)) y=(px(top + 15.0)) {
                    (bar.name)
                }
                rect class={ "f" (bar.hue % HUES.len()) } x=(px(LEFT)) y=(px(top + 3.0))
                    width=(px(length(bar.value).max(0.5))) height=(px(ROW - 6.0)) {}
                text class="value" x=(px(LEFT + length(bar.value) + 6.0)) y=(px(top + 15.0)) {
                    (short(bar.value))
                }
            }
        }
    }
}

/// A mean with its interval.
#[derive(Debug, Clone)]
pub(crate) struct Whisker {
    /// Its name.
    pub name: String,
    /// The mean.
    pub mean: f64,
    /// Half of the interval's width; `None` if there is none.
    pub half_width: Option<f64>,
}

/// Means with their intervals beside a line at 0.
///
/// - `id`: that of the figure, by which its texts are found
pub(crate) fn whiskers(id: &str, title: &str, rows: &[Whisker]) -> Markup {
    let ends_of = |row: &Whisker| {
        let half = row.half_width.unwrap_or(0.0);
        [row.mean - half, row.mean + half]
    };
    let values = rows.iter().flat_map(ends_of).chain([0.0]);
    let Some(scale) = Scale::new(values, [LEFT, WIDTH - 20.0], 3) else { return html! {} };
    let (title_id, desc_id) = (format!("{id}-t"), format!("{id}-d"));
    let words = rows.iter().map(|row| {
        let half = row.half_width.map(|half| format!(" ± {}", short(half))).unwrap_or_default();
        format!("{}: {}{half}.", row.name, short(row.mean))
    });
    let bottom = height(rows.len());
    html! {
        svg class="bars" viewBox={ "0 0 " (px(WIDTH)) " " (px(bottom + 18.0)) } role="img"
            aria-labelledby={ (title_id) " " (desc_id) } {
            title id=(title_id) { (title) }
            desc id=(desc_id) { (words.collect::<Vec<_>>().join(" ")) }
            @for tick in &scale.ticks {
                @let class = if *tick == 0.0 { "axis" } else { "grid" };
                path class=(class) d={ "M" (px(scale.place(*tick))) " 0V" (px(bottom)) } {}
                text class="tick" text-anchor="middle" x=(px(scale.place(*tick)))
                    y=(px(bottom + 13.0)) { (scale.label(*tick)) }
            }
            @for (index, row) in rows.iter().enumerate() {
                @let middle = TOP + ROW * (index as f64 + 0.5);
                @let [low, high] = ends_of(row).map(|value| px(scale.place(value)));
                text class="tick" text-anchor="end" x=(px(LEFT - 6.0)) y=(px(middle + 4.0)) {
                    (row.name)
                }
                @if row.half_width.is_some() {
                    @let top = px(middle - 5.0);
                    path class="line s0" d={ "M" (low) " " (px(middle)) "H" (high)
                        "M" (low) " " (top) "v10M" (high) " " (top) "v10" } {}
                }
                circle class="f0" cx=(px(scale.place(row.mean))) cy=(px(middle)) r="4" {}
            }
        }
    }
}

fn height(rows: usize) -> f64 {
    2.0 * TOP + ROW * rows as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_of_0_has_no_length_but_its_number() {
        let bar = |value| Bar { name: "expert_0".into(), value, hue: 0 };
        let text = bars("b", "Moved", &[bar(0.0), bar(0.0)]).into_string();
        assert_eq!(text.matches("width=\"0.5\"").count(), 2, "{text}");
        assert!(text.contains(">0.0000</text>"), "{text}");
    }

    #[test]
    fn an_interval_has_its_line_at_0() {
        let row = Whisker { name: "oracle".into(), mean: 0.01, half_width: Some(0.02) };
        let text = whiskers("w", "Gains", &[row]).into_string();
        assert!(text.contains("oracle: 0.0100 ± 0.0200."), "{text}");
        assert_eq!(text.matches("class=\"axis\"").count(), 1, "{text}");
    }
}
