//! What others load: each expert as a PEFT adapter with the mixture's router beside them ([`peft`]),
//! static mixtures merged ([`merge`]), and a base as a Hugging Face folder ([`hugging_face`]).

pub mod hugging_face;
pub mod merge;
pub mod peft;
