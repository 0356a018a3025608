//! The floating-point operations that a token is worth, for model FLOPs utilisation (MFU).
//!
//! ```text
//! a training step:  4P + 3A + 6Lo        an evaluation:  2P + A + 2Lo
//! P  = L (4 d^2 + 2 d d_inner) + V d     = 12 L d^2 + V d where d_inner = 4 d
//! A  = 2 L T d                           attention's products, the causal half of them
//! Lo = sum over experts and target modules of r (in + out)
//! ```
//!
//! A step takes 2P forward and 2P backward, as the frozen base has no weight gradients; attention A and
//! 2A; the experts 2Lo, 2Lo for the gradients of their inputs and 2Lo for those of A and B. A row that
//! computes the mixture in a more expensive way is credited with the mixture alone. P counts the head,
//! with the vocabulary as it is.

use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::ExpertSpec;

/// The three terms of the formula, operations a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlopsPerToken {
    /// `P`: parameters of the base's matrix products.
    pub base: i64,
    /// `A`.
    pub attention: i64,
    /// `Lo`: parameters of the experts.
    pub experts: i64,
}

impl FlopsPerToken {
    /// The terms of a base with experts on sequences of `seq_len`.
    pub fn new(base: &DecoderSpec, specs: &[ExpertSpec], seq_len: usize) -> Self {
        let DecoderSpec { n_layer, n_embd: d, n_inner, vocab_size, .. } = base;
        let experts = specs.iter().map(|spec| {
            let (lora_a, lora_b, _) = spec.num_parameters(base);
            lora_a + lora_b
        });
        Self {
            base: n_layer * (4 * d * d + 2 * d * n_inner) + vocab_size * d,
            attention: 2 * n_layer * seq_len as i64 * d,
            experts: experts.sum(),
        }
    }

    /// Of a training step: `4P + 3A + 6Lo`.
    pub fn training(self) -> i64 {
        4 * self.base + 3 * self.attention + 6 * self.experts
    }

    /// Of a forward pass: `2P + A + 2Lo`.
    pub fn evaluation(self) -> i64 {
        2 * self.base + self.attention + 2 * self.experts
    }
}
