//! Rotary position embeddings (RoPE, arXiv:2104.09864), with the scalings of transformers 5.17
//! (`modeling_rope_utils.py`).
//!
//! A head's width `h` has `h / 2` pairs, and pair `k` consists of the elements `k` and
//! `k + h / 2`. At position `p`, a pair is rotated by the angle `p f_k`:
//!
//! ```text
//! default   f_k = theta^(-2k / h)
//! linear    f_k / factor
//! llama3    l = 2 pi / f_k;  f_k where l < L / high,  f_k / factor where l > L / low,  otherwise
//!           (1 - s) f_k / factor + s f_k  with  s = (L / l - low) / (high - low)
//! yarn      (1 - r_k) f_k + r_k f_k / factor  with  r_k = clamp((k - a) / (b - a), 0, 1),
//!           a = c(beta_fast), b = c(beta_slow), c(n) = h ln(L / (2 pi n)) / (2 ln theta);
//!           cos and sin are multiplied by the attention factor
//! ```
//!
//! `L` is `original_max_position_embeddings`. yarn is arXiv:2309.00071.
//!
//! Letters of shapes: `b` batch, `t` position, `n` head, `h` width of a head.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use super::precision::wide;

/// How queries and keys are rotated.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed for sequences longer than those of the pretraining.
    pub scaling: RopeScaling,
    /// The layers that rotate nothing.
    pub skipped_layers: Vec<i64>,
}

/// How the frequencies of RoPE are changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// They are not.
    Default,
    /// All are divided by the factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies are divided by the factor, and high ones are kept.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_positions / low` are scaled in full.
        low: f64,
        /// Wavelengths below `original_positions / high` are kept.
        high: f64,
        /// `original_max_position_embeddings`.
        original_positions: f64,
    },
    /// yarn: a ramp over the pairs from kept to divided frequencies.
    Yarn {
        /// The divisor.
        factor: f64,
        /// `original_max_position_embeddings`.
        original_positions: f64,
        /// A pair that turns at least this often over the original positions keeps its frequency.
        beta_fast: f64,
        /// The frequency of a pair that turns at most this often over the original positions is
        /// divided by the factor.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
}

impl RopeSpec {
    /// The frequencies `f_k` of a head's pairs, in radians for each position, `head_dim / 2` of
    /// them.
    pub fn frequencies(&self, head_dim: i64) -> Vec<f64> {
        let width = head_dim as f64;
        let plain = |k: i64| self.theta.powf(-2.0 * k as f64 / width);
        (0..head_dim / 2).map(|k| self.scaled(k, plain(k), width)).collect()
    }

    fn scaled(&self, pair: i64, frequency: f64, width: f64) -> f64 {
        match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low, high, original_positions } => {
                let turns = original_positions * frequency / (2.0 * PI);
                if turns > high {
                    return frequency;
                }
                if turns < low {
                    return frequency / factor;
                }
                let smooth = (turns - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
            RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                let pair_of = |turns: f64| {
                    width * (original_positions / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut first, mut last) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                // `width - 1` where one expects the number of pairs, as in the reference
                (first, last) = (first.max(0.0), last.min(width - 1.0));
                if first == last {
                    last += 0.001;
                }
                let ramp = ((pair as f64 - first) / (last - first)).clamp(0.0, 1.0);
                frequency / factor * ramp + frequency * (1.0 - ramp)
            }
        }
    }

    /// Factor of cos and sin.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }
}

/// The frequencies of a base on its device.
#[derive(Debug)]
pub(crate) struct Rotary {
    /// `f_k`, `[h / 2]`, in f64.
    frequencies: Tensor,
    /// The same in f32.
    frequencies_f32: Tensor,
    attention_factor: f64,
}

impl Rotary {
    /// The frequencies of heads of width `head_dim` on `device`.
    pub fn new(rope: &RopeSpec, head_dim: i64, device: Device) -> Self {
        let frequencies = Tensor::from_slice(&rope.frequencies(head_dim)).to_device(device);
        let frequencies_f32 = frequencies.to_kind(Kind::Float);
        Self { frequencies, frequencies_f32, attention_factor: rope.attention_factor() }
    }

    /// The frequencies in f32, `[h / 2]`, and the factor of cosines and sines.
    pub fn parameters(&self) -> (&Tensor, f64) {
        (&self.frequencies_f32, self.attention_factor)
    }

    /// The rotations at `position_ids`, `[b, t]`, for a model that computes in `kind`. Angles,
    /// cosines and sines are computed in f32, or in f64 if `kind` is f64, and then rounded to
    /// `kind`.
    pub fn at(&self, position_ids: &Tensor, kind: Kind) -> Rotation {
        let precise = wide(kind);
        let angles =
            position_ids.to_kind(precise).unsqueeze(-1) * self.frequencies.to_kind(precise);
        let angles = Tensor::cat(&[&angles, &angles], -1).unsqueeze(1);
        let part = |x: Tensor| (x * self.attention_factor).to_kind(kind);
        Rotation { cos: part(angles.cos()), sin: part(angles.sin()) }
    }
}

/// The rotations of a batch's positions.
#[derive(Debug)]
pub struct Rotation {
    /// `[b, 1, t, h]`; both halves of the last dimension are equal.
    cos: Tensor,
    /// `[b, 1, t, h]`, in the same layout.
    sin: Tensor,
}

impl Rotation {
    /// Rotates queries or keys, `[b, n, t, h]`.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let half = x.size()[3] / 2;
        let turned = Tensor::cat(&[x.narrow(3, half, half).neg(), x.narrow(3, 0, half)], 3);
        x * &self.cos + turned * &self.sin
    }

    /// Cosines and sines of each token's angles, `[b t, h]`.
    pub fn flat(&self) -> (Tensor, Tensor) {
        let flat = |x: &Tensor| x.flatten(0, 2);
        (flat(&self.cos), flat(&self.sin))
    }

    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }
}
