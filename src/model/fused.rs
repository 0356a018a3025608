//! The fused way through a block: the operations of [`crate::ffi::fused`], whose backward passes are
//! written by hand for a frozen base. It computes what [`super::gpt2::Block::forward`] with
//! [`super::lora::LoraExperts::add`] does, which stays as its reference (`train.kernels`).
//!
//! Between blocks the residual stream is a pair, `x` and what the last block adds to it, since the next
//! LayerNorm can add them in passing. On CUDA a module's weight lies in one matrix with its experts' (see
//! `csrc/linear.h`), of which the base's weight is a view, and the head has rows of zeros up to a
//! multiple of 64, without which its products take several times as long.
//!
//! Not fused: DoRA, masks of dropout for each expert, top-k that skips experts, a base that is trained.
//!
//! Letters of shapes: `b` batch, `t` position, `M = b t`, `d` width, `i` in, `o` out, `e` expert, `R` sum
//! of ranks (with those of the initial components), `v` vocabulary.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::gpt2::{AttentionMask, LayerNorm};
use super::gpt2_config::Activation;
use super::lora::{LoraDropout, LoraExperts, RoutingWeights};
use super::routing::BlockWeights;
use super::{RoutedBlock, RoutedGpt2, wide};
use crate::config::{DropoutMasks, Kernels, TargetModule};
use crate::ffi;
use crate::ffi::fused::{Attention, Experts, HeadLoss, Mixing, Module, Norm};

/// Columns of a rank space come in multiples of this: rows of 16 bytes for any dtype.
const COLUMNS: i64 = 8;
/// The most columns of a rank space that the kernels take: a row of it lies in shared memory.
const MAX_COLUMNS: i64 = 4096;
/// Rows of a padded head come in multiples of this.
const HEAD_ROWS: i64 = 64;

/// What the fused way needs of a target module.
#[derive(Debug)]
pub(super) struct FusedModule {
    mixing: Mixing,
    /// `[W A^T; B^T 0]`, `[i + R', o + R']`, with kernels.
    packed: Option<Tensor>,
}

impl FusedModule {
    fn new(experts: &LoraExperts, num_experts: usize, kind: Kind) -> Self {
        let device = experts.lora_a.device();
        let stacked = experts.lora_a.size()[0];
        let initial = experts.initial.as_ref().map_or(0, |(a, _)| a.size()[0]);
        let num_columns = stacked + initial;
        let filled = (num_columns + COLUMNS - 1) / COLUMNS * COLUMNS;
        let (mut expert_of, mut scaling) =
            (vec![0i32; filled as usize], vec![0f32; filled as usize]);
        let mut runs = vec![[0i32; 4]; num_experts];
        let rows = Tensor::zeros([num_experts as i64, num_columns], (Kind::Double, Device::Cpu));
        for slot in &experts.slots {
            let first = (slot.start, slot.start + slot.rank);
            let second = slot.initial.map_or((0, 0), |at| (stacked + at, stacked + at + slot.rank));
            runs[slot.expert] = [first.0, first.1, second.0, second.1].map(|at| at as i32);
            for (from, to) in [first, second] {
                let row = rows.get(slot.expert as i64).narrow(0, from, to - from);
                let _ = row.shallow_clone().fill_(slot.scaling);
                for column in from as usize..to as usize {
                    expert_of[column] = slot.expert as i32;
                    scaling[column] = slot.scaling as f32;
                }
            }
        }
        let mixing = Mixing {
            expert_of: Tensor::from_slice(&expert_of).to_device(device),
            scaling: Tensor::from_slice(&scaling).to_device(device),
            runs: Tensor::from_slice(runs.as_flattened()).view([-1, 4]).to_device(device),
            rows: rows.to_kind(wide(kind)).to_device(device),
            single_scaling: experts.slots[0].scaling,
        };
        Self { mixing, packed: None }
    }

    fn shallow_clone(&self) -> Self {
        let Mixing { expert_of, scaling, runs, rows, single_scaling } = &self.mixing;
        let mixing = Mixing {
            expert_of: expert_of.shallow_clone(),
            scaling: scaling.shallow_clone(),
            runs: runs.shallow_clone(),
            rows: rows.shallow_clone(),
            single_scaling: *single_scaling,
        };
        Self { mixing, packed: self.packed.as_ref().map(Tensor::shallow_clone) }
    }

    /// Puts the base's weight, `[i, o]`, into a packed matrix and returns its place there.
    fn pack(&mut self, weight: &Tensor) -> Tensor {
        let (i, o) = weight.size2().expect("a weight is [i, o]");
        let room = self.mixing.expert_of.size()[0];
        let packed = Tensor::zeros([i + room, o + room], (weight.kind(), weight.device()));
        let mut place = packed.narrow(0, 0, i).narrow(1, 0, o);
        place.copy_(weight);
        self.packed = Some(packed);
        place
    }
}

/// The residual stream between blocks.
#[derive(Debug)]
pub(super) struct Stream {
    /// `[M, d]`.
    x: Tensor,
    /// What is still to be added, `[M, d]`.
    pending: Option<Tensor>,
    /// `[b, t, d]`.
    shape: [i64; 3],
}

impl Stream {
    pub fn new(x_btd: &Tensor) -> Self {
        let (b, t, d) = x_btd.size3().expect("activations are [b, t, d]");
        Self { x: x_btd.reshape([b * t, d]), pending: None, shape: [b, t, d] }
    }

    /// All of it, `[b, t, d]`.
    pub fn whole(&self) -> Tensor {
        match &self.pending {
            None => self.x.view(self.shape),
            Some(pending) => (&self.x + pending).view(self.shape),
        }
    }

    /// The stream without anything pending, and its LayerNorm, `[M, d]`.
    pub fn normed(
        &self,
        norm: &LayerNorm,
        room_forward: i64,
        room_backward: i64,
    ) -> (Self, Tensor) {
        let LayerNorm { weight, bias, eps } = norm;
        let norm = Norm { weight, bias, eps: *eps, room_forward, room_backward };
        let (x, normed) = ffi::fused::norm(&self.x, self.pending.as_ref(), &norm)
            .unwrap_or_else(|error| panic!("{error:#}"));
        (Self { x, pending: None, shape: self.shape }, normed)
    }

    /// `[M, d]` as `[b, t, d]`.
    pub fn shaped(&self, x: &Tensor) -> Tensor {
        x.view(self.shape)
    }
}

impl RoutedBlock {
    /// Whether the fused way computes this block under these weights.
    pub(super) fn fuses(&self, x_btd: &Tensor, g: &BlockWeights, dropout: LoraDropout) -> bool {
        self.experts.iter().all(|(&module, experts)| match g.of(module) {
            RoutingWeights::Chosen(_, assignments) => !experts.skips(x_btd, assignments),
            _ => true,
        }) && self.may_fuse(dropout)
    }

    /// The same whatever the weights are.
    pub(super) fn may_fuse(&self, dropout: LoraDropout) -> bool {
        self.fused.is_some() && dropout.masks == DropoutMasks::Shared && !self.has_dora()
    }

    fn has_dora(&self) -> bool {
        self.experts.values().any(|experts| experts.dora.is_some())
    }

    /// Whether the fused way takes packed documents by their lengths, without a mask; `x` is `[.., d]`.
    pub(super) fn attends_by_length(&self, x: &Tensor) -> bool {
        let d = *x.size().last().expect("activations have a width");
        ffi::fused::attends_by_length(x, d / self.block.n_head)
    }

    /// Columns behind the rows of what `module` reads and of its output's gradient.
    pub(super) fn room(&self, module: TargetModule) -> i64 {
        let fused = self.fused.as_ref().and_then(|modules| modules.get(&module));
        fused.filter(|m| m.packed.is_some()).map_or(0, |m| m.mixing.expert_of.size()[0])
    }

    /// This block of a stream and its first LayerNorm, as [`Stream::normed`] gives them.
    pub(super) fn fused(
        &self,
        stream: Stream,
        normed: &Tensor,
        mask: &AttentionMask,
        g: &BlockWeights,
        dropout: LoraDropout,
    ) -> Stream {
        let [b, t, _] = stream.shape;
        let modules = self.fused.as_ref().expect("the caller asked `fuses`");
        let flat = g.flat(b * t);
        let factors: BTreeMap<_, _> =
            self.experts.iter().map(|(&module, experts)| (module, experts.factors())).collect();
        let module = |at: TargetModule| {
            let linear = &self.block.linears[&at];
            let experts = factors.get(&at).and_then(|(a, b)| {
                let g = match flat.of(at) {
                    RoutingWeights::Off => return None,
                    RoutingWeights::Ones => None,
                    RoutingWeights::PerToken(g) | RoutingWeights::Chosen(g, _) => Some(g),
                };
                let FusedModule { mixing, packed } = &modules[&at];
                Some(Experts { a, b, g, mixing, packed: packed.as_ref() })
            });
            Module { weight: &linear.weight, bias: &linear.bias, experts }
        };
        let modules = TargetModule::ALL.map(module);
        let LayerNorm { weight, bias, eps } = &self.block.ln_2;
        let second = Norm {
            weight,
            bias,
            eps: *eps,
            room_forward: modules[2].room(),
            room_backward: modules[1].room(),
        };
        let (mask, cu_seqlens, max_len) = match mask {
            AttentionMask::Causal => (None, None, t),
            AttentionMask::Documents(documents) => {
                // the mask is made where it is needed only
                let by_length = self.attends_by_length(&stream.x);
                let mask = (!by_length).then(|| documents.mask());
                (mask, Some(&documents.cu_seqlens), documents.max_len)
            }
        };
        let attention = Attention {
            batch: b,
            seq: t,
            heads: self.block.n_head,
            scale: self.block.attention_scale,
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

    /// The room behind this block's first LayerNorm, and behind the gradient of what the block before
    /// adds.
    pub(super) fn rooms(&self, before: Option<&Self>) -> (i64, i64) {
        let behind = before.map_or(0, |block| block.room(TargetModule::MlpCProj));
        (self.room(TargetModule::AttnCAttn), behind)
    }

    /// All of this block alone, `[b, t, d]` to `[b, t, d]`.
    pub(super) fn fused_alone(
        &self,
        x: &Tensor,
        mask: &AttentionMask,
        g: &BlockWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        let (forward, _) = self.rooms(None);
        let (stream, normed) = Stream::new(x).normed(&self.block.ln_1, forward, 0);
        self.fused(stream, &normed, mask, g, dropout).whole()
    }
}

impl RoutedGpt2 {
    /// Makes ready for the fused way, if it is wanted and the base is frozen.
    pub(super) fn prepare_fused(&mut self) {
        if self.trains_base || self.kernels == Kernels::Reference {
            return;
        }
        if self.blocks.iter().any(RoutedBlock::has_dora) {
            tracing::info!("blocks with DoRA experts take libtorch's operations one by one");
        }
        let num_experts = self.specs.len();
        let has_kernels = self.prepare_kernels();
        for layer in 0..self.blocks.len() {
            let block = &mut self.blocks[layer];
            let mut modules = BTreeMap::new();
            for (&module, experts) in &block.experts {
                let mut fused = FusedModule::new(experts, num_experts, self.kind);
                let fits = fused.mixing.expert_of.size()[0] <= MAX_COLUMNS;
                if has_kernels && fits && experts.dora.is_none() {
                    let linear =
                        block.block.linears.get_mut(&module).expect("a block has all four");
                    linear.weight = fused.pack(&linear.weight);
                    let of_base = self.base.blocks[layer].linears.get_mut(&module);
                    of_base.expect("as above").weight = linear.weight.shallow_clone();
                }
                modules.insert(module, fused);
            }
            block.fused = Some(modules);
        }
        if has_kernels {
            self.pad_head();
        }
    }

    /// Whether there are kernels for this model.
    fn prepare_kernels(&self) -> bool {
        let Device::Cuda(device) = self.device() else { return false };
        let (d, inner) = (self.base.config.n_embd, self.base.config.n_inner);
        let fits = d % COLUMNS == 0 && inner % COLUMNS == 0;
        if !fits || !matches!(self.kind, Kind::BFloat16 | Kind::Float) {
            tracing::info!("no kernels for this shape or dtype: libtorch's operations are used");
            return false;
        }
        let prepared = ffi::use_device(self.device());
        match prepared.and_then(|()| ffi::cuda::prepare_kernels(device, d)) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("no kernels, libtorch's operations are used: {error:#}");
                false
            }
        }
    }

    fn pad_head(&mut self) {
        let head = &self.base.lm_head;
        let (v, d) = head.size2().expect("the head is [v, d]");
        let rows = (v + HEAD_ROWS - 1) / HEAD_ROWS * HEAD_ROWS;
        if rows == v {
            return;
        }
        let padded = Tensor::zeros([rows, d], (head.kind(), head.device()));
        let mut place = padded.narrow(0, 0, v);
        place.copy_(head);
        if self.base.config.tied_head {
            self.base.wte = place.shallow_clone();
        }
        self.base.lm_head = place;
        self.padded_head = Some(padded);
    }

    /// The fused loss of hidden states `[n, d]`, or none where the head is trained: the scaled sum, and
    /// each position's, `[n]`.
    pub(super) fn fused_loss(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        scale: &Tensor,
        settings: HeadLoss,
    ) -> Option<(Tensor, Tensor)> {
        if self.trains_base || self.kernels == Kernels::Reference {
            return None;
        }
        let head = self.padded_head.as_ref().unwrap_or(&self.base.lm_head);
        let loss = ffi::fused::head_loss(hidden, head, labels, scale, settings);
        Some(loss.unwrap_or_else(|error| panic!("{error:#}")))
    }
}

impl RoutedBlock {
    /// Another handle to what the fused way needs.
    pub(super) fn clone_fused(&self) -> Option<BTreeMap<TargetModule, FusedModule>> {
        let modules = self.fused.as_ref()?;
        Some(modules.iter().map(|(&module, fused)| (module, fused.shallow_clone())).collect())
    }
}
