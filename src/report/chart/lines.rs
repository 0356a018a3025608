//! A chart of lines over the steps of runs.

use std::collections::BTreeMap;

use maud::{Markup, html};
use serde_json::{Value, json};

use super::px;
use super::scale::Scale;
use crate::report::palette::HUES;
use crate::report::text::{exact, short};

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 210.0;
const LEFT: f64 = 50.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;
/// Most points of a line. Of a longer line, the smallest and the largest value of each part stay.
const MAX_POINTS: usize = 400;
/// The dashes of lines, so that they differ without colours as well.
const DASHES: [&str; 4] = ["none", "7 3", "2 3", "9 3 2 3"];
/// The least distance of the labels at the ends of lines.
const LABEL_HEIGHT: f64 = 12.0;
/// The room for such a label.
const LABEL_WIDTH: f64 = 16.0;

/// How a line is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Thin, for the values of single steps.
    Thin,
    /// With a dot at each value.
    Dots,
}

/// A line: a value at some steps.
#[derive(Debug, Clone)]
pub struct Line {
    /// Its name in the table.
    pub name: String,
    /// What stands at its end: the letter of a run or the number of an expert.
    pub label: String,
    /// The index of its hue and its dashes.
    pub hue: usize,
    /// How it is drawn.
    pub mark: Mark,
    /// The index of its run.
    pub run: usize,
    /// Where its values come from: the kind of a line of `metrics.jsonl` and the keys of the value.
    pub source: Vec<Value>,
    /// The steps and the values.
    pub points: Vec<(u64, f64)>,
}

/// A chart of lines.
#[derive(Debug, Clone)]
pub struct LineChart {
    /// Its title.
    pub title: String,
    /// The unit of its values, such as `nats a token`.
    pub unit: String,
    /// The lines; those without values are left out.
    pub lines: Vec<Line>,
}

impl LineChart {
    /// The figure; nothing if no line has a value.
    pub fn render(&self, id: &str) -> Markup {
        let mut lines: Vec<Line> =
            self.lines.iter().filter(|line| !line.points.is_empty()).cloned().collect();
        for line in &mut lines {
            line.points = thinned(&line.points, MAX_POINTS);
        }
        html! {
            @if !lines.is_empty() {
                figure class="chart" {
                    figcaption { (self.title) " " span class="unit" { "(" (self.unit) ")" } }
                    (self.drawing(id, &lines))
                    details {
                        summary { "Numbers: " (self.title) }
                        (table(&lines))
                    }
                }
            }
        }
    }

    fn drawing(&self, id: &str, lines: &[Line]) -> Markup {
        let steps = lines.iter().flat_map(|line| &line.points).map(|(step, _)| *step as f64);
        let values = lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value);
        let x = Scale::new(steps, [LEFT, WIDTH - RIGHT], 3);
        let y = Scale::new(values, [HEIGHT - BOTTOM, TOP], 3);
        let (Some(x), Some(y)) = (x, y) else {
            return html! { p class="none" { "No value is finite." } };
        };
        let (title_id, desc_id) = (format!("{id}-t"), format!("{id}-d"));
        html! {
            svg viewBox={ "0 0 " (px(WIDTH)) " " (px(HEIGHT)) } role="img"
                aria-labelledby={ (title_id) " " (desc_id) } {
                title id=(title_id) { (self.title) ", " (self.unit) }
                desc id=(desc_id) { (description(lines)) }
                (axes(&x, &y))
                @for line in lines { (curve(line, &x, &y)) }
                @for (line, [x, y]) in labels(lines, &x, &y) {
                    text class={ "end i" (line.hue % HUES.len()) } x=(px(x + 5.0))
                        y=(px(y + 4.0)) { (line.label) }
                }
            }
        }
    }
}

/// What the chart shows, in words.
fn description(lines: &[Line]) -> String {
    let of = |line: &Line| {
        let (first, last) = (line.points.first()?, line.points.last()?);
        Some(format!(
            "{}: {} at step {}, {} at step {}.",
            line.name,
            short(first.1),
            first.0,
            short(last.1),
            last.0
        ))
    };
    lines.iter().filter_map(of).collect::<Vec<_>>().join(" ")
}

fn axes(x: &Scale, y: &Scale) -> Markup {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    html! {
        @for tick in &y.ticks {
            @let place = y.place(*tick);
            path class="grid" d={ "M" (px(LEFT)) " " (px(place)) "H" (px(right)) } {}
            text class="tick" text-anchor="end" x=(px(LEFT - 5.0)) y=(px(place + 4.0)) {
                (y.label(*tick))
            }
        }
        path class="axis" d={ "M" (px(LEFT)) " " (px(bottom)) "H" (px(right)) } {}
        // a run of one step has no steps between
        @for tick in x.ticks.iter().filter(|tick| tick.fract() == 0.0) {
            text class="tick" text-anchor="middle" x=(px(x.place(*tick))) y=(px(bottom + 14.0)) {
                (x.label(*tick))
            }
        }
        text class="tick" text-anchor="middle" x=(px((LEFT + right) / 2.0))
            y=(px(HEIGHT - 4.0)) { "step" }
    }
}

/// A line, with gaps where its value is not finite.
fn curve(line: &Line, x: &Scale, y: &Scale) -> Markup {
    let mut path = String::new();
    let mut pen_down = false;
    for (step, value) in &line.points {
        if !value.is_finite() {
            pen_down = false;
            continue;
        }
        path += if pen_down { "L" } else { "M" };
        path += &format!("{} {}", px(x.place(*step as f64)), px(y.place(*value)));
        pen_down = true;
    }
    let finite = line.points.iter().filter(|(_, value)| value.is_finite());
    let has_dots = line.mark == Mark::Dots || line.points.len() == 1;
    let class = if line.mark == Mark::Thin { "line thin" } else { "line" };
    html! {
        path class={ (class) " s" (line.hue % HUES.len()) } d=(path)
            stroke-dasharray=(dashes(line.hue)) {}
        @if has_dots {
            @for (step, value) in finite {
                circle class={ "f" (line.hue % HUES.len()) } cx=(px(x.place(*step as f64)))
                    cy=(px(y.place(*value))) r="3" {
                    title { (line.name) ", step " (step) ": " (exact(*value)) }
                }
            }
        }
    }
}

/// The dashes of a line. Where hues begin anew, dashes do not, so that the two differ.
fn dashes(hue: usize) -> &'static str {
    DASHES[(hue + hue / HUES.len()) % DASHES.len()]
}

/// The labels at the ends of lines, as x and y, moved apart; of several lines with the same one,
/// the last has it.
fn labels<'a>(lines: &'a [Line], x: &Scale, y: &Scale) -> Vec<(&'a Line, [f64; 2])> {
    let mut ends = BTreeMap::new();
    for (index, line) in lines.iter().enumerate() {
        let last = line.points.iter().rev().find(|(_, value)| value.is_finite());
        if let Some((step, value)) = last {
            let place = [x.place(*step as f64), y.place(*value)];
            ends.insert((line.hue, &line.label), (&lines[index], place));
        }
    }
    let mut placed: Vec<(&Line, [f64; 2])> = ends.into_values().collect();
    placed.sort_by(|(_, a), (_, b)| a[0].total_cmp(&b[0]));
    // lines that end at about the same step have their labels below each other
    for column in placed.chunk_by_mut(|(_, a), (_, b)| b[0] - a[0] < LABEL_WIDTH) {
        let right = column.last().map_or(0.0, |(_, place)| place[0]);
        let heights: Vec<f64> = column.iter().map(|(_, place)| place[1]).collect();
        for ((_, place), height) in column.iter_mut().zip(apart(&heights)) {
            *place = [right, height];
        }
    }
    placed
}

/// The heights of labels, moved apart.
fn apart(heights: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..heights.len()).collect();
    order.sort_by(|a, b| heights[*a].total_cmp(&heights[*b]));
    let mut places = heights.to_vec();
    let (mut least, mut most) = (TOP, HEIGHT - BOTTOM);
    // many labels come closer to each other
    let distance = LABEL_HEIGHT.min((most - least) / heights.len().max(2) as f64);
    for index in &order {
        places[*index] = places[*index].max(least);
        least = places[*index] + distance;
    }
    for index in order.iter().rev() {
        places[*index] = places[*index].min(most);
        most = places[*index] - distance;
    }
    places
}

/// The first and the last point, and the smallest and the largest of each part of the others.
fn thinned(points: &[(u64, f64)], most: usize) -> Vec<(u64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let size = points.len().div_ceil(most / 2 - 1);
    let mut kept = vec![0, points.len() - 1];
    for (part, chunk) in points.chunks(size).enumerate() {
        let by_value = |a: &(usize, &(u64, f64)), b: &(usize, &(u64, f64))| a.1.1.total_cmp(&b.1.1);
        let ends =
            [chunk.iter().enumerate().min_by(by_value), chunk.iter().enumerate().max_by(by_value)];
        kept.extend(ends.into_iter().flatten().map(|(index, _)| part * size + index));
    }
    kept.sort_unstable();
    kept.dedup();
    kept.into_iter().map(|index| points[index]).collect()
}

/// The exact numbers of the lines: a row for each step, a column for each line.
fn table(lines: &[Line]) -> Markup {
    let mut rows: BTreeMap<u64, Vec<Option<f64>>> = BTreeMap::new();
    for (column, line) in lines.iter().enumerate() {
        for (step, value) in &line.points {
            rows.entry(*step).or_insert_with(|| vec![None; lines.len()])[column] = Some(*value);
        }
    }
    html! {
        div class="scroll" role="group" aria-label="scrolls" tabindex="0" {
            table class="series" {
                thead { tr {
                    th scope="col" { "step" }
                    @for line in lines {
                        th scope="col" data-run=(line.run) data-source=(json!(line.source)) {
                            (line.name)
                        }
                    }
                } }
                tbody {
                    @for (step, values) in &rows {
                        tr {
                            th scope="row" { (step) }
                            @for value in values {
                                td { @if let Some(value) = value { (exact(*value)) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: Vec<(u64, f64)>) -> Line {
        Line {
            name: "A".into(),
            label: "A".into(),
            hue: 0,
            mark: Mark::Thin,
            run: 0,
            source: vec![json!("train"), json!("loss")],
            points,
        }
    }

    #[test]
    fn a_long_line_keeps_its_ends_and_its_extremes() {
        let mut points: Vec<(u64, f64)> = (0..10_000).map(|i| (i, (i % 7) as f64)).collect();
        (points[4321].1, points[5678].1) = (99.0, -99.0);
        let kept = thinned(&points, 400);
        assert!(kept.len() <= 400, "{}", kept.len());
        assert_eq!([kept[0], kept[kept.len() - 1]], [points[0], points[9999]]);
        assert!(kept.contains(&(4321, 99.0)) && kept.contains(&(5678, -99.0)));
        assert_eq!(thinned(&points[..400], 400), points[..400]);
    }

    #[test]
    fn a_line_has_a_gap_where_its_value_is_not_finite() {
        let unit = "nats".to_owned();
        let points = vec![(1, 1.0), (2, f64::NAN), (3, 2.0), (4, 3.0)];
        let chart = LineChart { title: "Loss".into(), unit, lines: vec![line(points)] };
        let text = chart.render("c").into_string();
        let path = text.split("class=\"line thin s0\" d=\"").nth(1).expect("it is drawn");
        let path = path.split('"').next().unwrap_or_default();
        assert_eq!((path.matches('M').count(), path.matches('L').count()), (2, 1), "{path}");
        assert!(text.contains("<td>not finite</td>") && !text.contains("NaN"), "{text}");
    }

    #[test]
    fn a_chart_without_finite_values_says_so_and_one_without_lines_is_left_out() {
        let chart = |lines| LineChart { title: "Loss".into(), unit: "nats".into(), lines };
        let text = chart(vec![line(vec![(1, f64::NAN)])]).render("c").into_string();
        assert!(text.contains("No value is finite."), "{text}");
        assert_eq!(chart(vec![line(vec![])]).render("c").into_string(), "");
    }

    #[test]
    fn labels_do_not_lie_on_each_other_and_stay_within_the_chart() {
        for (count, least) in [(6, LABEL_HEIGHT), (40, 4.0)] {
            let heights: Vec<f64> = (0..count).map(|i| 90.0 + 1e-3 * f64::from(i)).collect();
            let places = apart(&heights);
            assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= least - 1e-9));
            assert!(places.iter().all(|place| (TOP - 1e-9..HEIGHT).contains(place)));
        }
        assert_eq!(apart(&[50.0, 48.0]), [60.0, 48.0]);
    }

    #[test]
    fn a_label_stands_where_its_line_ends() {
        let of = |hue: usize, last, value| Line {
            hue,
            label: hue.to_string(),
            ..line(vec![(0, 1.0), (last, value)])
        };
        let lines = [of(0, 300, 1.0), of(1, 80, 1.0), of(2, 299, 1.0)];
        let x = Scale::new([0.0, 300.0].into_iter(), [LEFT, WIDTH - RIGHT], 4).expect("finite");
        let y = Scale::new([0.0, 2.0].into_iter(), [HEIGHT - BOTTOM, TOP], 4).expect("finite");
        let placed = labels(&lines, &x, &y);
        let hues: Vec<usize> = placed.iter().map(|(line, _)| line.hue).collect();
        let [first, second, third] = [0, 1, 2].map(|at| placed[at].1);
        assert_eq!(hues, [1, 2, 0]);
        assert_eq!(first, [x.place(80.0), y.place(1.0)]);
        assert_eq!([second[0], third[0]], [x.place(300.0); 2]);
        assert_eq!(third[1] - second[1], LABEL_HEIGHT);
    }

    #[test]
    fn lines_of_the_same_hue_have_other_dashes() {
        for hue in 0..HUES.len() {
            assert_ne!(dashes(hue), dashes(hue + HUES.len()));
        }
    }
}
