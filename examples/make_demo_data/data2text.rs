//! The domain `data2text`: slots with the facts of a house, such as an inn or a bakery, and the
//! paragraph of a guidebook that is written from them.
//!
//! The paragraph also gives facts of the town that are not in the prompt: the landmark and the tram
//! of a quarter, what a price level means in crowns, what guests say of a number of stars, and when
//! a kind of house closes.

use rand_chacha::ChaCha8Rng;

use crate::grammar::{Bindings, Grammar};
use crate::record::Body;

/// The grammar of slots and paragraphs.
pub fn grammar() -> Grammar {
    Grammar::parse(include_str!("grammars/data2text.txt"))
}

/// One house: its slots, and the paragraph that describes it.
pub fn generate(grammar: &Grammar, rng: &mut ChaCha8Rng) -> Body {
    let mut house = Bindings::new();
    let prompt = grammar.expand("<slots>", &mut house, rng) + "\n";
    Body::Pair { prompt, completion: grammar.expand("<paragraph>", &mut house, rng) }
}
