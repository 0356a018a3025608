//! One transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width.

use std::collections::BTreeMap;

use tch::Tensor;

use super::attention::Attention;
use super::context::AttentionContext;
use super::linear::{ApplyLinear, Linear};
use super::mlp::Activation;
use super::names::PartNames;
use super::norm::Norm;
use crate::config::TargetModule;

/// One transformer block.
#[derive(Debug)]
pub struct Block {
    /// Normalises the input of attention.
    pub norm_1: Norm,
    /// Normalises the input of the feed-forward network.
    pub norm_2: Norm,
    /// The linear layers.
    pub linears: BTreeMap<TargetModule, Linear>,
    /// Attention, without its linear layers.
    pub attention: Attention,
    /// The activation of the feed-forward network.
    pub activation: Activation,
}

impl Block {
    /// Applies the block to `x`, `[b, t, d]`, and returns the same shape. `linear` applies a linear
    /// layer to its input, with or without experts.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &AttentionContext,
        linear: &mut ApplyLinear<'_>,
    ) -> Tensor {
        let x = x + self.attention.forward(&self.norm_1.forward(x), context, linear);
        &x + self.activation.mlp(&self.norm_2.forward(&x), linear)
    }

    /// Every parameter with its part of the block and its kind, `weight` or `bias`, in the order of
    /// [`super::spec::DecoderSpec::parameter_shapes`].
    ///
    /// - `names`: how the family names its parts
    pub fn named_parameters(&self, names: &PartNames) -> Vec<(String, Tensor)> {
        let mut named = vec![];
        let mut add = |part: &str, weight: &Tensor, bias: Option<&Tensor>| {
            named.push((format!("{part}.weight"), weight.shallow_clone()));
            named.extend(bias.map(|bias| (format!("{part}.bias"), bias.shallow_clone())));
        };
        let [query_norm, key_norm] = names.qk_norms.unwrap_or_default();
        let norms = [names.norm_1, names.norm_2, query_norm, key_norm];
        let qk_norms = self.attention.qk_norms.as_ref().map(|(query, key)| [query, key]);
        let all = [&self.norm_1, &self.norm_2].into_iter().chain(qk_norms.into_iter().flatten());
        for (name, norm) in norms.into_iter().zip(all) {
            let (weight, bias) = norm.parameters();
            add(name, weight, bias);
        }
        for (module, linear) in &self.linears {
            add(module.name(), linear.stored(), linear.bias.as_ref());
        }
        named
    }

    /// Another handle to the same parameters.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            norm_1: self.norm_1.shallow_clone(),
            norm_2: self.norm_2.shallow_clone(),
            linears: self.linears.iter().map(|(&m, linear)| (m, linear.shallow_clone())).collect(),
            attention: self.attention.shallow_clone(),
            activation: self.activation,
        }
    }
}
