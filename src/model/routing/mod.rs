//! How tokens are routed:
//!
//! - [`source`]: what decides the routing weights
//! - [`site`]: the sites at which routers decide
//! - [`router`]: how a router scores the experts, and the rule that turns scores into weights
//! - [`routers`]: all routers of a model
//! - [`pass`]: their decisions in one forward pass
//! - [`supervision`]: the loss that teaches routers the domains
//! - [`totals`]: sums over what they did, and the losses that follow

pub mod pass;
pub mod router;
pub mod routers;
pub mod site;
pub mod source;
pub mod supervision;
pub mod totals;

pub use site::Site;
pub use source::{RoutingSource, RowSources};
