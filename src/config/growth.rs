//! `[growth]`: how the expert that `dylora add-expert` adds is trained.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[growth]`: how an expert that is added for a new domain is trained.
///
/// In the first `seed_steps` steps, the tokens of the new domain are routed to the new expert
/// alone, and the new expert's column of the router learns to tell them from other tokens. After
/// this seeding phase, the router decides for all tokens, and the learning rates are lower.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GrowthConfig {
    /// The name of the new domain in `[[data.domains]]`. The new expert is the last one.
    pub domain: String,
    /// Factor of the old experts' learning rate. 0 freezes them.
    pub old_experts_rate: f64,
    /// Factor of the learning rate of the old experts' router columns and of the router's hidden
    /// layers. 0 freezes them.
    pub old_columns_rate: f64,
    /// Number of steps in the seeding phase.
    pub seed_steps: u64,
    /// Factor of the loss that trains the new router column in the seeding phase.
    pub seed_router_coef: f64,
    /// The learning rate of the new router column, whatever `optimizer.router.learning_rate` is.
    #[serde(default = "column_learning_rate")]
    pub column_learning_rate: f64,
    /// Factor of all learning rates after the seeding phase.
    pub consolidation_rate: f64,
}

fn column_learning_rate() -> f64 {
    1e-3
}
