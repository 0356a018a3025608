//! Turns a conversation into tokens and says which of them the assistant wrote.
//!
//! The base's chat template renders the conversation, and the whole text is encoded at once,
//! without the tokens that the tokenizer puts in front of other texts: a template writes them
//! itself. The ids are those of transformers' `apply_chat_template`.
//!
//! A token is learned if all of its bytes are within one of the assistant's turns. A token that
//! reaches over the border of a turn is only read: a model that writes the turn never chooses it.

use std::sync::Arc;

use super::token_file::Span;
use super::tokenize::Tokenizer;
use crate::chat_template::{AssistantTurns, ChatTemplate, Conversation};
use crate::config::LossOnTurns;

/// How records with `messages` become text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChatOptions {
    /// The base's chat templates, if it has any.
    pub template: Option<Arc<ChatTemplate>>,
    /// The base's name in messages.
    pub base: String,
    /// The turns of the assistant that are learned.
    pub turns: LossOnTurns,
}

/// A tokenized conversation.
#[derive(Debug)]
pub(super) struct ChatTokens {
    pub ids: Vec<u32>,
    /// Number of tokens in front of the assistant's first turn.
    pub prompt_len: usize,
    /// The learned tokens, in ascending order.
    pub learned: Vec<Span>,
    pub text: String,
}

/// Renders and encodes a conversation.
///
/// # Errors
/// A description of the fault, for a record that the template cannot render or of which no token is
/// learned.
pub(super) fn encode(
    conversation: &Conversation,
    template: &ChatTemplate,
    which: LossOnTurns,
    tokenizer: &Tokenizer,
) -> Result<ChatTokens, String> {
    let turns = template.assistant_turns(conversation, which);
    let AssistantTurns { text, prompt_end, turns } = turns.map_err(|error| format!("{error:#}"))?;
    let encoded = tokenizer.encode_with_offsets(&text);
    let encoded = encoded.map_err(|error| format!("{error:#}"))?;
    if u32::try_from(encoded.len()).is_err() {
        return Err(format!("has {} tokens, more than 2^32", encoded.len()));
    }
    let prompt_len = encoded.iter().take_while(|(_, bytes)| bytes.start < prompt_end).count();
    let mut learned: Vec<Span> = Vec::new();
    for (token, (_, bytes)) in (0..).zip(&encoded) {
        let turn = turns.get(turns.partition_point(|turn| turn.end < bytes.end));
        if turn.is_none_or(|turn| bytes.start < turn.start) {
            continue;
        }
        match learned.last_mut() {
            Some(span) if span.end == token => span.end += 1,
            _ => learned.push(Span { start: token, end: token + 1 }),
        }
    }
    // the first token of a document has nothing before it that could predict it
    if learned.iter().all(|span| span.end <= 1) {
        return Err("has nothing to learn: no token lies within the assistant's turns".into());
    }
    let ids = encoded.into_iter().map(|(id, _)| id).collect();
    Ok(ChatTokens { ids, prompt_len, learned, text })
}
