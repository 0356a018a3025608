//! The domain `data2text`: a table of slots becomes the paragraph of a guidebook.
//!
//! The prompt's slots leave out what a guide of this town knows: each quarter's landmark and tram,
//! what a price level means in crowns, what guests say of so many stars, when a kind of house
//! closes.

use rand_chacha::ChaCha8Rng;

use crate::grammar::{Bindings, Grammar};
use crate::record::Body;

/// The grammar of slots and paragraphs.
pub fn grammar() -> Grammar {
    Grammar::parse(include_str!("grammars/data2text.txt"))
}

/// One house: its slots, and the paragraph that tells them.
pub fn generate(grammar: &Grammar, rng: &mut ChaCha8Rng) -> Body {
    let mut house = Bindings::new();
    let prompt = grammar.expand("<slots>", &mut house, rng) + "\n";
    Body::Pair { prompt, completion: grammar.expand("<paragraph>", &mut house, rng) }
}
