//! The plan of a study: its runs, in two stages.
//!
//! ```text
//! trials    each arm at each rate with the first seed; the arm keeps the rate with the lowest loss
//!           on the half to select by, of equal ones the smaller
//! finals    each arm at its rate with the other seeds
//! ```
//!
//! Run s of every arm has the seed `run.seed + s`, so that the arms see the same blocks in the same
//! order. An arm that splits the domains makes one run for each of them instead of one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::arms::{Arm, on_one_domain};
use super::run::{RunId, RunResult, RunSpec};
use super::statistics::mean;
use crate::config::Config;

/// What a study is to do.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The mixture's config.
    pub config: Config,
    /// The arms, each once.
    pub arms: Vec<Arm>,
    /// The factors of the learning rate, in ascending order.
    pub rates: Vec<f64>,
    /// Number of seeds.
    pub num_seeds: u64,
    /// The folder of the study.
    pub dir: PathBuf,
    /// Whether the checkpoints of the runs are kept.
    pub keep: bool,
}

/// What a study must know of its data and its base.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Number of steps of a run on all domains.
    pub steps: u64,
    /// BLAKE3 of the datasets of all domains.
    pub data: String,
    /// The domains, in the config's order.
    pub domains: Vec<DomainFacts>,
    /// BLAKE3 of the base's files.
    pub base: String,
}

/// What a study must know of a domain.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainFacts {
    /// Its share of the training blocks.
    pub share: f64,
    /// BLAKE3 of its datasets alone; `None` if no arm splits the domains.
    pub data: Option<String>,
}

/// The results of a study's runs, by [`RunId::name`].
pub type Results = BTreeMap<String, RunResult>;

/// The plan of a study.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What the study is to do.
    pub settings: Settings,
    /// Its data and its base.
    pub facts: Facts,
}

impl Plan {
    /// The runs of an arm at a rate with seed number `index`: one, or one for each domain.
    pub fn runs(&self, arm: Arm, factor: f64, index: u64) -> Vec<RunSpec> {
        match arm.splits_domains() {
            false => vec![self.run(arm, None, factor, index)],
            true => {
                let domains = 0..self.facts.domains.len();
                domains.map(|domain| self.run(arm, Some(domain), factor, index)).collect()
            }
        }
    }

    fn run(&self, arm: Arm, domain: Option<usize>, factor: f64, index: u64) -> RunSpec {
        let Settings { config: mixture, dir, keep, .. } = &self.settings;
        let split_seed = mixture.run.seed;
        let seed = split_seed + index;
        let mut config = arm.config(mixture);
        config.run.seed = seed;
        arm.scale_rate(&mut config, factor);
        let data = match domain {
            None => &self.facts.data,
            Some(domain) => {
                let of = &self.facts.domains[domain];
                on_one_domain(&mut config, domain, self.facts.steps, of.share);
                of.data.as_ref().expect("it is known if an arm splits the domains")
            }
        };
        let id = RunId { arm, domain, factor, seed };
        let runs = dir.join("runs");
        let spec = RunSpec::new(id, config, split_seed, data, &self.facts.base, &runs);
        RunSpec { keep: *keep, ..spec }
    }

    /// The runs of an arm at every rate with the first seed.
    pub fn trials(&self, arm: Arm) -> Vec<RunSpec> {
        self.settings.rates.iter().flat_map(|&factor| self.runs(arm, factor, 0)).collect()
    }

    /// The runs of an arm at a rate with all seeds. That of the first seed was a trial.
    pub fn finals(&self, arm: Arm, factor: f64) -> Vec<RunSpec> {
        (0..self.settings.num_seeds).flat_map(|index| self.runs(arm, factor, index)).collect()
    }

    /// The loss of each of an arm's trials on the half to select by, in the order of the rates;
    /// `None` for one that diverged. The result is `None` until all of them are over.
    pub(crate) fn trial_losses(&self, arm: Arm, results: &Results) -> Option<Vec<Option<f64>>> {
        let of_rate = |factor: &f64| {
            let runs = self.runs(arm, *factor, 0);
            let results = runs.iter().map(|run| results.get(&run.id.name()));
            let results: Vec<&RunResult> = results.collect::<Option<_>>()?;
            let losses = results.iter().map(|run| Some(run.measured()?.selection.loss));
            Some(losses.collect::<Option<Vec<f64>>>().and_then(|losses| mean(&losses)))
        };
        self.settings.rates.iter().map(of_rate).collect()
    }

    /// The rate that an arm keeps: the one with the lowest loss on the half to select by, of equal
    /// ones the smaller. `None` until all trials are over, or if all of them diverged.
    pub fn kept_rate(&self, arm: Arm, results: &Results) -> Option<f64> {
        let losses = self.trial_losses(arm, results)?;
        let rated = self.settings.rates.iter().zip(losses);
        let rated = rated.filter_map(|(&factor, loss)| Some((factor, loss?)));
        // the first of several least elements is taken
        rated.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(factor, _)| factor)
    }

    /// The runs that can be made now and are not over: all trials, and the finals of each arm whose
    /// trials are over.
    pub fn ready(&self, results: &Results) -> Vec<RunSpec> {
        let arms = self.settings.arms.iter();
        let trials = arms.clone().flat_map(|&arm| self.trials(arm));
        let finals = arms.flat_map(|&arm| {
            let kept = self.kept_rate(arm, results);
            kept.map(|factor| self.finals(arm, factor)).unwrap_or_default()
        });
        let mut seen = std::collections::BTreeSet::new();
        let is_new = |run: &RunSpec| {
            let name = run.id.name();
            !results.contains_key(&name) && seen.insert(name)
        };
        trials.chain(finals).filter(is_new).collect()
    }

    /// The number of runs of the whole study, and of their steps.
    pub fn size(&self) -> Size {
        let (trials, seeds) = (self.settings.rates.len() as u64, self.settings.num_seeds);
        let of_arm = |arm: Arm| -> Size {
            let steps = match arm.splits_domains() {
                false => vec![self.facts.steps],
                true => {
                    let runs = self.runs(arm, 1.0, 0);
                    runs.iter().map(|run| self.steps(run)).collect()
                }
            };
            let repeats = trials + seeds - 1;
            let steps_of_all = repeats * steps.iter().sum::<u64>();
            Size { runs: repeats * steps.len() as u64, steps: steps_of_all }
        };
        let sizes = self.settings.arms.iter().map(|&arm| of_arm(arm));
        sizes.fold(Size::default(), |sum, of| Size {
            runs: sum.runs + of.runs,
            steps: sum.steps + of.steps,
        })
    }

    /// The number of steps of a run.
    pub fn steps(&self, run: &RunSpec) -> u64 {
        match (run.id.domain, run.config.train.duration) {
            (Some(_), crate::config::Duration::Steps(steps)) => steps,
            _ => self.facts.steps,
        }
    }
}

/// The size of a study.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Number of runs.
    pub runs: u64,
    /// Number of steps of all runs.
    pub steps: u64,
}

/// How long the rest of a study takes, in seconds, if all runs are as fast as those so far.
///
/// - `done`: runs that were made so far, as their steps and wall-clock seconds
pub fn secs_left(done: &[(u64, f64)], steps_left: u64, jobs: u64) -> Option<f64> {
    let steps: u64 = done.iter().map(|(steps, _)| steps).sum();
    let secs: f64 = done.iter().map(|(_, secs)| secs).sum();
    (steps > 0).then(|| secs / steps as f64 * steps_left as f64 / jobs.max(1) as f64)
}
