//! The sections of the page. Each is a function of the reported runs, and is empty if no run has
//! anything for it.

pub mod about;
pub mod growth;
pub mod losses;
pub(crate) mod overview;
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

/// A heading for what concerns one run. A page of one run has it for screen readers alone, which go
/// from one level to the next.
fn run_heading(index: usize, name: &str, num_runs: usize) -> Markup {
    html! {
        h3 class=[(num_runs == 1).then_some("hidden")] { (run_mark(index)) " " (name) }
    }
}

/// What may be wider than the page, and then scrolls by itself.
fn scrolling(content: Markup) -> Markup {
    html! { div class="scroll" role="group" aria-label="scrolls" tabindex="0" { (content) } }
}
