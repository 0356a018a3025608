//! The formats of others, as plain structs that are read and written: PEFT's adapters ([`adapter`]).

pub mod adapter;
