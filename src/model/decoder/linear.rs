//! A frozen linear layer.
//!
//! Letters of shapes: `b` batch, `t` position, `i` in, `o` out.

use tch::Tensor;

/// A linear layer whose weight has GPT-2's layout (`Conv1D`), `[in, out]`.
#[derive(Debug)]
pub struct Linear {
    /// `[i, o]`.
    pub weight: Tensor,
    /// `[o]`.
    pub bias: Tensor,
}

impl Linear {
    /// `x W + b`, computed in the dtype of `x`: `[b, t, i]` to `[b, t, o]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (b, t, i) = x.size3().expect("activations are [b, t, i]");
        let kind = x.kind();
        let y = self.bias.to_kind(kind).addmm(&x.reshape([b * t, i]), &self.weight.to_kind(kind));
        y.reshape([b, t, -1])
    }

    /// Another handle to the same parameters.
    pub fn shallow_clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), bias: self.bias.shallow_clone() }
    }
}
