//! The fused transformer block and loss of `csrc/block.cpp` and `csrc/head_loss.cpp`: what they compute is said
//! there. All matrices are `[M, n]` with `M = b t` tokens.

use std::ffi::c_int;

use anyhow::Result;
use tch::Tensor;
use torch_sys::C_tensor;

use super::{TensorPtr, check};

#[repr(C)]
struct RawProduct {
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
struct RawNorm {
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

/// How the routing weights of `e` experts become factors of the `R` columns of a module's rank space.
#[derive(Debug)]
pub struct RankColumns {
    /// Each column's expert, int32 `[R']`; `R'` is `R` and what fills it up to a round number.
    pub expert_of: Tensor,
    /// Each column's scaling, f32 `[R']`, 0 for what fills up.
    pub scaling: Tensor,
    /// Each expert's columns, `[first, second)` and `[third, fourth)`, int32 `[e, 4]`.
    pub runs: Tensor,
    /// The scaling where a column is the expert's, else 0: `[e, R]`, in the experts' dtype.
    pub rows: Tensor,
    /// The scaling, if there is a single expert.
    pub single_scaling: f64,
}

/// The experts of a linear layer.
#[derive(Debug)]
pub struct Experts<'a> {
    /// `A`, `[R, i]`.
    pub a: &'a Tensor,
    /// `B^T`, `[R, o]`.
    pub b: &'a Tensor,
    /// Routing weights `[M, e]`; none = all 1. Modules that share them share the tensor.
    pub g: Option<&'a Tensor>,
    /// Their places.
    pub columns: &'a RankColumns,
    /// `[W A^T; B^T 0]`, `[i + R', o + R']`; none without kernels.
    pub packed: Option<&'a Tensor>,
}

/// A linear layer of a block.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[i, o]`.
    pub weight: &'a Tensor,
    /// `[o]`.
    pub bias: &'a Tensor,
    /// Its experts, if it has any.
    pub experts: Option<Experts<'a>>,
}

impl Product<'_> {
    /// Columns that its input and its output's gradient have behind each row.
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
    /// `[d]`.
    pub weight: &'a Tensor,
    /// `[d]`.
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
    /// [`Product::row_padding`] of what reads its output.
    pub row_padding_forward: i64,
    /// [`Product::row_padding`] of what its sum's second part comes from.
    pub row_padding_backward: i64,
}

/// A block's attention.
#[derive(Debug)]
pub struct Attention<'a> {
    /// `b`.
    pub batch: i64,
    /// `t`.
    pub seq: i64,
    /// Heads.
    pub heads: i64,
    /// Factor of the scores.
    pub scale: f64,
    /// True where attention is allowed, `[b, 1, t, t]`; none = wherever it is causal, or by `cu_seqlens`
    /// where [`attends_by_length`].
    pub mask: Option<&'a Tensor>,
    /// Where documents begin in the flattened tokens, then `M`, int32; the same documents as `mask`'s.
    pub cu_seqlens: Option<&'a Tensor>,
    /// Tokens of the longest of these documents, at most.
    pub max_len: i64,
}

fn or_null(tensor: Option<&Tensor>) -> TensorPtr {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

fn raw_norm(norm: &Norm<'_>) -> RawNorm {
    RawNorm {
        weight: norm.weight.as_ptr(),
        bias: norm.bias.as_ptr(),
        eps: norm.eps,
        row_padding_forward: norm.row_padding_forward,
        row_padding_backward: norm.row_padding_backward,
    }
}

fn pair(call: impl FnOnce(*mut *mut C_tensor) -> c_int) -> Result<(Tensor, Tensor)> {
    let mut out = [std::ptr::null_mut(); 2];
    check(call(out.as_mut_ptr()))?;
    // SAFETY: the shim returned two tensors allocated with `new` and gave up their ownership
    Ok(unsafe { (Tensor::from_ptr(out[0]), Tensor::from_ptr(out[1])) })
}

/// `x + y` (or `x`) and its LayerNorm.
///
/// - `x`, `y`: `[M, d]`
pub fn norm(x: &Tensor, y: Option<&Tensor>, norm: &Norm<'_>) -> Result<(Tensor, Tensor)> {
    let raw = raw_norm(norm);
    // SAFETY: live tensors; the shim keeps references of its own
    pair(|out| unsafe { dylora_fused_norm(x.as_ptr(), or_null(y), &raw, out) })
}

/// Whether attention within documents needs their lengths alone, not a mask, for activations like this
/// and heads of this size.
pub fn attends_by_length(like: &Tensor, head_size: i64) -> bool {
    // SAFETY: a live tensor
    unsafe { dylora_attends_by_length(like.as_ptr(), head_size) != 0 }
}

/// A block without its first LayerNorm: two tensors whose sum is the block's output.
///
/// - `x`: the residual stream, `[M, d]`, and `a`: its LayerNorm by [`norm`]
/// - `modules`: `attn.c_attn`, `attn.c_proj`, `mlp.c_fc`, `mlp.c_proj`
/// - `second`: the LayerNorm between
/// - `tanh_gelu`: the tanh form, else the exact one
/// - `dropout`: of the experts' inputs, one mask for all experts of a module
pub fn block(
    x: &Tensor,
    a: &Tensor,
    modules: &[Product<'_>; 4],
    second: &Norm<'_>,
    attention: &Attention<'_>,
    tanh_gelu: bool,
    dropout: f64,
) -> Result<(Tensor, Tensor)> {
    let raw_modules = modules.each_ref().map(|module| {
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
    });
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
    // SAFETY: four modules of live tensors; the shim keeps references of its own
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

/// How [`head_loss`] is taken.
#[derive(Debug, Clone, Copy)]
pub struct HeadLoss {
    /// How many of the head's rows are tokens.
    pub vocabulary: i64,
    /// Share of the target's probability that is spread evenly.
    pub label_smoothing: f64,
    /// Positions whose logits are in memory at once.
    pub chunk_tokens: i64,
}

/// The sum of the positions' cross entropy times `scale`, 0-dim, and each position's without smoothing,
/// `[n]`, nats. A label below 0 counts in neither.
///
/// - `hidden`: `[n, d]`, `head`: `[v', d]`, frozen, `labels`: `[n]`, int64, `scale`: 0-dim
pub fn head_loss(
    hidden: &Tensor,
    head: &Tensor,
    labels: &Tensor,
    scale: &Tensor,
    settings: HeadLoss,
) -> Result<(Tensor, Tensor)> {
    // SAFETY: live tensors; the shim keeps references of its own
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
