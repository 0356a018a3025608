//! The model: a frozen base ([`decoder`]) whose linear layers carry LoRA [`experts`]. One forward
//! pass applies the experts, mixed for each token by routing weights.
//!
//! ```text
//! input_ids, position_ids -> embeddings -> routing -> routing_weights [b, t, e]
//!                             |                        |  shared, or for each layer or module
//!                             +-> blocks: base linear + experts -> final norm -> loss in chunks
//! ```
//!
//! [`routing`] decides the weights, by a learned router ([`routing::router`]) or otherwise;
//! [`forward`] runs the blocks; [`parameters`] names what is trained and what is saved.
//!
//! Letters of shapes: `b` batch, `t` position, `n` labelled positions, `d` width, `e` expert, `m` a
//! site's experts, `v` vocabulary.

pub mod batch;
pub(crate) mod block;
pub(crate) mod cut;
pub mod decoder;
pub mod experts;
pub mod families;
pub mod forward;
#[doc(hidden)]
pub mod fused;
pub mod loss;
mod mode;
pub mod parameters;
mod quantised;
pub mod routing;
pub(crate) mod step;

use std::cell::OnceCell;
use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::config::{Config, Dtype, Kernels, ModulePath, Orthogonality};
use crate::ffi;
use crate::ffi::cuda::KernelSet;
use crate::tensor_file;
pub use batch::{Inputs, Rows};
use block::{BlockExperts, RoutedBlock};
use decoder::Decoder;
use decoder::precision::wide;
use experts::init::InitialValues;
use experts::orthogonality::orthogonality;
use experts::spec::{ExpertSpec, num_routed};
use experts::stack::LoraExperts;
pub use forward::{ForwardOutput, ModuleUpdate, Recorder};
use fused::pack::{COLUMNS, FusedProduct, padded_head};
pub use mode::ForwardMode;
pub use parameters::{ParameterGroup, Trained, TrainedParameter};
pub use quantised::check_quantisable;
use routing::router::{Router, RouterSpec};
use routing::routers::Routers;
pub use routing::{RoutingSource, RowSources, Site};
pub use step::NextStep;

/// A base with its experts and routers.
///
/// ```
/// use dylora::config::{LoraConfig, RouterConfig};
/// use dylora::model::decoder::Decoder;
/// use dylora::model::experts::spec::ExpertSpec;
/// use dylora::model::families;
/// use dylora::model::routing::router::RouterSpec;
/// use dylora::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Rows};
/// use tch::{Device, Kind};
///
/// # fn main() -> anyhow::Result<()> {
/// let base = Decoder::random(families::from_json(&serde_json::json!({
///     "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16,
///     "vocab_size": 20,
/// }))?);
/// let lora = LoraConfig { num_experts: 3, rank: 2, ..LoraConfig::default() };
/// let specs = ExpertSpec::all(&lora, &base.spec)?;
/// let router = RouterSpec::from(&RouterConfig::default());
/// let model = RoutedModel::with_experts(&base, &specs, &router, Device::Cpu, Kind::Float);
///
/// // one row with one document of three tokens
/// let rows = Rows {
///     num_rows: 1,
///     seq_len: 3,
///     input_ids: &[4, 1, 7],
///     labels: &[1, 7, -100],
///     position_ids: &[0, 1, 2],
///     document_ids: &[0, 0, 0],
///     expert_ids: None,
///     prompt: None,
/// };
/// let inputs = Inputs::new(rows, Device::Cpu);
/// let output = model.forward(&inputs, &RoutingSource::Router, ForwardMode::EVAL, None);
/// assert_eq!(model.logits(&output.hidden).size(), [1, 3, 20]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RoutedModel {
    decoder: Decoder,
    /// The experts of each block.
    experts: Vec<BlockExperts>,
    specs: Vec<ExpertSpec>,
    routers: Routers,
    trains_base: bool,
    kind: Kind,
    kernels: Kernels,
    /// Whether there are CUDA kernels for the model's device, width and dtype.
    has_kernels: bool,
    /// Whether there are kernels for steps of generation as well, once it was asked.
    has_step_kernels: OnceCell<bool>,
    /// The head with rows of zeros behind it, of which the decoder's head is a view; `None` without
    /// kernels or if the head needs no such rows.
    padded_head: Option<Tensor>,
}

/// The dtype in which a model computes, and how it computes. A [`Kind`] converts into it with
/// [`Kernels::Auto`].
#[derive(Debug, Clone, Copy)]
pub struct Compute {
    /// The dtype of the base and of activations.
    pub kind: Kind,
    /// How forward and backward passes are computed.
    pub kernels: Kernels,
}

impl Compute {
    /// The settings of a config.
    pub fn of_config(config: &Config) -> Self {
        Self { kind: kind_of(config.base.dtype), kernels: config.train.kernels }
    }
}

impl From<Kind> for Compute {
    fn from(kind: Kind) -> Self {
        Self { kind, kernels: Kernels::Auto }
    }
}

impl RoutedModel {
    /// A base without experts on `device`. With `trains_base`, its parameters are trained and kept
    /// in f32 (or f64 if it computes in f64).
    pub fn plain(
        base: &Decoder,
        device: Device,
        compute: impl Into<Compute>,
        trains_base: bool,
    ) -> Self {
        let mut model = Self::bare(base, device, compute.into(), trains_base);
        model.prepare_fused();
        model
    }

    /// The same model, not yet prepared for the fused operations.
    fn bare(base: &Decoder, device: Device, compute: Compute, trains_base: bool) -> Self {
        let Compute { kind, kernels } = compute;
        let parameter_kind = if trains_base { wide(kind) } else { kind };
        let decoder = base.to(device, parameter_kind);
        if trains_base {
            for (_, tensor) in decoder.named_parameters() {
                let _ = tensor.set_requires_grad(true);
            }
        }
        Self {
            experts: decoder.blocks.iter().map(|_| BlockExperts::default()).collect(),
            decoder,
            specs: vec![],
            routers: Routers::none(device),
            trains_base,
            kind,
            kernels,
            has_kernels: false,
            has_step_kernels: OnceCell::new(),
            padded_head: None,
        }
    }

    /// A frozen base with new experts and, if there is more than one, new routers. All random
    /// numbers come from libtorch's default CPU generator, so that they are the same for every
    /// device.
    pub fn with_experts(
        base: &Decoder,
        specs: &[ExpertSpec],
        router: &RouterSpec,
        device: Device,
        compute: impl Into<Compute>,
    ) -> Self {
        Self::assemble(base, specs, router, device, compute.into(), InitialValues::Fresh)
    }

    /// A frozen base whose experts and routers have the values of `tensors`, which must hold every
    /// tensor of [`RoutedModel::tensors`].
    ///
    /// # Errors
    /// If a tensor is missing, extra or misshapen; the message names it.
    pub fn from_tensors(
        base: &Decoder,
        specs: &[ExpertSpec],
        router: &RouterSpec,
        tensors: &BTreeMap<String, Tensor>,
        device: Device,
        compute: impl Into<Compute>,
    ) -> Result<Self> {
        let model =
            Self::assemble(base, specs, router, device, compute.into(), InitialValues::Empty);
        model.load(tensors)?;
        Ok(model)
    }

    fn assemble(
        base: &Decoder,
        specs: &[ExpertSpec],
        router: &RouterSpec,
        device: Device,
        compute: Compute,
        values: InitialValues,
    ) -> Self {
        let mut model = Self::bare(base, device, compute, false);
        let kind = compute.kind;
        if values == InitialValues::Fresh && specs.iter().any(ExpertSpec::starts_from_base) {
            tracing::info!("factorising the base's weights, where the experts start");
        }
        for (layer, experts) in model.experts.iter_mut().enumerate() {
            for &module in base.spec.modules() {
                let weight = base.blocks[layer].linears[&module].weight();
                let linear = &model.decoder.blocks[layer].linears[&module];
                let path = ModulePath { layer, module };
                let new = LoraExperts::new(path, specs, &weight, linear, wide(kind), values);
                experts.modules.extend(new.map(|experts| (module, experts)));
            }
        }
        let modules = model.experts.iter().map(|experts| experts.modules.keys().copied().collect());
        let routed = &specs[..num_routed(specs)];
        let kind = wide(kind);
        model.routers = Routers::new(router, routed, modules.collect(), &base.spec, kind, device);
        model.specs = specs.to_vec();
        model.prepare_fused();
        model
    }

    /// BLAKE3 hash of what is not trained: the base, and the frozen experts and routers if there
    /// are any.
    pub fn frozen_hash(&self) -> Result<String> {
        self.frozen_hash_beside(self.decoder.hash()?)
    }

    /// The same as [`RoutedModel::frozen_hash`], given the hash of the base as it lies on the
    /// device.
    pub(crate) fn frozen_hash_beside(&self, base_hash: String) -> Result<String> {
        let experts = self.frozen_tensors();
        if experts.is_empty() {
            return Ok(base_hash);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(base_hash.as_bytes());
        tensor_file::hash_tensors(&mut hasher, &experts)?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The base's embeddings of positions, `[positions, d]`. A base that has none is given zeros
    /// for `seq_len` positions.
    pub(crate) fn positions_or_zeros(&mut self, seq_len: usize) -> &Tensor {
        let zeros = || self.decoder.embedding.narrow(0, 0, 1).zeros_like();
        let zeros = || zeros().repeat([seq_len as i64, 1]);
        self.decoder.positions.get_or_insert_with(zeros)
    }

    /// The base.
    pub fn base(&self) -> &Decoder {
        &self.decoder
    }

    /// The experts' settings, with those of the part that is always on at the end; empty for a base
    /// without experts.
    pub fn specs(&self) -> &[ExpertSpec] {
        &self.specs
    }

    /// Number of routed experts `E`; 0 for a base without experts.
    pub fn num_experts(&self) -> i64 {
        num_routed(&self.specs) as i64
    }

    /// The routers: one for all layers, or one for each layer or target module. There are none with
    /// fewer than two experts.
    pub fn routers(&self) -> &[Router] {
        self.routers.all()
    }

    /// The settings of the routers.
    pub fn router_spec(&self) -> &RouterSpec {
        self.routers.spec()
    }

    /// The prefix of each router's tensor names, such as `router` or `layers.0.router`.
    pub fn router_names(&self) -> Vec<String> {
        self.routers.names()
    }

    /// The temperature that divides the scores, 0-dim, f64. It is the same tensor for the model's
    /// whole life.
    pub fn temperature(&self) -> &Tensor {
        self.routers.temperature()
    }

    /// Sets the temperature, and how many experts a token keeps (`None` for all).
    pub fn set_rule(&mut self, temperature: f64, top_k: Option<i64>) {
        self.routers.set_rule(temperature, top_k);
    }

    /// The sites, in the order of a forward pass.
    pub fn sites(&self) -> Vec<Site> {
        self.routers.sites()
    }

    /// The experts that a site routes over, `[m]`; `None` for all.
    pub(crate) fn present_at(&self, site: Site) -> Option<&Tensor> {
        self.routers.present_at(site)
    }

    /// The indices of the experts that a site routes over.
    pub fn experts_at(&self, site: Site) -> Vec<usize> {
        self.routers.experts_at(site, num_routed(&self.specs))
    }

    /// The device that holds the model.
    pub fn device(&self) -> Device {
        self.decoder.embedding.device()
    }

    /// The experts of a target module, if it has any.
    pub fn experts(&self, path: ModulePath) -> Option<&LoraExperts> {
        self.experts[path.layer].modules.get(&path.module)
    }

    /// Every target module that has experts, in the order of a forward pass.
    pub fn modules(&self) -> impl Iterator<Item = (ModulePath, &LoraExperts)> {
        self.experts.iter().enumerate().flat_map(|(layer, experts)| {
            let experts = experts.modules.iter();
            experts.map(move |(&module, experts)| (ModulePath { layer, module }, experts))
        })
    }
}

impl RoutedModel {
    /// The blocks with their experts, in order.
    fn routed_blocks(&self) -> impl Iterator<Item = RoutedBlock<'_>> {
        let pairs = self.decoder.blocks.iter().zip(&self.experts);
        pairs.map(|(block, experts)| RoutedBlock { block, experts })
    }

    /// Whether some module that the site decides for may skip the experts that a token did not
    /// choose, if each token chooses `k` experts.
    fn may_skip(&self, site: Site, k: i64) -> bool {
        let e = self.specs.len() as i64;
        let k = k + e - self.num_experts();
        self.modules().any(|(path, experts)| {
            site.layer.is_none_or(|layer| layer == path.layer)
                && site.module.is_none_or(|module| module == path.module)
                && experts.may_skip(k, e, self.kind, self.device())
        })
    }

    /// Whether some module may skip the experts that a token did not choose. How much is computed
    /// then depends on the values of a batch.
    pub fn skips_experts(&self) -> bool {
        let chooses = |site: &Site| {
            let m = self.present_at(*site).map_or(self.num_experts(), |experts| experts.size()[0]);
            self.router_spec().top_k.filter(|k| *k < m)
        };
        self.sites().into_iter().any(|site| chooses(&site).is_some_and(|k| self.may_skip(site, k)))
    }

    /// The mean squared cosine between experts, 0-dim and differentiable; `None` if no module has
    /// two experts.
    pub fn orthogonality(&self, of: Orthogonality) -> Option<Tensor> {
        orthogonality(self.modules().map(|(_, experts)| experts), of)
    }

    /// Whether the fused operations compute what they can: not if the base is trained or the config
    /// asks for the reference.
    fn uses_fused(&self) -> bool {
        !self.trains_base && self.kernels == Kernels::Auto
    }

    /// Whether the fused operations compute blocks.
    fn fuses_blocks(&self) -> bool {
        self.uses_fused() && self.decoder.spec.has_fused_blocks(self.device())
    }

    /// Prepares the model for the fused operations, if it uses them.
    fn prepare_fused(&mut self) {
        if !self.uses_fused() {
            return;
        }
        let has_kernels = self.prepare_kernels();
        self.has_kernels = has_kernels;
        if self.fuses_blocks() {
            self.prepare_fused_blocks(has_kernels);
        }
        if has_kernels && let Some((padded, place)) = padded_head(self.decoder.head()) {
            self.decoder.set_head(place);
            self.padded_head = Some(padded);
        }
    }

    /// Prepares the blocks for the fused operations.
    fn prepare_fused_blocks(&mut self, has_kernels: bool) {
        if self.routed_blocks().any(RoutedBlock::has_dora) {
            tracing::info!("blocks with DoRA experts take libtorch's operations one by one");
        }
        let (num_experts, products) = (self.specs.len(), self.decoder.spec.products());
        for (block, experts) in self.decoder.blocks.iter_mut().zip(&mut self.experts) {
            let fused = products.map(|members| {
                let modules = &experts.modules;
                let mut product = FusedProduct::new(members, modules, num_experts, self.kind);
                if has_kernels {
                    product.pack(block, modules);
                }
                product
            });
            experts.fused = Some(fused);
        }
    }

    /// Makes the kernels ready and returns whether there are any for this model.
    fn prepare_kernels(&self) -> bool {
        let Device::Cuda(device) = self.device() else { return false };
        let (d, inner) = (self.decoder.spec.width, self.decoder.spec.inner_width);
        let fits = d % COLUMNS == 0 && inner % COLUMNS == 0;
        if !fits || !matches!(self.kind, Kind::BFloat16 | Kind::Float) {
            tracing::info!("no kernels for this shape or dtype: libtorch's operations are used");
            return false;
        }
        let prepared = ffi::use_device(self.device());
        match prepared.and_then(|()| ffi::cuda::prepare_kernels(device, d, KernelSet::Base)) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("no kernels, libtorch's operations are used: {error:#}");
                false
            }
        }
    }
}

/// The libtorch dtype of a config's dtype.
pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
    }
}
