//! The sections of the page. Each is a function of the reported runs, and is empty if no run has
//! anything for it.

pub mod about;
pub mod growth;
pub mod losses;
pub mod overview;
pub mod routing;
pub mod samples;
pub mod study;
pub mod training;

use maud::{Markup, html};

use super::palette::HUES;
use super::text::letter;

/// A section with its heading. It is left out if it is empty.
fn section(id: &str, heading: &str, content: Markup) -> Markup {
    html! {
        @if !content.0.is_empty() {
            section id=(id) aria-labelledby={ (id) "-heading" } {
                h2 id={ (id) "-heading" } { (heading) }
                (content)
            }
        }
    }
}

/// The mark of a run: its letter in its colour.
fn run_mark(index: usize) -> Markup {
    html! { span class={ "mark k" (index % HUES.len()) } { (letter(index)) } }
}

/// A heading for what concerns one run, if there are several.
fn run_heading(index: usize, name: &str, num_runs: usize) -> Markup {
    html! {
        @if num_runs > 1 { h3 { (run_mark(index)) " " (name) } }
    }
}

/// A table that may be wider than the page.
fn scrolling(table: Markup) -> Markup {
    html! { div class="scroll" tabindex="0" { (table) } }
}
