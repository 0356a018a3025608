//! The feed-forward network of a block.
//!
//! ```text
//! GELU     c_proj(gelu(c_fc(x)))
//! SwiGLU   down_proj(silu(gate_proj(x)) * up_proj(x))          arXiv:2002.05202, eq. 6
//! ```
//!
//! Letters of shapes: `b` batch, `t` position, `d` width.

use tch::Tensor;

use super::linear::ApplyLinear;
use crate::config::TargetModule as Module;

/// The activation of a feed-forward network. With SiLU, the network has a gate (SwiGLU).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU by its tanh approximation (arXiv:1606.08415, section 2), called `gelu_new` in configs.
    GeluNew,
    /// Exact GELU, by the error function.
    Gelu,
    /// SiLU, `x * sigmoid(x)`.
    Silu,
}

impl Activation {
    /// Applies the feed-forward network to `x`, `[b, t, d]`, and returns the same shape.
    pub fn mlp(self, x: &Tensor, linear: &mut ApplyLinear<'_>) -> Tensor {
        let approximation = match self {
            Self::Silu => {
                let gate = linear(Module::GateProj, x).silu();
                let up = linear(Module::UpProj, x);
                return linear(Module::DownProj, &(gate * up));
            }
            Self::GeluNew => "tanh",
            Self::Gelu => "none",
        };
        let up = linear(Module::MlpCFc, x);
        linear(Module::MlpCProj, &up.gelu(approximation))
    }
}
