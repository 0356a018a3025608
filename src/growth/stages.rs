//! What a mixture has been through, and what it has forgotten: the rows of the forgetting matrix are
//! stages, its columns domains, its numbers each domain's validation loss at the end of a stage.
//!
//! A domain's forgetting is its loss after the last stage less its loss after the stage that it was
//! learned in (backward transfer of arXiv:1706.08840, eq. 3, with losses, so that above 0 is worse).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A stage of a mixture's life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// `train`, `add DOMAIN`, `remove expert_N`, `merge expert_N expert_M`.
    pub name: String,
    /// The domains that were new in it.
    pub learned: Vec<String>,
    /// Experts at its end.
    pub num_experts: i64,
    /// Its last step that was evaluated.
    pub step: u64,
    /// Validation loss of each domain at that step, nats.
    pub losses: BTreeMap<String, f64>,
}

impl Stage {
    /// A stage before its first evaluation.
    pub fn new(name: &str, learned: Vec<String>, num_experts: i64) -> Self {
        Self { name: name.into(), learned, num_experts, step: 0, losses: BTreeMap::new() }
    }
}

/// How much each domain's loss has risen since the stage that it was learned in, nats; of the domains
/// that were evaluated then and in the last stage.
pub fn forgetting(stages: &[Stage]) -> BTreeMap<String, f64> {
    let Some(last) = stages.last() else { return BTreeMap::new() };
    let risen = last.losses.iter().filter_map(|(domain, now)| {
        let stage = stages.iter().find(|stage| stage.learned.contains(domain))?;
        Some((domain.clone(), now - stage.losses.get(domain)?))
    });
    risen.collect()
}
