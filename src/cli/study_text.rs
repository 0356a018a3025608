//! What `dylora study` prints: its plan, its runs as they end, and its results.

use anyhow::{Result, bail};
use serde_json::json;

use super::results::Schema;
use super::table::{count, table};
use crate::base::Base;
use crate::config::{AdapterSource, Config, Method};
use crate::data::HalvedDatasets;
use crate::mixture::Mixture;
use crate::model::experts::spec::ExpertSpec;
use crate::study::arms::Arm;
use crate::study::plan::Plan;
use crate::study::report::{ACTIVE, ArmReport, StudyReport, TOTAL};
use crate::study::run::{Outcome, RunResult};
use crate::study::statistics::Interval;
use crate::train::plan::ParameterCounts;

/// What a study will do: its arms, its runs, and the halves of its validation data.
pub fn plan(plan: &Plan, base: &Base, halves: &HalvedDatasets, json: bool) -> Result<String> {
    let (settings, size) = (&plan.settings, plan.size());
    let repeats = settings.rates.len() as u64 + settings.num_seeds - 1;
    let mut arms = vec![];
    for &arm in &settings.arms {
        let config = arm.config(&settings.config);
        let parts = if arm.splits_domains() { plan.facts.domains.len() as u64 } else { 1 };
        let counts = ParameterCounts::new(&config, &specs(&config, base)?, &base.spec);
        let rates: Vec<f64> = settings.rates.iter().map(|f| f * arm.rate(&config)).collect();
        arms.push((arm, config, counts.trained * parts as i64, rates, repeats * parts));
    }
    let domains = halves.selection.domains.iter().zip(&halves.report.domains);
    let domains = domains.zip(&plan.facts.domains);
    if json {
        let arms: Vec<_> = arms
            .iter()
            .map(|(arm, config, parameters, rates, runs)| {
                json!({ "arm": arm, "parameters": parameters, "learning_rates": rates,
                        "runs": runs, "config": config })
            })
            .collect();
        let domains: Vec<_> = domains
            .map(|((selection, report), facts)| {
                json!({ "name": selection.name, "share": facts.share,
                        "selection_documents": selection.counts.documents,
                        "report_documents": report.counts.documents })
            })
            .collect();
        let json = json!({ "arms": arms, "domains": domains, "runs": size.runs,
                           "steps_of_a_run": plan.facts.steps, "steps": size.steps });
        return Ok(Schema::StudyPlan.text(json));
    }
    let rows = arms.iter().map(|(arm, config, parameters, rates, runs)| {
        let rates: Vec<String> = rates.iter().map(|rate| format!("{rate:.2e}")).collect();
        let cells = [rank(*arm, config), count(*parameters), rates.join(" "), count(*runs)];
        [arm.name().to_owned()].into_iter().chain(cells).collect()
    });
    let header = ["arm", "rank", "trained parameters", "rates to try", "runs"];
    let arms = table(&header, rows.collect());
    let rows = domains.map(|((selection, report), facts)| {
        vec![
            selection.name.clone(),
            format!("{:.1} %", 100.0 * facts.share),
            count(selection.counts.documents),
            count(report.counts.documents),
        ]
    });
    let header = ["domain", "share of the blocks", "documents to select by", "to report"];
    let halves = table(&header, rows.collect());
    Ok(format!(
        "{arms}\n\n{halves}\n\n{} runs, of {} steps each on all domains; {} steps in all",
        count(size.runs),
        count(plan.facts.steps),
        count(size.steps),
    ))
}

/// The experts of an arm. Where they have the ranks of their domains' sizes, their sum is the same.
fn specs(config: &Config, base: &Base) -> Result<Vec<ExpertSpec>> {
    let find = |_: &AdapterSource| bail!("a study has no experts from adapters");
    Ok(Mixture::of_config(config, &base.spec, &find)?.specs)
}

/// The rank of an arm in words, such as `4 x 8 + 2`.
fn rank(arm: Arm, config: &Config) -> String {
    let lora = &config.lora;
    match (config.method, lora.num_experts, lora.shared_rank) {
        (Method::Full, ..) => "-".into(),
        _ if arm.splits_domains() => format!("{} each", lora.rank),
        (_, 1, _) => lora.rank.to_string(),
        (_, experts, 0) => format!("{experts} x {}", lora.rank),
        (_, experts, shared) => format!("{experts} x {} + {shared}", lora.rank),
    }
}

/// A line for a run that is over.
pub fn result(label: &str, result: &RunResult) -> String {
    match &result.outcome {
        Outcome::Trained(of) => format!(
            "{label}: loss {:.4} to select by, {:.4} to report ({:.0} s)",
            of.selection.loss, of.report.loss, of.train_secs
        ),
        Outcome::Diverged(reason) => format!("{label}: diverged, {reason}"),
    }
}

/// A time in words, such as `3 minutes`.
pub fn duration(secs: f64) -> String {
    match secs {
        secs if secs < 90.0 => format!("{secs:.0} seconds"),
        secs if secs < 5400.0 => format!("{:.0} minutes", secs / 60.0),
        secs => format!("{:.1} hours", secs / 3600.0),
    }
}

/// The results of a study.
pub fn report(report: &StudyReport) -> String {
    let domains: Vec<&str> =
        report.config.data.domains.iter().map(|domain| domain.name.as_str()).collect();
    let header = ["arm", "rate", "loss (nats)", "sd"].into_iter().chain(domains.iter().copied());
    let header = header.chain(["below single", "active rank", "parameters", "seconds"]);
    let header: Vec<&str> = header.collect();
    let rows = report.arms.iter().map(|row| row_of(row, &domains, report)).collect();
    let (seeds, steps) = (report.seeds.len(), count(report.steps));
    let mut text = format!(
        "loss on the half of the validation documents to report, {seeds} seed(s), {steps} steps\n\
         {}",
        table(&header, rows)
    );
    for (name, what) in [
        (TOTAL, "what perfect routing by domain brings at the same total rank"),
        (ACTIVE, "at the same active rank"),
    ] {
        if let Some(comparison) = report.comparison(name) {
            text += &format!("\n{name} {} nats: {what}", interval(comparison.interval));
        }
    }
    for (arm, share) in &report.recovery {
        text += &format!("\nrecovery of {arm}: {:.0} % of G_total", 100.0 * share);
    }
    for warning in &report.warnings {
        text += &format!("\nwarning: {warning}");
    }
    text + &format!("\n\n{}", report.verdict)
}

fn row_of(row: &ArmReport, domains: &[&str], report: &StudyReport) -> Vec<String> {
    let missing = || "-".to_owned();
    let measured = row.measured.as_ref();
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(missing, |value| format!("{value:.digits$}"))
    };
    let rate = row.learning_rate.map_or_else(missing, |rate| {
        format!("{rate:.2e}{}", if row.is_at_edge { " (edge)" } else { "" })
    });
    let loss = measured.map(|of| of.loss);
    let mut cells = vec![
        row.arm.name().to_owned(),
        rate,
        number(loss.map(|loss| loss.mean), 4),
        number(loss.and_then(|loss| loss.sd), 4),
    ];
    cells.extend(domains.iter().map(|name| {
        let domain = measured.and_then(|of| of.domains.get(*name));
        number(domain.map(|domain| domain.mean), 4)
    }));
    let gain = report.comparison(row.arm.name()).map(|comparison| comparison.interval);
    cells.extend([
        gain.map_or_else(missing, interval),
        number(measured.and_then(|of| of.active_rank), 1),
        measured.map_or_else(missing, |of| count(of.parameters)),
        number(measured.map(|of| of.train_secs), 0),
    ]);
    cells
}

/// A mean with its interval, such as `+0.0104 ± 0.0021`.
fn interval(interval: Interval) -> String {
    let half = interval.half_width.map(|half| format!(" ± {half:.4}")).unwrap_or_default();
    format!("{:+.4}{half}", interval.mean)
}
