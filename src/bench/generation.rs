//! The texts of the rows that generate.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::data::TokenDataset;
use crate::generate::{Engine, EngineLimits, Request, Route, Sampling};
use crate::model::RoutedModel;

/// An engine with `num_texts` texts, each of which continues the start of a block of `dataset` by
/// `num_new` tokens up to the block's length. The prompts have been computed.
///
/// # Errors
/// Blocks that are not longer than the number of new tokens.
pub fn engine<'a>(
    model: &'a RoutedModel,
    dataset: &TokenDataset,
    num_texts: usize,
    num_new: usize,
) -> Result<Engine<'a>> {
    let context = dataset.seq_len;
    let prompt_len = context.checked_sub(num_new).filter(|len| *len > 0).with_context(|| {
        format!("a text of {context} positions has no room for {num_new} steps behind a prompt")
    })?;
    let mut engine = Engine::new(model, EngineLimits { max_texts: num_texts, context })?;
    let blocks: Vec<_> = dataset.eval_order().into_iter().cycle().take(num_texts).collect();
    for (key, block) in (0..).zip(blocks) {
        engine.add(Request {
            key,
            prompt: dataset.batch(&[block]).input_ids[..prompt_len].to_vec(),
            // the first comes with the prompt
            max_new_tokens: num_new + 1,
            sampling: Sampling::GREEDY,
            route: Route::Router,
            // all texts stay until the last step
            end_tokens: Arc::new([]),
            num_alternatives: 0,
            wants_weights: false,
        })?;
    }
    while engine.num_texts().1 > 0 {
        engine.step();
    }
    Ok(engine)
}
