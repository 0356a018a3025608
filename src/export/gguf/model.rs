//! A whole model: the base's settings, its vocabulary and its tensors.
//!
//! As in llama.cpp's own files, vectors and position embeddings are in f32 whatever the dtype is.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::WholeModel;
use super::architecture::{self, Architecture};
use crate::gguf::{GgufFile, TensorSource, Value};
use crate::model::decoder::Decoder;
use crate::model::decoder::linear::Layout;
use crate::model::decoder::rope::{RopeScaling, RopeSpec};
use crate::model::decoder::spec::DecoderSpec;

/// The file of a whole model.
///
/// # Errors
/// A base or a vocabulary that llama.cpp cannot express.
pub(super) fn file<'a>(whole: &WholeModel<'a>, kind: Kind) -> Result<GgufFile<'a>> {
    let architecture = architecture::of(&whole.base.spec)?;
    let mut metadata = settings(&whole.base.spec, architecture, whole.name, kind);
    metadata.extend(whole.vocabulary.metadata(&whole.base.spec, whole.chat_template)?);
    let tensors = tensors(whole.base, architecture, kind);
    Ok(GgufFile { metadata, tensors })
}

fn settings(
    spec: &DecoderSpec,
    architecture: Architecture,
    name: &str,
    kind: Kind,
) -> Vec<(String, Value)> {
    let file_type = match kind {
        Kind::Half => 1,
        Kind::BFloat16 => 32,
        _ => 0,
    };
    let mut all = vec![
        ("general.architecture".to_owned(), architecture.name.into()),
        ("general.type".to_owned(), "model".into()),
        ("general.name".to_owned(), name.into()),
        ("general.file_type".to_owned(), Value::U32(file_type)),
        ("general.quantization_version".to_owned(), Value::U32(2)),
    ];
    let mut add = |key: &str, value| all.push((format!("{}.{key}", architecture.name), value));
    let counts = [
        ("block_count", spec.num_layers),
        ("context_length", spec.max_positions),
        ("embedding_length", spec.width),
        ("feed_forward_length", spec.inner_width),
        ("vocab_size", spec.vocab_size),
        ("attention.head_count", spec.num_heads),
    ];
    for (key, count) in counts {
        add(key, Value::U32(count as u32));
    }
    let Some(rope) = &spec.rope else {
        add("attention.layer_norm_epsilon", Value::F32(spec.norm_eps as f32));
        return all;
    };
    for (key, count) in [
        ("attention.head_count_kv", spec.num_kv_heads),
        ("attention.key_length", spec.head_dim),
        ("attention.value_length", spec.head_dim),
        ("rope.dimension_count", spec.head_dim),
    ] {
        add(key, Value::U32(count as u32));
    }
    add("attention.layer_norm_rms_epsilon", Value::F32(spec.norm_eps as f32));
    add("rope.freq_base", Value::F32(rope.theta as f32));
    for (key, value) in scaling(rope) {
        add(key, value);
    }
    all
}

/// The settings of a scaling of RoPE. That of Llama 3 is a tensor instead.
fn scaling(rope: &RopeSpec) -> Vec<(&'static str, Value)> {
    match rope.scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => vec![],
        RopeScaling::Linear { factor } => vec![
            ("rope.scaling.type", "linear".into()),
            ("rope.scaling.factor", Value::F32(factor as f32)),
        ],
        RopeScaling::Yarn { factor, original_positions, .. } => vec![
            ("rope.scaling.type", "yarn".into()),
            ("rope.scaling.factor", Value::F32(factor as f32)),
            ("rope.scaling.original_context_length", Value::U32(original_positions as u32)),
        ],
    }
}

/// What the plain frequency of each pair is divided by with Llama 3's scaling, `[h / 2]`.
fn rope_factors(rope: &RopeSpec, head_dim: i64) -> Option<Tensor> {
    if !matches!(rope.scaling, RopeScaling::Llama3 { .. }) {
        return None;
    }
    let plain = RopeSpec { scaling: RopeScaling::Default, ..rope.clone() };
    let scaled = rope.frequencies(head_dim);
    let factors = plain.frequencies(head_dim).into_iter().zip(scaled);
    Some(Tensor::from_slice(&factors.map(|(plain, scaled)| plain / scaled).collect::<Vec<f64>>()))
}

/// Collects the tensors of a file.
struct Tensors<'a> {
    kind: Kind,
    all: Vec<TensorSource<'a>>,
}

impl<'a> Tensors<'a> {
    /// Adds a tensor that is made when it is written.
    fn add(&mut self, name: impl Into<String>, shape: &[i64], make: impl Fn() -> Tensor + 'a) {
        let name = name.into();
        let is_f32 = shape.len() == 1 || name == "position_embd.weight";
        let kind = if is_f32 { Kind::Float } else { self.kind };
        self.all.push(TensorSource { name, shape: shape.to_vec(), kind, make: Box::new(make) });
    }

    fn add_plain(&mut self, name: impl Into<String>, tensor: &'a Tensor) {
        self.add(name, &tensor.size(), || tensor.shallow_clone());
    }

    fn add_norm(&mut self, name: &str, (weight, bias): (&'a Tensor, Option<&'a Tensor>)) {
        self.add_plain(format!("{name}.weight"), weight);
        if let Some(bias) = bias {
            self.add_plain(format!("{name}.bias"), bias);
        }
    }
}

fn tensors(base: &Decoder, architecture: Architecture, kind: Kind) -> Vec<TensorSource<'_>> {
    let spec = &base.spec;
    let mut tensors = Tensors { kind, all: vec![] };
    tensors.add_plain("token_embd.weight", &base.embedding);
    if let Some(positions) = &base.positions {
        tensors.add_plain("position_embd.weight", positions);
    }
    let factors = spec.rope.as_ref().and_then(|rope| rope_factors(rope, spec.head_dim));
    if let Some(factors) = factors {
        tensors.add("rope_freqs.weight", &factors.size(), move || factors.shallow_clone());
    }
    for (layer, block) in base.blocks.iter().enumerate() {
        tensors.add_norm(&format!("blk.{layer}.attn_norm"), block.norm_1.parameters());
        tensors.add_norm(&format!("blk.{layer}.ffn_norm"), block.norm_2.parameters());
        if let Some((query, key)) = &block.attention.qk_norms {
            tensors.add_norm(&format!("blk.{layer}.attn_q_norm"), query.parameters());
            tensors.add_norm(&format!("blk.{layer}.attn_k_norm"), key.parameters());
        }
        for (&module, linear) in &block.linears {
            let name = architecture::linear_name(layer, module);
            let (i, o) = spec.linear_shape(module);
            tensors.add(format!("{name}.weight"), &[o, i], move || {
                let weight = match spec.layout() {
                    Layout::InOut => linear.stored().tr(),
                    Layout::OutIn => linear.stored().shallow_clone(),
                };
                architecture.ordered(spec, module, &weight)
            });
            if let Some(bias) = &linear.bias {
                tensors.add(format!("{name}.bias"), &[o], move || {
                    architecture.ordered(spec, module, bias)
                });
            }
        }
    }
    tensors.add_norm("output_norm", base.final_norm.parameters());
    if !spec.tied_head {
        tensors.add_plain("output.weight", base.head());
    }
    tensors.all
}
