//! Evaluation by domain, the accuracy of routers, and how far experts have moved.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod domains;
mod experts;
