//! `[growth]`: how the expert that `dylora add-expert` adds is trained.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[growth]`: how an expert that is added for a new domain is trained.
///
/// In the first `seed_steps` steps the new domain's tokens go to the new expert alone, and its
/// column of the router learns to tell them from the others. After that the router decides, and the
/// learning rates are lower.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GrowthConfig {
    /// The new domain, by its name under `[[data.domains]]`. The new expert is the last one.
    pub domain: String,
    /// Factor of the old experts' learning rate; 0 freezes them.
    pub old_experts_rate: f64,
    /// Factor of the learning rate of the old experts' router columns and of the router's hidden
    /// layers; 0 freezes them.
    pub old_columns_rate: f64,
    /// Steps of the seeding phase.
    pub seed_steps: u64,
    /// Factor of the loss by which the new router column learns in the seeding phase.
    pub seed_router_coef: f64,
    /// Factor of all learning rates after the seeding phase.
    pub consolidation_rate: f64,
}
