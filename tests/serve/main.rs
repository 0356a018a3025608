//! `dylora serve`: the texts are those of the engine, whatever they are computed with and in
//! whatever form they are sent; errors have OpenAI's form; and no client holds up others.

#[path = "../common/mod.rs"]
mod common;

mod chat;
mod client;
mod completions;
mod errors;
mod limits;
mod process;
mod server;
