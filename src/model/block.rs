//! A block of the base with the experts of its target modules, computed by libtorch's operations
//! one by one (the reference) or by the fused operations.
//!
//! Letters of shapes: `b` batch, `t` position, `M = b t`, `d` width.

use std::collections::BTreeMap;

use tch::Tensor;

use super::decoder::block::Block;
use super::decoder::context::{AttentionContext, AttentionMask};
use super::decoder::mlp::Activation;
use super::decoder::norm::LayerNorm;
use super::experts::dropout::LoraDropout;
use super::experts::stack::LoraExperts;
use super::experts::weights::RoutingWeights;
use super::fused::pack::FusedModule;
use super::fused::stream::Stream;
use super::routing::site::BlockWeights;
use crate::config::{DropoutMasks, TargetModule};
use crate::ffi;
use crate::ffi::fused::{Attention, Experts, Norm, Product};

/// The linear layers of a fused block, in its order.
pub(super) const FUSED_MODULES: [TargetModule; 4] = [
    TargetModule::AttnCAttn,
    TargetModule::AttnCProj,
    TargetModule::MlpCFc,
    TargetModule::MlpCProj,
];

/// `A` and `B^T` of each module with experts, `[R, i]` and `[R, o]`.
pub(super) type Factors = BTreeMap<TargetModule, (Tensor, Tensor)>;

/// The experts of a block.
#[derive(Debug, Default)]
pub struct BlockExperts {
    /// The experts of each module that at least one expert targets.
    pub modules: BTreeMap<TargetModule, LoraExperts>,
    /// What the fused operations need of each of these modules; `None` where they do not compute
    /// the block, because they do not know its family, the base is trained or the config asks for
    /// the reference (`train.kernels`).
    pub fused: Option<BTreeMap<TargetModule, FusedModule>>,
}

impl BlockExperts {
    /// Another handle to the same experts.
    pub fn shallow_clone(&self) -> Self {
        let modules = self.modules.iter().map(|(&m, experts)| (m, experts.shallow_clone()));
        let fused = self.fused.as_ref().map(|modules| {
            modules.iter().map(|(&module, fused)| (module, fused.shallow_clone())).collect()
        });
        Self { modules: modules.collect(), fused }
    }
}

/// A block of the base and its experts.
#[derive(Debug, Clone, Copy)]
pub struct RoutedBlock<'a> {
    /// The block of the base.
    pub block: &'a Block,
    /// Its experts.
    pub experts: &'a BlockExperts,
}

/// Gives the routing weights of a module with experts, by the module's input, `[b, t, i]`.
pub type WeightsOf<'a> = dyn FnMut(TargetModule, &Tensor) -> RoutingWeights + 'a;

/// Receives a module and its output, first without and then with its experts.
pub type Note<'a> = dyn FnMut(TargetModule, &Tensor, &Tensor) + 'a;

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
    /// module skips the experts that a token did not choose.
    pub fn fuses(self, x_btd: &Tensor, g: &BlockWeights, dropout: LoraDropout) -> bool {
        self.experts.modules.iter().all(|(&module, experts)| match g.of(module) {
            RoutingWeights::Chosen(_, assignments) => !experts.skips(x_btd, assignments),
            _ => true,
        }) && self.may_fuse(dropout)
    }

    /// Whether the fused operations may compute this block, whatever its routing weights are.
    pub fn may_fuse(self, dropout: LoraDropout) -> bool {
        self.experts.fused.is_some() && dropout.masks == DropoutMasks::Shared && !self.has_dora()
    }

    /// Whether some expert of the block is a DoRA expert.
    pub fn has_dora(self) -> bool {
        self.experts.modules.values().any(|experts| experts.dora.is_some())
    }

    /// Whether attention within packed documents needs only their lengths, without a mask, for
    /// activations like `x`, `[.., d]`.
    pub fn attends_by_length(self, x: &Tensor) -> bool {
        ffi::fused::attends_by_length(x, self.block.attention.head_dim)
    }

    /// The row padding of `module`: extra columns behind each row of its input and of its output's
    /// gradient.
    pub fn row_padding(self, module: TargetModule) -> i64 {
        let fused = self.experts.fused.as_ref().and_then(|modules| modules.get(&module));
        fused.map_or(0, FusedModule::row_padding)
    }

    /// Applies the block to a stream without a pending part and to the stream's LayerNorm `normed`,
    /// both as [`Stream::normed`] returns them.
    pub fn fused(
        self,
        stream: Stream,
        normed: &Tensor,
        context: &AttentionContext,
        g: &BlockWeights,
        dropout: LoraDropout,
    ) -> Stream {
        let [b, t, _] = stream.shape;
        let (flat, factors) = (g.flat(b * t), self.factors());
        let modules = FUSED_MODULES.map(|at| self.product(at, &flat, &factors));
        let LayerNorm { weight, bias, eps } = self.block.norm_2.layer();
        let second = Norm {
            weight,
            bias,
            eps: *eps,
            row_padding_forward: modules[2].row_padding(),
            row_padding_backward: modules[1].row_padding(),
        };
        let (mask, cu_seqlens, max_len) = match &context.mask {
            AttentionMask::Cached(_) => unreachable!("generation takes the operations one by one"),
            AttentionMask::Causal => (None, None, t),
            AttentionMask::Documents(documents) => {
                // the mask is built only where it is needed
                let by_length = self.attends_by_length(&stream.x);
                let mask = (!by_length).then(|| documents.mask());
                (mask, Some(&documents.cu_seqlens), documents.max_len)
            }
        };
        let attention = Attention {
            batch: b,
            seq: t,
            heads: self.block.attention.num_heads,
            scale: self.block.attention.scale,
            mask,
            cu_seqlens,
            max_len,
        };
        let tanh = self.block.activation == Activation::GeluNew;
        let p = dropout.probability;
        let (x, pending) =
            ffi::fused::block(&stream.x, normed, &modules, &second, &attention, tanh, p)
                .unwrap_or_else(|error| panic!("{error:#}"));
        Stream { x, pending: Some(pending), shape: stream.shape }
    }

    /// `A` and `B^T` of each module with experts, as the fused operations take them.
    pub(super) fn factors(self) -> Factors {
        let experts = self.experts.modules.iter();
        experts.map(|(&module, experts)| (module, experts.factors())).collect()
    }

    /// A linear layer as the fused operations take it. The caller has asked whether they apply.
    ///
    /// - `flat`: the block's routing weights over flattened tokens
    /// - `factors`: what [`RoutedBlock::factors`] returned
    pub(super) fn product<'b>(
        &'b self,
        at: TargetModule,
        flat: &'b BlockWeights,
        factors: &'b Factors,
    ) -> Product<'b> {
        let linear = &self.block.linears[&at];
        let experts = factors.get(&at).and_then(|(a, b)| {
            let g = match flat.of(at) {
                RoutingWeights::Off => return None,
                RoutingWeights::Ones => None,
                RoutingWeights::PerToken(g) | RoutingWeights::Chosen(g, _) => Some(g),
            };
            let FusedModule { columns, packed } = &self.experts.fused.as_ref()?[&at];
            Some(Experts { a, b, g, columns, packed: packed.as_ref() })
        });
        let bias = linear.bias.as_ref().expect("each layer of a GPT-2 has a bias");
        Product { weight: linear.stored(), bias, experts }
    }

    /// The row padding of this block's first LayerNorm, and that of the gradient of what the block
    /// `before` adds to the stream.
    pub fn row_paddings(self, before: Option<Self>) -> (i64, i64) {
        let behind = before.map_or(0, |block| block.row_padding(TargetModule::MlpCProj));
        (self.row_padding(TargetModule::AttnCAttn), behind)
    }

    /// Applies the whole block, with its first LayerNorm and both additions to the residual stream,
    /// to `x`, `[b, t, d]`, and returns the same shape.
    pub fn fused_alone(
        self,
        x: &Tensor,
        context: &AttentionContext,
        g: &BlockWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        let (forward, _) = self.row_paddings(None);
        let (stream, normed) = Stream::new(x).normed(self.block.norm_1.layer(), forward, 0);
        self.fused(stream, &normed, context, g, dropout).whole()
    }
}
