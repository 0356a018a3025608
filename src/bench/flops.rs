//! The floating-point operations of a token, for model FLOPs utilisation (MFU).
//!
//! ```text
//! a training step:  4P + 3A + 6Lo        an evaluation:  2P + A + 2Lo
//! P  = L * sum over linear layers of in * out + V d      12 L d^2 + V d in GPT-2
//! A  = 2 L T H h                         the causal half of attention's products
//! Lo = sum over experts and target modules of r (in + out)
//! ```
//!
//! The base takes 2P forward and 2P backward, because its frozen weights have no gradients.
//! Attention takes A forward and 2A backward. The experts take 2Lo forward; backward they take 2Lo
//! for the gradients of their inputs and 2Lo for those of their weights. A row that computes the
//! mixture in a more expensive way is credited with these operations alone. P includes the head,
//! over the vocabulary without padding.
//!
//! Letters: `L` layers, `d` width, `H` query heads of width `h` (in GPT-2, `H h` is `d`), `V`
//! vocabulary, `T` tokens of a block, `r` rank.

use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::ExpertSpec;

/// The formulas of the MFU and of [`FlopsPerToken`] in one line.
pub const FORMULA: &str = "MFU = tokens/s * FLOPs a token / peak; FLOPs a token = 4P + 3A + 6Lo \
                           in training, 2P + A + 2Lo in evaluation; P = sum of in * out \
                           over linear layers + V d, A = 2 L T H h, Lo = sum of r (in + out) over \
                           experts and modules";

/// The three terms of the formula, in operations for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlopsPerToken {
    /// `P`: the parameters of the base's matrix products.
    pub base: i64,
    /// `A`: attention's products of queries with keys, and of weights with values.
    pub attention: i64,
    /// `Lo`: the parameters of the experts.
    pub experts: i64,
}

impl FlopsPerToken {
    /// The terms of a base with experts on sequences of `seq_len`.
    pub fn new(base: &DecoderSpec, specs: &[ExpertSpec], seq_len: usize) -> Self {
        let DecoderSpec { num_layers, width: d, vocab_size, num_heads, head_dim, .. } = base;
        let experts = specs.iter().map(|spec| {
            let (lora_a, lora_b, _) = spec.num_parameters(base);
            lora_a + lora_b
        });
        Self {
            base: base.num_linear_weights() + vocab_size * d,
            attention: 2 * num_layers * seq_len as i64 * num_heads * head_dim,
            experts: experts.sum(),
        }
    }

    /// The operations of a training step: `4P + 3A + 6Lo`.
    pub fn training(self) -> i64 {
        4 * self.base + 3 * self.attention + 6 * self.experts
    }

    /// The operations of a forward pass: `2P + A + 2Lo`.
    pub fn evaluation(self) -> i64 {
        2 * self.base + self.attention + 2 * self.experts
    }
}
