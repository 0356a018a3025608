//! The operations of `csrc/step.cpp`, which make a step of generation: each text gets one new
//! position. They need CUDA kernels; without them, or for shapes that these do not know, each
//! function returns `None`.
//!
//! Letters of shapes: `M` texts, `d` width, `i` in, `o` out, `R` columns of a module's rank space,
//! `R'` the same rounded up, `n` head, `h` width of a head, `v` vocabulary.

use std::ffi::c_int;

use anyhow::Result;
use tch::Tensor;
use torch_sys::C_tensor;

use super::fused::{
    Activation, Heads, Norm, Product, RawNorm, RawProduct, or_null, raw_members, raw_norm,
    raw_products,
};
use super::{TensorPtr, check};

#[repr(C)]
struct RawCache {
    keys: TensorPtr,
    values: TensorPtr,
    places: TensorPtr,
    positions: TensorPtr,
    query_heads: i64,
    key_heads: i64,
    head_size: i64,
    window: i64,
    scale: f64,
    q_norm: TensorPtr,
    k_norm: TensorPtr,
    norm_eps: f64,
    frequencies: TensorPtr,
    rope_factor: f64,
}

unsafe extern "C" {
    fn dylora_step_pack(
        a: TensorPtr,
        b: TensorPtr,
        packed_a: TensorPtr,
        packed_b: TensorPtr,
    ) -> c_int;
    fn dylora_step_embed(
        tokens: TensorPtr,
        ids: TensorPtr,
        positions: TensorPtr,
        position_ids: TensorPtr,
        out: *mut *mut C_tensor,
    ) -> c_int;
    fn dylora_step_norm(
        x: TensorPtr,
        product: TensorPtr,
        bias: TensorPtr,
        norm: *const RawNorm,
        out: *mut *mut C_tensor,
    ) -> c_int;
    fn dylora_step_block(
        x: TensorPtr,
        a: TensorPtr,
        product: TensorPtr,
        bias: TensorPtr,
        beside: c_int,
        norms: *const RawNorm,
        products: *const RawProduct,
        cache: *const RawCache,
        activation: c_int,
        out: *mut *mut C_tensor,
    ) -> c_int;
    fn dylora_step_choice(
        logits: TensorPtr,
        vocabulary: i64,
        ids: TensorPtr,
        positions: TensorPtr,
        places: TensorPtr,
        choices: TensorPtr,
        out: *mut *mut C_tensor,
    ) -> c_int;
}

/// The output of a linear layer without its bias.
#[derive(Debug)]
pub struct Unbiased<'a> {
    /// The output, `[M, d]`.
    pub product: &'a Tensor,
    /// The bias, `[d]`, if the layer has one.
    pub bias: Option<&'a Tensor>,
}

impl Unbiased<'_> {
    /// The product and the bias as the shim takes them.
    fn raw(y: Option<&Self>) -> [TensorPtr; 2] {
        [or_null(y.map(|y| y.product)), or_null(y.and_then(|y| y.bias))]
    }
}

/// The attention of a block to a cache.
#[derive(Debug)]
pub struct CachedAttention<'a> {
    /// The keys of the texts, `[M, n, positions, h]`.
    pub keys: &'a Tensor,
    /// The values of the texts, in the same shape.
    pub values: &'a Tensor,
    /// Where each text's new position goes in its row, int64, `M` numbers.
    pub places: &'a Tensor,
    /// The index of each text's new position in its text, int64 `[M]`.
    pub positions: &'a Tensor,
    /// The heads, without a rotation.
    pub heads: Heads<'a>,
    /// The frequencies of rotation, f32 `[h / 2]`, and a factor of cosines and sines; `None`
    /// without rotation.
    pub rotary: Option<(&'a Tensor, f64)>,
    /// Number of positions that a position attends to; `None` if there is no limit.
    pub window: Option<i64>,
    /// Factor of the scores.
    pub scale: f64,
}

/// The tensors that a call returned, unless no kernel applies.
pub(super) fn outputs<const N: usize>(
    call: impl FnOnce(*mut *mut C_tensor) -> c_int,
) -> Result<Option<[Tensor; N]>> {
    let mut out = [std::ptr::null_mut(); N];
    let status = call(out.as_mut_ptr());
    check(status)?;
    // SAFETY: with status 0, the shim returned tensors allocated with `new` and gave up their
    // ownership
    Ok((status == 0).then(|| out.map(|pointer| unsafe { Tensor::from_ptr(pointer) })))
}

/// Writes experts, `A` `[R, i]` and `B^T` `[R, o]` in f32, to their places in the packed weight of
/// their product, `[i, R']` and `[R', o]`. Returns whether there is a kernel for it.
pub fn pack([a, b]: [&Tensor; 2], [packed_a, packed_b]: [&Tensor; 2]) -> Result<bool> {
    // SAFETY: live tensors, of which the shim only reads the first two and fills the others
    let status =
        unsafe { dylora_step_pack(a.as_ptr(), b.as_ptr(), packed_a.as_ptr(), packed_b.as_ptr()) };
    check(status)?;
    Ok(status == 0)
}

/// The embeddings of tokens, `[M, d]`, in the table's dtype. Those of their positions are added if
/// there are any.
///
/// - `tokens`, `positions`: the tables, `[v, d]` and `[_, d]`
/// - `ids`, `position_ids`: int64, `M` numbers each
pub fn embed(
    tokens: &Tensor,
    ids: &Tensor,
    positions: Option<&Tensor>,
    position_ids: &Tensor,
) -> Result<Option<Tensor>> {
    // SAFETY: live tensors, to which the shim keeps its own references, or null
    let x = outputs(|out| unsafe {
        dylora_step_embed(
            tokens.as_ptr(),
            ids.as_ptr(),
            or_null(positions),
            position_ids.as_ptr(),
            out,
        )
    })?;
    Ok(x.map(|[x]| x))
}

/// The sum `x + y`, or `x` without `y`, and its norm, `[M, d]` each.
///
/// - `x`: `[M, d]`
pub fn norm(x: &Tensor, y: Option<&Unbiased<'_>>, norm: &Norm<'_>) -> Result<Option<[Tensor; 2]>> {
    let raw = raw_norm(norm);
    let [product, bias] = Unbiased::raw(y);
    // SAFETY: live tensors, to which the shim keeps its own references
    outputs(|out| unsafe { dylora_step_norm(x.as_ptr(), product, bias, &raw, out) })
}

/// What a block reads besides the residual stream `x`.
#[derive(Debug)]
pub enum BlockInput<'a> {
    /// The first norm of `x`, `[M, d]`.
    Normed(&'a Tensor),
    /// What is to be added to `x` first, if anything is.
    Stream(Option<&'a Unbiased<'a>>),
    /// Nothing is to be added. The operation in front does not write `x`, and lets this one start
    /// only when `x` is complete, so the norm of `x` may be computed beside it.
    Beside,
}

/// Computes a transformer block, and adds the new keys and values to the cache. Returns the
/// residual stream, `[M, d]`, and the output of the block's last linear layer without its bias,
/// `[M, d]`. That output and the bias are not in the stream yet ([`Unbiased`]).
///
/// - `x`: the residual stream, `[M, d]`
/// - `products`: as in [`super::fused::block`]
/// - `norms`: those before attention and before the feed-forward network
pub fn block(
    x: &Tensor,
    input: &BlockInput<'_>,
    products: &[Product<'_>; 4],
    norms: &[Norm<'_>; 2],
    attention: &CachedAttention<'_>,
    activation: Activation,
) -> Result<Option<[Tensor; 2]>> {
    let members = raw_members(products);
    let raw_products = raw_products(products, &members);
    let raw_norms = norms.each_ref().map(raw_norm);
    let (normed, before) = match input {
        BlockInput::Normed(normed) => (normed.as_ptr(), None),
        BlockInput::Stream(before) => (std::ptr::null(), *before),
        BlockInput::Beside => (std::ptr::null(), None),
    };
    let beside = c_int::from(matches!(input, BlockInput::Beside));
    let [product, bias] = Unbiased::raw(before);
    let Heads { queries, keys, size, norms, .. } = attention.heads;
    let cache = RawCache {
        keys: attention.keys.as_ptr(),
        values: attention.values.as_ptr(),
        places: attention.places.as_ptr(),
        positions: attention.positions.as_ptr(),
        query_heads: queries,
        key_heads: keys,
        head_size: size,
        window: attention.window.unwrap_or(0),
        scale: attention.scale,
        q_norm: or_null(norms.map(|(q, ..)| q)),
        k_norm: or_null(norms.map(|(_, k, _)| k)),
        norm_eps: norms.map_or(0.0, |(.., eps)| eps),
        frequencies: or_null(attention.rotary.map(|(frequencies, _)| frequencies)),
        rope_factor: attention.rotary.map_or(1.0, |(_, factor)| factor),
    };
    // SAFETY: two norms and four products of live tensors, to which the shim keeps its own
    // references
    outputs(|out| unsafe {
        dylora_step_block(
            x.as_ptr(),
            normed,
            product,
            bias,
            beside,
            raw_norms.as_ptr(),
            raw_products.as_ptr(),
            &cache,
            activation as c_int,
            out,
        )
    })
}

/// What a step leaves for the next one and for the host.
#[derive(Debug)]
pub struct Counters<'a> {
    /// The id of each text's new token, int64, `M` numbers.
    pub ids: &'a Tensor,
    /// Its index in the text, int64, `M` numbers.
    pub positions: &'a Tensor,
    /// Its place in the text's row of the cache, int64, `M` numbers.
    pub places: &'a Tensor,
    /// The results, f64 `[2, 2, M]`. Those of a text with an odd index go to the second half, so
    /// that they can be read while the next step runs.
    pub choices: &'a Tensor,
}

/// The most probable token of each text, and below it the logarithm of its probability, f64
/// `[1, 2, M]`. Of equally probable tokens, the first counts.
///
/// With `counters`, the results are written to `counters.choices`, which is returned. The tokens
/// become those of the next step, and then indices and places are raised by 1.
///
/// - `logits`: `[M, v']`, where the first `vocabulary` columns are tokens
pub fn choice(
    logits: &Tensor,
    vocabulary: i64,
    counters: Option<&Counters<'_>>,
) -> Result<Option<Tensor>> {
    let [ids, positions, places, choices] = match counters {
        Some(Counters { ids, positions, places, choices }) => {
            [ids, positions, places, choices].map(|x| x.as_ptr())
        }
        None => [std::ptr::null(); 4],
    };
    // SAFETY: a live tensor, to which the shim keeps its own reference, and four that it changes
    // or null
    let choice = outputs(|out| unsafe {
        dylora_step_choice(logits.as_ptr(), vocabulary, ids, positions, places, choices, out)
    })?;
    Ok(choice.map(|[choice]| choice))
}
