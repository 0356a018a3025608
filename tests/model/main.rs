//! Facts about the model that need no other implementation as a reference: identities, invariances
//! and closed forms.

#[path = "../common/mod.rs"]
mod common;

mod accumulation;
mod by_hand;
mod cached;
mod checkpointing;
mod clips;
mod experts;
mod families;
mod gradients;
mod grouped;
mod loss;
mod losses;
mod module_input;
mod orthogonality;
mod own_experts;
mod packing;
mod padding;
mod report;
mod routing;
mod scopes;
mod seeding;
mod selection_bias;
mod sequence;
mod shared;
mod steps;
mod supervision;
