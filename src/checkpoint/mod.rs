//! Checkpoints: their files ([`format`](mod@format)), the state of routing that they keep
//! ([`routing_state`]), and the models that they hold ([`load`]).

pub mod format;
pub mod load;
pub mod routing_state;

pub use format::*;
pub use load::{build_model, checkpoint_base, load_mixture, load_model};
