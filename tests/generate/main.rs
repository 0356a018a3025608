//! Generation: texts equal those of whole forward passes, whatever they are computed with, and
//! samples follow the distribution that the settings say.

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod chat;
mod command;
mod engine;
mod sampling;
mod settings;
mod text;
