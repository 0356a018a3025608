//! Losses over the steps: a chart for each domain, with a thin line for training and one with dots
//! for validation.

use maud::{Markup, html};
use serde_json::{Value, json};

use super::section;
use crate::report::Reported;
use crate::report::chart::{Line, LineChart, Mark};
use crate::report::run::Run;
use crate::report::text::letter;

/// The section.
pub fn losses(runs: &[Reported]) -> Markup {
    let mut domains: Vec<String> = vec![];
    for name in runs.iter().flat_map(|run| run.run.domains()) {
        if !domains.contains(&name) {
            domains.push(name);
        }
    }
    let mean = chart(runs, "All domains", None);
    let charts = domains.iter().map(|name| chart(runs, name, Some(name)));
    let charts: Vec<LineChart> = std::iter::once(mean).chain(charts).collect();
    let content = html! {
        @if charts.iter().any(|chart| chart.lines.iter().any(|line| !line.points.is_empty())) {
            p class="note" {
                "A thin line is the loss of each training step; a line with dots is the loss on \
                 the validation data. In the first chart, the loss of a step is the mean over its \
                 label tokens, and that of the validation data is the mean of the domains. A line \
                 ends with the letter of its run."
            }
            div class="grid" {
                @for (index, chart) in charts.iter().enumerate() {
                    (chart.render(&format!("loss{index}")))
                }
            }
        }
    };
    section("losses", "Losses by domain", content)
}

/// The losses of a domain, or of all.
fn chart(runs: &[Reported], title: &str, domain: Option<&String>) -> LineChart {
    let lines = runs.iter().enumerate().flat_map(|(index, run)| lines(index, &run.run, domain));
    LineChart { title: title.into(), unit: "nats a token".into(), lines: lines.collect() }
}

fn lines(index: usize, run: &Run, domain: Option<&String>) -> [Line; 2] {
    let keys = |kind: &str| -> Vec<Value> {
        match domain {
            None => vec![json!(kind), json!("loss")],
            Some(name) => vec![json!(kind), json!("domain_losses"), json!(name)],
        }
    };
    let line = |kind: &str, what: &str, mark, points| Line {
        name: format!("{} {}, {what}", letter(index), run.name),
        label: letter(index),
        hue: index,
        mark,
        run: index,
        source: keys(kind),
        points,
    };
    let steps = run.steps.iter().filter_map(|step| {
        let loss = domain.map_or(Some(step.loss), |name| step.domain_losses.get(name).copied());
        Some((step.step, loss?))
    });
    let passes = run.validations.iter().filter_map(|pass| {
        let loss = domain.map_or(Some(pass.loss), |name| pass.domain_losses.get(name).copied());
        Some((pass.step, loss?))
    });
    [
        line("train", "training", Mark::Thin, steps.collect()),
        line("validation", "validation", Mark::Dots, passes.collect()),
    ]
}
