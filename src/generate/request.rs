//! A text to generate: what was asked for, and what has been generated so far.

use std::sync::Arc;

use super::sampling::Sampling;
use crate::model::batch::StepRow;

/// What decides the routing weights of a text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Route {
    /// The router.
    Router,
    /// These weights, one for each routed expert. With all of them 0, the base alone answers;
    /// otherwise the part that is always on takes part.
    Fixed(Vec<f64>),
}

/// A text to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// Distinguishes the random numbers of texts with the same seed.
    pub key: u64,
    /// The tokens to continue; at least one.
    pub prompt: Vec<i64>,
    /// Most tokens to generate; at least one.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What decides the routing weights.
    pub route: Route,
    /// The tokens that end the text.
    pub end_tokens: Arc<[i64]>,
    /// How many of the most probable tokens to return at each position.
    pub num_alternatives: usize,
    /// Whether to return routing weights.
    pub wants_weights: bool,
}

/// Why a text has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The model wrote an end token, or the text contains a string that stops it.
    Stop,
    /// It has as many tokens as were asked for, or fills the context.
    Length,
}

impl Finish {
    /// `stop` or `length`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A token that was generated.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct NewToken {
    /// The token's id.
    pub id: i64,
    /// The logarithm of the probability that the model gave it, before temperature, penalty and
    /// filters, in nats.
    pub log_prob: f64,
    /// The most probable tokens with the logarithms of their probabilities, if they were asked for.
    pub alternatives: Vec<(i64, f64)>,
    /// The routing weights at the position that predicted the token, as a mean over the sites,
    /// `[e]`; empty if they were not asked for.
    pub weights: Vec<f64>,
}

/// What a step brought to a text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// The text, as [`super::Engine::add`] numbered it.
    pub text: u64,
    /// Its new token.
    pub token: NewToken,
    /// Why it has ended, if it has.
    pub finish: Option<Finish>,
}

/// A text that waits or has begun.
#[derive(Debug)]
pub(super) struct Text {
    /// Its number in the engine.
    pub number: u64,
    /// What was asked for.
    pub request: Request,
    /// Prompt and generated tokens.
    pub tokens: Vec<i64>,
    /// The position from which each expert is active; empty if every expert always is.
    pub active_from: Vec<i64>,
    /// Whether nothing more is wanted of it.
    pub has_ended: bool,
}

impl Text {
    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    pub fn row(&self, past: usize, end: usize) -> StepRow<'_> {
        StepRow {
            past,
            tokens: &self.tokens[past..end],
            prompt_len: self.prompt_len(),
            active_from: &self.active_from,
        }
    }

    /// Number of positions that the text may have in the end.
    pub(crate) fn most_positions(request: &Request, context: usize) -> usize {
        // the last token is not computed again
        (request.prompt.len() + request.max_new_tokens - 1).min(context)
    }

    /// Whether the text goes on after `num_more` tokens, unless one of them ends it.
    pub(crate) fn has_room_after(&self, num_more: usize, context: usize) -> bool {
        let len = self.tokens.len() + num_more;
        len - self.prompt_len() < self.request.max_new_tokens && len <= context
    }

    pub(crate) fn finish_after(&self, token: i64, context: usize) -> Option<Finish> {
        if self.request.end_tokens.contains(&token) {
            Some(Finish::Stop)
        } else {
            (!self.has_room_after(0, context)).then_some(Finish::Length)
        }
    }
}
