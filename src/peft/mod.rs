//! The formats of others, as plain structs that are read and written: PEFT's adapters ([`adapter`]), and what
//! X-LoRA puts beside them ([`xlora`]).

pub mod adapter;
pub mod xlora;
