//! How a forward pass is carried out.

use super::experts::dropout::LoraDropout;
use crate::config::{BaseProducts, EvalRule, RouterNoise};

/// How a forward pass is carried out.
#[derive(Debug, Clone, Copy)]
pub struct ForwardMode {
    /// Dropout of the experts' inputs.
    pub dropout: LoraDropout,
    /// Noise that disturbs the routers.
    pub noise: RouterNoise,
    /// Whether the routers' gradient stops at their input.
    pub detaches_routers: bool,
    /// Whether to return what the routers' scores are linear in ([`ForwardOutput::features`]).
    ///
    /// [`ForwardOutput::features`]: super::ForwardOutput::features
    pub keeps_features: bool,
    /// The routing rule; `None` for the model's own.
    pub rule: Option<EvalRule>,
    /// How the base's products are computed in blocks that the fused operations compute. For
    /// [`BaseProducts::Fp8`], [`RoutedModel::quantise_base`] must have been called.
    ///
    /// [`RoutedModel::quantise_base`]: super::RoutedModel::quantise_base
    pub base_products: BaseProducts,
    /// Keep only each block's input, and what a layer's own router reads, for the backward pass,
    /// which computes the rest again.
    pub gradient_checkpointing: bool,
}

impl ForwardMode {
    /// Without dropout, noise and gradient checkpointing, by the model's own routing rule.
    pub const EVAL: Self = Self {
        dropout: LoraDropout::NONE,
        noise: RouterNoise::None,
        detaches_routers: false,
        keeps_features: false,
        rule: None,
        base_products: BaseProducts::Exact,
        gradient_checkpointing: false,
    };
}
