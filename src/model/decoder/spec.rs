//! The shape of a base: its sizes, and the name and shape of each parameter.

use super::mlp::Activation;
use crate::config::{RandomBase, TargetModule};

/// The shape of a base.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Number of blocks.
    pub n_layer: i64,
    /// Number of attention heads.
    pub n_head: i64,
    /// Width `d` of the hidden states.
    pub n_embd: i64,
    /// Width of the feed-forward layer, usually `4 d`.
    pub n_inner: i64,
    /// Length of the longest sequence.
    pub n_positions: i64,
    /// Size `v` of the vocabulary.
    pub vocab_size: i64,
    /// Added to the variance by each LayerNorm.
    pub layer_norm_epsilon: f64,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Whether the head is the token embedding.
    pub tied_head: bool,
    /// Whether attention scores are divided by the square root of a head's width.
    pub scale_attn_weights: bool,
    /// Whether attention scores are divided by the block's number, counted from 1.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// The token that ends a document; `None` if the vocabulary lacks it.
    pub eos_token_id: Option<u32>,
}

impl DecoderSpec {
    /// The shape of a random base with a tokenizer's vocabulary.
    pub fn from_random(shape: &RandomBase, vocab_size: i64, eos_token_id: Option<u32>) -> Self {
        Self {
            n_layer: shape.n_layer,
            n_head: shape.n_head,
            n_embd: shape.n_embd,
            n_inner: 4 * shape.n_embd,
            n_positions: shape.n_positions,
            vocab_size,
            layer_norm_epsilon: 1e-5,
            activation: Activation::GeluNew,
            tied_head: true,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            eos_token_id,
        }
    }

    /// Factor of the attention scores of block `layer`, counted from 0.
    pub fn attention_scale(&self, layer: i64) -> f64 {
        let mut scale = 1.0;
        if self.scale_attn_weights {
            scale /= ((self.n_embd / self.n_head) as f64).sqrt();
        }
        if self.scale_attn_by_inverse_layer_idx {
            scale /= (layer + 1) as f64;
        }
        scale
    }

    /// The widths `(in, out)` of a linear layer of a block.
    pub fn linear_shape(&self, module: TargetModule) -> (i64, i64) {
        use TargetModule::{AttnCAttn, AttnCProj, MlpCFc, MlpCProj};
        match module {
            AttnCAttn => (self.n_embd, 3 * self.n_embd),
            AttnCProj => (self.n_embd, self.n_embd),
            MlpCFc => (self.n_embd, self.n_inner),
            MlpCProj => (self.n_inner, self.n_embd),
        }
    }

    /// Name and shape of every parameter.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let d = self.n_embd;
        let mut shapes = vec![
            ("transformer.wte.weight".to_owned(), vec![self.vocab_size, d]),
            ("transformer.wpe.weight".to_owned(), vec![self.n_positions, d]),
        ];
        for layer in 0..self.n_layer {
            let mut add = |module: &str, weight: Vec<i64>| {
                let bias = vec![*weight.last().expect("a weight has dimensions")];
                shapes.push((format!("transformer.h.{layer}.{module}.weight"), weight));
                shapes.push((format!("transformer.h.{layer}.{module}.bias"), bias));
            };
            add("ln_1", vec![d]);
            add("ln_2", vec![d]);
            for module in TargetModule::ALL {
                let (i, o) = self.linear_shape(module);
                add(module.name(), vec![i, o]);
            }
        }
        shapes.push(("transformer.ln_f.weight".to_owned(), vec![d]));
        shapes.push(("transformer.ln_f.bias".to_owned(), vec![d]));
        if !self.tied_head {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, d]));
        }
        shapes
    }

    /// Number of parameters of the base; a tied head counts once.
    pub fn num_parameters(&self) -> i64 {
        self.parameter_shapes().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
    }
}
