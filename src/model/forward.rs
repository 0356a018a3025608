//! The forward pass: embeddings, routing, blocks with experts, loss.
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions, `d` width, `v` vocabulary.

use tch::{Device, Kind, Tensor};

use super::RoutedModel;
use super::batch::prompt_means::RunningMeans;
use super::batch::{GenerationCache, Inputs};
use super::block::{MLP_OUT, RoutedBlock};
use super::cut::Cut;
use super::decoder::context::{AttentionContext, AttentionMask};
use super::decoder::kv_cache::KvCache;
use super::decoder::precision::wide;
use super::experts::stack::LoraExperts;
use super::experts::weights::RoutingWeights;
use super::fused::stream::Stream;
use super::loss::{ChunkedLoss, LossSettings, chunked_cross_entropy};
use super::mode::ForwardMode;
use super::routing::pass::{RoutedParts, RoutingPass};
use super::routing::router::{RouterSpec, Routing, RoutingRule};
use super::routing::site::{BlockWeights, Site};
use super::routing::source::RoutingSource;
use crate::config::{EvalRule, ModulePath, RouterInput, RouterNoise, RoutingLevel};
use crate::ffi;
use crate::ffi::fused::HeadLoss;

/// The result of a forward pass.
#[derive(Debug)]
#[non_exhaustive]
pub struct ForwardOutput {
    /// The last hidden states after the final normalisation, `[b, t, d]`.
    pub hidden: Tensor,
    /// The routing weights used: one entry for all layers, or one for each of
    /// [`RoutedModel::sites`].
    pub weights: Vec<RoutingWeights>,
    /// What the routers did at each of [`RoutedModel::sites`]; empty if no router decided.
    pub routing: Vec<Routing>,
    /// The input of the layer that scores the experts at each site, `[b, t, w]`; empty unless the
    /// mode asks for it.
    pub features: Vec<Tensor>,
}

/// Records what happens inside a forward pass.
#[derive(Debug, Default)]
pub struct Recorder {
    /// The residual stream after the embeddings and after each block, before the final
    /// normalisation: `num_layers + 1` tensors `[b, t, d]`.
    pub hidden_states: Vec<Tensor>,
    /// The target modules whose experts were applied, in the order of the forward pass.
    pub updates: Vec<ModuleUpdate>,
}

/// How much the experts of a module changed its output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModuleUpdate {
    /// The target module.
    pub path: ModulePath,
    /// Frobenius norm of what the experts added, over all tokens.
    pub update_norm: f64,
    /// Frobenius norm of the output with the experts.
    pub output_norm: f64,
}

impl ModuleUpdate {
    /// Norm of the update over the norm of the output; 0 if the output is 0.
    pub fn share(&self) -> f64 {
        if self.output_norm > 0.0 { self.update_norm / self.output_norm } else { 0.0 }
    }
}

impl RoutedModel {
    /// The embeddings, `[b, t, d]`.
    fn embed(&self, inputs: &Inputs) -> Tensor {
        let of_step = self.step_of(inputs).and_then(|_| self.embed_step(inputs));
        let embed = || self.decoder.embed(&inputs.input_ids, &inputs.position_ids, self.kind);
        of_step.unwrap_or_else(embed)
    }

    /// What attention needs of a batch.
    fn context(&self, inputs: &Inputs) -> AttentionContext {
        // built before the mask is cloned, so that all passes over the batch share it
        if let AttentionMask::Documents(documents) = &inputs.mask
            && !self.fuses_blocks()
        {
            documents.mask();
        }
        self.decoder.context(&inputs.mask, &inputs.position_ids, self.kind)
    }

    /// Runs the decoder with its experts and returns the last hidden states, the routing weights
    /// used, and what the routers did.
    pub fn forward(
        &self,
        inputs: &Inputs,
        source: &RoutingSource,
        mode: ForwardMode,
        recorder: Option<&mut Recorder>,
    ) -> ForwardOutput {
        self.forward_cut(inputs, source, mode, recorder, &mut Cut::default())
    }

    /// As [`RoutedModel::forward`], with a cut through the graph.
    fn forward_cut(
        &self,
        inputs: &Inputs,
        source: &RoutingSource,
        mode: ForwardMode,
        recorder: Option<&mut Recorder>,
        cut: &mut Cut,
    ) -> ForwardOutput {
        let x = self.embed(inputs);
        self.with_pass(inputs, &x, source, mode, |pass| {
            self.run_blocks(x.shallow_clone(), inputs, pass, mode, recorder, cut)
        })
    }

    fn rule(&self, mode: ForwardMode) -> RoutingRule {
        let RouterSpec { top_k, renormalize, .. } = *self.routers.spec();
        let top_k = mode.rule.map_or(top_k, EvalRule::top_k);
        let temperature = self.routers.temperature().shallow_clone();
        RoutingRule { temperature, top_k, renormalize, noise: mode.noise }
    }

    /// What the routers do with a batch; empty if there are none.
    ///
    /// Routers that read a layer's own input need the whole forward pass. With both noise and
    /// dropout it is run as well, so that the routers draw the same random numbers as in training.
    pub fn routing(&self, inputs: &Inputs, mode: ForwardMode) -> Vec<Routing> {
        self.routing_by(inputs, &RoutingSource::Router, mode)
    }

    /// The same for any `source`; empty if no router decides.
    pub fn routing_by(
        &self,
        inputs: &Inputs,
        source: &RoutingSource,
        mode: ForwardMode,
    ) -> Vec<Routing> {
        let x = self.embed(inputs);
        self.with_pass(inputs, &x, source, mode, |mut pass| {
            let draws_both = mode.noise != RouterNoise::None && mode.dropout.is_active();
            if pass.reads_layers() || draws_both {
                let (x, cut) = (x.shallow_clone(), &mut Cut::default());
                return self.run_blocks(x, inputs, pass, mode, None, cut).routing;
            }
            for layer in 0..self.experts.len() {
                pass.block(layer, &|| unreachable!("these routers read no layer's input"));
            }
            pass.routing
        })
    }

    /// Calls `run` with the routing by `source` of a batch whose embeddings are `x`, `[b, t, d]`.
    fn with_pass<T>(
        &self,
        inputs: &Inputs,
        x: &Tensor,
        source: &RoutingSource,
        mode: ForwardMode,
        run: impl FnOnce(RoutingPass<'_>) -> T,
    ) -> T {
        let is_step = self.step_of(inputs).is_some();
        let may_skip = |site: Site, k: i64| !is_step && self.may_skip(site, k);
        let parts = RoutedParts {
            routers: &self.routers,
            specs: &self.specs,
            kind: wide(self.kind),
            detaches: mode.detaches_routers,
            keeps_features: mode.keeps_features,
            fuses: self.has_kernels,
            may_skip: &may_skip,
        };
        let base_hidden = || self.base_hidden(inputs, x);
        run(RoutingPass::new(parts, inputs, x, source, self.rule(mode), &base_hidden))
    }

    /// The base's last hidden state, after the final normalisation, for the embeddings `x`: `[b, t,
    /// d]`.
    fn base_hidden(&self, inputs: &Inputs, x: &Tensor) -> Tensor {
        let mode = ForwardMode::EVAL;
        let own = inputs.of_base();
        let inputs = own.as_ref().unwrap_or(inputs);
        self.with_pass(inputs, x, &RoutingSource::Base, mode, |pass| {
            let (x, cut) = (x.shallow_clone(), &mut Cut::default());
            self.run_blocks(x, inputs, pass, mode, None, cut).hidden
        })
    }

    fn run_blocks(
        &self,
        x: Tensor,
        inputs: &Inputs,
        pass: RoutingPass<'_>,
        mode: ForwardMode,
        recorder: Option<&mut Recorder>,
        cut: &mut Cut,
    ) -> ForwardOutput {
        let fuses = self.fuses_blocks() && recorder.is_none() && !pass.reads_modules();
        let is_cached = matches!(inputs.mask, AttentionMask::Cached(_));
        if let Some(step) = self.step_of(inputs)
            && fuses
        {
            return self.run_step(&x, step, pass);
        }
        if fuses && !is_cached && !mode.gradient_checkpointing {
            return self.run_fused(&x, inputs, pass, mode, cut);
        }
        self.run_whole(x, inputs, pass, mode, recorder, cut)
    }

    /// Runs the blocks one by one. Between them, the residual stream is a single tensor.
    fn run_whole(
        &self,
        mut x: Tensor,
        inputs: &Inputs,
        mut pass: RoutingPass<'_>,
        mode: ForwardMode,
        mut recorder: Option<&mut Recorder>,
        cut: &mut Cut,
    ) -> ForwardOutput {
        let context = self.context(inputs);
        for (layer, block) in self.routed_blocks().enumerate() {
            cut.reach(layer, [&mut x], &mut pass);
            let g = match pass.reads_modules() {
                true => None,
                false => Some(pass.block(layer, &|| block.block.norm_1.forward(&x))),
            };
            let mut weights = |module, x: &Tensor| match &g {
                Some(g) => g.of(module).shallow_clone(),
                None => pass.module(layer, module, x),
            };
            if let Some(recorder) = recorder.as_deref_mut() {
                recorder.hidden_states.push(x.shallow_clone());
                let updates = &mut recorder.updates;
                let mut note = |module, without: &Tensor, with: &Tensor| {
                    let exact = |x: &Tensor| x.to_kind(Kind::Double);
                    let norm = |x: Tensor| x.norm().double_value(&[]);
                    let update_norm = norm(exact(with) - exact(without));
                    let output_norm = norm(exact(with));
                    let path = ModulePath { layer, module };
                    updates.push(ModuleUpdate { path, update_norm, output_norm });
                };
                x = block.forward(&x, &context, &mut weights, mode.dropout, Some(&mut note));
            } else if let (true, Some(g)) = (mode.gradient_checkpointing, &g) {
                x = self.checkpointed(block, &x, &context, g, mode);
            } else {
                x = block.forward(&x, &context, &mut weights, mode.dropout, None);
            }
        }
        if let Some(recorder) = recorder {
            recorder.hidden_states.push(x.shallow_clone());
        }
        let RoutingPass { used, routing, features, .. } = pass;
        let hidden = self.decoder.final_norm.forward(&x);
        ForwardOutput { hidden, weights: used, routing, features }
    }

    /// Runs the blocks by the fused operations where these apply. What such a block adds to the
    /// residual stream is added by the next norm.
    fn run_fused(
        &self,
        x: &Tensor,
        inputs: &Inputs,
        mut pass: RoutingPass<'_>,
        mode: ForwardMode,
        cut: &mut Cut,
    ) -> ForwardOutput {
        let context = self.context(inputs);
        let mut stream = Stream::new(x);
        let mut before = None;
        for (layer, block) in self.routed_blocks().enumerate() {
            cut.reach(layer, stream.tensors_mut(), &mut pass);
            let (sum, normed) = if block.may_fuse(mode.dropout) {
                let (forward, backward) = block.row_paddings(before);
                let (sum, normed) = stream.normed(&block.block.norm_1, forward, backward);
                (sum, Some(normed))
            } else {
                (Stream::new(&stream.whole()), None)
            };
            let x = sum.whole();
            let g = pass.block(layer, &|| match &normed {
                Some(normed) => sum.shaped(normed),
                None => block.block.norm_1.forward(&x),
            });
            (stream, before) = match normed {
                Some(normed) if block.fuses(&x, &g, mode.dropout) => {
                    (block.fused(sum, &normed, &context, &g, mode), Some(block))
                }
                _ => {
                    let mut weights = |module, _: &Tensor| g.of(module).shallow_clone();
                    let x = block.forward(&x, &context, &mut weights, mode.dropout, None);
                    (Stream::new(&x), None)
                }
            };
        }
        let backward = before.map_or(0, |block| block.row_padding(MLP_OUT));
        let (_, hidden) = stream.normed(&self.decoder.final_norm, 0, backward);
        let hidden = stream.shaped(&hidden);
        let RoutingPass { used, routing, features, .. } = pass;
        ForwardOutput { hidden, weights: used, routing, features }
    }

    /// Runs one block under gradient checkpointing. Its second run, in the backward pass, draws the
    /// same dropout masks as the first.
    fn checkpointed(
        &self,
        block: RoutedBlock<'_>,
        x: &Tensor,
        context: &AttentionContext,
        g: &BlockWeights,
        mode: ForwardMode,
    ) -> Tensor {
        let dropout = mode.dropout;
        let leaves = block.experts.modules.values().flat_map(LoraExperts::leaves);
        let mut parameters: Vec<Tensor> =
            leaves.filter(|leaf| leaf.requires_grad()).map(Tensor::shallow_clone).collect();
        if self.trains_base {
            let named = block.block.named_parameters(self.decoder.spec.names()).into_iter();
            parameters.extend(named.map(|(_, parameter)| parameter));
        }
        let mut activations = vec![x.shallow_clone()];
        // a block without experts does not use the weights, so it has no gradient for them
        if !block.experts.modules.is_empty() {
            activations.extend(g.tensors());
        }
        if !(block.may_fuse(dropout) && block.attends_by_length(x)) {
            // built before the context is cloned, so that all blocks share it
            context.mask(block.block.attention.window);
        }
        let (base, experts) = (block.block.shallow_clone(), block.experts.shallow_clone());
        let (context, g) = (context.shallow_clone(), g.shallow_clone());
        let device = x.device();
        let rng_before =
            dropout.is_active().then(|| ffi::rng_state(device).expect("every device has one"));
        let has_run = std::cell::Cell::new(false);
        let segment = move |activations: &[Tensor]| {
            let block = RoutedBlock { block: &base, experts: &experts };
            let g = match &activations[1..] {
                [] => g.shallow_clone(),
                tensors => g.with_tensors(tensors),
            };
            let forward = || match block.fuses(&activations[0], &g, dropout) {
                true => block.fused_alone(&activations[0], &context, &g, mode),
                false => {
                    let mut weights = |module, _: &Tensor| g.of(module).shallow_clone();
                    block.forward(&activations[0], &context, &mut weights, dropout, None)
                }
            };
            match &rng_before {
                Some(state) if has_run.get() => with_rng(device, state, forward),
                _ => {
                    has_run.set(true);
                    forward()
                }
            }
        };
        ffi::checkpoint(Box::new(segment), &activations, &parameters)
            .unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Empty caches for `num_rows` texts of at most `capacity` positions that this model generates.
    pub fn generation_cache(&self, num_rows: usize, capacity: usize) -> GenerationCache {
        let new = || KvCache::new(&self.decoder.spec, num_rows, capacity, self.kind, self.device());
        let RouterSpec { input, level, .. } = *self.routers.spec();
        let has_routers = !self.routers.is_empty();
        let reads_base = has_routers && input == RouterInput::BaseHidden;
        let reads_means = has_routers && level == RoutingLevel::Sequence;
        GenerationCache {
            model: new(),
            base: reads_base.then(new),
            means: reads_means.then(RunningMeans::default),
            num_rows,
        }
    }

    /// Logits `[.., v]` of hidden states `[.., d]`. They are all in memory at once, so this is for
    /// few positions only.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        hidden.matmul(&self.decoder.head().to_kind(hidden.kind()).tr())
    }

    /// The loss of a batch's labelled positions, and what the routers did.
    pub fn loss(
        &self,
        inputs: &Inputs,
        source: &RoutingSource,
        mode: ForwardMode,
        settings: LossSettings,
    ) -> (ChunkedLoss, Vec<Routing>) {
        self.loss_cut(inputs, source, mode, settings, &mut Cut::default())
    }

    /// As [`RoutedModel::loss`], with a cut through the graph. What the routers below it did is
    /// returned as the part above it takes it.
    pub(crate) fn loss_cut(
        &self,
        inputs: &Inputs,
        source: &RoutingSource,
        mode: ForwardMode,
        settings: LossSettings,
        cut: &mut Cut,
    ) -> (ChunkedLoss, Vec<Routing>) {
        let output = self.forward_cut(inputs, source, mode, None, cut);
        let d = self.decoder.spec.width;
        let hidden_nd = output.hidden.reshape([-1, d]);
        let hidden_nd = match inputs.every_position {
            true => hidden_nd,
            false => hidden_nd.index_select(0, &inputs.labelled),
        };
        let fused = HeadLoss {
            vocabulary: self.decoder.spec.vocab_size,
            label_smoothing: settings.label_smoothing,
            chunk_tokens: settings.chunk_tokens,
        };
        if let Some((loss, token_losses)) =
            self.fused_loss(&hidden_nd, &inputs.labels, &settings.scale, fused)
        {
            return (ChunkedLoss { loss, token_losses }, output.routing);
        }
        let loss = chunked_cross_entropy(&hidden_nd, self.decoder.head(), &inputs.labels, settings);
        (loss, output.routing)
    }

    /// The scaled sum of the fused loss of hidden states `[n, d]`, and the loss of each position,
    /// `[n]`; `None` if the base is trained or the config asks for the reference.
    fn fused_loss(
        &self,
        hidden: &Tensor,
        labels: &Tensor,
        scale: &Tensor,
        settings: HeadLoss,
    ) -> Option<(Tensor, Tensor)> {
        if !self.uses_fused() {
            return None;
        }
        let head = self.padded_head.as_ref().unwrap_or(self.decoder.head());
        let loss = ffi::fused::head_loss(hidden, head, labels, scale, settings);
        Some(loss.unwrap_or_else(|error| panic!("{error:#}")))
    }
}

/// Runs `f` with the generator in `state` and then restores the generator.
fn with_rng<T>(device: Device, state: &Tensor, f: impl FnOnce() -> T) -> T {
    let now = ffi::rng_state(device).expect("every device has a generator");
    ffi::set_rng_state(device, state).expect("the state came from this generator");
    let result = f();
    ffi::set_rng_state(device, &now).expect("the state came from this generator");
    result
}
