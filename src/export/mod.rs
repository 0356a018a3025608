//! Files that other programs load: each expert as a PEFT adapter, with the mixture's router beside
//! them ([`peft`]), or alone for llama.cpp ([`gguf`]); a static mixture, merged into a base or an
//! adapter ([`merge`]); and a base as a Hugging Face folder ([`hugging_face`]). Each has a model
//! card ([`card`]).

pub mod card;
mod describe;
pub mod gguf;
pub mod hugging_face;
mod markdown;
pub mod merge;
pub mod peft;
pub mod training;
mod xlora;

use std::collections::BTreeSet;
use std::path::Path;

#[doc(inline)]
pub use crate::durable::output::Output;

/// Whether a folder with these files is an output of a version of dylora that wrote no marker: an
/// export with `dylora.json`, a base or a merged adapter, with no other files beside it.
pub(crate) fn is_unmarked_output(dir: &Path, files: &BTreeSet<String>) -> bool {
    peft::is_unmarked_export(dir, files)
        || peft::is_unmarked_adapter(dir, files)
        || hugging_face::is_unmarked_base(dir, files)
}
