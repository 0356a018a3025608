//! What others load: each expert as a PEFT adapter, the mixture's router beside them ([`peft`]), and
//! a fully trained base as a Hugging Face folder ([`hugging_face`]).

pub mod hugging_face;
pub mod peft;
