//! The shape of a base: its sizes, its choice of parts, and the name and shape of each parameter.

use tch::Device;

use super::linear::Layout;
use super::mlp::Activation;
use super::names::PartNames;
use super::rope::RopeSpec;
use crate::config::{Family, TargetModule};

/// The shape of a base.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// The family, which decides how parts are named and laid out, and which parts there are.
    pub family: Family,
    /// Number of blocks.
    pub num_layers: i64,
    /// Number of query heads.
    pub num_heads: i64,
    /// Number of key and value heads, which divides the number of query heads. Each serves as many
    /// query heads, one group after the other (grouped-query attention, arXiv:2305.13245).
    pub num_kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Width `d` of the hidden states.
    pub width: i64,
    /// Width of the feed-forward layer.
    pub inner_width: i64,
    /// Length of the longest sequence.
    pub max_positions: i64,
    /// Size `v` of the vocabulary. A base may have more rows than its tokenizer has tokens.
    pub vocab_size: i64,
    /// Added to the variance by each LayerNorm, or to the mean square by each RMSNorm.
    pub norm_eps: f64,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Which linear layers have a bias.
    pub biases: Biases,
    /// Whether queries and keys are normalised in each head.
    pub has_qk_norm: bool,
    /// How queries and keys are rotated; `None` if positions are embedded instead.
    pub rope: Option<RopeSpec>,
    /// Which layers attend to a window of positions; `None` if none does.
    pub windows: Option<Windows>,
    /// Whether the head is the token embedding.
    pub tied_head: bool,
    /// Whether attention scores are divided by the square root of a head's width.
    pub scale_attn_weights: bool,
    /// Whether attention scores are divided by the block's number, counted from 1.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// The tokens that end a document. The first is put behind each document of the data. The list
    /// is empty if the vocabulary lacks them.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a document, as the base's config names it. The tokenizer decides
    /// whether it is used.
    pub bos_token_id: Option<u32>,
}

/// Which linear layers of each block have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Biases {
    /// The layers that compute queries, keys and values.
    pub qkv: bool,
    /// The output projection of attention.
    pub attention_out: bool,
    /// The layers of the feed-forward network.
    pub mlp: bool,
}

/// Sliding windows: in `layers`, a position attends to itself and the `size - 1` positions before
/// it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Number of positions in a window.
    pub size: i64,
    /// Whether each layer has the window.
    pub layers: Vec<bool>,
}

impl DecoderSpec {
    /// The linear layers of a block, in the order in which it applies them.
    pub fn modules(&self) -> &'static [TargetModule] {
        self.family.modules()
    }

    /// How the family names its parts.
    pub fn names(&self) -> &'static PartNames {
        PartNames::of(self.family)
    }

    /// The token that is put behind each document; `None` if the vocabulary lacks it.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_ids.first().copied()
    }

    /// The linear layers of a block by the input that they read: those that compute queries, keys
    /// and values, the output projection of attention, and the layers of the feed-forward network
    /// before and after its activation.
    pub fn products(&self) -> [&'static [TargetModule]; 4] {
        use TargetModule as M;
        match self.modules().contains(&M::AttnCAttn) {
            true => [&[M::AttnCAttn], &[M::AttnCProj], &[M::MlpCFc], &[M::MlpCProj]],
            false => [
                &[M::QProj, M::KProj, M::VProj],
                &[M::OProj],
                &[M::GateProj, M::UpProj],
                &[M::DownProj],
            ],
        }
    }

    /// Whether the fused operations compute the blocks of this family: those of Llama-like bases on
    /// a GPU only.
    pub(crate) fn has_fused_blocks(&self, device: Device) -> bool {
        self.family == Family::Gpt2 || device.is_cuda()
    }

    /// Factor of the attention scores of block `layer`, counted from 0.
    pub(crate) fn attention_scale(&self, layer: i64) -> f64 {
        let mut scale = 1.0;
        if self.scale_attn_weights {
            scale /= (self.head_dim as f64).sqrt();
        }
        if self.scale_attn_by_inverse_layer_idx {
            scale /= (layer + 1) as f64;
        }
        scale
    }

    /// The number of positions that block `layer` attends to; `None` if there is no limit.
    pub fn window(&self, layer: i64) -> Option<i64> {
        let windows = self.windows.as_ref()?;
        windows.layers[layer as usize].then_some(windows.size)
    }

    /// Whether block `layer` rotates its queries and keys.
    pub fn rotates(&self, layer: i64) -> bool {
        self.rope.as_ref().is_some_and(|rope| !rope.skipped_layers.contains(&layer))
    }

    /// The widths `(in, out)` of a linear layer of a block.
    pub fn linear_shape(&self, module: TargetModule) -> (i64, i64) {
        use TargetModule as M;
        let (d, inner) = (self.width, self.inner_width);
        let (queries, keys) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        match module {
            M::AttnCAttn => (d, 3 * d),
            M::AttnCProj => (d, d),
            M::QProj => (d, queries),
            M::KProj | M::VProj => (d, keys),
            M::OProj => (queries, d),
            M::MlpCFc | M::GateProj | M::UpProj => (d, inner),
            M::MlpCProj | M::DownProj => (inner, d),
        }
    }

    /// Whether a linear layer of a block has a bias.
    pub(crate) fn has_bias(&self, module: TargetModule) -> bool {
        use TargetModule as M;
        match module {
            M::AttnCAttn | M::QProj | M::KProj | M::VProj => self.biases.qkv,
            M::AttnCProj | M::OProj => self.biases.attention_out,
            M::MlpCFc | M::MlpCProj | M::GateProj | M::UpProj | M::DownProj => self.biases.mlp,
        }
    }

    /// The shape of a linear layer's weight in files.
    fn stored_shape(&self, module: TargetModule) -> Vec<i64> {
        let (i, o) = self.linear_shape(module);
        match self.layout() {
            Layout::InOut => vec![i, o],
            Layout::OutIn => vec![o, i],
        }
    }

    /// How the family stores the weights of linear layers.
    pub fn layout(&self) -> Layout {
        if self.family == Family::Gpt2 { Layout::InOut } else { Layout::OutIn }
    }

    /// The names, in a block, of what normalises queries and keys; `None` if nothing does.
    pub(crate) fn qk_norms(&self) -> Option<[&'static str; 2]> {
        self.names().qk_norms.filter(|_| self.has_qk_norm)
    }

    /// Name and shape of every parameter.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let (names, d) = (self.names(), self.width);
        let mut shapes = vec![(names.embedding.to_owned(), vec![self.vocab_size, d])];
        if let Some(positions) = names.positions {
            shapes.push((positions.to_owned(), vec![self.max_positions, d]));
        }
        for layer in 0..self.num_layers {
            let block = names.block(layer);
            let mut add = |part: &str, weight: Vec<i64>, bias: Option<i64>| {
                shapes.push((format!("{block}.{part}.weight"), weight));
                shapes.extend(bias.map(|width| (format!("{block}.{part}.bias"), vec![width])));
            };
            let norm_bias = names.norms_have_bias.then_some(d);
            add(names.norm_1, vec![d], norm_bias);
            add(names.norm_2, vec![d], norm_bias);
            for part in self.qk_norms().into_iter().flatten() {
                add(part, vec![self.head_dim], None);
            }
            for &module in self.modules() {
                let (_, o) = self.linear_shape(module);
                let bias = self.has_bias(module).then_some(o);
                add(module.name(), self.stored_shape(module), bias);
            }
        }
        shapes.push((format!("{}.weight", names.final_norm), vec![d]));
        if names.norms_have_bias {
            shapes.push((format!("{}.bias", names.final_norm), vec![d]));
        }
        if !self.tied_head {
            shapes.push((PartNames::HEAD.to_owned(), vec![self.vocab_size, d]));
        }
        shapes
    }

    /// Number of the weights of all blocks' linear layers.
    pub fn num_linear_weights(&self) -> i64 {
        let shapes = self.modules().iter().map(|&module| self.linear_shape(module));
        self.num_layers * shapes.map(|(i, o)| i * o).sum::<i64>()
    }

    /// Number of parameters of the base; a tied head counts once.
    pub fn num_parameters(&self) -> i64 {
        self.parameter_shapes().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
    }
}
