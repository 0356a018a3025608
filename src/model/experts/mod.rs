//! The LoRA experts of a frozen linear layer: what they are ([`spec`]), where they lie ([`stack`]) and
//! start ([`init`]), and what they add to the layer's output, all at once or one after the other
//! ([`forward`]) or for the tokens that chose them alone ([`grouped`]).

pub mod assignments;
pub mod delta;
pub mod dropout;
mod forward;
pub mod grouped;
pub mod init;
pub mod orthogonality;
pub mod slots;
pub mod spec;
pub mod stack;
pub mod weights;
