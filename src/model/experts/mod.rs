//! The LoRA experts of a frozen linear layer: their settings ([`spec`]), their tensors ([`stack`])
//! and the initial values of these ([`init`]). [`stack::LoraExperts::add`] adds their updates to
//! the layer's output; [`grouped`] does so only for the tokens that chose an expert.

pub mod assignments;
pub(crate) mod delta;
pub mod dropout;
mod forward;
pub mod grouped;
pub mod init;
pub(crate) mod orthogonality;
pub(crate) mod slots;
pub mod spec;
pub mod stack;
pub(crate) mod targets;
pub mod update;
pub mod weights;
