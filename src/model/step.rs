//! A step of generation by the operations of [`crate::ffi::step`]: each text gets one new position.
//! Its results are those of the blocks of [`super::block`] with a cache. Between blocks, the
//! residual stream is not complete: the output of the last linear layer is kept beside `x`, and the
//! next norm adds it with the layer's bias.
//!
//! Letters of shapes: `b` texts, `d` width, `v` vocabulary.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::RoutedModel;
use super::block::{Factors, MLP_OUT, RoutedBlock};
use super::decoder::context::AttentionMask;
use super::decoder::kv_cache::CachedStep;
use super::decoder::norm::Norm;
use super::decoder::rope::Rotary;
use super::experts::stack::LoraExperts;
use super::fused::pack::FusedProduct;
use super::fused::stream::fused_norm;
use super::routing::pass::RoutingPass;
use super::routing::site::BlockWeights;
use crate::config::{Kernels, RouterInput, RouterScope};
use crate::ffi;
use crate::ffi::cuda::KernelSet;
use crate::ffi::step::{BlockInput, CachedAttention, Counters, Unbiased};
use crate::model::{ForwardOutput, Inputs};

/// The bytes that a thread loads at once.
const PACK_BYTES: i64 = 16;
/// Most columns of a module's rank space, and largest width, for which a block of threads has
/// shared memory.
const MAX_RANKS: i64 = 2048;
const MAX_WIDTH: i64 = 8192;
/// The least number of positions in the layout of repeated steps.
const SHORTEST_STEP: usize = 64;

/// The residual stream between the blocks of a step.
struct StepStream<'a> {
    /// The stream without the pending part, `[b, d]`.
    x: Tensor,
    pending: Option<Pending<'a>>,
}

/// What a block adds to the stream.
struct Pending<'a> {
    /// The output of the block's last linear layer without its bias, `[b, d]`.
    product: Tensor,
    /// The bias of that layer.
    bias: Option<&'a Tensor>,
}

impl StepStream<'_> {
    /// What is to be added to `x`, if anything is.
    fn pending(&self) -> Option<Unbiased<'_>> {
        let Pending { product, bias } = self.pending.as_ref()?;
        Some(Unbiased { product, bias: *bias })
    }

    /// Adds the pending part, and returns the stream and its norm, `[b, d]` each.
    fn normed(&self, norm: &Norm) -> [Tensor; 2] {
        taken(ffi::step::norm(&self.x, self.pending().as_ref(), &fused_norm(norm, 0, 0)))
    }
}

impl<'a> RoutedBlock<'a> {
    /// Applies the block to `stream`.
    fn step(
        self,
        stream: &StepStream<'_>,
        input: &BlockInput<'_>,
        step: &CachedStep,
        rotary: Option<&Rotary>,
        weights: &BlockWeights,
    ) -> StepStream<'a> {
        let factors = self.parameters();
        let products: [_; 4] = std::array::from_fn(|at| self.product(at, weights, &factors));
        let of_block = &self.block.attention;
        let [keys, values] = step.rows(of_block.layer);
        let attention = CachedAttention {
            keys,
            values,
            places: step.places(),
            positions: &step.positions().view([-1]),
            heads: self.heads(),
            rotary: rotary.filter(|_| of_block.rotates).map(Rotary::parameters),
            window: of_block.window,
            scale: of_block.scale,
        };
        let norms = [&self.block.norm_1, &self.block.norm_2].map(|norm| fused_norm(norm, 0, 0));
        let activation = self.activation();
        let block = ffi::step::block(&stream.x, input, &products, &norms, &attention, activation);
        let [x, product] = taken(block);
        StepStream { x, pending: Some(Pending { product, bias: self.last_bias() }) }
    }

    /// The bias of the block's last linear layer, if it has one.
    fn last_bias(self) -> Option<&'a Tensor> {
        let [last] = self.fused_products()[MLP_OUT].members[..] else {
            unreachable!("the last product is one linear layer")
        };
        self.block.linears[&last].bias.as_ref()
    }

    /// `A` and `B^T` of each module with experts, as they are trained.
    fn parameters(self) -> Factors {
        let experts = self.experts.modules.iter();
        let both = |experts: &LoraExperts| {
            (experts.lora_a.shallow_clone(), experts.lora_b.shallow_clone())
        };
        experts.map(|(&module, experts)| (module, both(experts))).collect()
    }
}

impl RoutedModel {
    /// Whether kernels compute steps that give each text one new position. They do so after
    /// [`RoutedModel::prepare_steps`].
    pub(crate) fn steps_by_kernels(&self) -> bool {
        self.has_step_kernels.get() == Some(&true)
    }

    /// Whether the kernels know the model's shape.
    fn fits_step_kernels(&self) -> bool {
        let spec = &self.decoder.spec;
        let bytes_of_head = spec.head_dim * self.kind.elt_size_in_bytes() as i64;
        let has_routers_of_modules = self.routers.spec().scope == RouterScope::Module;
        let fits = |product: &FusedProduct| {
            // in a step, all experts of a product have the same routing weights
            let share_weights = product.experts.len() <= 1 || !has_routers_of_modules;
            product.is_one_product() && share_weights && product.row_padding() <= MAX_RANKS
        };
        let are_known = |products: &[FusedProduct; 4]| products.iter().all(fits);
        self.has_kernels
            && self.fuses_blocks()
            && [4, 8, 16, 32].map(|threads| threads * PACK_BYTES).contains(&bytes_of_head)
            && spec.width <= MAX_WIDTH
            && self.experts.iter().all(|block| block.fused.as_ref().is_some_and(are_known))
    }

    /// Makes the kernels of steps ready and returns whether there are any for this model.
    fn prepare_step_kernels(&self) -> bool {
        let Device::Cuda(device) = self.device() else { return false };
        if !self.fits_step_kernels() {
            return false;
        }
        let width = self.decoder.spec.width;
        let prepared = ffi::cuda::prepare_kernels(device, width, KernelSet::Steps);
        if let Err(error) = &prepared {
            tracing::warn!("no kernels for steps of generation: {error:#}");
        }
        prepared.is_ok()
    }

    /// Whether later steps are the same operations on other numbers, so that a graph can replay
    /// them.
    pub(crate) fn steps_alike(&self) -> bool {
        self.kernels == Kernels::Auto && (self.steps_by_kernels() || !self.skips_experts())
    }

    /// A number of positions for the layout of repeated steps in which no text gets longer than
    /// `longest`. It is rounded up, so that few layouts occur.
    ///
    /// - `capacity`: number of positions for which there is room
    pub(crate) fn step_length(&self, longest: usize, capacity: usize) -> usize {
        let reads_modules = self.routers.spec().input == RouterInput::ModuleInput;
        match self.steps_by_kernels() && !reads_modules {
            // the kernels know how long each text is
            true => capacity,
            false => longest.next_power_of_two().max(SHORTEST_STEP).min(capacity),
        }
    }

    /// Makes the kernels of steps ready. Later steps have the experts as they are now.
    pub fn prepare_steps(&self) {
        if !self.has_step_kernels.get_or_init(|| self.prepare_step_kernels()) {
            return;
        }
        let _no_grad = tch::no_grad_guard();
        for block in self.routed_blocks() {
            let products = block.experts.fused.as_ref().expect("the model steps by kernels");
            let factors = block.factors();
            for product in products {
                for (module, [down, up]) in product.places() {
                    let (a, b) = &factors[&module];
                    let packs = ffi::step::pack([&a.contiguous(), &b.contiguous()], [&down, &up]);
                    let packs = packs.unwrap_or_else(|error| panic!("{error:#}"));
                    assert!(packs, "f32 experts are packed");
                }
            }
        }
    }

    /// The step of `inputs` if kernels compute it.
    pub(super) fn step_of<'i>(&self, inputs: &'i Inputs) -> Option<&'i CachedStep> {
        match &inputs.mask {
            AttentionMask::Cached(step) => {
                let is_single = inputs.input_ids.size()[1] == 1 && !step.is_first();
                (is_single && self.steps_by_kernels()).then_some(step)
            }
            _ => None,
        }
    }

    /// The embeddings of a step, `[b, 1, d]`, if a kernel computes them.
    pub(super) fn embed_step(&self, inputs: &Inputs) -> Option<Tensor> {
        let (tokens, positions) = (&self.decoder.embedding, self.decoder.positions.as_ref());
        if tokens.kind() != self.kind {
            return None;
        }
        let x = ffi::step::embed(tokens, &inputs.input_ids, positions, &inputs.position_ids);
        let x = x.unwrap_or_else(|error| panic!("{error:#}"))?;
        Some(x.unsqueeze(1))
    }

    /// Runs the blocks of a step on the embeddings `x`, `[b, 1, d]`.
    pub(super) fn run_step(
        &self,
        x: &Tensor,
        step: &CachedStep,
        mut pass: RoutingPass<'_>,
    ) -> ForwardOutput {
        let (b, _, d) = x.size3().expect("activations are [b, t, d]");
        let mut stream = StepStream { x: x.reshape([b, d]), pending: None };
        let rotary = self.decoder.rotary();
        for (layer, block) in self.routed_blocks().enumerate() {
            // the first norm is a part of the block unless a router reads it
            let mut normed = None;
            if pass.reads_layers() {
                let [sum, of_sum] = stream.normed(&block.block.norm_1);
                stream = StepStream { x: sum, pending: None };
                normed = Some(of_sum);
            }
            let layer_input = || normed.as_ref().expect("it was computed").view([b, 1, d]);
            let num_decisions = pass.routing.len();
            let g = pass.block(layer, &layer_input).flat(b);
            let pending = stream.pending();
            let input = match (&normed, &pending) {
                (Some(normed), _) => BlockInput::Normed(normed),
                // the router's kernel waits for the embeddings before it lets the norm start
                (None, None) if pass.routing.len() > num_decisions => BlockInput::Beside,
                (None, pending) => BlockInput::Stream(pending.as_ref()),
            };
            stream = block.step(&stream, &input, step, rotary, &g);
        }
        let [_, hidden] = stream.normed(&self.decoder.final_norm);
        let RoutingPass { used, routing, features, .. } = pass;
        ForwardOutput { hidden: hidden.view([b, 1, d]), weights: used, routing, features }
    }

    /// The logits `[b, v]` of hidden states, `[b, d]`, and where a kernel computes it, the most
    /// probable token of each and the logarithm of its probability, f64 `[1, 2, b]`. Logits that
    /// are no numbers count as the smallest.
    ///
    /// With `next`, the kernel also makes the inputs of the next step, and the tokens and
    /// logarithms are in `next.choices`, which is returned.
    pub fn next_tokens(
        &self,
        hidden: &Tensor,
        next: Option<&NextStep<'_>>,
    ) -> (Tensor, Option<Tensor>) {
        let head = self.padded_head.as_ref().unwrap_or(self.decoder.head());
        let logits = hidden.matmul(&head.to_kind(hidden.kind()).tr());
        let v = self.decoder.spec.vocab_size;
        let choice = match logits.kind() {
            Kind::BFloat16 | Kind::Float if self.has_kernels => {
                let counters = next.and_then(NextStep::counters);
                let choice = ffi::step::choice(&logits, v, counters.as_ref());
                choice.unwrap_or_else(|error| panic!("{error:#}"))
            }
            _ => None,
        };
        (logits.narrow(-1, 0, v), choice)
    }
}

/// What a step writes so that the next one can begin before the host has read its tokens.
#[derive(Debug, Clone, Copy)]
pub struct NextStep<'a> {
    /// The inputs of the step, which become those of the next one.
    pub inputs: &'a Inputs,
    /// Where the most probable tokens and the logarithms of their probabilities go, f64
    /// `[2, 2, b]`. Those of texts whose new position has an odd index go to the second half.
    pub choices: &'a Tensor,
}

impl NextStep<'_> {
    /// The numbers that change from step to step.
    fn counters(&self) -> Option<Counters<'_>> {
        match &self.inputs.mask {
            AttentionMask::Cached(step) => Some(Counters {
                ids: &self.inputs.input_ids,
                positions: step.positions(),
                places: step.places(),
                choices: self.choices,
            }),
            _ => None,
        }
    }
}

/// What kernels computed for a model that [`RoutedModel::steps_by_kernels`].
fn taken<T>(result: Result<Option<T>>) -> T {
    let result = result.unwrap_or_else(|error| panic!("{error:#}"));
    result.expect("the kernels know this shape")
}
