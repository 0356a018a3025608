//! The feed-forward layer's activation.

use tch::Tensor;

/// The feed-forward layer's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU by its tanh approximation (arXiv:1606.08415, section 2), called `gelu_new` in configs.
    GeluNew,
    /// Exact GELU, by the error function.
    Gelu,
}

impl Activation {
    /// Applies the activation to `up`, of any shape.
    pub fn apply(self, up: &Tensor) -> Tensor {
        match self {
            Self::GeluNew => up.gelu("tanh"),
            Self::Gelu => up.gelu("none"),
        }
    }
}
