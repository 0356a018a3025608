//! What a model card says of a checkpoint's training: its data and its scores.
//!
//! The scores are those of the evaluation after the checkpoint's step, from the run's
//! `metrics.jsonl`.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::checkpoint::TrainState;
use crate::config::Config;

/// The training of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    /// Number of steps.
    pub step: u64,
    /// Number of target tokens.
    pub target_tokens: u64,
    /// Number of tokens in a block.
    pub seq_len: usize,
    /// The domains, in the config's order.
    pub domains: Vec<DomainTraining>,
    /// Mean of the domains' validation losses, in nats a token, if they were measured.
    pub loss: Option<f64>,
    /// Factor of the domain supervision of the router; 0 without it.
    pub supervision: f64,
}

/// The training on a domain.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainTraining {
    /// The domain's name.
    pub name: String,
    /// Number of blocks that were trained on.
    pub blocks: u64,
    /// Validation loss in nats a token, if it was measured.
    pub loss: Option<f64>,
    /// Its experts; none if no expert is its own.
    pub experts: Vec<i64>,
}

/// An evaluation in `metrics.jsonl`.
#[derive(Default, Deserialize)]
struct Evaluation {
    kind: String,
    step: u64,
    #[serde(default)]
    loss: Option<f64>,
    #[serde(default)]
    domain_losses: Map<String, Value>,
}

impl Training {
    /// The training of the checkpoint in the folder `dir`.
    ///
    /// # Errors
    /// A `metrics.jsonl` that cannot be read. There may be none.
    pub(crate) fn of_checkpoint(config: &Config, state: &TrainState, dir: &Path) -> Result<Self> {
        let run = dir.parent().and_then(Path::parent);
        let metrics = run.map(|run| run.join("metrics.jsonl")).filter(|file| file.is_file());
        let text = metrics.map(fs_err::read_to_string).transpose()?.unwrap_or_default();
        let evaluations = text.lines().filter(|line| line.contains("validation"));
        let evaluations = evaluations.filter_map(|line| serde_json::from_str(line).ok());
        let of_step = |found: &Evaluation| found.kind == "validation" && found.step == state.step;
        let scores: Evaluation = evaluations.rev().find(of_step).unwrap_or_default();
        let blocks = state.domain_blocks.iter().copied().chain(std::iter::repeat(0));
        let domains = config.data.domains.iter().zip(blocks).map(|(domain, blocks)| {
            let loss = scores.domain_losses.get(&domain.name).and_then(Value::as_f64);
            let experts = domain.expert.as_ref().map_or(vec![], |own| own.experts().to_vec());
            DomainTraining { name: domain.name.clone(), blocks, loss, experts }
        });
        Ok(Self {
            step: state.step,
            target_tokens: state.tokens_seen,
            seq_len: config.data.seq_len,
            domains: domains.collect(),
            loss: scores.loss,
            supervision: config.router.domain_supervision.unwrap_or(0.0),
        })
    }
}
