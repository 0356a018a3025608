//! The fused computation of a block by the operations of [`crate::ffi::fused`], whose backward
//! passes are written by hand for a frozen base. It computes the same as
//! [`super::decoder::block::Block::forward`] with [`super::experts::stack::LoraExperts::add`],
//! which remain as its reference (`train.kernels`).
//!
//! A block has four products, each of one or more linear layers that read the same input
//! (`DecoderSpec::products`). Between blocks the residual stream is a pair: `x`, and what the last
//! block adds to it. The next norm adds the two while it reads them.
//!
//! With CUDA kernels, one packed matrix holds a product's weights and experts (see
//! `csrc/product.h`), and the base's weights are views of that matrix. The head gets rows of zeros
//! up to a multiple of 64 rows; without them, its products take several times as long.
//!
//! The fused operations do not cover DoRA, a dropout mask for each expert, top-k routing that skips
//! experts, or a base that is trained.
//!
//! Letters of shapes: `b` batch, `t` position, `M = b t`, `d` width, `i` in, `o` out, `e` expert,
//! `R` sum of ranks (with those of the initial components), `v` vocabulary.

pub mod pack;
pub(crate) mod stream;
