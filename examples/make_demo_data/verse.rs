//! The domain `verse`: short scenes of a play in an old-fashioned register.
//!
//! A scene is a record with one `text`. Each of the ten characters always has the same rank, home,
//! oath and form of address.

use rand_chacha::ChaCha8Rng;

use crate::grammar::{Bindings, Grammar};
use crate::record::Body;

/// The grammar of a scene.
pub fn grammar() -> Grammar {
    Grammar::parse(include_str!("grammars/verse.txt"))
}

/// One scene of three to five speeches between two characters.
pub fn generate(grammar: &Grammar, rng: &mut ChaCha8Rng) -> Body {
    Body::Text { text: grammar.expand("<scene>", &mut Bindings::new(), rng) }
}
