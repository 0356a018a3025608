//! dylora.
pub mod config;
