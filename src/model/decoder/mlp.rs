//! The feed-forward layer's activation.

use tch::Tensor;

/// The feed-forward layer's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU by tanh (arXiv:1606.08415, section 2): `gelu_new`.
    GeluNew,
    /// Exact GELU, by erf.
    Gelu,
}

impl Activation {
    /// The activation of `up`, of any shape.
    pub fn apply(self, up: &Tensor) -> Tensor {
        match self {
            Self::GeluNew => up.gelu("tanh"),
            Self::Gelu => up.gelu("none"),
        }
    }
}
