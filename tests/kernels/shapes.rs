//! The loss and the gradients of one step, by the fused operations and by the reference.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::TargetModule::{
    AttnCAttn, AttnCProj, DownProj, GateProj, KProj, MlpCFc, MlpCProj, OProj, QProj, UpProj, VProj,
};
use dylora::config::{
    BaseProducts, DropoutMasks, ExpertConfig, Family, Kernels, LoraConfig, LoraInit, ModulePath,
    RouterConfig, RouterInput, RouterScope, TargetModule, TargetModules,
};
use dylora::ffi;
use dylora::model::decoder::Decoder;
use dylora::model::decoder::{mlp::Activation, spec::DecoderSpec};
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::loss::LossSettings;
use dylora::model::routing::router::{RouterSpec, Routing};
use dylora::model::{Compute, ForwardMode, Inputs, RoutedModel, RoutingSource, Rows};
use tch::{Device, Kind, Tensor};

use crate::common::{family_specs, gpt2_spec, plain_router, randomize, seed};

/// The seed of a case's first batch.
const FIRST_BATCH: i64 = 6;
/// How far a loss in bf16 may be from the reference's, in nats, unless f64 shows that it is no
/// worse.
const BF16_LOSS_BOUND: f64 = 2e-2;
/// Number of batches of a case for which chance has to be told from a fault.
const NUM_BATCHES: i64 = 12;

/// A mixture on a base, and the shape of a batch.
pub(super) struct Case {
    pub name: String,
    pub base: DecoderSpec,
    pub lora: LoraConfig,
    pub router: RouterConfig,
    pub batch: usize,
    pub seq_len: usize,
    /// Lengths of a row's packed documents; `None` if each row is one document.
    pub documents: Option<Vec<usize>>,
    pub dropout: f64,
    pub label_smoothing: f64,
    pub checkpointing: bool,
    pub source: RoutingSource,
    pub base_products: BaseProducts,
}

pub(super) fn lora(num_experts: usize, rank: i64, target_modules: &[TargetModule]) -> LoraConfig {
    LoraConfig {
        num_experts: num_experts as i64,
        rank,
        alpha: 1.5 * rank as f64,
        target_modules: target_modules.into(),
        ..LoraConfig::default()
    }
}

pub(super) fn shape(
    heads: i64,
    head_size: i64,
    vocab_size: i64,
    max_positions: i64,
) -> DecoderSpec {
    DecoderSpec { vocab_size, max_positions, ..gpt2_spec(2, heads, heads * head_size) }
}

pub(super) fn case(name: &str) -> Case {
    Case {
        name: name.into(),
        base: shape(2, 16, 53, 64),
        lora: lora(3, 4, Family::Gpt2.modules()),
        router: plain_router(),
        batch: 2,
        seq_len: 24,
        documents: None,
        dropout: 0.0,
        label_smoothing: 0.0,
        checkpointing: false,
        source: RoutingSource::Router,
        base_products: BaseProducts::Exact,
    }
}

pub(super) fn cases(on_gpu: bool) -> Vec<Case> {
    let mut cases = of_experts();
    cases.extend(of_shapes(on_gpu));
    cases.extend(of_routers());
    cases.extend(of_both());
    cases.extend(of_shared_parts());
    cases.extend(on_families(&cases));
    cases.extend(of_families());
    cases
}

/// The same on Llama-like bases, one family after the other.
pub(super) fn on_families(cases: &[Case]) -> Vec<Case> {
    let others: Vec<_> = family_specs().into_iter().filter(|(name, _)| *name != "gpt2").collect();
    let translated = (0..).zip(cases).map(|(at, case): (usize, _)| {
        let (family, spec) = &others[at % others.len()];
        case.on(family, spec)
    });
    translated.collect()
}

/// Different numbers, ranks and target modules of experts.
fn of_experts() -> Vec<Case> {
    let mut cases = vec![];
    for num_experts in [1, 3, 6, 16] {
        for rank in [1, 4, 12, 64] {
            let lora = lora(num_experts, rank, Family::Gpt2.modules());
            cases.push(Case { lora, ..case(&format!("E {num_experts}, r {rank}")) });
        }
    }
    for modules in [&[AttnCAttn][..], &[AttnCProj], &[MlpCFc], &[MlpCProj], &[AttnCProj, MlpCFc]] {
        let lora = lora(4, 8, modules);
        cases.push(Case { lora, ..case(&format!("{modules:?}")) });
    }
    cases
}

/// Different kinds of experts, shapes of the base and of batches, losses and dropout.
fn of_shapes(on_gpu: bool) -> Vec<Case> {
    let mut cases = vec![];
    let experts = vec![
        ExpertConfig { rank: Some(2), ..ExpertConfig::default() },
        ExpertConfig { rank: Some(5), alpha: Some(3.0), ..ExpertConfig::default() },
        ExpertConfig {
            rank: Some(16),
            target_modules: Some([AttnCAttn].into()),
            ..ExpertConfig::default()
        },
    ];
    cases.push(Case { lora: LoraConfig { experts, ..case("").lora }, ..case("mixed ranks") });
    let init = LoraConfig { init: LoraInit::Pissa, ..case("").lora };
    cases.push(Case { lora: init, ..case("pissa") });
    let longest = if on_gpu { 1024 } else { 130 };
    for seq_len in [1, 2, 7, 33, 64, 127, longest] {
        let base = shape(2, 16, 53, 1024);
        let batch = if seq_len == 33 { 1 } else { 2 };
        cases.push(Case { base, seq_len, batch, ..case(&format!("T {seq_len}, batch {batch}")) });
    }
    for head_size in [16, 24, 64, 96, 128] {
        cases.push(Case {
            base: shape(2, head_size, 53, 64),
            ..case(&format!("head size {head_size}"))
        });
    }
    // on a GPU, the longest row does not fit into the shared memory of one block
    let longest = on_gpu.then_some(151_936);
    for vocab_size in [53, 1000, 50257].into_iter().chain(longest) {
        cases.push(Case { base: shape(2, 16, vocab_size, 64), ..case(&format!("v {vocab_size}")) });
    }
    cases.push(Case { base: shape(3, 5, 53, 64), ..case("a width that is no multiple of 8") });
    let exact = DecoderSpec { activation: Activation::Gelu, ..shape(2, 16, 53, 64) };
    cases.push(Case { base: exact, ..case("exact gelu") });
    let untied = DecoderSpec { tied_head: false, ..shape(2, 16, 53, 64) };
    cases.push(Case { base: untied, ..case("untied head") });
    cases.push(Case { label_smoothing: 0.1, ..case("label smoothing") });
    cases.push(Case { dropout: 0.2, ..case("dropout") });
    cases.push(Case { dropout: 0.2, lora: lora(4, 8, &[AttnCAttn]), ..case("dropout, c_attn") });
    // wide enough for the kernels of dropout
    let wide = shape(2, 64, 53, 64);
    for (num_experts, rank) in [(1, 4), (1, 16), (3, 8), (3, 20)] {
        let lora = lora(num_experts, rank, Family::Gpt2.modules());
        let name = format!("dropout, E {num_experts}, r {rank}");
        cases.push(Case { lora, dropout: 0.2, base: wide.clone(), ..case(&name) });
    }
    let some = lora(2, 8, &[AttnCAttn, MlpCProj]);
    let some = Case { lora: some, base: wide.clone(), ..case("dropout, c_attn and c_proj") };
    cases.push(Case { dropout: 0.5, checkpointing: true, ..some });
    if on_gpu {
        // so many tokens that the kernels divide them among blocks
        let base = DecoderSpec { max_positions: 1024, ..wide };
        let lora = lora(3, 8, Family::Gpt2.modules());
        let long = Case { lora, base, seq_len: 601, ..case("dropout, T 601") };
        cases.push(Case { dropout: 0.2, ..long });
    }
    cases.push(Case { checkpointing: true, ..case("checkpointing") });
    cases.push(Case { documents: Some(vec![5, 1, 11, 7]), ..case("packed documents") });
    cases
}

/// Different routers, and gradient checkpointing with dropout.
fn of_routers() -> Vec<Case> {
    let mut cases = vec![];
    for scope in [RouterScope::Layer, RouterScope::Module] {
        for input in [RouterInput::Embeddings, RouterInput::LayerInput] {
            let router = RouterConfig { scope, input, ..plain_router() };
            cases.push(Case { router, ..case(&format!("{scope:?} routers on {input:?}")) });
        }
    }
    let router = RouterConfig { input: RouterInput::BaseHidden, ..plain_router() };
    cases.push(Case { router, ..case("router on base_hidden") });
    let router = RouterConfig { top_k: Some(2), ..plain_router() };
    cases.push(Case { router, ..case("top 2") });
    // the routers of new configs, some over more experts than a thread adds up at once
    for (num_experts, heads) in [(2, 2), (8, 10), (9, 10), (17, 2)] {
        let router = RouterConfig { temperature: 2.5, ..RouterConfig::default() };
        let lora = lora(num_experts, 4, &[AttnCAttn]);
        let base = shape(heads, 64, 53, 64);
        let name = format!("normalising routers, E {num_experts}, width {}", 64 * heads);
        cases.push(Case { router, lora, base, ..case(&name) });
    }
    cases.push(Case { checkpointing: true, dropout: 0.2, ..case("checkpointing with dropout") });
    cases
}

/// Combinations of settings, further kinds of experts, and the other sources of routing weights.
fn of_both() -> Vec<Case> {
    let mut cases = vec![];
    let documents = Some(vec![5, 1, 11, 7]);
    cases.push(Case { checkpointing: true, documents, ..case("checkpointing packed documents") });
    let single = lora(1, 4, Family::Gpt2.modules());
    let odd = shape(3, 5, 53, 64);
    cases.push(Case { lora: single, base: odd, ..case("E 1, a width that is no multiple of 8") });
    let wide = lora(16, 300, &[AttnCAttn]);
    cases.push(Case { lora: wide, ..case("more columns than the kernels take") });
    let frozen = ExpertConfig { trainable: false, ..ExpertConfig::default() };
    let experts = vec![ExpertConfig::default(), frozen, ExpertConfig::default()];
    cases.push(Case { lora: LoraConfig { experts, ..case("").lora }, ..case("a frozen expert") });
    // one row of `inputs` has this token twice, and the other does not have it
    let alora = ExpertConfig { alora_invocation_tokens: vec![50], ..ExpertConfig::default() };
    let experts = vec![ExpertConfig::default(), alora, ExpertConfig::default()];
    cases.push(Case { lora: LoraConfig { experts, ..case("").lora }, ..case("an aLoRA expert") });
    let given = Tensor::from_slice(&[0.2, -0.5, 1.5]);
    for source in [
        RoutingSource::Uniform,
        RoutingSource::All,
        RoutingSource::Expert(1),
        RoutingSource::Given(given),
    ] {
        cases.push(Case { name: format!("{source:?}"), source, ..case("") });
    }
    cases
}

/// A part that is always on, beside experts of the same and of another rank, and beside one expert.
fn of_shared_parts() -> Vec<Case> {
    let with = |num_experts, shared_rank| LoraConfig {
        shared_rank,
        ..lora(num_experts, 4, Family::Gpt2.modules())
    };
    let mut cases = vec![];
    for (num_experts, rank) in [(3, 4), (3, 9), (1, 4), (1, 9)] {
        let name = format!("E {num_experts}, r 4, always on {rank}");
        cases.push(Case { lora: with(num_experts, rank), ..case(&name) });
    }
    for source in [RoutingSource::Uniform, RoutingSource::All, RoutingSource::Expert(1)] {
        let name = format!("{source:?}, always on 9");
        cases.push(Case { lora: with(3, 9), source, ..case(&name) });
    }
    // the routers of new configs
    let router = RouterConfig { top_k: Some(2), ..RouterConfig::default() };
    cases.push(Case { lora: with(3, 9), router, ..case("normalising routers, always on 9") });
    let pissa = LoraConfig { init: LoraInit::Pissa, ..with(3, 9) };
    let all = Case { lora: pissa, dropout: 0.2, ..case("pissa, always on 9") };
    cases.push(Case { checkpointing: true, ..all });
    cases
}

/// The linear layers of a Llama-like base in place of those of GPT-2.
fn translated(targets: &TargetModules) -> TargetModules {
    let like = |module: TargetModule| match module {
        AttnCAttn => &[QProj, KProj, VProj][..],
        AttnCProj => &[OProj],
        MlpCFc => &[GateProj, UpProj],
        _ => &[DownProj],
    };
    let modules = Family::Gpt2.modules().iter().copied();
    let targeted = modules.filter(|&module| targets.contain(ModulePath { layer: 0, module }));
    targeted.flat_map(like).copied().collect::<Vec<_>>().as_slice().into()
}

/// Each family, with the settings that its linear layers, documents and windows make special.
fn of_families() -> Vec<Case> {
    let mut cases = vec![];
    for (family, spec) in family_specs() {
        let lora = LoraConfig { target_modules: TargetModules::all(), ..case("").lora };
        let named = |what: &str| Case {
            base: spec.clone(),
            lora: lora.clone(),
            ..case(&format!("{family}, {what}"))
        };
        let some = match family {
            "gpt2" => &[AttnCProj, MlpCFc][..],
            _ => &[KProj, UpProj],
        };
        let lora_of_some = LoraConfig { target_modules: some.into(), ..lora.clone() };
        let own = RouterConfig { scope: RouterScope::Module, ..plain_router() };
        let of_some =
            Case { lora: lora_of_some, dropout: 0.2, ..named("a router for each of some") };
        cases.push(Case { router: own, ..of_some });
        let router = RouterConfig {
            scope: RouterScope::Layer,
            input: RouterInput::LayerInput,
            top_k: Some(2),
            ..plain_router()
        };
        cases.push(Case { router, ..named("top 2 by routers on the layers' inputs") });
        let documents = Some(vec![5, 1, 11, 7]);
        cases.push(Case { documents: documents.clone(), ..named("packed documents") });
        let checkpointing = Case { checkpointing: true, documents, ..named("checkpointing") };
        cases.push(Case { dropout: 0.2, ..checkpointing });
    }
    cases
}

impl Case {
    /// The same on a base of another family, with the number and the width of heads, the vocabulary
    /// and the head of this case's base, and the other parts of `spec`.
    fn on(&self, family: &str, spec: &DecoderSpec) -> Self {
        let DecoderSpec { num_heads, head_dim, width, vocab_size, tied_head, .. } = self.base;
        // heads that are rotated have an even width
        let head_dim = head_dim + head_dim % 2;
        let base = DecoderSpec {
            num_heads,
            num_kv_heads: if num_heads % 2 == 0 { num_heads / 2 } else { 1 },
            head_dim,
            width,
            inner_width: 3 * width / 2,
            max_positions: self.base.max_positions,
            vocab_size,
            tied_head,
            ..spec.clone()
        };
        let experts = self.lora.experts.iter().map(|expert| ExpertConfig {
            target_modules: expert.target_modules.as_ref().map(translated),
            ..expert.clone()
        });
        let lora = LoraConfig {
            target_modules: translated(&self.lora.target_modules),
            experts: experts.collect(),
            ..self.lora.clone()
        };
        Self { name: format!("{family}, {}", self.name), base, lora, ..self.on_its_own() }
    }

    /// The same case once more.
    pub(super) fn on_its_own(&self) -> Self {
        let source = match &self.source {
            RoutingSource::Given(given) => RoutingSource::Given(given.shallow_clone()),
            RoutingSource::Expert(expert) => RoutingSource::Expert(*expert),
            RoutingSource::All => RoutingSource::All,
            RoutingSource::Uniform => RoutingSource::Uniform,
            _ => RoutingSource::Router,
        };
        Self {
            name: self.name.clone(),
            base: self.base.clone(),
            lora: self.lora.clone(),
            router: self.router.clone(),
            documents: self.documents.clone(),
            source,
            ..*self
        }
    }

    fn rank(&self) -> i64 {
        self.lora.rank
    }

    /// The base with random parameters, after seeding libtorch's default generator.
    pub(super) fn decoder(&self) -> Decoder {
        tch::manual_seed(5);
        let tensors = self.base.parameter_shapes().into_iter().map(|(name, shape)| {
            // the weight of a normalisation is the only vector that is a weight
            let mean = if shape.len() == 1 && name.ends_with("weight") { 1.0 } else { 0.0 };
            (name, Tensor::randn(&shape, (Kind::Double, Device::Cpu)) * 0.08 + mean)
        });
        Decoder::new(self.base.clone(), tensors.collect())
    }

    /// The first batch.
    pub(super) fn inputs(&self, device: Device) -> Inputs {
        self.batch_of(FIRST_BATCH, device)
    }

    /// Random tokens and their labels, after seeding libtorch's default generator with `seed`.
    fn batch_of(&self, seed: i64, device: Device) -> Inputs {
        tch::manual_seed(seed);
        let n = self.batch * self.seq_len;
        let ids = Tensor::randint(self.base.vocab_size, [n as i64], (Kind::Int64, Device::Cpu));
        let ids = Vec::<i64>::try_from(ids).expect("integers");
        let mut positions: Vec<i64> = vec![];
        let mut documents: Vec<i64> = vec![];
        for _ in 0..self.batch {
            let lengths = self.documents.clone().unwrap_or_else(|| vec![self.seq_len]);
            for (document, length) in lengths.into_iter().enumerate() {
                positions.extend(0..length as i64);
                documents.extend(std::iter::repeat_n(document as i64, length));
            }
        }
        let label = |(at, id): (usize, &i64)| {
            if at % 5 == 3 { -100 } else { (id * 7 + 1) % self.base.vocab_size }
        };
        let labels: Vec<i64> = ids.iter().enumerate().map(label).collect();
        let rows = Rows {
            num_rows: self.batch,
            seq_len: self.seq_len,
            input_ids: &ids,
            labels: &labels,
            position_ids: &positions,
            document_ids: &documents,
            expert_ids: None,
            prompt: None,
        };
        Inputs::new(rows, device)
    }

    /// The settings of all experts. The part that is always on is the last of them.
    pub(super) fn specs(&self) -> Result<Vec<ExpertSpec>> {
        let mut specs = ExpertSpec::all(&self.lora, &self.base)?;
        specs.extend(ExpertSpec::of_shared(&self.lora, &self.base)?);
        Ok(specs)
    }

    /// The mixture with the given tensors or, without them, with random ones.
    pub(super) fn model(
        &self,
        base: &Decoder,
        device: Device,
        compute: impl Into<Compute>,
        tensors: Option<&BTreeMap<String, Tensor>>,
    ) -> Result<RoutedModel> {
        let router = RouterSpec::from(&self.router);
        let mut model = RoutedModel::with_experts(base, &self.specs()?, &router, device, compute);
        if self.base_products == BaseProducts::Fp8 {
            model.quantise_base()?;
        }
        match tensors {
            None => {
                randomize(&model)?;
                // makes the updates about as large as the base's weights
                let smaller = |(name, tensor): (String, Tensor)| {
                    let factor = if name.contains("lora_") {
                        0.5 / (self.rank() as f64).sqrt()
                    } else {
                        1.0
                    };
                    (name, &tensor * factor)
                };
                let tensors =
                    model.tensors().into_iter().filter(|(name, _)| !name.contains("initial"));
                model.load_some(&tensors.map(smaller).collect())?;
            }
            Some(tensors) => model.load(tensors)?,
        }
        Ok(model)
    }

    /// The loss, with a part of the routers' z-loss, and every gradient. The gradients are
    /// converted to f64 on the CPU.
    pub(super) fn step(&self, model: &RoutedModel, inputs: &Inputs) -> Result<Step> {
        let settings = LossSettings {
            chunk_tokens: 17,
            label_smoothing: self.label_smoothing,
            scale: Tensor::from(1.0 / inputs.labelled.size()[0] as f64).to_device(model.device()),
            with_grad: true,
        };
        let dropout = LoraDropout { probability: self.dropout, masks: DropoutMasks::Shared };
        let mode = ForwardMode {
            dropout,
            gradient_checkpointing: self.checkpointing,
            base_products: self.base_products,
            ..ForwardMode::EVAL
        };
        tch::manual_seed(11);
        let (loss, routing) = model.loss(inputs, &self.source, mode, settings);
        let z_loss = |site: &Routing| {
            let squares = site.logits.logsumexp(-1, false).square();
            squares.mean(Kind::Double) / (10.0 * routing.len() as f64)
        };
        let loss = routing.iter().map(z_loss).fold(loss.loss, |loss, other| loss + other);
        let trained = model.trained(dylora::config::RoutingChoice::Router, None);
        let grads = Tensor::run_backward(&[&loss], &trained.leaves, false, false);
        let grads: Vec<Tensor> = grads
            .into_iter()
            .zip(&trained.leaves)
            .map(|(grad, leaf)| if grad.defined() { grad } else { leaf.zeros_like().detach() })
            .collect();
        let grads = trained.split(&grads).into_iter().zip(&trained.parameters);
        let grads = grads.map(|(grad, parameter)| (parameter.name.clone(), exact(&grad))).collect();
        Ok((loss.double_value(&[]), grads))
    }
}

/// `x` in f64 on the CPU.
pub(super) fn exact(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu).to_kind(Kind::Double)
}

fn norm(x: &Tensor) -> f64 {
    x.norm().double_value(&[])
}

/// Relative distances of gradients: the norm of the difference divided by the norm of the second
/// operand, over the parameters of all experts and over those of all routers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Distances {
    pub experts: f64,
    routers: f64,
}

impl Distances {
    pub fn new(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> Self {
        assert!(a.keys().eq(b.keys()));
        let ratio = |is_expert: bool| {
            let names = a.keys().filter(|name| name.contains("lora_") == is_expert);
            let squares =
                names.map(|name| (norm(&(&a[name] - &b[name])).powi(2), norm(&b[name]).powi(2)));
            let (difference, size) =
                squares.fold((0.0, 0.0), |sum, new| (sum.0 + new.0, sum.1 + new.1));
            if size > 0.0 { f64::sqrt(difference / size) } else { f64::sqrt(difference) }
        };
        Self { experts: ratio(true), routers: ratio(false) }
    }
}

impl std::fmt::Display for Distances {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1e} of experts, {:.1e} of routers", self.experts, self.routers)
    }
}

/// The device that the tests run on.
pub(super) fn device() -> Result<Device> {
    match std::env::var("DYLORA_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            // this must come before any other call of libtorch
            ffi::load_cuda().map_err(anyhow::Error::msg)?;
            // without the kernels, the reference would be compared with itself
            ffi::cuda::prepare_kernels(0, 32, ffi::cuda::KernelSet::Base)?;
            Ok(Device::Cuda(0))
        }
        _ => Ok(Device::Cpu),
    }
}

/// The judgement of a case in one dtype.
struct Judged {
    line: String,
    /// Whether all distances from the reference are within their bounds.
    is_close: bool,
    /// In bf16, how far the losses are from each other and from f64.
    loss: Option<LossErrors>,
    /// In bf16, the distances of the gradients from those in f64, divided by the distances of the
    /// reference's gradients: of experts, and of routers if there are any.
    ratios: Vec<f64>,
}

/// Distances of losses, in nats.
#[derive(Debug, Clone, Copy)]
struct LossErrors {
    from_reference: f64,
    from_f64: f64,
    /// The reference's distance from f64.
    of_reference: f64,
}

impl LossErrors {
    fn is_good(self) -> bool {
        self.from_reference <= BF16_LOSS_BOUND || self.from_f64 <= 2.0 * self.of_reference
    }

    /// The root mean squares.
    fn of_all(all: &[Self]) -> Self {
        let mean = |part: fn(&Self) -> f64| {
            f64::sqrt(all.iter().map(|one| part(one).powi(2)).sum::<f64>() / all.len() as f64)
        };
        Self {
            from_reference: mean(|one| one.from_reference),
            from_f64: mean(|one| one.from_f64),
            of_reference: mean(|one| one.of_reference),
        }
    }
}

impl Judged {
    fn is_good(&self) -> bool {
        self.is_close
            && self.loss.is_none_or(LossErrors::is_good)
            && self.ratios.iter().all(|&ratio| ratio <= 2.0)
    }

    /// The judgement on several batches, with the geometric means of the ratios and the root mean
    /// squares of the losses' errors.
    fn of_all(all: &[Self]) -> Self {
        let losses: Vec<_> = all.iter().filter_map(|one| one.loss).collect();
        let mean = |at: usize| {
            (all.iter().map(|one| one.ratios[at].ln()).sum::<f64>() / all.len() as f64).exp()
        };
        Self {
            line: all.iter().map(|one| one.line.as_str()).collect::<Vec<_>>().join("\n     "),
            is_close: all.iter().all(|one| one.is_close),
            loss: (!losses.is_empty()).then(|| LossErrors::of_all(&losses)),
            ratios: (0..all[0].ratios.len()).map(mean).collect(),
        }
    }
}

/// A step's loss and its gradients by name. Those of an expert's B are `[r, o]`.
pub(super) type Step = (f64, BTreeMap<String, Tensor>);

fn judge(
    case: &Case,
    kind: Kind,
    fused: &Step,
    reference: &Step,
    truth: &dyn Fn() -> Result<Step>,
) -> Result<Judged> {
    let of_loss = (fused.0 - reference.0).abs();
    let of_grads = Distances::new(&fused.1, &reference.1);
    let (loss_bound, bound) = match kind {
        Kind::Double => (1e-10, 1e-9),
        Kind::Float => (1e-5, 1e-4),
        // the masks of dropout differ between devices, so the gradients cannot be compared with f64
        // on the CPU; they are compared with the reference in bf16
        _ if case.dropout > 0.0 => (BF16_LOSS_BOUND, 0.1),
        _ => (BF16_LOSS_BOUND, f64::INFINITY),
    };
    // with a NaN in either, every comparison fails
    let mut is_close = of_grads.experts <= bound && of_grads.routers <= bound;
    let (mut extra, mut ratios, mut loss) = (String::new(), vec![], None);
    // f64 on the CPU would have other masks of dropout
    if kind == Kind::BFloat16 && case.dropout == 0.0 {
        let truth = truth()?;
        let ours = Distances::new(&fused.1, &truth.1);
        let theirs = Distances::new(&reference.1, &truth.1);
        let (from_f64, of_reference) = ((fused.0 - truth.0).abs(), (reference.0 - truth.0).abs());
        loss = Some(LossErrors { from_reference: of_loss, from_f64, of_reference });
        ratios.push(ours.experts / theirs.experts);
        if theirs.routers > 0.0 {
            ratios.push(ours.routers / theirs.routers);
        } else {
            is_close &= ours.routers <= 0.0;
        }
        extra = format!(", from f64: {from_f64:.1e}, {ours} against {of_reference:.1e}, {theirs}");
    } else {
        is_close &= of_loss <= loss_bound;
    }
    let line =
        format!("{} in {kind:?}: loss {of_loss:.1e}, gradients {of_grads}{extra}", case.name);
    Ok(Judged { line, is_close, loss, ratios })
}

/// The losses differ from the reference's by at most 1e-10 in f64 and 1e-5 in f32, and the
/// gradients by at most 1e-9 of their norm in f64 and 1e-4 in f32.
///
/// In bf16, both are compared with those in f64. The loss is within 2e-2 of the reference's in
/// bf16, or at most twice as far from f64. The distance of the gradients is at most twice that of
/// the reference in each case, since chance has a part in it: rounding may make a token choose
/// another expert. A case beyond that is computed with further batches, and the mean over all of
/// its batches counts: the root mean square of losses, and the geometric mean of gradients'
/// ratios. In the geometric mean over all cases, the distance is at most 1.05 times that of the
/// reference.
#[test]
fn fused_steps_equal_the_references() -> Result<()> {
    let device = device()?;
    let on_gpu = device.is_cuda();
    let _generator = seed(900);
    let (mut faults, mut ratios) = (vec![], vec![]);
    for case in cases(on_gpu) {
        let base = case.decoder();
        let exact = case.model(&base, Device::Cpu, Kind::Double, None)?;
        let tensors = exact.tensors();
        let judge_batch = |kind: Kind, batch: i64| -> Result<Judged> {
            let inputs = case.batch_of(batch, device);
            let step = |kernels: Kernels| {
                let compute = Compute { kind, kernels };
                case.step(&case.model(&base, device, compute, Some(&tensors))?, &inputs)
            };
            let (fused, reference) = (step(Kernels::Auto)?, step(Kernels::Reference)?);
            let truth = || case.step(&exact, &case.batch_of(batch, Device::Cpu));
            judge(&case, kind, &fused, &reference, &truth)
        };
        let kinds: &[Kind] = match on_gpu {
            true => &[Kind::Float, Kind::BFloat16],
            false => &[Kind::Double, Kind::Float, Kind::BFloat16],
        };
        for &kind in kinds {
            let mut judged = judge_batch(kind, FIRST_BATCH)?;
            if !judged.is_good() && !judged.ratios.is_empty() {
                let others = (1..NUM_BATCHES).map(|more| judge_batch(kind, FIRST_BATCH + more));
                let mut all = others.collect::<Result<Vec<_>>>()?;
                all.insert(0, judged);
                judged = Judged::of_all(&all);
            }
            if on_gpu {
                println!("{} {}", if judged.is_good() { "ok  " } else { "FAIL" }, judged.line);
            }
            if !judged.is_good() {
                faults.push(judged.line);
            }
            ratios.extend(judged.ratios);
        }
    }
    let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
    println!(
        "in bf16, distance from f64 over the reference's: {mean:.3}, {} numbers",
        ratios.len()
    );
    assert!(mean <= 1.05, "{mean}");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}
