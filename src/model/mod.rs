//! RoutedGpt2: a frozen [`gpt2`] base whose linear layers carry [`lora`] experts, mixed per token by
//! routing weights, in one forward pass with every expert active.
//!
//! ```text
//! input_ids, position_ids -> embeddings -> routing -> routing_weights [b, t, e]
//!                                 |                        |  shared by all layers, or one each
//!                                 +-> n_layer blocks: base linear + experts -> ln_f -> loss in chunks
//! ```
//!
//! [`routing`] decides the weights, by a learned [`router`] or otherwise; [`forward`] runs the blocks;
//! [`parameters`] names what is trained and what is saved.
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions, `d` width, `e` expert, `v`
//! vocabulary.

pub mod adapter;
pub mod expert;
pub mod forward;
mod fused;
pub mod gpt2;
pub mod gpt2_config;
pub mod host_inputs;
pub mod inputs;
pub mod lora;
mod lora_forward;
pub mod lora_grouped;
mod lora_init;
pub mod loss;
mod orthogonality;
pub mod parameters;
pub mod router;
pub mod routing;
pub mod routing_totals;
pub mod weights;

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::config::{Config, Dtype, Kernels, ModulePath, RouterScope, TargetModule};
use expert::ExpertSpec;
pub use forward::{ForwardMode, ForwardOutput, ModuleUpdate, Recorder};
use fused::FusedModule;
use gpt2::{Block, Gpt2};
pub use inputs::{Inputs, Rows};
use lora::{LoraExperts, Start};
pub use parameters::{ParameterGroup, Trained, TrainedParameter};
use router::{Router, RouterSpec};
pub use routing::{RoutingSource, Site};

/// A block and the experts of its target modules.
#[derive(Debug)]
struct RoutedBlock {
    block: Block,
    /// Of the modules that some expert targets.
    experts: BTreeMap<TargetModule, LoraExperts>,
    /// What the fused way needs of them; none where the base is trained.
    fused: Option<BTreeMap<TargetModule, FusedModule>>,
}

/// The model: base, experts, routers.
#[derive(Debug)]
pub struct RoutedGpt2 {
    base: Gpt2,
    blocks: Vec<RoutedBlock>,
    specs: Vec<ExpertSpec>,
    /// One, or one for each layer or target module; none with fewer than two experts.
    routers: Vec<Router>,
    router_spec: RouterSpec,
    /// The present temperature of the router's rule, 0-dim, f64, on the device.
    temperature: Tensor,
    /// The experts that each layer routes over, `[m]`; none = all.
    present: Vec<Option<Tensor>>,
    trains_base: bool,
    kind: Kind,
    kernels: Kernels,
    /// The head with rows of zeros behind it, of which `base.lm_head` is a view; with kernels.
    padded_head: Option<Tensor>,
}

/// What a model computes in, and how; of a dtype alone, with [`Kernels::Auto`].
#[derive(Debug, Clone, Copy)]
pub struct Compute {
    /// The dtype of the base and of activations.
    pub kind: Kind,
    /// How forward and backward passes are computed.
    pub kernels: Kernels,
}

impl Compute {
    /// As a config says.
    pub fn of_config(config: &Config) -> Self {
        Self { kind: kind_of(config.base.dtype), kernels: config.train.kernels }
    }
}

impl From<Kind> for Compute {
    fn from(kind: Kind) -> Self {
        Self { kind, kernels: Kernels::Auto }
    }
}

impl RoutedGpt2 {
    /// A base that computes on `device`, without experts. With `trains_base` its
    /// parameters stay in f32 and are trained.
    pub fn plain(
        base: &Gpt2,
        device: Device,
        compute: impl Into<Compute>,
        trains_base: bool,
    ) -> Self {
        let mut model = Self::bare(base, device, compute.into(), trains_base);
        model.prepare_fused();
        model
    }

    /// The same before it is made ready for the fused way.
    fn bare(base: &Gpt2, device: Device, compute: Compute, trains_base: bool) -> Self {
        let Compute { kind, kernels } = compute;
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
            .map(|block| RoutedBlock {
                block: block.shallow_clone(),
                experts: BTreeMap::new(),
                fused: None,
            })
            .collect();
        Self {
            base,
            blocks,
            specs: vec![],
            routers: vec![],
            router_spec: RouterSpec::default(),
            temperature: Tensor::ones([], (Kind::Double, device)),
            present: vec![],
            trains_base,
            kind,
            kernels,
            padded_head: None,
        }
    }

    /// A frozen base with new experts and, for more than one, new routers, all from libtorch's
    /// default CPU generator, so that they are the same for every device.
    pub fn with_experts(
        base: &Gpt2,
        specs: &[ExpertSpec],
        router: &RouterSpec,
        device: Device,
        compute: impl Into<Compute>,
    ) -> Self {
        Self::assemble(base, specs, router, device, compute.into(), Start::Fresh)
    }

    /// A frozen base with the experts and routers of `tensors`, which are all of
    /// [`RoutedGpt2::tensors`].
    ///
    /// # Errors
    /// A missing, extra or misshapen tensor, by name.
    pub fn from_tensors(
        base: &Gpt2,
        specs: &[ExpertSpec],
        router: &RouterSpec,
        tensors: &BTreeMap<String, Tensor>,
        device: Device,
        compute: impl Into<Compute>,
    ) -> Result<Self> {
        let model = Self::assemble(base, specs, router, device, compute.into(), Start::Empty);
        model.load(tensors)?;
        Ok(model)
    }

    fn assemble(
        base: &Gpt2,
        specs: &[ExpertSpec],
        router: &RouterSpec,
        device: Device,
        compute: Compute,
        start: Start,
    ) -> Self {
        let mut model = Self::bare(base, device, compute, false);
        let kind = compute.kind;
        if start == Start::Fresh && specs.iter().any(ExpertSpec::starts_from_base) {
            tracing::info!("factorising the base's weights, where the experts start");
        }
        for (layer, block) in model.blocks.iter_mut().enumerate() {
            for module in TargetModule::ALL {
                let weight = &base.blocks[layer].linears[&module].weight;
                let linear = &block.block.linears[&module];
                let path = ModulePath { layer, module };
                let new = LoraExperts::new(path, specs, weight, linear, wide(kind), start);
                block.experts.extend(new.map(|experts| (module, experts)));
            }
        }
        if specs.len() > 1 {
            let count = match router.scope {
                RouterScope::Shared => 1,
                RouterScope::Layer => model.blocks.len(),
                RouterScope::Module => model.modules().count(),
            };
            let (e, d) = (specs.len() as i64, base.config.n_embd);
            let new = |_| Router::new(router, e, d, wide(kind)).into_leaf(device);
            model.routers = (0..count).map(new).collect();
        }
        model.router_spec = router.clone();
        let _ = model.temperature.fill_(router.temperature);
        model.specs = specs.to_vec();
        model.prepare_fused();
        if router.own_experts {
            let of_layer = |layer| {
                let experts = model.experts_in(layer);
                let experts: Vec<i64> = experts.into_iter().map(|e| e as i64).collect();
                let has_all = experts.len() == specs.len();
                (!has_all && !experts.is_empty())
                    .then(|| Tensor::from_slice(&experts).to_device(device))
            };
            model.present = (0..model.blocks.len()).map(of_layer).collect();
        }
        model
    }

    /// BLAKE3 of what is not trained: the base, and the frozen experts if there are any.
    pub fn frozen_hash(&self) -> Result<String> {
        self.frozen_hash_beside(self.base.hash()?)
    }

    /// [`RoutedGpt2::frozen_hash`], where the hash of the base as it lies on the device is known.
    pub fn frozen_hash_beside(&self, base_hash: String) -> Result<String> {
        let experts = self.frozen_tensors();
        if experts.is_empty() {
            return Ok(base_hash);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(base_hash.as_bytes());
        weights::hash_tensors(&mut hasher, &experts)?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The base.
    pub fn base(&self) -> &Gpt2 {
        &self.base
    }

    /// The experts' settings; none for a bare base.
    pub fn specs(&self) -> &[ExpertSpec] {
        &self.specs
    }

    /// `E`; 0 for a bare base.
    pub fn num_experts(&self) -> i64 {
        self.specs.len() as i64
    }

    /// The routers: one, one for each layer or target module, or none with fewer than two experts.
    pub fn routers(&self) -> &[Router] {
        &self.routers
    }

    /// What the routers are.
    pub fn router_spec(&self) -> &RouterSpec {
        &self.router_spec
    }

    /// The temperature that divides the scores, 0-dim, f64; one tensor for the model's life.
    pub fn temperature(&self) -> &Tensor {
        &self.temperature
    }

    /// Sets the rule by which scores become weights.
    pub fn set_rule(&mut self, temperature: f64, top_k: Option<i64>) {
        if temperature != self.router_spec.temperature {
            let _ = self.temperature.fill_(temperature);
        }
        self.router_spec.temperature = temperature;
        self.router_spec.top_k = top_k;
    }

    /// Where the model is.
    pub fn device(&self) -> Device {
        self.base.wte.device()
    }

    /// The experts of a target module.
    pub fn experts(&self, path: ModulePath) -> Option<&LoraExperts> {
        self.blocks[path.layer].experts.get(&path.module)
    }

    /// Every target module with its experts, in the order of a forward pass.
    pub fn modules(&self) -> impl Iterator<Item = (ModulePath, &LoraExperts)> {
        self.blocks.iter().enumerate().flat_map(|(layer, block)| {
            let experts = block.experts.iter();
            experts.map(move |(&module, experts)| (ModulePath { layer, module }, experts))
        })
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
