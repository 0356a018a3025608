//! The fused way through a block: the operations of [`crate::ffi::fused`], whose backward passes are
//! written by hand for a frozen base. It computes what [`super::decoder::block::Block::forward`] with
//! [`super::experts::stack::LoraExperts::add`] does, which stays as its reference (`train.kernels`).
//!
//! Between blocks the residual stream is a pair, `x` and what the last block adds to it, since the next
//! LayerNorm can add them in passing. On CUDA a module's weight lies in one matrix with its experts' (see
//! `csrc/product.h`), of which the base's weight is a view, and the head has rows of zeros up to a
//! multiple of 64, without which its products take several times as long.
//!
//! Not fused: DoRA, masks of dropout for each expert, top-k that skips experts, a base that is trained.
//!
//! Letters of shapes: `b` batch, `t` position, `M = b t`, `d` width, `i` in, `o` out, `e` expert, `R` sum
//! of ranks (with those of the initial components), `v` vocabulary.

pub mod pack;
pub mod stream;
