//! The base: GPT-2's forward pass (transformers 5.17, `models/gpt2/modeling_gpt2.py`), without any
//! LoRA. Dropout of the base is never active, in training neither.
//!
//! ```text
//! x_0 = wte[input_ids] + wpe[position_ids]
//! x   = x + attn.c_proj(attention(attn.c_attn(ln_1(x))))
//! x   = x + mlp.c_proj(gelu(mlp.c_fc(ln_2(x))))          n_layer times
//! logits = ln_f(x) lm_head^T
//! ```
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `h` head, `i` in, `o` out, `v` vocabulary.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::gpt2_config::{Activation, Gpt2Config};
use super::inputs::Documents;
use crate::config::TargetModule;

/// A linear layer as GPT-2 keeps it (`Conv1D`): the weight is `[in, out]`.
#[derive(Debug)]
pub struct Linear {
    /// `[i, o]`.
    pub weight: Tensor,
    /// `[o]`.
    pub bias: Tensor,
}

impl Linear {
    /// `x W + b`, computed in the dtype of `x`: `[b, t, i]` to `[b, t, o]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (b, t, i) = x.size3().expect("activations are [b, t, i]");
        let kind = x.kind();
        let y = self.bias.to_kind(kind).addmm(&x.reshape([b * t, i]), &self.weight.to_kind(kind));
        y.reshape([b, t, -1])
    }

    fn shallow_clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), bias: self.bias.shallow_clone() }
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
    /// Normalises `x`, `[.., d]`, in its dtype (statistics of bf16 are taken in f32 by libtorch).
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (self.weight.to_kind(x.kind()), self.bias.to_kind(x.kind()));
        x.layer_norm(weight.size(), Some(weight), Some(bias), self.eps, true)
    }

    fn shallow_clone(&self) -> Self {
        let (weight, bias) = (self.weight.shallow_clone(), self.bias.shallow_clone());
        Self { weight, bias, eps: self.eps }
    }
}

/// Which earlier positions a position may attend to.
#[derive(Debug)]
pub enum AttentionMask {
    /// All of them: each row is one document.
    Causal,
    /// Those of its own document.
    Documents(Documents),
}

impl AttentionMask {
    /// Another handle to the same mask.
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::Causal => Self::Causal,
            Self::Documents(documents) => Self::Documents(documents.shallow_clone()),
        }
    }
}

/// One transformer block.
#[derive(Debug)]
pub struct Block {
    /// Before the attention.
    pub ln_1: LayerNorm,
    /// Before the feed-forward layer.
    pub ln_2: LayerNorm,
    /// The four linear layers.
    pub linears: BTreeMap<TargetModule, Linear>,
    pub(super) n_head: i64,
    pub(super) attention_scale: f64,
    pub(super) activation: Activation,
}

impl Block {
    /// `x`, `[b, t, d]`, after this block. `linear` applies a linear layer to its input: the base's
    /// own, or that plus its experts.
    pub fn forward(
        &self,
        x: &Tensor,
        mask: &AttentionMask,
        linear: &mut dyn FnMut(TargetModule, &Tensor) -> Tensor,
    ) -> Tensor {
        let qkv = linear(TargetModule::AttnCAttn, &self.ln_1.forward(x));
        let x = x + linear(TargetModule::AttnCProj, &self.attention(&qkv, mask));
        let up = linear(TargetModule::MlpCFc, &self.ln_2.forward(&x));
        let up = match self.activation {
            Activation::GeluNew => up.gelu("tanh"),
            Activation::Gelu => up.gelu("none"),
        };
        &x + linear(TargetModule::MlpCProj, &up)
    }

    /// Multi-head attention of `qkv`, `[b, t, 3d]`, before the output projection: `[b, t, d]`.
    fn attention(&self, qkv: &Tensor, mask: &AttentionMask) -> Tensor {
        let (b, t, d3) = qkv.size3().expect("activations are [b, t, 3d]");
        let heads = qkv.view([b, t, 3, self.n_head, d3 / 3 / self.n_head]).permute([2, 0, 3, 1, 4]);
        let (q, k, v) = (heads.get(0), heads.get(1), heads.get(2));
        let (mask, is_causal) = match mask {
            AttentionMask::Causal => (None, true),
            AttentionMask::Documents(documents) => (Some(documents.mask()), false),
        };
        let scale = Some(self.attention_scale);
        let y =
            Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, is_causal, scale, false);
        y.transpose(1, 2).reshape([b, t, d3 / 3])
    }

    /// Handles to all parameters of the block.
    pub fn parameters(&self) -> Vec<Tensor> {
        let norms =
            [&self.ln_1, &self.ln_2].into_iter().flat_map(|norm| [&norm.weight, &norm.bias]);
        let linears = self.linears.values().flat_map(|linear| [&linear.weight, &linear.bias]);
        norms.chain(linears).map(Tensor::shallow_clone).collect()
    }

    /// Another handle to the same parameters.
    pub fn shallow_clone(&self) -> Self {
        Self {
            ln_1: self.ln_1.shallow_clone(),
            ln_2: self.ln_2.shallow_clone(),
            linears: self.linears.iter().map(|(&m, linear)| (m, linear.shallow_clone())).collect(),
            ..*self
        }
    }
}

/// The base's parameters under their Hugging Face names.
#[derive(Debug)]
pub struct Gpt2 {
    /// Its shape.
    pub config: Gpt2Config,
    /// `transformer.wte.weight`, `[v, d]`.
    pub wte: Tensor,
    /// `transformer.wpe.weight`, `[n_positions, d]`.
    pub wpe: Tensor,
    /// `transformer.h.*`.
    pub blocks: Vec<Block>,
    /// `transformer.ln_f`.
    pub ln_f: LayerNorm,
    /// `lm_head.weight`, `[v, d]`; a handle to `wte` if the head is tied.
    pub lm_head: Tensor,
}

impl Gpt2 {
    /// Builds the base from `tensors`, which hold exactly the names and shapes of
    /// [`Gpt2Config::parameter_shapes`].
    pub fn new(config: Gpt2Config, mut tensors: BTreeMap<String, Tensor>) -> Self {
        let mut take = |name: String| {
            tensors.remove(&name).unwrap_or_else(|| panic!("the caller checked `{name}`"))
        };
        let eps = config.layer_norm_epsilon;
        let wte = take("transformer.wte.weight".into());
        let wpe = take("transformer.wpe.weight".into());
        let mut blocks = vec![];
        for layer in 0..config.n_layer {
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
                n_head: config.n_head,
                attention_scale: config.attention_scale(layer),
                activation: config.activation,
            });
        }
        let ln_f = LayerNorm {
            weight: take("transformer.ln_f.weight".into()),
            bias: take("transformer.ln_f.bias".into()),
            eps,
        };
        let lm_head =
            if config.tied_head { wte.shallow_clone() } else { take("lm_head.weight".into()) };
        Self { config, wte, wpe, blocks, ln_f, lm_head }
    }

    /// Random parameters, f32 on the CPU, from libtorch's default generator (GPT-2's
    /// initialisation: N(0, 0.02), residual projections scaled by `1 / sqrt(2 n_layer)`).
    pub fn random(config: Gpt2Config) -> Self {
        let options = (Kind::Float, Device::Cpu);
        let residual = 0.02 / (2.0 * config.n_layer as f64).sqrt();
        let tensors = config.parameter_shapes().into_iter().map(|(name, shape)| {
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
        Self::new(config, tensors)
    }

    /// Every parameter under its Hugging Face name, in that of
    /// [`Gpt2Config::parameter_shapes`]'s order; a tied head appears once, as
    /// `transformer.wte.weight`.
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
        if !self.config.tied_head {
            named.push(("lm_head.weight".to_owned(), &self.lm_head));
        }
        named.into_iter().map(|(name, tensor)| (name, tensor.shallow_clone())).collect()
    }

    /// The base with its parameters on `device`, in `kind`.
    pub fn to(&self, device: Device, kind: Kind) -> Self {
        let tensors = self.named_parameters().into_iter();
        let tensors = tensors.map(|(name, t)| (name, t.detach().to_device(device).to_kind(kind)));
        Self::new(self.config.clone(), tensors.collect())
    }

    /// Token plus position embeddings, `[b, t, d]`, of `input_ids` and `position_ids`, `[b, t]`.
    pub fn embed(&self, input_ids: &Tensor, position_ids: &Tensor, kind: Kind) -> Tensor {
        let tokens = Tensor::embedding(&self.wte, input_ids, -1, false, false);
        let positions = Tensor::embedding(&self.wpe, position_ids, -1, false, false);
        (tokens + positions).to_kind(kind)
    }

    /// BLAKE3 over every parameter's name, dtype, shape and bytes.
    pub fn hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        super::weights::hash_tensors(&mut hasher, &self.named_parameters())?;
        Ok(hasher.finalize().to_hex().to_string())
    }
}
