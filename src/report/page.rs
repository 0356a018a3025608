//! The whole page: head, styles, navigation and sections.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::Reported;
use super::palette::{DARK, HUES, LIGHT, Mode, NUM_SHADES, Rgb};
use super::sections::{about, growth, losses, overview, routing, samples, study, training};
use super::text::letter;
use crate::data::visible;

/// The rules that do not name a colour.
const STYLE: &str = include_str!("page.css");

/// Nothing is loaded, and no script runs, whatever the data contains.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
                      form-action 'none'";

/// The page as HTML. In it, control characters and marks of direction are visible.
pub fn page(runs: &[Reported]) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.run.name.as_str()).collect();
    let title = format!("dylora report: {}", names.join(", "));
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="generator" content={ "dylora " (env!("CARGO_PKG_VERSION")) };
                title { (title) }
                style { (PreEscaped(styles())) }
            }
            body {
                a class="skip" href="#main" { "Skip to the content" }
                (header(runs))
                main id="main" { (sections(runs)) }
                footer {
                    "Made by dylora " (env!("CARGO_PKG_VERSION")) " from the files of the runs."
                }
            }
        }
    };
    visible(&page.into_string())
}

fn header(runs: &[Reported]) -> Markup {
    html! {
        header {
            h1 { "dylora report" }
            ul class="legend" {
                @for (index, run) in runs.iter().enumerate() {
                    li {
                        span class={ "mark k" (index % HUES.len()) } { (letter(index)) } " "
                        (run.run.name)
                    }
                }
            }
        }
    }
}

fn sections(runs: &[Reported]) -> Markup {
    html! {
        (overview::overview(runs))
        (study::study(runs))
        (losses::losses(runs))
        (routing::routing(runs))
        (samples::samples(runs))
        (growth::growth(runs))
        (training::training(runs))
        (about::about(runs))
    }
}

fn styles() -> String {
    let dark = colours(&DARK, |hue| HUES[hue].dark);
    format!(
        "{}@media screen and (prefers-color-scheme: dark){{{dark}}}\n{STYLE}{}",
        colours(&LIGHT, |hue| HUES[hue].light),
        classes()
    )
}

/// The colours of a mode, as variables.
fn colours(mode: &Mode, hue: impl Fn(usize) -> Rgb) -> String {
    let mut variables = vec![];
    for (name, colour) in [
        ("page", mode.page),
        ("card", mode.card),
        ("text", mode.text),
        ("muted", mode.muted),
        ("rule", mode.rule),
        ("link", mode.link),
    ] {
        variables.push((name.to_owned(), colour));
    }
    for index in 0..HUES.len() {
        variables.push((format!("hue{index}"), hue(index)));
        variables.push((format!("tint{index}"), mode.tint(hue(index))));
    }
    for level in 0..NUM_SHADES {
        let [shade, ink] = mode.shade(level);
        variables.push((format!("shade{level}"), shade));
        variables.push((format!("ink{level}"), ink));
    }
    let lines = variables.iter().map(|(name, colour)| format!("--{name}:{};", hex(*colour)));
    format!(":root{{{}}}\n", lines.collect::<String>())
}

/// The classes that have these colours: for hues, `s` strokes, `f` fills, `i` inks, `k` marks and
/// `x` tokens; for shades, `h` fills, `b` backgrounds and `t` text.
fn classes() -> String {
    let of_hue = |i: usize| {
        format!(
            ".s{i}{{stroke:var(--hue{i})}}.f{i}{{fill:var(--hue{i})}}.i{i}{{fill:var(--hue{i})}}\
             .k{i}{{background:var(--tint{i});border-color:var(--hue{i})}}\
             .x{i}{{background:var(--tint{i});border-color:var(--hue{i})}}\n"
        )
    };
    let of_shade = |i: usize| {
        format!(
            ".h{i}{{fill:var(--shade{i})}}.b{i}{{background:var(--shade{i})}}\
             .t{i}{{fill:var(--ink{i});color:var(--ink{i})}}\n"
        )
    };
    let hues = (0..HUES.len()).map(of_hue);
    hues.chain((0..NUM_SHADES).map(of_shade)).collect()
}

fn hex(colour: Rgb) -> String {
    let [red, green, blue] = colour;
    format!("#{red:02x}{green:02x}{blue:02x}")
}
