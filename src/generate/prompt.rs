//! The tokens of a prompt.

use anyhow::{Result, bail};

use crate::data::Tokenizer;

/// The tokens of a text that begins a document, with the tokenizer's start tokens in front.
///
/// # Errors
/// A text that cannot be encoded, and an empty text where the tokenizer has no start tokens.
pub fn prompt_ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i64>> {
    let ids = tokenizer.encode(text)?;
    let start = match ids.is_empty() {
        true => tokenizer.start_tokens(),
        false => tokenizer.start_tokens_for(&ids),
    };
    let ids: Vec<i64> = start.iter().chain(&ids).map(|id| i64::from(*id)).collect();
    if ids.is_empty() {
        bail!("the prompt is empty, and this tokenizer has no token for the start of a text");
    }
    Ok(ids)
}
