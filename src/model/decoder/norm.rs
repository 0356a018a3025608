//! The normalisations of hidden states: LayerNorm and RMSNorm.
//!
//! ```text
//! LayerNorm   (x - mean(x)) / sqrt(var(x) + eps) * weight + bias       arXiv:1607.06450
//! RMSNorm     x / sqrt(mean(x^2) + eps) * weight                       arXiv:1910.07467
//! ```
//!
//! Letters of shapes: `d` width.

use tch::{Kind, Tensor};

use super::precision::wide;

/// A normalisation over the last dimension.
#[derive(Debug)]
pub enum Norm {
    /// Layer normalisation.
    Layer(LayerNorm),
    /// Root mean square normalisation.
    Rms(RmsNorm),
}

impl Norm {
    /// LayerNorm if there is a bias, and otherwise RMSNorm.
    pub fn new(weight: Tensor, bias: Option<Tensor>, eps: f64) -> Self {
        match bias {
            Some(bias) => Self::Layer(LayerNorm { weight, bias, eps }),
            None => Self::Rms(RmsNorm { weight, eps }),
        }
    }

    /// Normalises `x`, `[.., d]`, and returns the same shape and dtype.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }

    /// What is added to the variance or the mean square.
    pub fn eps(&self) -> f64 {
        match self {
            Self::Layer(norm) => norm.eps,
            Self::Rms(norm) => norm.eps,
        }
    }

    /// The weight, and the bias if there is one.
    pub fn parameters(&self) -> (&Tensor, Option<&Tensor>) {
        match self {
            Self::Layer(norm) => (&norm.weight, Some(&norm.bias)),
            Self::Rms(norm) => (&norm.weight, None),
        }
    }

    /// Another handle to the same parameters.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let clone = |tensor: &Tensor| tensor.shallow_clone();
        match self {
            Self::Layer(LayerNorm { weight, bias, eps }) => {
                Self::Layer(LayerNorm { weight: clone(weight), bias: clone(bias), eps: *eps })
            }
            Self::Rms(RmsNorm { weight, eps }) => {
                Self::Rms(RmsNorm { weight: clone(weight), eps: *eps })
            }
        }
    }
}

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
    fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (self.weight.to_kind(x.kind()), self.bias.to_kind(x.kind()));
        x.layer_norm(weight.size(), Some(weight), Some(bias), self.eps, true)
    }
}

/// Root mean square normalisation over the last dimension.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[d]`.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Normalises `x`, `[.., d]`, in f32 (or f64), rounds to its dtype and then multiplies by the
    /// weight, as transformers does.
    fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let precise: Kind = wide(kind);
        let x = x.to_kind(precise);
        let mean_square = x.square().mean_dim(-1, true, precise);
        let normed = (&x * (mean_square + self.eps).rsqrt()).to_kind(kind);
        normed * self.weight.to_kind(kind)
    }
}
