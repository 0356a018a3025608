//! Text from a model: prompts go in, tokens come out one by one, and each is routed as in training.
//!
//! ```text
//! prompts -> engine: prefill, then steps of all texts together -> tokens -> text
//!              |          logits -> sampling -> token
//!              +- model with its caches
//! ```
//!
//! - [`prompt`]: the tokens of texts and conversations
//! - [`route`]: what decides the routing of a text
//! - [`settings`]: what `generation_config.json` says
//! - [`engine`]: texts in batches, where one may begin or end while others go on
//! - [`request`]: what is asked for, and what comes back
//! - `next`: the tokens of a step, and `graphs`: steps as CUDA graphs
//! - [`sampling`]: the choice of the next token
//! - [`text`]: tokens become text piece by piece, up to a string that ends it
//! - [`answers`]: answers to a dataset's documents, beside their references

pub mod answers;
pub mod engine;
mod graphs;
mod next;
pub mod prompt;
pub mod request;
pub mod route;
pub mod sampling;
pub mod settings;
pub mod text;

pub use engine::{Engine, EngineLimits};
pub use request::{Event, Finish, NewToken, Request, Route};
pub use route::RouteChoice;
pub use sampling::Sampling;
pub use settings::GenerationDefaults;
pub use text::TextStream;
