//! The decoder: GPT-2's forward pass (transformers 5.17, `models/gpt2/modeling_gpt2.py`), without
//! LoRA. The base's dropout is never active, not even in training.
//!
//! ```text
//! x_0 = wte[input_ids] + wpe[position_ids]
//! x   = x + attn.c_proj(attention(attn.c_attn(ln_1(x))))
//! x   = x + mlp.c_proj(gelu(mlp.c_fc(ln_2(x))))          n_layer times
//! logits = ln_f(x) lm_head^T
//! ```
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `h` head, `i` in, `o` out, `v`
//! vocabulary.

pub mod attention;
pub mod block;
pub mod linear;
pub mod mlp;
pub mod norm;
pub mod precision;
pub mod spec;

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::config::TargetModule;
use crate::tensor_file::hash_tensors;
use block::Block;
use linear::Linear;
use norm::LayerNorm;
use spec::DecoderSpec;

/// The base's parameters, with their Hugging Face names.
#[derive(Debug)]
pub struct Decoder {
    /// The sizes of the base.
    pub spec: DecoderSpec,
    /// Token embedding, `transformer.wte.weight`, `[v, d]`.
    pub wte: Tensor,
    /// Position embedding, `transformer.wpe.weight`, `[n_positions, d]`.
    pub wpe: Tensor,
    /// The blocks, `transformer.h.*`.
    pub blocks: Vec<Block>,
    /// The final LayerNorm, `transformer.ln_f`.
    pub ln_f: LayerNorm,
    /// `lm_head.weight`, `[v, d]`; `None` if the head is the token embedding.
    lm_head: Option<Tensor>,
}

impl Decoder {
    /// Builds the base from `tensors`, which must have exactly the names and shapes of
    /// [`DecoderSpec::parameter_shapes`].
    pub fn new(spec: DecoderSpec, mut tensors: BTreeMap<String, Tensor>) -> Self {
        let mut take = |name: String| {
            tensors.remove(&name).unwrap_or_else(|| panic!("the caller checked `{name}`"))
        };
        let eps = spec.layer_norm_epsilon;
        let wte = take("transformer.wte.weight".into());
        let wpe = take("transformer.wpe.weight".into());
        let mut blocks = vec![];
        for layer in 0..spec.n_layer {
            let mut weight_bias = |module: &str| {
                let name = format!("transformer.h.{layer}.{module}");
                (take(format!("{name}.weight")), take(format!("{name}.bias")))
            };
            let mut norm = |module| {
                let (weight, bias) = weight_bias(module);
                LayerNorm { weight, bias, eps }
            };
            let (ln_1, ln_2) = (norm("ln_1"), norm("ln_2"));
            let linears = TargetModule::ALL.into_iter().map(|module| {
                let (weight, bias) = weight_bias(module.name());
                (module, Linear { weight, bias })
            });
            blocks.push(Block {
                ln_1,
                ln_2,
                linears: linears.collect(),
                n_head: spec.n_head,
                attention_scale: spec.attention_scale(layer),
                activation: spec.activation,
            });
        }
        let ln_f = LayerNorm {
            weight: take("transformer.ln_f.weight".into()),
            bias: take("transformer.ln_f.bias".into()),
            eps,
        };
        let lm_head = (!spec.tied_head).then(|| take("lm_head.weight".into()));
        Self { spec, wte, wpe, blocks, ln_f, lm_head }
    }

    /// Random parameters, f32 on the CPU, from libtorch's default generator. As in GPT-2, weights
    /// have mean 0 and standard deviation 0.02, which is divided by `sqrt(2 n_layer)` for the
    /// residual projections.
    pub fn random(spec: DecoderSpec) -> Self {
        let options = (Kind::Float, Device::Cpu);
        let residual = 0.02 / (2.0 * spec.n_layer as f64).sqrt();
        let tensors = spec.parameter_shapes().into_iter().map(|(name, shape)| {
            let tensor = if name.ends_with(".bias") {
                Tensor::zeros(&shape, options)
            } else if name.contains(".ln_") {
                Tensor::ones(&shape, options)
            } else {
                let std = if name.ends_with("c_proj.weight") { residual } else { 0.02 };
                Tensor::randn(&shape, options) * std
            };
            (name, tensor)
        });
        let tensors = tensors.collect();
        Self::new(spec, tensors)
    }

    /// Every parameter with its Hugging Face name, in the order of
    /// [`DecoderSpec::parameter_shapes`]. A tied head appears once, as `transformer.wte.weight`.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let mut named = vec![
            ("transformer.wte.weight".to_owned(), &self.wte),
            ("transformer.wpe.weight".to_owned(), &self.wpe),
        ];
        for (layer, block) in self.blocks.iter().enumerate() {
            for (name, norm) in [("ln_1", &block.ln_1), ("ln_2", &block.ln_2)] {
                named.push((format!("transformer.h.{layer}.{name}.weight"), &norm.weight));
                named.push((format!("transformer.h.{layer}.{name}.bias"), &norm.bias));
            }
            for (module, linear) in &block.linears {
                let name = module.name();
                named.push((format!("transformer.h.{layer}.{name}.weight"), &linear.weight));
                named.push((format!("transformer.h.{layer}.{name}.bias"), &linear.bias));
            }
        }
        named.push(("transformer.ln_f.weight".to_owned(), &self.ln_f.weight));
        named.push(("transformer.ln_f.bias".to_owned(), &self.ln_f.bias));
        named.extend(self.lm_head.as_ref().map(|head| ("lm_head.weight".to_owned(), head)));
        named.into_iter().map(|(name, tensor)| (name, tensor.shallow_clone())).collect()
    }

    /// The base with its parameters on `device`, in dtype `kind`.
    pub fn to(&self, device: Device, kind: Kind) -> Self {
        let tensors = self.named_parameters().into_iter();
        let tensors = tensors.map(|(name, t)| (name, t.detach().to_device(device).to_kind(kind)));
        Self::new(self.spec.clone(), tensors.collect())
    }

    /// The sum of token and position embeddings, `[b, t, d]`, in dtype `kind`, of `input_ids` and
    /// `position_ids`, both `[b, t]`.
    pub fn embed(&self, input_ids: &Tensor, position_ids: &Tensor, kind: Kind) -> Tensor {
        let tokens = Tensor::embedding(&self.wte, input_ids, -1, false, false);
        let positions = Tensor::embedding(&self.wpe, position_ids, -1, false, false);
        (tokens + positions).to_kind(kind)
    }

    /// The head, `[v, d]`, which turns hidden states into logits. It is the token embedding if the
    /// head is tied.
    pub fn head(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.wte)
    }

    /// Makes `place` the head, and also the token embedding if the head is tied to it. `place`
    /// holds the same numbers elsewhere in memory.
    pub fn set_head(&mut self, place: Tensor) {
        match &mut self.lm_head {
            Some(head) => *head = place,
            None => self.wte = place,
        }
    }

    /// BLAKE3 hash over every parameter's name, dtype, shape and bytes.
    pub fn hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hash_tensors(&mut hasher, &self.named_parameters())?;
        Ok(hasher.finalize().to_hex().to_string())
    }
}
