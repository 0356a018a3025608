//! A batch on its way from the data to the model: rows on the host ([`host`]), tensors on the
//! device ([`inputs`]), those of its positions that have labels ([`labelled`]), and the experts of
//! its domains ([`targets`]). [`step`] makes the inputs of generation, and [`prompt_means`]
//! takes means over prompts.

pub mod host;
pub mod inputs;
pub mod labelled;
pub mod prompt_means;
pub mod step;
pub mod targets;

pub use host::{Extent, HostInputs, InputLayout, PackedExtent, Rows};
pub use inputs::Inputs;
pub use labelled::Labelled;
pub use step::{GenerationCache, StepLayout, StepRow};
pub use targets::DomainTargets;
