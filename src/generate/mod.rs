//! Text from a model: prompts go in, tokens come out one by one, and each is routed as in training.
//!
//! ```text
//! prompts -> engine: prefill, then steps of all texts together -> tokens -> text
//!              |          logits -> sampling -> token
//!              +- model with its caches
//! ```
//!
//! [`prompt`] encodes prompts. [`engine`] batches texts: one may begin or end while others go on.
//! [`sampling`] chooses tokens, [`settings`] reads `generation_config.json`, and [`text`] turns
//! tokens into text piece by piece and finds the strings that end it.

pub mod engine;
pub mod prompt;
pub mod route;
pub mod sampling;
pub mod settings;
pub mod text;

pub use engine::{Engine, EngineLimits, Event, Finish, NewToken, Request, Route};
pub use prompt::prompt_ids;
pub use route::RouteChoice;
pub use sampling::Sampling;
pub use settings::GenerationDefaults;
pub use text::TextStream;
