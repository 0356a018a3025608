//! `[growth]`: how the expert that `dylora add-expert` adds is trained.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[growth]`: how an expert that is added for a new domain is trained.
///
/// In the first `seed_steps` steps, the tokens of the new domain are routed to the new expert
/// alone. Then the new expert's column of the router is fitted to tell these tokens from others. If
/// held-out tokens of the new domain then get the expert, the seeding phase ends; otherwise it goes
/// on for as many steps again, or the stage fails. After the seeding phase, the router decides for
/// all tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GrowthConfig {
    /// The name of the new domain in `[[data.domains]]`. The new expert is the last one.
    pub domain: String,
    /// Factor of the learning rate of the old experts and of the part that is always on. 0 freezes
    /// them.
    pub old_experts_rate: f64,
    /// Factor of the learning rate of the old experts' router columns and of the router's hidden
    /// layers. 0 freezes them.
    pub old_columns_rate: f64,
    /// Number of steps until the new router column is fitted.
    pub seed_steps: u64,
    /// Factor of the loss that keeps the new router column telling the domains apart.
    pub seed_router_coef: f64,
    /// The learning rate of the new router column, whatever `optimizer.router.learning_rate` is.
    #[serde(default = "column_learning_rate")]
    pub column_learning_rate: f64,
    /// Factor of all learning rates after the seeding phase.
    pub consolidation_rate: f64,
}

impl GrowthConfig {
    /// The learning rate of a new router column unless the config says otherwise.
    pub const COLUMN_LEARNING_RATE: f64 = 3e-4;
}

fn column_learning_rate() -> f64 {
    GrowthConfig::COLUMN_LEARNING_RATE
}
