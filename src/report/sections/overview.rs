//! The runs in a table: how far they have come, and what they reached.

use std::collections::BTreeMap;

use maud::{Markup, html};
use serde_json::{Value, json};

use super::{run_mark, scrolling, section};
use crate::config::Duration;
use crate::report::Reported;
use crate::report::run::Run;
use crate::report::text::{bytes, exact, short};
use crate::train::metrics::ValidationMetrics;

/// The section.
pub(crate) fn overview(runs: &[Reported]) -> Markup {
    let with_metrics: Vec<(usize, &Run)> =
        runs.iter().map(|run| &run.run).enumerate().filter(|(_, run)| run.has_metrics()).collect();
    let content = html! {
        @if !with_metrics.is_empty() {
            (scrolling(table(&with_metrics)))
            p class="note" {
                "Losses are in nats a token. “Best loss” is the lowest mean of the domains' \
                 validation losses, as the run evaluated them."
            }
            @let has = |of: fn(&ValidationMetrics) -> &ByDomain| with_metrics.iter()
                .any(|(_, run)| run.best_validation().is_some_and(|pass| !of(pass).is_empty()));
            @if has(|pass| &pass.domain_losses) {
                (scrolling(best_table(&with_metrics, "Validation losses at the best evaluation",
                    "domain_losses", |pass| &pass.domain_losses, Some(|pass| pass.loss))))
            }
            @if has(|pass| &pass.accuracy_by_domain) {
                (scrolling(best_table(&with_metrics,
                    "Accuracy of the router at the best evaluation",
                    "accuracy_by_domain", |pass| &pass.accuracy_by_domain, None)))
                p class="note" {
                    "The accuracy is the share of tokens whose most probable expert is one of \
                     their domain's."
                }
            }
        }
    };
    section("overview", "Overview", content)
}

fn table(runs: &[(usize, &Run)]) -> Markup {
    html! {
        table {
            caption { "Runs" }
            thead { tr {
                @for name in ["run", "state", "steps", "tokens seen", "best loss", "at step",
                              "last tokens/s", "peak memory"] {
                    th scope="col" { (name) }
                }
            } }
            tbody {
                @for (index, run) in runs {
                    @let last = run.steps.last();
                    tr {
                        th scope="row" { (run_mark(*index)) " " (run.name) }
                        td { (state(run)) }
                        td { (last.map_or(0, |step| step.step)) }
                        td { (last.map_or(0, |step| step.tokens_seen)) }
                        @match run.best_validation() {
                            None => { td { "-" } td { "-" } },
                            Some(pass) => {
                                (cell(*index, pass.step, json!(["validation", "loss"]),
                                    Some(pass.loss)))
                                td { (pass.step) }
                            },
                        }
                        @match last {
                            None => td { "-" },
                            Some(last) => (cell(*index, last.step,
                                json!(["train", "tokens_per_sec"]), Some(last.tokens_per_sec))),
                        }
                        td { (last.map_or("-".into(), |step| bytes(step.peak_memory_bytes))) }
                    }
                }
            }
        }
    }
}

/// How far a run has come, by its config.
fn state(run: &Run) -> &'static str {
    let Some(last) = run.steps.last() else { return "no step yet" };
    let Some((config, _)) = &run.config else { return "unknown" };
    // a fraction of an epoch is rounded
    let has_passed = |epochs: f64| last.epoch >= epochs - 1e-6;
    let is_complete = match config.train.duration {
        Duration::Auto => has_passed(3.0) && last.step >= 100,
        Duration::Steps(steps) => last.step >= steps,
        Duration::Epochs(epochs) => has_passed(epochs as f64),
        Duration::Tokens(tokens) => last.tokens_seen >= tokens,
    };
    if is_complete { "complete" } else { "in progress, interrupted or stopped early" }
}

/// What an evaluation says of each domain.
type ByDomain = BTreeMap<String, f64>;

/// The figures of each run's best evaluation, by domain.
///
/// - `key`: the name of the figures in `metrics.jsonl`
/// - `of`: the figures
/// - `mean`: the mean of the domains, if `metrics.jsonl` has it, under the key `loss`
fn best_table(
    runs: &[(usize, &Run)],
    caption: &str,
    key: &str,
    of: fn(&ValidationMetrics) -> &ByDomain,
    mean: Option<fn(&ValidationMetrics) -> f64>,
) -> Markup {
    let mut domains: Vec<String> = vec![];
    for name in runs.iter().flat_map(|(_, run)| run.domains()) {
        if !domains.contains(&name) {
            domains.push(name);
        }
    }
    html! {
        table {
            caption { (caption) }
            thead { tr {
                th scope="col" { "run" }
                @for name in &domains { th scope="col" { (name) } }
                @if mean.is_some() { th scope="col" { "mean of domains" } }
            } }
            tbody {
                @for (index, run) in runs {
                    @if let Some(pass) = run.best_validation().filter(|pass| !of(pass).is_empty()) {
                        tr {
                            th scope="row" { (run_mark(*index)) " " (run.name) }
                            @for name in &domains {
                                (cell(*index, pass.step, json!(["validation", key, name]),
                                    of(pass).get(name).copied()))
                            }
                            @if let Some(mean) = mean {
                                (cell(*index, pass.step, json!(["validation", "loss"]),
                                    Some(mean(pass))))
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A cell with a number of `metrics.jsonl`.
fn cell(run: usize, step: u64, source: Value, number: Option<f64>) -> Markup {
    html! {
        @match number {
            None => td { "-" },
            Some(number) => td data-run=(run) data-step=(step) data-source=(source)
                data-value=(exact(number)) title=(exact(number)) { (short(number)) },
        }
    }
}
