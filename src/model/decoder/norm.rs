//! Layer normalisation.
//!
//! Letters of shapes: `d` width.

use tch::Tensor;

/// Layer normalisation over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    /// `[d]`.
    pub weight: Tensor,
    /// `[d]`.
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// Normalises `x`, `[.., d]`, in its dtype. For bf16, libtorch takes the statistics in f32.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (self.weight.to_kind(x.kind()), self.bias.to_kind(x.kind()));
        x.layer_norm(weight.size(), Some(weight), Some(bias), self.eps, true)
    }

    /// Another handle to the same parameters.
    pub fn shallow_clone(&self) -> Self {
        let (weight, bias) = (self.weight.shallow_clone(), self.bias.shallow_clone());
        Self { weight, bias, eps: self.eps }
    }
}
