//! The stages of a mixture and what it has forgotten. In the forgetting matrix, a row is a stage, a
//! column is a domain, and an entry is the domain's validation loss at the end of the stage.
//!
//! The forgetting of a domain is its loss after the last stage minus its loss after the stage in
//! which it was learned. This is backward transfer (arXiv:1706.08840, eq. 3) with losses in place
//! of accuracies, so that a value above 0 is worse.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A run in the history of a mixture, after which each domain's loss is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// What was done: `train`, `add DOMAIN`, `remove expert_N` or `merge expert_N expert_M`.
    pub name: String,
    /// The domains that were new in this stage.
    pub learned: Vec<String>,
    /// Number of experts at its end.
    pub num_experts: i64,
    /// The step of its last evaluation.
    pub step: u64,
    /// Validation loss of each domain at that step, nats.
    pub losses: BTreeMap<String, f64>,
}

impl Stage {
    /// A stage that has not been evaluated yet.
    pub fn new(name: &str, learned: Vec<String>, num_experts: i64) -> Self {
        Self { name: name.into(), learned, num_experts, step: 0, losses: BTreeMap::new() }
    }
}

/// The smallest share of its loss by which a new domain must gain.
const MIN_GAIN: f64 = 1e-3;

/// A message for the user if the domain that the last stage was to learn has gained next to
/// nothing: less than a thousandth of its loss by the base, or before the stage if that is less.
///
/// - `by_base`: the loss of `domain` by the base alone, nats
pub fn without_gain(stages: &[Stage], domain: &str, by_base: f64) -> Option<String> {
    let last = stages.last()?;
    let after = *last.losses.get(domain)?;
    let before = stages.iter().rev().nth(1).and_then(|stage| stage.losses.get(domain).copied());
    let least = before.map_or(by_base, |before| before.min(by_base));
    (after > least * (1.0 - MIN_GAIN)).then(|| {
        let before = before.map(|before| format!(", was {before:.4} before"));
        format!(
            "the new expert brings `{domain}` nothing: its loss is {after:.4} at step {}{}, and is \
             {by_base:.4} by the base alone\nhint: begin again with more `--steps` or a higher \
             rate, such as `--set optimizer.adapters.learning_rate=5e-3`",
            last.step,
            before.unwrap_or_default(),
        )
    })
}

/// How much each domain's loss has risen since the last stage in which it was learned, nats. Only
/// domains that were evaluated both then and in the last stage are there.
pub fn forgetting(stages: &[Stage]) -> BTreeMap<String, f64> {
    let Some(last) = stages.last() else { return BTreeMap::new() };
    let risen = last.losses.iter().filter_map(|(domain, now)| {
        let stage = stages.iter().rev().find(|stage| stage.learned.contains(domain))?;
        Some((domain.clone(), now - stage.losses.get(domain)?))
    });
    risen.collect()
}
