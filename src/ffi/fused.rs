//! The fused transformer block of `csrc/block.cpp` and the fused loss of `csrc/head_loss.cpp`,
//! which define what is computed.
//!
//! Letters of shapes: `M` tokens (`b t`), `b` batch, `t` position, `d` width, `i` in, `o` out, `e`
//! expert, `R` columns of a module's rank space (the sum of its experts' ranks), `R'` is `R`
//! rounded up, `n` positions.

use std::ffi::c_int;

use anyhow::Result;
use tch::Tensor;
use torch_sys::C_tensor;

use super::{TensorPtr, check};

#[repr(C)]
pub(super) struct RawProduct {
    weight: TensorPtr,
    bias: TensorPtr,
    packed: TensorPtr,
    expert_of: TensorPtr,
    scaling: TensorPtr,
    runs: TensorPtr,
    rows: TensorPtr,
    a: TensorPtr,
    b: TensorPtr,
    g: TensorPtr,
    single_scaling: f64,
}

#[repr(C)]
pub(super) struct RawNorm {
    weight: TensorPtr,
    bias: TensorPtr,
    eps: f64,
    row_padding_forward: i64,
    row_padding_backward: i64,
}

#[repr(C)]
struct RawAttention {
    batch: i64,
    seq: i64,
    heads: i64,
    scale: f64,
    mask: TensorPtr,
    cu_seqlens: TensorPtr,
    max_len: i64,
}

unsafe extern "C" {
    fn dylora_fused_norm(
        x: TensorPtr,
        y: TensorPtr,
        norm: *const RawNorm,
        out: *mut *mut C_tensor,
    ) -> c_int;
    fn dylora_fused_block(
        x: TensorPtr,
        a: TensorPtr,
        modules: *const RawProduct,
        norm: *const RawNorm,
        attention: *const RawAttention,
        tanh_gelu: c_int,
        dropout: f64,
        out: *mut *mut C_tensor,
    ) -> c_int;
    fn dylora_attends_by_length(like: TensorPtr, head_size: i64) -> c_int;
    fn dylora_head_loss(
        hidden: TensorPtr,
        head: TensorPtr,
        labels: TensorPtr,
        scale: TensorPtr,
        vocabulary: i64,
        smoothing: f64,
        chunk: i64,
        out: *mut *mut C_tensor,
    ) -> c_int;
}

/// Maps the routing weights of `e` experts to factors of the `R` columns of a module's rank space.
#[derive(Debug)]
pub struct RankColumns {
    /// The expert of each column, int32 `[R']`. The columns after the first `R` are padding.
    pub expert_of: Tensor,
    /// The scaling of each column, f32 `[R']`; 0 for padding.
    pub scaling: Tensor,
    /// The columns of each expert, which are `[first, second)` and `[third, fourth)`; int32
    /// `[e, 4]`.
    pub runs: Tensor,
    /// The scaling where a column belongs to the expert, and otherwise 0; `[e, R]`, in the experts'
    /// dtype.
    pub rows: Tensor,
    /// The scaling of the expert if there is only one.
    pub single_scaling: f64,
}

/// The experts of a linear layer.
#[derive(Debug)]
pub struct Experts<'a> {
    /// The down-projections `A` of all experts, stacked, `[R, i]`.
    pub a: &'a Tensor,
    /// The transposed up-projections `B^T` of all experts, stacked, `[R, o]`.
    pub b: &'a Tensor,
    /// Routing weights `[M, e]`; with `None`, all are 1. Modules with the same weights share the
    /// tensor.
    pub g: Option<&'a Tensor>,
    /// The columns of the experts in the module's rank space.
    pub columns: &'a RankColumns,
    /// The weight and the experts in one matrix, `[W A^T; B^T 0]`, `[i + R', o + R']`; `None`
    /// without kernels.
    pub packed: Option<&'a Tensor>,
}

/// A linear layer of a transformer block.
#[derive(Debug)]
pub struct Product<'a> {
    /// The weight `W`, `[i, o]`.
    pub weight: &'a Tensor,
    /// The bias, `[o]`.
    pub bias: &'a Tensor,
    /// Its experts, if it has any.
    pub experts: Option<Experts<'a>>,
}

impl Product<'_> {
    /// The row padding: the number of extra columns at the end of each row of the layer's input and
    /// of its output's gradient.
    pub fn row_padding(&self) -> i64 {
        match &self.experts {
            Some(Experts { packed: Some(_), columns, .. }) => columns.expert_of.size()[0],
            _ => 0,
        }
    }
}

/// A LayerNorm.
#[derive(Debug)]
pub struct Norm<'a> {
    /// The weight, `[d]`.
    pub weight: &'a Tensor,
    /// The bias, `[d]`.
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
    /// [`Product::row_padding`] of the layer that reads the output of this LayerNorm.
    pub row_padding_forward: i64,
    /// [`Product::row_padding`] of the layer whose output is the second summand of the input.
    pub row_padding_backward: i64,
}

/// The attention of a transformer block.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Number of rows `b`.
    pub batch: i64,
    /// Number of positions `t` in a row.
    pub seq: i64,
    /// Number of heads.
    pub heads: i64,
    /// Factor of the attention scores.
    pub scale: f64,
    /// True where attention is allowed, `[b, 1, t, t]`. With `None`, attention is causal, within
    /// the documents of `cu_seqlens` if [`attends_by_length`] holds and otherwise over whole rows.
    pub mask: Option<&'a Tensor>,
    /// The start of each document in the flattened tokens, followed by `M`; int32. These are the
    /// same documents as in `mask`.
    pub cu_seqlens: Option<&'a Tensor>,
    /// An upper bound of the number of tokens in a document.
    pub max_len: i64,
}

fn or_null(tensor: Option<&Tensor>) -> TensorPtr {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

pub(super) fn raw_norm(norm: &Norm<'_>) -> RawNorm {
    RawNorm {
        weight: norm.weight.as_ptr(),
        bias: norm.bias.as_ptr(),
        eps: norm.eps,
        row_padding_forward: norm.row_padding_forward,
        row_padding_backward: norm.row_padding_backward,
    }
}

pub(super) fn raw_product(module: &Product<'_>) -> RawProduct {
    let experts = module.experts.as_ref();
    let columns = experts.map(|experts| experts.columns);
    RawProduct {
        weight: module.weight.as_ptr(),
        bias: module.bias.as_ptr(),
        packed: or_null(experts.and_then(|experts| experts.packed)),
        expert_of: or_null(columns.map(|columns| &columns.expert_of)),
        scaling: or_null(columns.map(|columns| &columns.scaling)),
        runs: or_null(columns.map(|columns| &columns.runs)),
        rows: or_null(columns.map(|columns| &columns.rows)),
        a: or_null(experts.map(|experts| experts.a)),
        b: or_null(experts.map(|experts| experts.b)),
        g: or_null(experts.and_then(|experts| experts.g)),
        single_scaling: columns.map_or(0.0, |columns| columns.single_scaling),
    }
}

fn pair(call: impl FnOnce(*mut *mut C_tensor) -> c_int) -> Result<(Tensor, Tensor)> {
    let mut out = [std::ptr::null_mut(); 2];
    check(call(out.as_mut_ptr()))?;
    // SAFETY: the shim returned two tensors allocated with `new` and gave up their ownership
    Ok(unsafe { (Tensor::from_ptr(out[0]), Tensor::from_ptr(out[1])) })
}

/// The sum `x + y`, or `x` without `y`, and its LayerNorm.
///
/// - `x`, `y`: `[M, d]`
pub fn norm(x: &Tensor, y: Option<&Tensor>, norm: &Norm<'_>) -> Result<(Tensor, Tensor)> {
    let raw = raw_norm(norm);
    // SAFETY: live tensors, to which the shim keeps its own references
    pair(|out| unsafe { dylora_fused_norm(x.as_ptr(), or_null(y), &raw, out) })
}

/// Whether attention within documents needs only their lengths and no mask, for activations like
/// `like` and heads of this size.
pub fn attends_by_length(like: &Tensor, head_size: i64) -> bool {
    // SAFETY: `like` is alive during the call
    unsafe { dylora_attends_by_length(like.as_ptr(), head_size) == 1 }
}

/// Computes a transformer block from after its first LayerNorm. The block's output is the sum of
/// the two tensors that are returned.
///
/// - `x`: the residual stream, `[M, d]`
/// - `a`: the LayerNorm of `x` by [`norm`], `[M, d]`
/// - `modules`: `attn.c_attn`, `attn.c_proj`, `mlp.c_fc`, `mlp.c_proj`
/// - `second`: the LayerNorm between attention and the feed-forward network
/// - `tanh_gelu`: whether GELU has its tanh form or its exact one
/// - `dropout`: the probability of dropping an element of the experts' inputs; all experts of a
///   module share one mask
pub fn block(
    x: &Tensor,
    a: &Tensor,
    modules: &[Product<'_>; 4],
    second: &Norm<'_>,
    attention: &Attention<'_>,
    tanh_gelu: bool,
    dropout: f64,
) -> Result<(Tensor, Tensor)> {
    let raw_modules = modules.each_ref().map(raw_product);
    let raw_attention = RawAttention {
        batch: attention.batch,
        seq: attention.seq,
        heads: attention.heads,
        scale: attention.scale,
        mask: or_null(attention.mask),
        cu_seqlens: or_null(attention.cu_seqlens),
        max_len: attention.max_len,
    };
    let raw = raw_norm(second);
    // SAFETY: four modules of live tensors, to which the shim keeps its own references
    pair(|out| unsafe {
        dylora_fused_block(
            x.as_ptr(),
            a.as_ptr(),
            raw_modules.as_ptr(),
            &raw,
            &raw_attention,
            c_int::from(tanh_gelu),
            dropout,
            out,
        )
    })
}

/// The settings of [`head_loss`].
#[derive(Debug, Clone, Copy)]
pub struct HeadLoss {
    /// Number of the head's rows that are tokens; they are the first ones.
    pub vocabulary: i64,
    /// Share of the target's probability that is spread evenly over the vocabulary.
    pub label_smoothing: f64,
    /// Number of positions whose logits are in memory at the same time.
    pub chunk_tokens: i64,
}

/// The cross entropy under a frozen head, in nats. Returns the sum over all positions times
/// `scale`, with label smoothing, 0-dim; and the loss of each position without label smoothing,
/// `[n]`. A position whose label is below 0 has loss 0 in both.
///
/// - `hidden`: the hidden states, `[n, d]`
/// - `head`: the frozen head, `[v', d]`, where `v'` is the vocabulary and padding
/// - `labels`: `[n]`, int64
/// - `scale`: 0-dim
pub fn head_loss(
    hidden: &Tensor,
    head: &Tensor,
    labels: &Tensor,
    scale: &Tensor,
    settings: HeadLoss,
) -> Result<(Tensor, Tensor)> {
    // SAFETY: live tensors, to which the shim keeps its own references
    pair(|out| unsafe {
        dylora_head_loss(
            hidden.as_ptr(),
            head.as_ptr(),
            labels.as_ptr(),
            scale.as_ptr(),
            settings.vocabulary,
            settings.label_smoothing,
            settings.chunk_tokens,
            out,
        )
    })
}
