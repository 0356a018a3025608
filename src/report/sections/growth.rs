//! The forgetting matrix of a mixture that has grown: the loss of each domain after each stage.

use maud::{Markup, html};

use super::{run_heading, scrolling, section};
use crate::growth::stages::{Stage, forgetting};
use crate::report::Reported;
use crate::report::text::exact;

/// The section.
pub fn growth(runs: &[Reported]) -> Markup {
    let content = html! {
        @for (index, run) in runs.iter().enumerate() {
            @if let Ok(facts) = &run.run.checkpoint {
                @if facts.state.stages.len() > 1 {
                    (run_heading(index, &run.run.name, runs.len()))
                    (scrolling(matrix(&facts.state.stages)))
                }
            }
        }
    };
    let content = html! {
        @if !content.0.is_empty() {
            p class="note" {
                "The validation loss of each domain after each stage, in nats a token. The last \
                 row is how much the loss has risen since the stage that learned the domain (▲ \
                 forgotten, ▼ improved)."
            }
            (content)
        }
    };
    section("growth", "Growth: the forgetting matrix", content)
}

fn matrix(stages: &[Stage]) -> Markup {
    let mut domains: Vec<&String> = vec![];
    for domain in stages.iter().flat_map(|stage| stage.learned.iter().chain(stage.losses.keys())) {
        if !domains.contains(&domain) {
            domains.push(domain);
        }
    }
    let risen = forgetting(stages);
    html! {
        table class="matrix" {
            thead { tr {
                th scope="col" { "stage" }
                th scope="col" { "experts" }
                @for domain in &domains { th scope="col" { (domain) } }
            } }
            tbody {
                @for (index, stage) in stages.iter().enumerate() {
                    tr data-stage=(index) {
                        th scope="row" { (index + 1) " " (stage.name) }
                        td { (stage.num_experts) }
                        @for domain in &domains {
                            @let is_new = stage.learned.contains(domain);
                            @match stage.losses.get(*domain) {
                                None => td { "-" },
                                Some(loss) => td class=[is_new.then_some("learned")]
                                    data-domain=(domain) data-value=(exact(*loss))
                                    title=(exact(*loss)) {
                                    (format!("{loss:.4}")) @if is_new { " (learned)" }
                                },
                            }
                        }
                    }
                }
                tr class="sum" {
                    th scope="row" { "since it was learned" }
                    td {}
                    @for domain in &domains {
                        @match risen.get(*domain) {
                            None => td { "-" },
                            Some(rise) => td data-domain=(domain) data-value=(exact(*rise)) {
                                (format!("{rise:+.4}"))
                                @if *rise > 0.0 { " ▲" } @else if *rise < 0.0 { " ▼" }
                            },
                        }
                    }
                }
            }
        }
    }
}
