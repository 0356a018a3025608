//! The runs of a study, and the files by which they are started and report:
//!
//! ```text
//! OUT/runs/NAME-HASH/
//!     spec.json        what to train: the run's name, its config, and the data that it must find
//!     config.toml, metrics.jsonl, checkpoints/          as in every run
//!     result.json      the losses on both halves; written once, when the run is over
//! ```
//!
//! The hash covers the config, the data and the base, so that a result is never taken for that of
//! another run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::arms::Arm;
use crate::config::{Config, DeviceChoice, DomainExperts, Method, RoutingChoice, load};
use crate::durable;
use crate::eval::EvalReport;
use crate::model::experts::spec::{ExpertSpec, num_routed};
use crate::train::files::METRICS_FILE;
use crate::train::metrics::Metrics;

/// The version of the files. Results of another version are not read.
pub const FORMAT: u32 = 1;

/// The file that says what to train.
pub(crate) const SPEC: &str = "spec.json";
/// The file with the losses.
pub const RESULT: &str = "result.json";

/// Which run of a study it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunId {
    /// The arm.
    pub arm: Arm,
    /// The index of the only domain; `None` for all domains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<usize>,
    /// Factor of the learning rate.
    pub factor: f64,
    /// The run's seed.
    pub seed: u64,
}

impl RunId {
    /// A name that no other run of the study has, such as `single-x0.5-seed0`.
    pub fn name(&self) -> String {
        let domain = self.domain.map(|domain| format!("-domain{domain}")).unwrap_or_default();
        format!("{}{domain}-x{}-seed{}", self.arm, self.factor, self.seed)
    }

    /// The name for people, such as `single, rate x 0.5, seed 0`.
    pub fn label(&self, config: &Config) -> String {
        let domain = self.domain.map(|_| format!(" ({})", config.data.domains[0].name));
        let domain = domain.unwrap_or_default();
        format!("{}{domain}, rate x {}, seed {}", self.arm, self.factor, self.seed)
    }
}

/// What a run trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// [`FORMAT`].
    pub format: u32,
    /// Which run it is.
    pub id: RunId,
    /// The run's config. Its folder is that of the run.
    pub config: Config,
    /// The seed of `validation.fraction`, which is the same for all runs of a study.
    pub split_seed: u64,
    /// BLAKE3 of the training set and both halves of the validation set.
    pub data: String,
    /// BLAKE3 of what the result depends on.
    pub hash: String,
    /// Whether the checkpoints are kept.
    pub keep: bool,
}

impl RunSpec {
    /// A run of `config` in a folder of its own in `dir`.
    ///
    /// - `data`, `base`: BLAKE3 of the datasets and of the base's files
    pub fn new(
        id: RunId,
        mut config: Config,
        split_seed: u64,
        data: &str,
        base: &str,
        dir: &Path,
    ) -> Self {
        let hash = hash(&config, split_seed, data, base);
        config.run.dir = dir.join(format!("{}-{}", id.name(), &hash[..8]));
        let data = data.to_owned();
        Self { format: FORMAT, id, config, split_seed, data, hash, keep: false }
    }

    /// The run's folder.
    pub fn dir(&self) -> &Path {
        &self.config.run.dir
    }

    /// Writes the spec into the run's folder and returns its path.
    pub fn write(&self) -> Result<PathBuf> {
        fs_err::create_dir_all(self.dir())?;
        let path = self.dir().join(SPEC);
        let text = serde_json::to_string_pretty(self)? + "\n";
        durable::replace(&path, text.as_bytes())?;
        Ok(path)
    }

    /// Reads a spec.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs_err::read_to_string(path)?;
        serde_json::from_str(&text)
            .with_context(|| format!("`{}` is no run of this version", path.display()))
    }

    /// The result of the run, if it is over.
    pub fn result(&self) -> Option<RunResult> {
        let text = fs_err::read_to_string(self.dir().join(RESULT)).ok()?;
        let result: RunResult = serde_json::from_str(&text).ok()?;
        (result.format == FORMAT && result.hash == self.hash).then_some(result)
    }

    /// Writes the result of the run. From then on the run is over.
    pub fn finish(&self, outcome: Outcome) -> Result<()> {
        let result = RunResult {
            format: FORMAT,
            dylora_version: env!("CARGO_PKG_VERSION").into(),
            id: self.id.clone(),
            learning_rate: self.id.arm.rate(&self.config),
            hash: self.hash.clone(),
            data: self.data.clone(),
            outcome,
        };
        let text = serde_json::to_string_pretty(&result)? + "\n";
        durable::replace(&self.dir().join(RESULT), text.as_bytes())?;
        durable::sync_folder(self.dir())
    }
}

/// BLAKE3 of what a run's result depends on. The run's folder and device do not count.
fn hash(config: &Config, split_seed: u64, data: &str, base: &str) -> String {
    let mut config = config.clone();
    config.run.dir = PathBuf::new();
    config.run.device = DeviceChoice::Auto;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&FORMAT.to_le_bytes());
    hasher.update(&split_seed.to_le_bytes());
    for text in [data, base, &load::to_toml(&config)] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// What a run that is over reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunResult {
    /// [`FORMAT`].
    pub format: u32,
    /// The version of dylora that made the run.
    pub dylora_version: String,
    /// Which run it is.
    pub id: RunId,
    /// The learning rate of the experts, or of the base in a full fine-tune.
    pub learning_rate: f64,
    /// As [`RunSpec::hash`].
    pub hash: String,
    /// As [`RunSpec::data`].
    pub data: String,
    /// How the run ended.
    pub outcome: Outcome,
}

impl RunResult {
    /// The measurements; `None` if the run diverged.
    pub fn measured(&self) -> Option<&Measured> {
        match &self.outcome {
            Outcome::Trained(measured) => Some(measured),
            Outcome::Diverged(_) => None,
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was trained to its end.
    Trained(Measured),
    /// A loss or gradient was not finite; the value says which.
    Diverged(String),
}

/// The measurements of a run. The losses are those of the checkpoint with the lowest loss on the
/// half to select by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The losses on the half to select by.
    pub selection: Losses,
    /// The losses on the half to report.
    pub report: Losses,
    /// Number of steps.
    pub steps: u64,
    /// The step of the evaluated checkpoint.
    pub best_step: u64,
    /// Wall-clock time of all steps, without evaluations and checkpoints.
    pub train_secs: f64,
    /// Number of trained parameters.
    pub parameters: i64,
    /// The rank that a token uses; `None` for a full fine-tune.
    pub active_rank: Option<f64>,
    /// Mean entropy of the routing probabilities on the half to report, nats; `None` without a
    /// router.
    pub routing_entropy: Option<f64>,
}

/// The losses on a dataset, nats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Losses {
    /// The mean of the domains' losses.
    pub loss: f64,
    /// Each domain's loss, by its name.
    pub domains: BTreeMap<String, f64>,
}

impl Losses {
    /// The losses of an evaluation.
    pub fn of(report: &EvalReport) -> Self {
        Self { loss: report.loss, domains: report.domain_losses() }
    }

    /// Whether all losses are numbers.
    pub(crate) fn are_finite(&self) -> bool {
        self.loss.is_finite() && self.domains.values().all(|loss| loss.is_finite())
    }
}

/// The rank that a token of a trained model uses: with `k` chosen experts `k` ranks, with dense
/// routing `e^H` ranks, where H is the mean entropy of the routing probabilities, and the rank of
/// the part that is always on. Where experts differ in rank, their mean counts. `None` for a full
/// fine-tune.
///
/// - `top_k`: number of experts that a token keeps in evaluation
/// - `entropy`: H, nats
pub fn active_rank(
    config: &Config,
    specs: &[ExpertSpec],
    top_k: Option<i64>,
    entropy: Option<f64>,
) -> Option<f64> {
    if config.method == Method::Full {
        return None;
    }
    let rank = |spec: &ExpertSpec| spec.modules.values().next().map_or(0, |size| size.rank) as f64;
    let (routed, shared) = specs.split_at(num_routed(specs));
    let total: f64 = routed.iter().map(rank).sum();
    let mean = total / routed.len() as f64;
    let routed = match config.train.routing {
        RoutingChoice::Router if routed.len() > 1 => match top_k {
            Some(k) => k as f64 * mean,
            None => mean * entropy?.exp(),
        },
        RoutingChoice::Domain => {
            let domains = config.data.domains.iter();
            let experts = domains.filter_map(|domain| domain.expert.as_ref());
            let ranks = experts.map(DomainExperts::experts).map(|experts| {
                experts.iter().map(|&expert| rank(&specs[expert as usize])).sum::<f64>()
            });
            let ranks: Vec<f64> = ranks.collect();
            super::statistics::mean(&ranks)?
        }
        _ => total,
    };
    Some(routed + shared.iter().map(rank).sum::<f64>())
}

/// The wall-clock time of all steps in a run's `metrics.jsonl`, in seconds.
pub fn train_secs(run_dir: &Path) -> Result<f64> {
    let path = run_dir.join(METRICS_FILE);
    let text = fs_err::read_to_string(&path)?;
    let mut secs = 0.0;
    for line in text.lines() {
        let metrics = serde_json::from_str(line)
            .with_context(|| format!("`{}` has a line that is no metrics", path.display()))?;
        if let Metrics::Train(step) = metrics {
            secs += step.step_secs;
        }
    }
    Ok(secs)
}
