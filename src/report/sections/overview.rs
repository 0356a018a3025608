//! The runs in a table: how far they have come, and what they reached.

use maud::{Markup, html};
use serde_json::json;

use super::{run_mark, scrolling, section};
use crate::config::Duration;
use crate::report::Reported;
use crate::report::run::Run;
use crate::report::text::{bytes, exact, short};

/// The section.
pub fn overview(runs: &[Reported]) -> Markup {
    let with_metrics: Vec<(usize, &Run)> =
        runs.iter().map(|run| &run.run).enumerate().filter(|(_, run)| run.has_metrics()).collect();
    let content = html! {
        @if !with_metrics.is_empty() {
            (scrolling(table(&with_metrics)))
            p class="note" {
                "Losses are in nats a token. “Best loss” is the lowest mean of the domains' \
                 validation losses, as the run evaluated them."
            }
            @if with_metrics.iter().any(|(_, run)| !run.validations.is_empty()) {
                (scrolling(best_table(&with_metrics)))
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
                        (value(*index, last.map(|step| (step.step, "train", "tokens_seen",
                            step.tokens_seen.to_string(), step.tokens_seen.to_string()))))
                        (value(*index, run.best_validation().map(|pass| (pass.step, "validation",
                            "loss", short(pass.loss), exact(pass.loss)))))
                        td {
                            (run.best_validation()
                                .map_or("-".into(), |pass| pass.step.to_string()))
                        }
                        (value(*index, last.map(|step| (step.step, "train", "tokens_per_sec",
                            short(step.tokens_per_sec), exact(step.tokens_per_sec)))))
                        td { (last.map_or("-".into(), |step| bytes(step.peak_memory_bytes))) }
                    }
                }
            }
        }
    }
}

/// A cell with a number of `metrics.jsonl`: its step, the kind and the key, and the number as it is
/// read and as it is.
fn value(run: usize, cell: Option<(u64, &str, &str, String, String)>) -> Markup {
    html! {
        @match cell {
            None => td { "-" },
            Some((step, kind, key, shown, exact)) => {
                td data-run=(run) data-step=(step) data-source=(json!([kind, key]))
                    data-value=(exact) title=(exact) { (shown) }
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

/// The losses of each run's best evaluation, by domain.
fn best_table(runs: &[(usize, &Run)]) -> Markup {
    let mut domains: Vec<String> = vec![];
    for name in runs.iter().flat_map(|(_, run)| run.domains()) {
        if !domains.contains(&name) {
            domains.push(name);
        }
    }
    html! {
        table {
            caption { "Validation losses at the best evaluation" }
            thead { tr {
                th scope="col" { "run" }
                @for name in &domains { th scope="col" { (name) } }
                th scope="col" { "mean of domains" }
            } }
            tbody {
                @for (index, run) in runs {
                    @if let Some(pass) = run.best_validation() {
                        tr {
                            th scope="row" { (run_mark(*index)) " " (run.name) }
                            @for name in &domains {
                                @match pass.domain_losses.get(name) {
                                    None => td { "-" },
                                    Some(loss) => td data-run=(index) data-step=(pass.step)
                                        data-source=(json!(["validation", "domain_losses", name]))
                                        data-value=(exact(*loss)) title=(exact(*loss)) {
                                        (short(*loss))
                                    },
                                }
                            }
                            (value(*index, Some((pass.step, "validation", "loss",
                                short(pass.loss), exact(pass.loss)))))
                        }
                    }
                }
            }
        }
    }
}
