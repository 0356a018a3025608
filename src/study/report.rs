//! What a study found, as `study.json` holds it: a row for each arm, paired comparisons, warnings
//! and the verdict.
//!
//! ```text
//! G_total  = single - oracle             what perfect routing brings at the same total rank
//! G_active = single_active - oracle      and at the same active rank
//! recovery = (single - routed) / (single - oracle)
//! ```
//!
//! All of them are of losses on the half to report, paired by seed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::arms::Arm;
use super::plan::{Plan, Results};
use super::run::{FORMAT, Measured, RunResult};
use super::statistics::{Interval, deviation, differences, mean};
use super::verdict::{Compared, Possible, verdict};
use crate::config::Config;

/// The arms that may be compared with a single LoRA in the verdict, the first that a study has.
const ROUTED: [Arm; 2] = [Arm::Supervised, Arm::Learned];

/// What a study found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyReport {
    /// [`FORMAT`].
    pub format: u32,
    /// The version of dylora.
    pub dylora_version: String,
    /// The mixture's config.
    pub config: Config,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// The factors of the learning rate that each arm tried.
    pub rates: Vec<f64>,
    /// Number of steps of a run on all domains.
    pub steps: u64,
    /// A row for each arm.
    pub arms: Vec<ArmReport>,
    /// The paired comparisons.
    pub comparisons: Vec<Comparison>,
    /// The share of what perfect routing brings that each learned router has, by the arm's name. It
    /// is only there if the interval of G_total is above 0.
    pub recovery: BTreeMap<String, f64>,
    /// What makes the study weaker than it seems.
    pub warnings: Vec<String>,
    /// The verdict.
    pub verdict: String,
    /// The runs that failed.
    pub failed: Vec<Failure>,
    /// All runs.
    pub runs: Vec<RunResult>,
}

/// An arm's row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmReport {
    /// The arm.
    pub arm: Arm,
    /// Its config, without the factor of the rate and with the first seed.
    pub config: Config,
    /// Its trials, in the order of the rates.
    pub trials: Vec<Trial>,
    /// The factor of the rate that it kept; `None` if its trials are not over or all diverged.
    pub factor: Option<f64>,
    /// The learning rate that it kept.
    pub learning_rate: Option<f64>,
    /// Whether that rate is the smallest or the largest of several that were tried.
    pub is_at_edge: bool,
    /// Its measurements over all seeds; `None` if some runs are missing or diverged.
    pub measured: Option<ArmMeasured>,
}

/// A trial of an arm at a rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// The factor of the learning rate.
    pub factor: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The loss on the half to select by, nats; `None` if the run diverged.
    pub selection_loss: Option<f64>,
}

/// The measurements of an arm over all seeds, on the half to report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmMeasured {
    /// The mean of the domains' losses for each seed, nats.
    pub losses: Vec<f64>,
    /// Their mean and standard deviation.
    pub loss: Spread,
    /// Each domain's loss, by its name.
    pub domains: BTreeMap<String, Spread>,
    /// The rank that a token uses, as a mean over the seeds; `None` for a full fine-tune.
    pub active_rank: Option<f64>,
    /// Mean entropy of the routing probabilities, nats, as a mean over the seeds; `None` without a
    /// router.
    pub routing_entropy: Option<f64>,
    /// Number of trained parameters, of all domains together if each has a LoRA of its own.
    pub parameters: i64,
    /// Wall-clock time of the steps for one seed, as a mean over the seeds.
    pub train_secs: f64,
}

/// A mean and a standard deviation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The standard deviation over the seeds; `None` with one seed.
    pub sd: Option<f64>,
}

impl Spread {
    fn of(values: &[f64]) -> Option<Self> {
        Some(Self { mean: mean(values)?, sd: deviation(values) })
    }
}

/// A paired comparison of two arms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// Its name: `G_total`, `G_active` or, for the gain of an arm over a single LoRA, the arm's.
    pub name: String,
    /// The arm whose losses count as positive.
    pub of: Arm,
    /// The arm whose losses are subtracted.
    pub minus: Arm,
    /// The differences, by seed, nats.
    pub differences: Vec<f64>,
    /// Their mean and 95 % t-interval.
    pub interval: Interval,
}

/// A run that failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// The run, as `single, rate x 1, seed 0`.
    pub run: String,
    /// The error.
    pub error: String,
}

impl StudyReport {
    /// The report of the runs that are over.
    pub fn new(plan: &Plan, results: &Results, failed: Vec<Failure>) -> Self {
        let settings = &plan.settings;
        let arms = settings.arms.iter().map(|&arm| ArmReport::new(plan, arm, results));
        let arms: Vec<ArmReport> = arms.collect();
        let comparisons = comparisons(&arms);
        let gain = |name: &str| comparisons.iter().find(|comparison| comparison.name == name);
        let total = gain(TOTAL).map(|total| total.interval);
        let mut recovery = BTreeMap::new();
        if let Some(total) = total.filter(|total| total.is_above_zero()) {
            let gains = ROUTED.iter().filter_map(|arm| gain(arm.name()));
            recovery.extend(gains.map(|gain| (gain.name.clone(), gain.interval.mean / total.mean)));
        }
        let compared = ROUTED.into_iter().find(|arm| settings.arms.contains(arm));
        let compared = compared.and_then(|routed| {
            let possible = match (total, recovery.get(routed.name())) {
                (None, _) => Possible::Unknown,
                (Some(_), None) => Possible::Nothing,
                (Some(_), Some(share)) => Possible::Share(*share),
            };
            let gain = gain(routed.name())?.interval;
            Some(Compared { routed, gain, num_seeds: settings.num_seeds, possible })
        });
        let first = settings.config.run.seed;
        Self {
            format: FORMAT,
            dylora_version: env!("CARGO_PKG_VERSION").into(),
            config: settings.config.clone(),
            seeds: (first..first + settings.num_seeds).collect(),
            rates: settings.rates.clone(),
            steps: plan.facts.steps,
            warnings: warnings(plan, &arms),
            arms,
            comparisons,
            recovery,
            verdict: verdict(compared.as_ref()),
            failed,
            runs: results.values().cloned().collect(),
        }
    }

    /// The comparison with this name.
    pub fn comparison(&self, name: &str) -> Option<&Comparison> {
        self.comparisons.iter().find(|comparison| comparison.name == name)
    }
}

impl ArmReport {
    fn new(plan: &Plan, arm: Arm, results: &Results) -> Self {
        let config = arm.config(&plan.settings.config);
        let rate = arm.rate(&config);
        let rates = &plan.settings.rates;
        let losses = plan.trial_losses(arm, results).unwrap_or_default();
        let trial = |(&factor, selection_loss)| {
            let learning_rate = rate * factor;
            Trial { factor, learning_rate, selection_loss }
        };
        let factor = plan.kept_rate(arm, results);
        let is_edge = |factor: f64| rates.first() == Some(&factor) || rates.last() == Some(&factor);
        Self {
            arm,
            config,
            trials: rates.iter().zip(losses).map(trial).collect(),
            factor,
            learning_rate: factor.map(|factor| rate * factor),
            is_at_edge: rates.len() > 1 && factor.is_some_and(is_edge),
            measured: factor.and_then(|factor| ArmMeasured::new(plan, arm, factor, results)),
        }
    }
}

impl ArmMeasured {
    fn new(plan: &Plan, arm: Arm, factor: f64, results: &Results) -> Option<Self> {
        let of_seed = |index: u64| -> Option<SeedMeasured> {
            let runs = plan.runs(arm, factor, index);
            let measured = runs.iter().map(|run| results.get(&run.id.name())?.measured());
            SeedMeasured::of(&measured.collect::<Option<Vec<_>>>()?)
        };
        let seeds = (0..plan.settings.num_seeds).map(of_seed).collect::<Option<Vec<_>>>()?;
        let losses: Vec<f64> = seeds.iter().map(|seed| seed.loss).collect();
        let names = seeds.first()?.domains.keys().cloned();
        let domain = |name: String| {
            let of_name = seeds.iter().map(|seed| seed.domains.get(&name).copied());
            Some((name.clone(), Spread::of(&of_name.collect::<Option<Vec<_>>>()?)?))
        };
        let mean_of = |value: fn(&SeedMeasured) -> Option<f64>| {
            let values: Option<Vec<f64>> = seeds.iter().map(value).collect();
            values.and_then(|values| mean(&values))
        };
        Some(Self {
            loss: Spread::of(&losses)?,
            losses,
            domains: names.map(domain).collect::<Option<_>>()?,
            active_rank: mean_of(|seed| seed.active_rank),
            routing_entropy: mean_of(|seed| seed.routing_entropy),
            parameters: seeds.first()?.parameters,
            train_secs: mean_of(|seed| Some(seed.train_secs))?,
        })
    }
}

/// The measurements of an arm for one seed.
struct SeedMeasured {
    loss: f64,
    domains: BTreeMap<String, f64>,
    active_rank: Option<f64>,
    routing_entropy: Option<f64>,
    parameters: i64,
    train_secs: f64,
}

impl SeedMeasured {
    /// The measurements of one run on all domains, or of one run for each domain.
    fn of(runs: &[&Measured]) -> Option<Self> {
        let losses: Vec<f64> = runs.iter().map(|run| run.report.loss).collect();
        let domains = runs.iter().flat_map(|run| run.report.domains.clone());
        let ranks: Option<Vec<f64>> = runs.iter().map(|run| run.active_rank).collect();
        Some(Self {
            loss: mean(&losses)?,
            domains: domains.collect(),
            active_rank: ranks.and_then(|ranks| mean(&ranks)),
            routing_entropy: runs.first()?.routing_entropy,
            parameters: runs.iter().map(|run| run.parameters).sum(),
            train_secs: runs.iter().map(|run| run.train_secs).sum(),
        })
    }
}

/// The name of the comparison of a single LoRA with the oracle at the same total rank.
pub const TOTAL: &str = "G_total";
/// The name of the same comparison at the same active rank.
pub const ACTIVE: &str = "G_active";

/// The comparisons of the arms that are measured: each arm's gain over a single LoRA, G_total and
/// G_active.
fn comparisons(arms: &[ArmReport]) -> Vec<Comparison> {
    let losses = |arm: Arm| {
        let row = arms.iter().find(|row| row.arm == arm)?;
        row.measured.as_ref().map(|measured| &measured.losses)
    };
    let compare = |name: &str, of: Arm, minus: Arm| {
        let differences = differences(losses(of)?, losses(minus)?);
        let interval = Interval::of(&differences)?;
        Some(Comparison { name: name.into(), of, minus, differences, interval })
    };
    let others = arms.iter().map(|row| row.arm).filter(|arm| *arm != Arm::Single);
    let gains = others.filter_map(|arm| compare(arm.name(), Arm::Single, arm));
    let oracle = [(TOTAL, Arm::Single), (ACTIVE, Arm::SingleActive)];
    gains.chain(oracle.iter().filter_map(|(name, of)| compare(name, *of, Arm::Oracle))).collect()
}

/// What makes the study weaker than it seems, one sentence each.
fn warnings(plan: &Plan, arms: &[ArmReport]) -> Vec<String> {
    let mut warnings = vec![];
    let rates = &plan.settings.rates;
    if rates.len() == 1 {
        warnings.push("only one rate was tried, so that every arm may be undertuned".into());
    }
    for row in arms {
        let arm = row.arm;
        if let Some(factor) = row.factor.filter(|_| row.is_at_edge) {
            let which = if rates.last() == Some(&factor) { "largest" } else { "smallest" };
            warnings.push(format!(
                "the best rate of `{arm}`, x {factor}, is the {which} that was tried, so that \
                 `{arm}` may be undertuned"
            ));
        }
        for trial in row.trials.iter().filter(|trial| trial.selection_loss.is_none()) {
            warnings.push(format!("`{arm}` diverged at the rate x {}", trial.factor));
        }
        if row.measured.is_none() {
            warnings.push(format!("`{arm}` is not measured: some of its runs failed or diverged"));
        }
    }
    if plan.settings.num_seeds == 1 {
        warnings.push("one seed shows no difference between arms".into());
    }
    warnings
}
