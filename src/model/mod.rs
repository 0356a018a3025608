//! RoutedGpt2: a frozen [`gpt2`] base whose linear layers carry [`lora`] experts, mixed per token by a
//! [`router`], in one forward pass with every expert active.
//!
//! ```text
//! input_ids, position_ids -> embeddings -> router -> routing_weights [b, t, e]
//!                                 |                        |  shared by all layers
//!                                 +-> n_layer blocks: base linear + experts -> ln_f -> loss in chunks
//! ```
//!
//! The router reads the embeddings, which do not see other positions, so that the weights at `t`
//! depend on token `t` alone. A router on a layer's own input or on the base's last hidden state
//! takes its place in [`RoutedGpt2::route`].
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions, `d` width, `e` expert, `v`
//! vocabulary.

pub mod gpt2;
pub mod gpt2_config;
pub mod inputs;
pub mod lora;
pub mod loss;
pub mod router;
pub mod weights;

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use crate::config::{Dtype, LoraConfig, RouterConfig, TargetModule};
use crate::ffi;
use gpt2::{AttentionMask, Block, Gpt2};
pub use inputs::{Inputs, Rows};
use lora::{LoraDropout, LoraExperts, RoutingWeights};
use loss::{ChunkedLoss, LossSettings, chunked_cross_entropy};
use router::{Router, Routing};

/// What decides the routing weights of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoutingSource {
    /// The learned router; with one expert, which has none, weight 1.
    Router,
    /// 1 / E for each expert.
    Uniform,
    /// Weight 1 for this expert, 0 for the others.
    Expert(i64),
    /// The base alone.
    Base,
}

/// How a forward pass is carried out.
#[derive(Debug, Clone, Copy)]
pub struct ForwardMode {
    /// Dropout of the experts' inputs.
    pub dropout: LoraDropout,
    /// Keep only each block's input for the backward pass.
    pub gradient_checkpointing: bool,
}

impl ForwardMode {
    /// Without dropout, keeping everything.
    pub const EVAL: Self = Self { dropout: LoraDropout::NONE, gradient_checkpointing: false };
}

/// What a forward pass tells about its inside.
#[derive(Debug, Default)]
pub struct Recorder {
    /// After the embeddings and after each block, before `ln_f`: `n_layer + 1` of `[b, t, d]`.
    pub hidden_states: Vec<Tensor>,
    /// The target modules that received routing weights, as `h.{layer}.{module}`.
    pub routed_modules: Vec<String>,
}

/// A block and the experts of its target modules.
#[derive(Debug)]
pub struct RoutedBlock {
    /// The base's block.
    pub block: Block,
    /// The experts of its target modules; empty without LoRA.
    pub experts: BTreeMap<TargetModule, LoraExperts>,
}

impl RoutedBlock {
    /// `x`, `[b, t, d]`, after this block; `note` hears of each module that used `g`.
    fn forward(
        &self,
        x: &Tensor,
        mask: &AttentionMask,
        g: &RoutingWeights,
        dropout: LoraDropout,
        note: &mut dyn FnMut(TargetModule),
    ) -> Tensor {
        self.block.forward(x, mask, &mut |module, x| {
            let y = self.block.linears[&module].forward(x);
            match self.experts.get(&module) {
                None => y,
                Some(experts) => {
                    if !matches!(g, RoutingWeights::Off) {
                        note(module);
                    }
                    experts.add(y, x, g, dropout)
                }
            }
        })
    }

    fn shallow_clone(&self) -> Self {
        let experts = self.experts.iter().map(|(&m, experts)| (m, experts.shallow_clone()));
        Self { block: self.block.shallow_clone(), experts: experts.collect() }
    }
}

/// Which parameter group a trained parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParameterGroup {
    /// LoRA matrices.
    Adapters,
    /// The router.
    Router,
    /// Matrices of the base (`method = "full"`).
    Base,
    /// Biases, LayerNorms and embeddings of the base, which do not decay.
    BaseNoDecay,
}

/// A parameter that is trained.
#[derive(Debug)]
pub struct TrainedParameter {
    /// `h.{layer}.{module}.lora_a`, `router.weight`, .. or the base's Hugging Face name.
    pub name: String,
    /// The leaf tensor itself.
    pub tensor: Tensor,
    /// Its group.
    pub group: ParameterGroup,
}

/// The model: base, experts, router.
#[derive(Debug)]
pub struct RoutedGpt2 {
    base: Gpt2,
    blocks: Vec<RoutedBlock>,
    router: Option<Router>,
    num_experts: i64,
    trains_base: bool,
    kind: Kind,
}

impl RoutedGpt2 {
    /// A base that computes in `kind` on `device`, without experts. With `trains_base` its
    /// parameters stay in f32 and are trained.
    pub fn plain(base: &Gpt2, device: Device, kind: Kind, trains_base: bool) -> Self {
        let parameter_kind = if trains_base { wide(kind) } else { kind };
        let base = base.to(device, parameter_kind);
        if trains_base {
            for (_, tensor) in base.named_parameters() {
                let _ = tensor.set_requires_grad(true);
            }
        }
        let blocks = base
            .blocks
            .iter()
            .map(|block| RoutedBlock { block: block.shallow_clone(), experts: BTreeMap::new() })
            .collect();
        Self { base, blocks, router: None, num_experts: 0, trains_base, kind }
    }

    /// A frozen base with new experts and, for more than one, a new router, all from libtorch's
    /// default CPU generator, so that they are the same for every device.
    pub fn with_experts(
        base: &Gpt2,
        lora: &LoraConfig,
        router: &RouterConfig,
        device: Device,
        kind: Kind,
    ) -> Self {
        let mut model = Self::plain(base, device, kind, false);
        model.num_experts = lora.num_experts;
        let leaf = |tensor: Tensor| tensor.to_device(device).detach().set_requires_grad(true);
        for block in &mut model.blocks {
            for &module in &lora.target_modules {
                let shape = base.config.linear_shape(module);
                let experts = LoraExperts::new(lora, shape, wide(kind));
                let (lora_a, lora_b) = (leaf(experts.lora_a), leaf(experts.lora_b));
                let experts = LoraExperts { lora_a, lora_b, scaling: experts.scaling };
                block.experts.insert(module, experts);
            }
        }
        if lora.num_experts > 1 {
            let mut router = Router::new(router, lora.num_experts, base.config.n_embd, wide(kind));
            router.weight = leaf(router.weight);
            router.bias = leaf(router.bias);
            model.router = Some(router);
        }
        model
    }

    /// The base.
    pub fn base(&self) -> &Gpt2 {
        &self.base
    }

    /// `E`; 0 for a bare base.
    pub fn num_experts(&self) -> i64 {
        self.num_experts
    }

    /// The router, which a single expert has not.
    pub fn router(&self) -> Option<&Router> {
        self.router.as_ref()
    }

    /// Where the model is.
    pub fn device(&self) -> Device {
        self.base.wte.device()
    }

    /// The experts of a target module.
    pub fn experts(&self, layer: usize, module: TargetModule) -> Option<&LoraExperts> {
        self.blocks[layer].experts.get(&module)
    }

    /// Every trained parameter, in a fixed order.
    pub fn trained_parameters(&self) -> Vec<TrainedParameter> {
        if self.trains_base {
            let named = self.base.named_parameters().into_iter();
            return named.map(|(name, tensor)| base_parameter(name, tensor)).collect();
        }
        let mut parameters = vec![];
        let mut add = |name: String, tensor: &Tensor, group| {
            parameters.push(TrainedParameter { name, tensor: tensor.shallow_clone(), group });
        };
        for (layer, block) in self.blocks.iter().enumerate() {
            for (module, experts) in &block.experts {
                let name = format!("h.{layer}.{}", module.name());
                add(format!("{name}.lora_a"), &experts.lora_a, ParameterGroup::Adapters);
                add(format!("{name}.lora_b"), &experts.lora_b, ParameterGroup::Adapters);
            }
        }
        if let Some(router) = &self.router {
            add("router.weight".into(), &router.weight, ParameterGroup::Router);
            add("router.bias".into(), &router.bias, ParameterGroup::Router);
        }
        parameters
    }

    /// Overwrites the trained parameters with `tensors` of the same names and shapes.
    pub fn load_trained(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut parameters: BTreeMap<String, Tensor> =
            self.trained_parameters().into_iter().map(|p| (p.name, p.tensor)).collect();
        for (name, tensor) in &parameters {
            let Some(source) = tensors.get(name) else { bail!("tensor `{name}` is missing") };
            if source.size() != tensor.size() {
                bail!("tensor `{name}` must be {:?}, got {:?}", tensor.size(), source.size());
            }
        }
        if let Some(extra) = tensors.keys().find(|name| !parameters.contains_key(*name)) {
            bail!("tensor `{extra}` belongs to no parameter of this model");
        }
        tch::no_grad(|| {
            for (name, tensor) in &mut parameters {
                tensor.copy_(&tensors[name]);
            }
        });
        Ok(())
    }

    /// Token plus position embeddings, `[b, t, d]`.
    fn embed(&self, inputs: &Inputs) -> Tensor {
        self.base.embed(&inputs.input_ids, &inputs.position_ids, self.kind)
    }

    /// How the router routes a batch; none where there is no router.
    pub fn route(&self, inputs: &Inputs) -> Option<Routing> {
        self.router.as_ref().map(|router| router.forward(&self.embed(inputs)))
    }

    /// The routing weights that `source` decides on for a batch of `[b, t]`, and the router's part
    /// in it.
    fn routing_weights(
        &self,
        source: RoutingSource,
        embeddings: &Tensor,
    ) -> (RoutingWeights, Option<Routing>) {
        let e = self.num_experts;
        let fixed = |weights_e: Tensor| {
            let (b, t, _) = embeddings.size3().expect("embeddings are [b, t, d]");
            let weights_e = weights_e.to_device(embeddings.device());
            RoutingWeights::PerToken(weights_e.expand([b, t, e], false).contiguous())
        };
        let options = (wide(self.kind), Device::Cpu);
        match (source, &self.router) {
            _ if e == 0 => (RoutingWeights::Off, None),
            (RoutingSource::Base, _) => (RoutingWeights::Off, None),
            (RoutingSource::Uniform, _) => {
                (fixed(Tensor::full([e], 1.0 / e as f64, options)), None)
            }
            (RoutingSource::Expert(expert), _) => {
                let one_hot = Tensor::from(expert).one_hot(e).to_kind(options.0);
                (fixed(one_hot), None)
            }
            (RoutingSource::Router, None) => (RoutingWeights::Ones, None),
            (RoutingSource::Router, Some(router)) => {
                let routing = router.forward(embeddings);
                (RoutingWeights::PerToken(routing.weights.shallow_clone()), Some(routing))
            }
        }
    }

    /// The last hidden states after `ln_f`, `[b, t, d]`, and the routing weights used.
    pub fn forward(
        &self,
        inputs: &Inputs,
        source: RoutingSource,
        mode: ForwardMode,
        recorder: Option<&mut Recorder>,
    ) -> (Tensor, RoutingWeights, Option<Routing>) {
        let embeddings = self.embed(inputs);
        let (weights, routing) = self.routing_weights(source, &embeddings);
        let hidden = self.run_blocks(embeddings, inputs, &weights, mode, recorder);
        (hidden, weights, routing)
    }

    /// The forward pass with routing weights that are given.
    pub fn forward_with(
        &self,
        inputs: &Inputs,
        weights: &RoutingWeights,
        mode: ForwardMode,
    ) -> Tensor {
        self.run_blocks(self.embed(inputs), inputs, weights, mode, None)
    }

    fn run_blocks(
        &self,
        mut x: Tensor,
        inputs: &Inputs,
        g: &RoutingWeights,
        mode: ForwardMode,
        mut recorder: Option<&mut Recorder>,
    ) -> Tensor {
        for (layer, block) in self.blocks.iter().enumerate() {
            if let Some(recorder) = recorder.as_deref_mut() {
                recorder.hidden_states.push(x.shallow_clone());
            }
            let mut note = |module: TargetModule| {
                if let Some(recorder) = recorder.as_deref_mut() {
                    recorder.routed_modules.push(format!("h.{layer}.{}", module.name()));
                }
            };
            x = if mode.gradient_checkpointing {
                self.checkpointed(block, &x, &inputs.mask, g, mode.dropout)
            } else {
                block.forward(&x, &inputs.mask, g, mode.dropout, &mut note)
            };
        }
        if let Some(recorder) = recorder {
            recorder.hidden_states.push(x.shallow_clone());
        }
        self.base.ln_f.forward(&x)
    }

    /// One block under gradient checkpointing; the second run draws the dropout masks of the first.
    fn checkpointed(
        &self,
        block: &RoutedBlock,
        x: &Tensor,
        mask: &AttentionMask,
        g: &RoutingWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        let mut parameters: Vec<Tensor> = vec![];
        for experts in block.experts.values() {
            parameters.extend([experts.lora_a.shallow_clone(), experts.lora_b.shallow_clone()]);
        }
        if self.trains_base {
            parameters.extend(block.block.parameters());
        }
        let mut activations = vec![x.shallow_clone()];
        if let RoutingWeights::PerToken(weights) = g {
            activations.push(weights.shallow_clone());
        }
        let (block, mask, g) = (block.shallow_clone(), mask.shallow_clone(), g.shallow_clone());
        let device = x.device();
        let rng_before = (dropout.probability > 0.0)
            .then(|| ffi::rng_state(device).expect("every device has a generator"));
        let has_run = std::cell::Cell::new(false);
        let segment = move |activations: &[Tensor]| {
            let g = match activations.get(1) {
                Some(weights) => RoutingWeights::PerToken(weights.shallow_clone()),
                None => g.shallow_clone(),
            };
            let forward = || block.forward(&activations[0], &mask, &g, dropout, &mut |_| {});
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

    /// Logits `[.., v]` of hidden states `[.., d]`; for few positions only.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        hidden.matmul(&self.base.lm_head.to_kind(hidden.kind()).tr())
    }

    /// The loss of a batch's labelled positions.
    pub fn loss(
        &self,
        inputs: &Inputs,
        source: RoutingSource,
        mode: ForwardMode,
        settings: LossSettings,
    ) -> (ChunkedLoss, Option<Routing>) {
        let (hidden_btd, _, routing) = self.forward(inputs, source, mode, None);
        let d = self.base.config.n_embd;
        let hidden_nd = hidden_btd.view([-1, d]).index_select(0, &inputs.labelled);
        let loss = chunked_cross_entropy(&hidden_nd, &self.base.lm_head, &inputs.labels, settings);
        (loss, routing)
    }
}

/// libtorch's name of a config's dtype.
pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
    }
}

/// The dtype of what is trained and of what must be precise: f32, or f64 beside an f64 base.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

fn base_parameter(name: String, tensor: Tensor) -> TrainedParameter {
    let embedding = name.contains(".wte.") || name.contains(".wpe.");
    let decays = tensor.dim() == 2 && !embedding;
    let group = if decays { ParameterGroup::Base } else { ParameterGroup::BaseNoDecay };
    TrainedParameter { name, tensor, group }
}

/// Runs `f` from a generator state and leaves the generator as it was.
fn with_rng<T>(device: Device, state: &Tensor, f: impl FnOnce() -> T) -> T {
    let now = ffi::rng_state(device).expect("every device has a generator");
    ffi::set_rng_state(device, state).expect("the state came from this generator");
    let result = f();
    ffi::set_rng_state(device, &now).expect("the state came from this generator");
    result
}
