//! dylora.
pub mod config;
pub mod durable;
pub mod ffi;
pub mod hub;
pub mod data;
pub mod model;
pub mod base;
pub mod eval;
pub mod train;
pub mod export;
pub mod cli;
