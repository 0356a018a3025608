//! File formats of other projects, read and written as plain structs: PEFT's adapters ([`adapter`])
//! and the files that X-LoRA adds to them ([`xlora`]).

pub mod adapter;
pub mod xlora;
