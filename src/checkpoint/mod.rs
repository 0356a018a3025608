//! Checkpoints: their files ([`format`](mod@format)), the state of routing that they keep
//! ([`routing_state`]), the models that they hold ([`load`]), and where those of a failed stage go
//! ([`rejected`]).

pub mod format;
pub mod load;
pub mod rejected;
pub mod routing_state;

pub use format::*;
pub use load::{build_model, checkpoint_base, load_mixture, load_model};
