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

use super::quantised::{Quantised, QuantisedWeights};
use super::{TensorPtr, owned, pair};

#[repr(C)]
#[derive(Debug)]
pub(super) struct RawMember {
    weight: TensorPtr,
    bias: TensorPtr,
    expert_of: TensorPtr,
    scaling: TensorPtr,
    runs: TensorPtr,
    rows: TensorPtr,
    a: TensorPtr,
    b: TensorPtr,
    g: TensorPtr,
    single_scaling: f64,
    first_rank: i64,
}

#[repr(C)]
#[derive(Debug)]
pub(super) struct RawProduct {
    members: *const RawMember,
    num_members: i64,
    packed: TensorPtr,
    bias: TensorPtr,
    expert_of: TensorPtr,
    scaling: TensorPtr,
    runs: TensorPtr,
    output_codes: TensorPtr,
    output_scales: TensorPtr,
    input_codes: TensorPtr,
    input_scales: TensorPtr,
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
    query_heads: i64,
    key_heads: i64,
    head_size: i64,
    scale: f64,
    mask: TensorPtr,
    cu_seqlens: TensorPtr,
    max_len: i64,
    window: i64,
    q_norm: TensorPtr,
    k_norm: TensorPtr,
    norm_eps: f64,
    cos: TensorPtr,
    sin: TensorPtr,
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
        products: *const RawProduct,
        norms: *const RawNorm,
        attention: *const RawAttention,
        activation: c_int,
        dropout: f64,
        recomputes: c_int,
        out: *mut *mut C_tensor,
    ) -> c_int;
    fn dylora_dropout(x: TensorPtr, probability: f64) -> *mut C_tensor;
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

/// Maps the routing weights of `e` experts to factors of the columns of a rank space.
#[derive(Debug)]
pub struct RankColumns {
    /// The expert of each column, int32 `[R']`. A module's columns after the first `R` are padding.
    pub expert_of: Tensor,
    /// The scaling of each column, f32 `[R']`; 0 for padding.
    pub scaling: Tensor,
    /// The columns of each expert, which are `n` runs `[first, second)`; int32 `[e, 2 n]`.
    pub runs: Tensor,
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
    /// The scaling where a column belongs to the expert, and otherwise 0; `[e, R]`, in the experts'
    /// dtype.
    pub rows: &'a Tensor,
    /// The scaling of the expert if there is only one.
    pub single_scaling: f64,
    /// The first of the module's columns in the product's rank space.
    pub first_rank: i64,
}

/// A linear layer of a transformer block.
#[derive(Debug)]
pub struct Member<'a> {
    /// The weight `W`, `[i, o]`.
    pub weight: Tensor,
    /// The bias, `[o]`.
    pub bias: Option<&'a Tensor>,
    /// Its experts, if it has any.
    pub experts: Option<Experts<'a>>,
}

/// The weights and the experts of a product in one matrix, as the kernels need them.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// `[W A^T; B^T 0]`, `[i + R', o + R']`, where `R'` and `o` are sums over the members.
    pub matrix: &'a Tensor,
    /// The biases of all members, `[o]`.
    pub bias: Option<&'a Tensor>,
    /// The columns of all members in the product's rank space.
    pub columns: &'a RankColumns,
}

/// Linear layers of a transformer block that read the same input. Their outputs stand beside each
/// other.
#[derive(Debug)]
pub struct Product<'a> {
    /// The linear layers, in order.
    pub members: Vec<Member<'a>>,
    /// What the kernels need; `None` without kernels.
    pub packed: Option<Packed<'a>>,
    /// The quantised weights of all members side by side, if they are to be multiplied with.
    pub quantised: Option<&'a QuantisedWeights>,
}

impl Product<'_> {
    /// The row padding: the number of extra columns at the end of each row of the product's input
    /// and of its output's gradient.
    pub fn row_padding(&self) -> i64 {
        match self.packed {
            Some(packed) if self.has_experts() => packed.columns.expert_of.size()[0],
            _ => 0,
        }
    }

    fn has_experts(&self) -> bool {
        self.members.iter().any(|member| member.experts.is_some())
    }
}

/// A LayerNorm or an RMSNorm.
#[derive(Debug)]
pub struct Norm<'a> {
    /// The weight, `[d]`.
    pub weight: &'a Tensor,
    /// The bias, `[d]`; `None` in an RMSNorm.
    pub bias: Option<&'a Tensor>,
    /// Added to the variance or the mean square.
    pub eps: f64,
    /// [`Product::row_padding`] of the product that reads the output of this norm.
    pub row_padding_forward: i64,
    /// [`Product::row_padding`] of the product whose output is the second summand of the input.
    pub row_padding_backward: i64,
}

/// What happens to queries and keys before attention. Without RoPE and norms, nothing does.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// Number of query heads.
    pub queries: i64,
    /// Number of key-value heads.
    pub keys: i64,
    /// Width `h` of a head.
    pub size: i64,
    /// The weights of the RMSNorms of each query head and each key head, `[h]`, and what is added
    /// to the mean square.
    pub norms: Option<(&'a Tensor, &'a Tensor, f64)>,
    /// Cosines and sines of each token's angles, `[M, h]`, in the dtype of activations.
    pub rotation: Option<(&'a Tensor, &'a Tensor)>,
}

/// The activation of a feed-forward network, as `csrc/mlp.h` numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU in its tanh form.
    TanhGelu = 0,
    /// Exact GELU.
    Gelu = 1,
    /// `silu(gate) * up`.
    SwiGlu = 2,
}

/// The attention of a transformer block.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Number of rows `b`.
    pub batch: i64,
    /// Number of positions `t` in a row.
    pub seq: i64,
    /// The heads, and what happens to queries and keys.
    pub heads: Heads<'a>,
    /// Factor of the attention scores.
    pub scale: f64,
    /// True where attention is allowed, `[b or 1, 1, t, t]`. With `None`, attention is causal,
    /// within the documents of `cu_seqlens` if [`attends_by_length`] holds and otherwise over whole
    /// rows.
    pub mask: Option<&'a Tensor>,
    /// The start of each document in the flattened tokens, followed by `M`; int32. These are the
    /// same documents as in `mask`.
    pub cu_seqlens: Option<&'a Tensor>,
    /// An upper bound of the number of tokens in a document.
    pub max_len: i64,
    /// Number of positions that a position attends to; `None` if there is no limit.
    pub window: Option<i64>,
}

pub(super) fn or_null(tensor: Option<&Tensor>) -> TensorPtr {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

pub(super) fn raw_norm(norm: &Norm<'_>) -> RawNorm {
    RawNorm {
        weight: norm.weight.as_ptr(),
        bias: or_null(norm.bias),
        eps: norm.eps,
        row_padding_forward: norm.row_padding_forward,
        row_padding_backward: norm.row_padding_backward,
    }
}

fn raw_member(member: &Member<'_>) -> RawMember {
    let experts = member.experts.as_ref();
    let columns = experts.map(|experts| experts.columns);
    RawMember {
        weight: member.weight.as_ptr(),
        bias: or_null(member.bias),
        expert_of: or_null(columns.map(|columns| &columns.expert_of)),
        scaling: or_null(columns.map(|columns| &columns.scaling)),
        runs: or_null(columns.map(|columns| &columns.runs)),
        rows: or_null(experts.map(|experts| experts.rows)),
        a: or_null(experts.map(|experts| experts.a)),
        b: or_null(experts.map(|experts| experts.b)),
        g: or_null(experts.and_then(|experts| experts.g)),
        single_scaling: experts.map_or(0.0, |experts| experts.single_scaling),
        first_rank: experts.map_or(0, |experts| experts.first_rank),
    }
}

/// The members of products as the shim takes them.
pub(super) fn raw_members(products: &[Product<'_>]) -> Vec<Vec<RawMember>> {
    products.iter().map(|product| product.members.iter().map(raw_member).collect()).collect()
}

/// Products as the shim takes them.
///
/// - `members`: what [`raw_members`] returned, which must live as long as the result is used
pub(super) fn raw_products(
    products: &[Product<'_>],
    members: &[Vec<RawMember>],
) -> Vec<RawProduct> {
    let raw = products.iter().zip(members).map(|(product, members)| {
        let columns = product.packed.map(|packed| packed.columns);
        let by_output = product.quantised.map(|weights| &weights.by_output);
        let by_input = product.quantised.map(|weights| &weights.by_input);
        let codes = |of: Option<&Quantised>| or_null(of.map(|of| &of.codes));
        let scales = |of: Option<&Quantised>| or_null(of.map(|of| &of.scales));
        RawProduct {
            members: members.as_ptr(),
            num_members: members.len() as i64,
            packed: or_null(product.packed.map(|packed| packed.matrix)),
            bias: or_null(product.packed.and_then(|packed| packed.bias)),
            expert_of: or_null(columns.map(|columns| &columns.expert_of)),
            scaling: or_null(columns.map(|columns| &columns.scaling)),
            runs: or_null(columns.map(|columns| &columns.runs)),
            output_codes: codes(by_output),
            output_scales: scales(by_output),
            input_codes: codes(by_input),
            input_scales: scales(by_input),
        }
    });
    raw.collect()
}

fn raw_attention(attention: &Attention<'_>) -> RawAttention {
    let Heads { queries, keys, size, norms, rotation } = attention.heads;
    RawAttention {
        batch: attention.batch,
        seq: attention.seq,
        query_heads: queries,
        key_heads: keys,
        head_size: size,
        scale: attention.scale,
        mask: or_null(attention.mask),
        cu_seqlens: or_null(attention.cu_seqlens),
        max_len: attention.max_len,
        window: attention.window.unwrap_or(0),
        q_norm: or_null(norms.map(|(q, ..)| q)),
        k_norm: or_null(norms.map(|(_, k, _)| k)),
        norm_eps: norms.map_or(0.0, |(.., eps)| eps),
        cos: or_null(rotation.map(|(cos, _)| cos)),
        sin: or_null(rotation.map(|(_, sin)| sin)),
    }
}

/// The sum `x + y`, or `x` without `y`, and its norm.
///
/// - `x`, `y`: `[M, d]`
pub fn norm(x: &Tensor, y: Option<&Tensor>, norm: &Norm<'_>) -> Result<(Tensor, Tensor)> {
    let raw = raw_norm(norm);
    // SAFETY: live tensors, to which the shim keeps its own references
    pair(|out| unsafe { dylora_fused_norm(x.as_ptr(), or_null(y), &raw, out) })
}

/// Dropout of `x`, `[.., i]`, with gradients. The masks are those that [`block`] draws from the
/// same state of the generator. On a GPU in bf16, they are dylora's own: the probability is rounded
/// to a multiple of 1/65536 there.
pub fn dropout(x: &Tensor, probability: f64) -> Result<Tensor> {
    // SAFETY: `x` is alive during the call
    owned(unsafe { dylora_dropout(x.as_ptr(), probability) })
}

/// Whether attention within documents needs only their lengths and no mask, for activations like
/// `like` and heads of this size.
pub fn attends_by_length(like: &Tensor, head_size: i64) -> bool {
    // SAFETY: `like` is alive during the call
    unsafe { dylora_attends_by_length(like.as_ptr(), head_size) == 1 }
}

/// A transformer block without its weights.
#[derive(Debug)]
pub struct BlockSettings<'a> {
    /// The norm before attention, and that before the feed-forward network.
    pub norms: [Norm<'a>; 2],
    /// Its attention.
    pub attention: Attention<'a>,
    /// The activation of the feed-forward network.
    pub activation: Activation,
    /// The probability of dropping an element of the experts' inputs; all experts of a module share
    /// one mask.
    pub dropout: f64,
    /// Whether the backward pass computes the outputs of the norms and of the activation again,
    /// instead of keeping them.
    pub recomputes: bool,
}

/// Computes a transformer block from after its first norm. The block's output is the sum of the two
/// tensors that are returned.
///
/// - `x`: the residual stream, `[M, d]`
/// - `a`: the norm of `x` by [`norm`], `[M, d]`
/// - `products`: for attention's queries, keys and values, for its output, and for the input and
///   the output of the feed-forward network
pub fn block(
    x: &Tensor,
    a: &Tensor,
    products: &[Product<'_>; 4],
    settings: &BlockSettings<'_>,
) -> Result<(Tensor, Tensor)> {
    let members = raw_members(products);
    let raw_products = raw_products(products, &members);
    let attention = raw_attention(&settings.attention);
    let norms = settings.norms.each_ref().map(raw_norm);
    // SAFETY: four products of live tensors, to which the shim keeps its own references
    pair(|out| unsafe {
        dylora_fused_block(
            x.as_ptr(),
            a.as_ptr(),
            raw_products.as_ptr(),
            norms.as_ptr(),
            &attention,
            settings.activation as c_int,
            settings.dropout,
            c_int::from(settings.recomputes),
            out,
        )
    })
}

/// The settings of [`head_loss`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadLoss {
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
pub(crate) fn head_loss(
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
