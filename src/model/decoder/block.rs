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
    /// Normalises the input of attention.
    pub ln_1: LayerNorm,
    /// Normalises the input of the feed-forward layer.
    pub ln_2: LayerNorm,
    /// The four linear layers.
    pub linears: BTreeMap<TargetModule, Linear>,
    /// Number of attention heads.
    pub n_head: i64,
    /// Factor of the attention scores.
    pub attention_scale: f64,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
}

impl Block {
    /// Applies the block to `x`, `[b, t, d]`, and returns the same shape. `linear` applies a linear
    /// layer to its input, with or without experts.
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
