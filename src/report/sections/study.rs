//! A study's verdict, its comparisons and its arms.

use maud::{Markup, html};

use super::{run_heading, scrolling, section};
use crate::config::load::to_toml;
use crate::report::Reported;
use crate::report::chart::bars::{Whisker, whiskers};
use crate::report::text::{exact, short};
use crate::study::report::{ArmReport, Spread, StudyReport};

/// The section.
pub fn study(runs: &[Reported]) -> Markup {
    let content = html! {
        @for (index, run) in runs.iter().enumerate() {
            @if let Some(study) = &run.run.study {
                (run_heading(index, &run.run.name, runs.len()))
                (one(index, study))
            }
        }
    };
    section("study", "Does routing help? The study", content)
}

fn one(index: usize, study: &StudyReport) -> Markup {
    let rows: Vec<Whisker> = study
        .comparisons
        .iter()
        .map(|row| Whisker {
            name: row.name.clone(),
            mean: row.interval.mean,
            half_width: row.interval.half_width,
        })
        .collect();
    html! {
        p class="verdict" { (study.verdict) }
        p class="note" {
            "Made by dylora " (study.dylora_version) ": " (study.steps) " steps, "
            (study.seeds.len()) " seed(s), learning rates x "
            (study.rates.iter().map(f64::to_string).collect::<Vec<_>>().join(", ")) "."
        }
        @if !rows.is_empty() {
            figure class="chart wide" {
                figcaption { "Gains " span class="unit" { "(nats a token, 95 % intervals)" } }
                (whiskers(&format!("gain{index}"), "Gains with their 95 % intervals, nats", &rows))
                (scrolling(comparisons(study)))
            }
        }
        (scrolling(arms(study)))
        @if !study.warnings.is_empty() {
            h4 { "Warnings" }
            ul { @for warning in &study.warnings { li { (warning) } } }
        }
        details {
            summary { "The whole config of the study" }
            pre { code { (to_toml(&study.config)) } }
        }
        @if !study.failed.is_empty() {
            p class="none" { (study.failed.len()) " run(s) failed." }
        }
    }
}

fn comparisons(study: &StudyReport) -> Markup {
    html! {
        table {
            thead { tr {
                th scope="col" { "gain" } th scope="col" { "losses" } th scope="col" { "mean" }
                th scope="col" { "± half of the interval" }
            } }
            tbody {
                @for row in &study.comparisons {
                    tr data-comparison=(row.name) {
                        th scope="row" { (row.name) }
                        td { (row.minus.name()) " below " (row.of.name()) }
                        td data-value=(exact(row.interval.mean)) {
                            (format!("{:+.4}", row.interval.mean))
                        }
                        td { (row.interval.half_width.map_or("-".into(), short)) }
                    }
                }
            }
        }
    }
}

fn arms(study: &StudyReport) -> Markup {
    let spread = |spread: &Spread| match spread.sd {
        Some(sd) => format!("{:.4} ± {sd:.4}", spread.mean),
        None => format!("{:.4}", spread.mean),
    };
    let measured = |arm: &ArmReport| {
        arm.measured.as_ref().map_or("-".into(), |measured| spread(&measured.loss))
    };
    html! {
        table {
            caption { "Arms: mean loss and standard deviation over the seeds, nats a token" }
            thead { tr {
                th scope="col" { "arm" } th scope="col" { "loss" }
                th scope="col" { "learning rate" } th scope="col" { "trained parameters" }
            } }
            tbody {
                @for arm in &study.arms {
                    tr {
                        th scope="row" { (arm.arm.name()) }
                        td { (measured(arm)) }
                        td { (arm.learning_rate.map_or("-".into(), short)) }
                        td {
                            (arm.measured.as_ref()
                                .map_or("-".into(), |measured| measured.parameters.to_string()))
                        }
                    }
                }
            }
        }
    }
}
