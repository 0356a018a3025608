//! A block of the base with the experts of its target modules, computed by libtorch's operations
//! one by one (the reference) or by the fused operations.
//!
//! Letters of shapes: `b` batch, `t` position, `M = b t`, `d` width.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::decoder::block::Block;
use super::decoder::context::{AttentionContext, AttentionMask};
use super::decoder::mlp::Activation;
use super::decoder::rope::Rotation;
use super::experts::dropout::LoraDropout;
use super::experts::stack::LoraExperts;
use super::experts::weights::RoutingWeights;
use super::fused::pack::FusedProduct;
use super::fused::stream::{Stream, fused_norm};
use super::mode::ForwardMode;
use super::routing::site::BlockWeights;
use crate::config::{BaseProducts, DropoutMasks, TargetModule};
use crate::ffi::fused::{self, Attention, BlockSettings, Experts, Heads, Member, Product};

// The places of products in a block (`DecoderSpec::products`).
const QKV: usize = 0;
const ATTENTION_OUT: usize = 1;
const MLP_IN: usize = 2;
/// The place of the product whose output ends a block.
pub(super) const MLP_OUT: usize = 3;

/// `A` and `B^T` of each module with experts, `[R, i]` and `[R, o]`.
pub(super) type Factors = BTreeMap<TargetModule, (Tensor, Tensor)>;

/// The experts of a block.
#[derive(Debug, Default)]
pub(crate) struct BlockExperts {
    /// The experts of each module that at least one expert targets.
    pub modules: BTreeMap<TargetModule, LoraExperts>,
    /// What the fused operations need of the block's products; `None` where they do not compute it,
    /// because the base is trained, the config asks for the reference (`train.kernels`) or the base
    /// is like Llama and on the CPU.
    pub fused: Option<[FusedProduct; 4]>,
}

impl BlockExperts {
    /// Another handle to the same experts.
    pub fn shallow_clone(&self) -> Self {
        let modules = self.modules.iter().map(|(&m, experts)| (m, experts.shallow_clone()));
        let fused = self.fused.as_ref();
        let fused = fused.map(|products| products.each_ref().map(FusedProduct::shallow_clone));
        Self { modules: modules.collect(), fused }
    }
}

/// A block of the base and its experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RoutedBlock<'a> {
    /// The block of the base.
    pub block: &'a Block,
    /// Its experts.
    pub experts: &'a BlockExperts,
}

/// Gives the routing weights of a module with experts, by the module's input, `[b, t, i]`.
pub(crate) type WeightsOf<'a> = dyn FnMut(TargetModule, &Tensor) -> RoutingWeights + 'a;

/// Receives a module and its output, first without and then with its experts.
pub(crate) type Note<'a> = dyn FnMut(TargetModule, &Tensor, &Tensor) + 'a;

impl RoutedBlock<'_> {
    /// Applies the block to `x`, `[b, t, d]`, and returns the same shape. `note` is called for each
    /// module whose experts were applied.
    pub fn forward(
        self,
        x: &Tensor,
        context: &AttentionContext,
        weights: &mut WeightsOf<'_>,
        dropout: LoraDropout,
        mut note: Option<&mut Note<'_>>,
    ) -> Tensor {
        self.block.forward(x, context, &mut |module, x| {
            let linear = &self.block.linears[&module];
            let y = linear.forward(x);
            let Some(experts) = self.experts.modules.get(&module) else { return y };
            let g = &weights(module, x);
            if matches!(g, RoutingWeights::Off) {
                return y;
            }
            match note.as_deref_mut() {
                None => experts.add(y, x, linear, g, dropout),
                Some(note) => {
                    let sum = experts.add(y.shallow_clone(), x, linear, g, dropout);
                    note(module, &y, &sum);
                    sum
                }
            }
        })
    }

    /// Whether the fused operations compute this block with these routing weights. They do not if a
    /// module skips the experts that a token did not choose, or if only some members of a product
    /// have their experts switched on.
    pub(crate) fn fuses(self, x_btd: &Tensor, g: &BlockWeights, dropout: LoraDropout) -> bool {
        let skips = self.experts.modules.iter().any(|(&module, experts)| match g.of(module) {
            RoutingWeights::Chosen(_, assignments) => experts.skips(x_btd, assignments),
            _ => false,
        });
        let is_off = |module: &TargetModule| matches!(g.of(*module), RoutingWeights::Off);
        let is_mixed = |product: &FusedProduct| {
            let off = product.experts.keys().filter(|module| is_off(module)).count();
            off > 0 && off < product.experts.len()
        };
        !skips && self.may_fuse(dropout) && !self.fused_products().iter().any(is_mixed)
    }

    pub(super) fn fused_products(&self) -> &[FusedProduct] {
        self.experts.fused.as_ref().map_or(&[], |products| products)
    }

    /// Whether the fused operations may compute this block, whatever its routing weights are.
    pub(crate) fn may_fuse(self, dropout: LoraDropout) -> bool {
        self.experts.fused.is_some() && dropout.masks == DropoutMasks::Shared && !self.has_dora()
    }

    /// Whether some expert of the block is a DoRA expert.
    pub(crate) fn has_dora(self) -> bool {
        self.experts.modules.values().any(|experts| experts.dora.is_some())
    }

    /// Whether attention within packed documents needs only their lengths, without a mask, for
    /// activations like `x`, `[.., d]`.
    pub(crate) fn attends_by_length(self, x: &Tensor) -> bool {
        fused::attends_by_length(x, self.block.attention.head_dim)
    }

    /// The row padding of a product: extra columns behind each row of its input and of its output's
    /// gradient.
    pub(super) fn row_padding(self, product: usize) -> i64 {
        self.fused_products().get(product).map_or(0, FusedProduct::row_padding)
    }

    /// Applies the block to a stream without a pending part and to the stream's norm `normed`, both
    /// as [`Stream::normed`] returns them.
    pub fn fused(
        self,
        stream: Stream,
        normed: &Tensor,
        context: &AttentionContext,
        g: &BlockWeights,
        mode: ForwardMode,
    ) -> Stream {
        let [b, t, _] = stream.shape;
        let (flat, factors) = (g.flat(b * t), self.factors());
        let quantises = mode.base_products == BaseProducts::Fp8;
        let products: [_; 4] = std::array::from_fn(|at| {
            let quantised = quantises.then(|| self.fused_products()[at].quantised());
            let quantised = quantised.map(|weights| weights.expect("the base is quantised"));
            Product { quantised, ..self.product(at, &flat, &factors) }
        });
        let attends = &self.block.attention;
        let rotation = context.rotation.as_ref().filter(|_| attends.rotates);
        let rotation = rotation.map(Rotation::flat);
        let heads =
            Heads { rotation: rotation.as_ref().map(|(cos, sin)| (cos, sin)), ..self.heads() };
        let by_length = self.attends_by_length(&stream.x);
        let window = attends.window.filter(|_| context.is_windowed(attends.window));
        let lengths = Lengths::new(&context.mask, window, stream.shape, &stream.x, by_length);
        let settings = BlockSettings {
            norms: [
                fused_norm(&self.block.norm_1, products[QKV].row_padding(), 0),
                fused_norm(
                    &self.block.norm_2,
                    products[MLP_IN].row_padding(),
                    products[ATTENTION_OUT].row_padding(),
                ),
            ],
            attention: Attention {
                batch: b,
                seq: t,
                heads,
                scale: attends.scale,
                // the mask is built only where it is needed
                mask: if by_length { None } else { context.mask(attends.window) },
                cu_seqlens: lengths.cu_seqlens.as_ref(),
                max_len: lengths.max_len,
                window,
            },
            activation: self.activation(),
            dropout: mode.dropout.probability,
            recomputes: self.block.activation == Activation::Silu,
        };
        let (x, pending) = fused::block(&stream.x, normed, &products, &settings)
            .unwrap_or_else(|error| panic!("{error:#}"));
        Stream { x, pending: Some(pending), shape: stream.shape }
    }

    /// The heads as the fused operations take them, without a rotation.
    pub(super) fn heads(&self) -> Heads<'_> {
        let attends = &self.block.attention;
        let norms = attends.qk_norms.as_ref();
        Heads {
            queries: attends.num_heads,
            keys: attends.num_kv_heads,
            size: attends.head_dim,
            norms: norms.map(|(q, k)| (q.parameters().0, k.parameters().0, q.eps())),
            rotation: None,
        }
    }

    /// The activation as the fused operations number it.
    pub(super) fn activation(self) -> fused::Activation {
        match self.block.activation {
            Activation::GeluNew => fused::Activation::TanhGelu,
            Activation::Gelu => fused::Activation::Gelu,
            Activation::Silu => fused::Activation::SwiGlu,
        }
    }

    /// `A` and `B^T` of each module with experts, as the fused operations take them.
    pub(super) fn factors(self) -> Factors {
        let experts = self.experts.modules.iter();
        experts.map(|(&module, experts)| (module, experts.factors())).collect()
    }

    /// A product as the fused operations take it. The caller has asked whether they apply.
    ///
    /// - `at`: its place in the block
    /// - `flat`: the block's routing weights over flattened tokens
    /// - `factors`: what [`RoutedBlock::factors`] returned
    pub(super) fn product<'b>(
        &'b self,
        at: usize,
        flat: &'b BlockWeights,
        factors: &'b Factors,
    ) -> Product<'b> {
        let product = &self.fused_products()[at];
        let members = product.members.iter().map(|&module| {
            let linear = &self.block.linears[&module];
            let experts = factors.get(&module).and_then(|(a, b)| {
                let g = match flat.of(module) {
                    RoutingWeights::Off => return None,
                    RoutingWeights::Ones => None,
                    RoutingWeights::PerToken(g) | RoutingWeights::Chosen(g, _) => Some(g),
                };
                let fused = product.experts.get(&module)?;
                Some(Experts {
                    a,
                    b,
                    g,
                    columns: &fused.columns,
                    rows: &fused.rows,
                    single_scaling: fused.single_scaling,
                    first_rank: fused.first_rank,
                })
            });
            Member { weight: linear.weight(), bias: linear.bias.as_ref(), experts }
        });
        Product { members: members.collect(), packed: product.packed(), quantised: None }
    }

    /// The row padding of this block's first norm, and that of the gradient of what the block
    /// `before` adds to the stream.
    pub(crate) fn row_paddings(self, before: Option<Self>) -> (i64, i64) {
        let behind = before.map_or(0, |block| block.row_padding(MLP_OUT));
        (self.row_padding(QKV), behind)
    }

    /// Applies the whole block, with its first norm and both additions to the residual stream,
    /// to `x`, `[b, t, d]`, and returns the same shape.
    pub(crate) fn fused_alone(
        self,
        x: &Tensor,
        context: &AttentionContext,
        g: &BlockWeights,
        mode: ForwardMode,
    ) -> Tensor {
        let (forward, _) = self.row_paddings(None);
        let (stream, normed) = Stream::new(x).normed(&self.block.norm_1, forward, 0);
        self.fused(stream, &normed, context, g, mode).whole()
    }
}

/// Where attention by lengths finds its documents.
struct Lengths {
    /// As [`Attention::cu_seqlens`].
    cu_seqlens: Option<Tensor>,
    max_len: i64,
}

impl Lengths {
    fn new(
        mask: &AttentionMask,
        window: Option<i64>,
        [b, t, _]: [i64; 3],
        like: &Tensor,
        by_length: bool,
    ) -> Self {
        match mask {
            AttentionMask::Cached(_) => unreachable!("generation takes the operations one by one"),
            AttentionMask::Documents(documents) => Self {
                cu_seqlens: Some(documents.cu_seqlens.shallow_clone()),
                max_len: documents.max_len,
            },
            // each row is a document
            AttentionMask::Causal if window.is_some() && by_length => Self {
                cu_seqlens: Some(Tensor::arange_start_step(
                    0,
                    (b + 1) * t,
                    t,
                    (Kind::Int, like.device()),
                )),
                max_len: t,
            },
            AttentionMask::Causal => Self { cu_seqlens: None, max_len: t },
        }
    }
}
