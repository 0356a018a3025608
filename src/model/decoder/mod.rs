//! The decoder, without LoRA, made of the parts that its spec names. It computes what transformers
//! 5.17 computes (`models/{gpt2,llama,qwen2,qwen3,smollm3,mistral}/modeling_*.py`). The base's
//! dropout is never active, not even in training.
//!
//! ```text
//! x_0    = embedding[input_ids] (+ positions[position_ids])
//! x      = x + attention(norm_1(x))
//! x      = x + mlp(norm_2(x))                                   once for each block
//! logits = final_norm(x) head^T
//! ```
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `v` vocabulary.

pub(crate) mod attention;
pub mod block;
pub mod context;
pub mod kv_cache;
pub mod linear;
pub mod mlp;
pub(crate) mod names;
pub(crate) mod norm;
pub(crate) mod precision;
pub mod rope;
pub mod spec;

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::config::{Family, TargetModule};
use crate::tensor_file::hash_tensors;
use attention::Attention;
use block::Block;
use context::{AttentionContext, AttentionMask};
use linear::Linear;
use names::PartNames;
use norm::Norm;
use rope::Rotary;
use spec::DecoderSpec;

/// The base's parameters.
#[derive(Debug)]
pub struct Decoder {
    /// The shape of the base.
    pub spec: DecoderSpec,
    /// Token embedding, `[v, d]`.
    pub embedding: Tensor,
    /// Position embedding, `[max_positions, d]`; `None` if positions are rotated instead.
    pub positions: Option<Tensor>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Normalises the last hidden states.
    pub final_norm: Norm,
    /// `[v, d]`; `None` if the head is the token embedding.
    head: Option<Tensor>,
    /// The frequencies of RoPE; `None` without it.
    rotary: Option<Rotary>,
}

impl Decoder {
    /// Builds the base from `tensors`, which must have exactly the names and shapes of
    /// [`DecoderSpec::parameter_shapes`].
    pub fn new(spec: DecoderSpec, tensors: BTreeMap<String, Tensor>) -> Self {
        let mut tensors = Tensors(tensors);
        let names = spec.names();
        let embedding = tensors.take(names.embedding);
        let positions = names.positions.map(|name| tensors.take(name));
        let blocks = (0..spec.num_layers).map(|layer| block(&spec, layer, &mut tensors)).collect();
        let final_norm = tensors.norm(names.final_norm, spec.norm_eps);
        let head = (!spec.tied_head).then(|| tensors.take(PartNames::HEAD));
        let rotary = spec.rope.as_ref();
        let rotary = rotary.map(|rope| Rotary::new(rope, spec.head_dim, embedding.device()));
        Self { spec, embedding, positions, blocks, final_norm, head, rotary }
    }

    /// Random parameters, f32 on the CPU, from libtorch's default generator. Weights have mean 0
    /// and standard deviation 0.02; in GPT-2, that of the residual projections is divided by
    /// `sqrt(2 num_layers)`.
    pub fn random(spec: DecoderSpec) -> Self {
        Self::random_from(spec, Device::Cpu, Kind::Float)
    }

    /// The same in dtype `kind`, from the generator of `device`, which draws one parameter after
    /// the other. They are on the CPU, too.
    pub(crate) fn random_from(spec: DecoderSpec, device: Device, kind: Kind) -> Self {
        let options = (kind, device);
        let residual = 0.02 / (2.0 * spec.num_layers as f64).sqrt();
        let is_gpt2 = spec.family == Family::Gpt2;
        let tensors = spec.parameter_shapes().into_iter().map(|(name, shape)| {
            let tensor = if name.ends_with(".bias") {
                Tensor::zeros(&shape, options)
            } else if shape.len() == 1 {
                // the weight of a normalisation
                Tensor::ones(&shape, options)
            } else {
                let is_residual = is_gpt2 && name.ends_with("c_proj.weight");
                Tensor::randn(&shape, options) * if is_residual { residual } else { 0.02 }
            };
            (name, tensor.to_device(Device::Cpu))
        });
        let tensors = tensors.collect();
        Self::new(spec, tensors)
    }

    /// Every parameter with its Hugging Face name, in its file's layout, in the order of
    /// [`DecoderSpec::parameter_shapes`]. A tied head appears once, as the token embedding.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let names = self.spec.names();
        let mut named = vec![(names.embedding.to_owned(), self.embedding.shallow_clone())];
        if let (Some(name), Some(positions)) = (names.positions, &self.positions) {
            named.push((name.to_owned(), positions.shallow_clone()));
        }
        for (layer, block) in (0..).zip(&self.blocks) {
            let prefix = names.block(layer);
            let parameters = block.named_parameters(names).into_iter();
            named.extend(parameters.map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)));
        }
        let (weight, bias) = self.final_norm.parameters();
        let final_norm = names.final_norm;
        named.push((format!("{final_norm}.weight"), weight.shallow_clone()));
        named.extend(bias.map(|bias| (format!("{final_norm}.bias"), bias.shallow_clone())));
        named.extend(
            self.head.as_ref().map(|head| (PartNames::HEAD.to_owned(), head.shallow_clone())),
        );
        named
    }

    /// The base with its parameters on `device`, in dtype `kind`.
    #[must_use]
    pub fn to(&self, device: Device, kind: Kind) -> Self {
        let tensors = self.named_parameters().into_iter();
        let tensors = tensors.map(|(name, t)| (name, t.detach().to_device(device).to_kind(kind)));
        Self::new(self.spec.clone(), tensors.collect())
    }

    /// Another handle to the same parameters.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self::new(self.spec.clone(), self.named_parameters().into_iter().collect())
    }

    /// The embeddings, `[b, t, d]`, in dtype `kind`, of `input_ids` and, if positions are embedded,
    /// `position_ids`, both `[b, t]`.
    pub fn embed(&self, input_ids: &Tensor, position_ids: &Tensor, kind: Kind) -> Tensor {
        let tokens = Tensor::embedding(&self.embedding, input_ids, -1, false, false);
        let sum = match &self.positions {
            Some(positions) => {
                tokens + Tensor::embedding(positions, position_ids, -1, false, false)
            }
            None => tokens,
        };
        sum.to_kind(kind)
    }

    /// What attention needs of a batch besides hidden states, in a model that computes in `kind`.
    ///
    /// - `position_ids`: positions within each document, `[b, t]`
    pub fn context(
        &self,
        mask: &AttentionMask,
        position_ids: &Tensor,
        kind: Kind,
    ) -> AttentionContext {
        let rotation = self.rotary.as_ref().map(|rotary| rotary.at(position_ids, kind));
        let windows = self.blocks.iter().filter_map(|block| block.attention.window);
        AttentionContext::new(mask, rotation, position_ids, windows)
    }

    /// The frequencies of rotation, if the base rotates queries and keys.
    pub(crate) fn rotary(&self) -> Option<&Rotary> {
        self.rotary.as_ref()
    }

    /// The head, `[v, d]`, which turns hidden states into logits. It is the token embedding if the
    /// head is tied.
    pub fn head(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Makes `place` the head, and also the token embedding if the head is tied to it. `place`
    /// holds the same numbers elsewhere in memory.
    pub(crate) fn set_head(&mut self, place: Tensor) {
        match &mut self.head {
            Some(head) => *head = place,
            None => self.embedding = place,
        }
    }

    /// BLAKE3 hash over every parameter's name, dtype, shape and bytes.
    pub fn hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hash_tensors(&mut hasher, &self.named_parameters())?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The hash that the base has in dtype `kind`. One parameter at a time is converted.
    pub fn hash_in(&self, kind: Kind) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in self.named_parameters() {
            hash_tensors(&mut hasher, &[(name, tensor.to_kind(kind))])?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// The tensors of a base by name, which are taken one by one.
struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    fn take(&mut self, name: &str) -> Tensor {
        self.0.remove(name).unwrap_or_else(|| panic!("the caller checked `{name}`"))
    }

    fn weight_and_bias(&mut self, part: &str) -> (Tensor, Option<Tensor>) {
        (self.take(&format!("{part}.weight")), self.0.remove(&format!("{part}.bias")))
    }

    fn norm(&mut self, part: &str, eps: f64) -> Norm {
        let (weight, bias) = self.weight_and_bias(part);
        Norm::new(weight, bias, eps)
    }
}

/// Builds block `layer` from its tensors.
fn block(spec: &DecoderSpec, layer: i64, tensors: &mut Tensors) -> Block {
    let (names, eps) = (spec.names(), spec.norm_eps);
    let prefix = names.block(layer);
    let mut norm = |part: &str| tensors.norm(&format!("{prefix}.{part}"), eps);
    let (norm_1, norm_2) = (norm(names.norm_1), norm(names.norm_2));
    let qk_norms = spec.qk_norms().map(|[query, key]| (norm(query), norm(key)));
    let linears = spec.modules().iter().map(|&module| {
        let (weight, bias) = tensors.weight_and_bias(&format!("{prefix}.{}", module.name()));
        (module, Linear::new(weight, spec.layout(), bias))
    });
    Block {
        norm_1,
        norm_2,
        linears: linears.collect(),
        attention: Attention {
            layer: layer as usize,
            num_heads: spec.num_heads,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            scale: spec.attention_scale(layer),
            is_packed: spec.modules().contains(&TargetModule::AttnCAttn),
            window: spec.window(layer),
            rotates: spec.rotates(layer),
            qk_norms,
        },
        activation: spec.activation,
    }
}
