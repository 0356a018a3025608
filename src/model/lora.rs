//! The LoRA experts of one frozen linear layer (LoRA, arXiv:2106.09685, eq. 3, weighted per token):
//!
//! ```text
//! y = x W + b + sum_e g_e * s * drop(x) A_e^T B_e^T          s = alpha / r
//! ```
//!
//! [`LoraExperts::add_fused`] is one pair of matrix products, whatever E is: A is stacked into
//! `[e r, i]` and B into `[e r, o]`, and the routing weights act in rank space. Its twin,
//! [`LoraExperts::add_looped`], is the formula to the letter, one expert after the other.
//!
//! Letters of shapes: `b` batch, `t` position, `i` in, `o` out, `e` expert, `r` rank.

use tch::{Device, Kind, Tensor};

use crate::config::{DropoutMasks, LoraConfig};

/// The experts of one target module, stacked.
#[derive(Debug)]
pub struct LoraExperts {
    /// Down-projections `[e, r, i]`; slice `e` is PEFT's `lora_A.weight`.
    pub lora_a: Tensor,
    /// Up-projections `[e, o, r]`, zero at the start; slice `e` is PEFT's `lora_B.weight`.
    pub lora_b: Tensor,
    /// `alpha / rank`.
    pub scaling: f64,
}

/// What multiplies each expert's part.
#[derive(Debug)]
pub enum RoutingWeights {
    /// Nothing is added: the base alone.
    Off,
    /// 1 for every expert; what a single expert, which has no router, has.
    Ones,
    /// `[b, t, e]`.
    PerToken(Tensor),
}

impl RoutingWeights {
    /// Another handle to the same weights.
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::Off => Self::Off,
            Self::Ones => Self::Ones,
            Self::PerToken(weights) => Self::PerToken(weights.shallow_clone()),
        }
    }
}

/// Dropout of the experts' input in a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct LoraDropout {
    /// Probability of zero; 0 outside of training.
    pub probability: f64,
    /// Whether the experts share one mask.
    pub masks: DropoutMasks,
}

impl LoraDropout {
    /// No dropout.
    pub const NONE: Self = Self { probability: 0.0, masks: DropoutMasks::Shared };

    fn apply(self, x: &Tensor) -> Tensor {
        if self.probability > 0.0 { x.dropout(self.probability, true) } else { x.shallow_clone() }
    }
}

impl LoraExperts {
    /// New experts for a layer `[i, o]`: A from U(-1/sqrt(i), 1/sqrt(i)), B zero (PEFT 0.21,
    /// `reset_lora_parameters`: kaiming_uniform with a = sqrt(5)). `kind` is f32 outside of tests.
    pub fn new(config: &LoraConfig, (i, o): (i64, i64), kind: Kind) -> Self {
        let (e, r) = (config.num_experts, config.rank);
        let bound = 1.0 / (i as f64).sqrt();
        let lora_a = Tensor::empty([e, r, i], (kind, Device::Cpu)).uniform_(-bound, bound);
        let lora_b = Tensor::zeros([e, o, r], (kind, Device::Cpu));
        Self { lora_a, lora_b, scaling: config.alpha / r as f64 }
    }

    /// Adds what the experts contribute for the layer's input `x`, `[b, t, i]`, to the frozen
    /// layer's output `y`, `[b, t, o]`, by the way that `dropout.masks` needs.
    pub fn add(&self, y: Tensor, x: &Tensor, g: &RoutingWeights, dropout: LoraDropout) -> Tensor {
        match (g, dropout.masks) {
            (RoutingWeights::Off, _) => y,
            // one expert, which is plain LoRA to the bit in its own order of operations
            (RoutingWeights::Ones, _) => self.add_looped(y, x, g, dropout),
            (_, DropoutMasks::Shared) => self.add_fused(y, x, g, dropout),
            (_, DropoutMasks::PerExpert) => self.add_looped(y, x, g, dropout),
        }
    }

    /// All experts at once: one pair of matrix products and one dropout mask.
    pub fn add_fused(
        &self,
        y: Tensor,
        x: &Tensor,
        g: &RoutingWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        let kind = x.kind();
        let (b, t, i) = x.size3().expect("activations are [b, t, i]");
        let (e, o, r) = self.lora_b.size3().expect("B is [e, o, r]");
        let a = self.lora_a.to_kind(kind).view([e * r, i]);
        let up = self.lora_b.to_kind(kind).transpose(1, 2).reshape([e * r, o]);
        let z = dropout.apply(x).view([b * t, i]).matmul(&a.tr());
        let z = match g {
            RoutingWeights::Off => return y,
            RoutingWeights::Ones => z * self.scaling,
            RoutingWeights::PerToken(g_bte) => {
                let g = (g_bte.view([b * t, e, 1]) * self.scaling).to_kind(kind);
                (z.view([b * t, e, r]) * g).view([b * t, e * r])
            }
        };
        y.view([b * t, o]).addmm(&z, &up).view([b, t, o])
    }

    /// One expert after the other, each with a dropout mask of its own, as PEFT does.
    pub fn add_looped(
        &self,
        mut y: Tensor,
        x: &Tensor,
        g: &RoutingWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        let kind = x.kind();
        for e in 0..self.num_experts() {
            let (a, b) = (self.lora_a.get(e).to_kind(kind), self.lora_b.get(e).to_kind(kind));
            let update = dropout.apply(x).matmul(&a.tr()).matmul(&b.tr()) * self.scaling;
            y = match g {
                RoutingWeights::Off => y,
                RoutingWeights::Ones => y + update,
                RoutingWeights::PerToken(g_bte) => {
                    y + update * g_bte.narrow(-1, e, 1).to_kind(kind)
                }
            };
        }
        y
    }

    /// `E`.
    pub fn num_experts(&self) -> i64 {
        self.lora_a.size()[0]
    }

    /// Another handle to the same parameters.
    pub fn shallow_clone(&self) -> Self {
        let (lora_a, lora_b) = (self.lora_a.shallow_clone(), self.lora_b.shallow_clone());
        Self { lora_a, lora_b, scaling: self.scaling }
    }
}
