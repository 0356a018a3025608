//! Turns tokens into text while they arrive.

use std::borrow::Cow;

use anyhow::Result;

use super::request::{Event, Finish};
use crate::data::Tokenizer;

/// What stands for bytes that are no complete character.
pub(crate) const INCOMPLETE: char = '\u{FFFD}';

/// Number of the prompt's tokens that are decoded in front of the text.
const CONTEXT: usize = 4;

/// The text of tokens that arrive one by one. Special tokens are left out.
///
/// A piece of text is returned as soon as no later token can change it, and as soon as it cannot
/// be the beginning of a stop string.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    stop: Cow<'a, [String]>,
    ids: Vec<u32>,
    /// The ids from here on are decoded again with each new one, since the text of a token can
    /// depend on the one before it.
    context: usize,
    /// The ids up to here have been turned into text.
    decoded: usize,
    /// The text so far.
    text: String,
    /// Number of its bytes that were returned.
    returned: usize,
    has_stopped: bool,
}

impl<'a> TextStream<'a> {
    /// The text behind `prompt`, which ends before the first of the strings `stop`, none of which
    /// is empty.
    pub fn new(
        tokenizer: &'a Tokenizer,
        prompt: &[i64],
        stop: impl Into<Cow<'a, [String]>>,
    ) -> Self {
        // some tokenizers drop the space in front of the first word that they decode
        let tail = &prompt[prompt.len().saturating_sub(CONTEXT)..];
        let ids: Vec<u32> = tail.iter().map(|id| *id as u32).collect();
        Self {
            tokenizer,
            stop: stop.into(),
            context: 0,
            decoded: ids.len(),
            ids,
            text: String::new(),
            returned: 0,
            has_stopped: false,
        }
    }

    /// Adds a token and returns the new piece of text, which may be empty.
    ///
    /// # Errors
    /// A token that cannot be decoded.
    pub fn push(&mut self, id: i64) -> Result<&str> {
        if !self.has_stopped {
            self.ids.push(id as u32);
            let before = self.tokenizer.decode_text(&self.ids[self.context..self.decoded])?;
            let now = self.tokenizer.decode_text(&self.ids[self.context..])?;
            if now.len() > before.len() && !now.ends_with(INCOMPLETE) {
                self.append(now.get(before.len()..).unwrap_or_default());
                (self.context, self.decoded) = (self.decoded, self.ids.len());
            }
        }
        Ok(self.piece(false))
    }

    /// The rest of the text, when no more tokens come.
    ///
    /// # Errors
    /// A token that cannot be decoded.
    pub fn finish(&mut self) -> Result<&str> {
        if !self.has_stopped {
            let before = self.tokenizer.decode_text(&self.ids[self.context..self.decoded])?;
            let now = self.tokenizer.decode_text(&self.ids[self.context..])?;
            self.append(now.get(before.len()..).unwrap_or_default());
            self.decoded = self.ids.len();
        }
        Ok(self.piece(true))
    }

    /// Takes the token of a step. Returns the new piece of text, with all that is left of it if the
    /// text has ended, and why it has ended, if it has: by the engine, or before a stop string.
    ///
    /// # Errors
    /// A token that cannot be decoded.
    pub fn take(&mut self, event: &Event) -> Result<(String, Option<Finish>)> {
        let mut piece = match event.finish {
            // an end token has no text
            Some(Finish::Stop) => String::new(),
            _ => self.push(event.token.id)?.to_owned(),
        };
        let finish = if self.has_stopped { Some(Finish::Stop) } else { event.finish };
        if finish.is_some() {
            piece += self.finish()?;
        }
        Ok((piece, finish))
    }

    /// Whether the text has come to a stop string, which it does not contain.
    pub fn has_stopped(&self) -> bool {
        self.has_stopped
    }

    /// The whole text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn append(&mut self, piece: &str) {
        let old = self.text.len();
        self.text.push_str(piece);
        let found = self.stop.iter().filter_map(|stop| {
            // a stop string may begin in the text that was there
            let mut from = old.saturating_sub(stop.len());
            while !self.text.is_char_boundary(from) {
                from -= 1;
            }
            self.text[from..].find(stop.as_str()).map(|place| from + place)
        });
        if let Some(place) = found.min() {
            self.text.truncate(place);
            self.has_stopped = true;
        }
    }

    /// The text that was not returned yet, without what may be the beginning of a stop string.
    fn piece(&mut self, is_last: bool) -> &str {
        let keeps = match is_last || self.has_stopped {
            true => 0,
            false => self.stop.iter().map(|stop| overlap(&self.text, stop)).max().unwrap_or(0),
        };
        let start = self.returned.min(self.text.len());
        let end = (self.text.len() - keeps).max(start);
        self.returned = end;
        &self.text[start..end]
    }
}

/// Length of the longest end of `text` that is a beginning of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let places = stop.char_indices().map(|(place, _)| place).skip(1);
    places.filter(|place| text.ends_with(&stop[..*place])).max().unwrap_or(0)
}
