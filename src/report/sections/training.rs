//! Learning rates, gradient norms and throughput over the steps.

use maud::{Markup, html};
use serde_json::{Value, json};

use super::section;
use crate::report::Reported;
use crate::report::chart::{Line, LineChart, Mark};
use crate::report::text::letter;
use crate::train::metrics::StepMetrics;

/// The section.
pub fn training(runs: &[Reported]) -> Markup {
    let mut groups: Vec<&String> = vec![];
    for step in runs.iter().flat_map(|run| run.run.steps.first()) {
        for group in step.learning_rates.keys() {
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
    }
    let mut charts = vec![
        chart(runs, "Gradient norm before clipping", "L2 norm", &[json!("grad_norm")], |step| {
            Some(step.grad_norm)
        }),
        chart(runs, "Throughput", "positions/s", &[json!("tokens_per_sec")], |step| {
            Some(step.tokens_per_sec)
        }),
    ];
    for group in groups {
        let title = format!("Learning rate of {group}");
        let keys = [json!("learning_rates"), json!(group)];
        let rate = |step: &StepMetrics| step.learning_rates.get(group).copied();
        charts.push(chart(runs, &title, "a step", &keys, rate));
    }
    let has_steps = runs.iter().any(|run| !run.run.steps.is_empty());
    let content = html! {
        @if has_steps {
            div class="grid" {
                @for (index, chart) in charts.iter().enumerate() {
                    (chart.render(&format!("train{index}")))
                }
            }
        }
    };
    section("training", "Training", content)
}

/// A chart of a value of each step.
fn chart(
    runs: &[Reported],
    title: &str,
    unit: &str,
    keys: &[Value],
    value: impl Fn(&StepMetrics) -> Option<f64>,
) -> LineChart {
    let line = |(index, run): (usize, &Reported)| Line {
        name: format!("{} {}", letter(index), run.run.name),
        label: letter(index),
        hue: index,
        mark: Mark::Thin,
        run: index,
        source: [json!("train")].into_iter().chain(keys.iter().cloned()).collect(),
        points: run.run.steps.iter().filter_map(|step| Some((step.step, value(step)?))).collect(),
    };
    let lines = runs.iter().enumerate().map(line).collect();
    LineChart { title: title.into(), unit: unit.into(), lines }
}
