//! How tokens are routed: what decides ([`source`]), where ([`site`]), how a router scores the experts
//! and a rule makes weights of the scores ([`router`]), all routers of a model ([`routers`]), their
//! decisions in one forward pass ([`pass`]), and sums over what they did ([`totals`]).

pub mod pass;
pub mod router;
pub mod routers;
pub mod site;
pub mod source;
pub mod totals;

pub use site::Site;
pub use source::RoutingSource;
