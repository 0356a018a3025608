//! dylora.
pub mod config;
pub mod ffi;
pub mod model;
