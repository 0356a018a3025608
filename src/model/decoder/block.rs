//! One transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width.

use std::collections::BTreeMap;

use tch::Tensor;

use super::attention::{AttentionMask, attention};
use super::linear::Linear;
use super::mlp::Activation;
use super::norm::LayerNorm;
use crate::config::TargetModule;

/// One transformer block.
#[derive(Debug)]
pub struct Block {
    /// Before the attention.
    pub ln_1: LayerNorm,
    /// Before the feed-forward layer.
    pub ln_2: LayerNorm,
    /// The four linear layers.
    pub linears: BTreeMap<TargetModule, Linear>,
    /// Attention heads.
    pub n_head: i64,
    /// What attention scores are multiplied with.
    pub attention_scale: f64,
    /// Of the feed-forward layer.
    pub activation: Activation,
}

impl Block {
    /// `x`, `[b, t, d]`, after this block. `linear` applies a linear layer to its input: the base's
    /// own, or that plus its experts.
    pub fn forward(
        &self,
        x: &Tensor,
        mask: &AttentionMask,
        linear: &mut dyn FnMut(TargetModule, &Tensor) -> Tensor,
    ) -> Tensor {
        let qkv = linear(TargetModule::AttnCAttn, &self.ln_1.forward(x));
        let attention = attention(&qkv, self.n_head, self.attention_scale, mask);
        let x = x + linear(TargetModule::AttnCProj, &attention);
        let up = linear(TargetModule::MlpCFc, &self.ln_2.forward(&x));
        &x + linear(TargetModule::MlpCProj, &self.activation.apply(&up))
    }

    /// Handles to all parameters of the block.
    pub fn parameters(&self) -> Vec<Tensor> {
        let norms =
            [&self.ln_1, &self.ln_2].into_iter().flat_map(|norm| [&norm.weight, &norm.bias]);
        let linears = self.linears.values().flat_map(|linear| [&linear.weight, &linear.bias]);
        norms.chain(linears).map(Tensor::shallow_clone).collect()
    }

    /// Another handle to the same parameters.
    pub fn shallow_clone(&self) -> Self {
        Self {
            ln_1: self.ln_1.shallow_clone(),
            ln_2: self.ln_2.shallow_clone(),
            linears: self.linears.iter().map(|(&m, linear)| (m, linear.shallow_clone())).collect(),
            ..*self
        }
    }
}
