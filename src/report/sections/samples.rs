//! Answers before and after: of the base and of the model, with a strip of the model's tokens in
//! the colours of their experts.

use maud::{Markup, html};

use super::{run_heading, scrolling, section};
use crate::report::palette::{HUES, largest};
use crate::report::samples::{Answer, RoutedToken, Sample};
use crate::report::{Reported, Run};

/// The section.
pub fn samples(runs: &[Reported]) -> Markup {
    let has_some = |run: &Reported| run.samples.as_ref().is_ok_and(|samples| !samples.is_empty());
    let content = html! {
        @if runs.iter().any(has_some) {
            p class="note" {
                "Both models answer greedily, with the same prompts from the validation data. In a \
                 strip, each token has the colour and the number of the expert with the largest \
                 weight, as a mean over the routers; its weights appear when the pointer rests on \
                 it."
            }
        }
        @for (index, run) in runs.iter().enumerate().filter(|(_, run)| run.run.has_metrics()) {
            (run_heading(index, &run.run.name, runs.len()))
            @match &run.samples {
                Err(reason) => p class="none" { "There are no samples: " (reason) "." },
                Ok(samples) if samples.is_empty() => p class="none" {
                    "There are no samples: the validation data has no document to answer."
                },
                Ok(samples) => {
                    (legend(&run.run, samples))
                    @for sample in samples { (one(sample)) }
                },
            }
        }
    };
    section("samples", "Samples before and after", content)
}

fn legend(run: &Run, samples: &[Sample]) -> Markup {
    let tokens = samples.iter().flat_map(|sample| &sample.after.tokens);
    let count = tokens.map(|token| token.weights.len()).max().unwrap_or(0);
    html! {
        ul class="legend" {
            @for (expert, name) in run.expert_names(count).iter().enumerate() {
                li { span class={ "mark k" (expert % HUES.len()) } { (expert) } " " (name) }
            }
        }
    }
}

fn one(sample: &Sample) -> Markup {
    html! {
        article class="sample" {
            h4 { (sample.domain) }
            dl {
                dt { "prompt" }
                dd class="text" { (sample.prompt) }
                dt { "in the data" }
                dd class="text" { (sample.reference) }
                dt { "before (base)" }
                dd class="text" { (sample.before.text()) (end(&sample.before)) }
                dt { "after (model)" }
                dd class="text" { (sample.after.text()) (end(&sample.after)) }
                dt { "after, by expert" }
                dd class="strip" {
                    @for token in &sample.after.tokens { (strip_token(token)) }
                }
            }
            details {
                summary { "Numbers: the weights of each token" }
                (scrolling(weights(&sample.after)))
            }
        }
    }
}

fn weights(answer: &Answer) -> Markup {
    let count = answer.tokens.first().map_or(0, |token| token.weights.len());
    html! {
        table {
            thead { tr {
                th scope="col" { "token" }
                @for expert in 0..count { th scope="col" { (expert) } }
            } }
            tbody {
                @for token in &answer.tokens {
                    tr {
                        th scope="row" { code { (format!("{:?}", token.text)) } }
                        @for weight in &token.weights { td { (format!("{weight:.4}")) } }
                    }
                }
            }
        }
    }
}

/// A token of a strip. A line feed in it also ends the line of the strip.
fn strip_token(token: &RoutedToken) -> Markup {
    let expert = largest(&token.weights);
    let weights: Vec<String> =
        token.weights.iter().enumerate().map(|(e, weight)| format!("{e}: {weight:.3}")).collect();
    html! {
        span class={ "token x" (expert % HUES.len()) } title=(weights.join("  ")) {
            (token.text.replace('\n', "⏎")) sub { (expert) }
        }
        @if token.text.contains('\n') { br; }
    }
}

fn end(answer: &Answer) -> Markup {
    html! {
        @if answer.is_cut { span class="cut" title="cut after 64 tokens" { " […]" } }
        @if answer.tokens.is_empty() { span class="none" { "(nothing)" } }
    }
}
