//! The input of a step, first on the host and then on the device: its micro-batches, and the few
//! numbers that change from step to step. Nothing else changes, so steps of the same shape run the
//! same kernels.

use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::data::{Batch, BlockId, TokenDataset};
use crate::ffi;
use crate::model::batch::{DomainTargets, Extent, HostInputs, InputLayout};
use crate::model::{Inputs, RoutedModel, RoutingSource, Rows};

/// The phase of growth in which a new expert is seeded: all tokens of its domain go to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SeedingPhase {
    /// The new expert.
    pub expert: i64,
    /// The new domain's index in the dataset.
    pub domain: u32,
}

/// A step's micro-batches on the host.
#[derive(Debug)]
pub struct Prepared {
    micro_batches: Vec<HostInputs>,
    /// Number of label tokens of each domain.
    pub label_counts: Vec<u64>,
    /// Number of tokens, padding excluded, whose domain has experts.
    pub supervised_tokens: u64,
    /// The seeding phase, if the step belongs to one.
    pub seeding: Option<SeedingPhase>,
    /// The expert and the domain that the stage adds, if it adds one.
    pub added: Option<SeedingPhase>,
    /// Whether the sizes of the micro-batches are rounded up, so that few different sizes occur.
    pub is_rounded: bool,
    /// Whether this process was asked to stop before the step.
    pub stops: bool,
    device: Device,
}

/// The counts by which a step's losses are divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepCounts {
    /// Number of label tokens of each domain.
    pub label_counts: Vec<u64>,
    /// Number of tokens, padding excluded, whose domain has experts.
    pub supervised_tokens: u64,
}

impl StepCounts {
    /// The counts of some blocks of `dataset`.
    pub fn new(config: &Config, dataset: &TokenDataset, blocks: &[BlockId]) -> Self {
        let experts = domain_targets(config);
        let mut label_counts = vec![0; dataset.domains.len()];
        let mut supervised_tokens = 0;
        for &block in blocks {
            let domain = block.domain as usize;
            label_counts[domain] += dataset.label_tokens(block);
            if experts.as_ref().is_some_and(|experts| !experts.of(domain).is_empty()) {
                supervised_tokens += dataset.block_lengths(block).sum::<u64>();
            }
        }
        Self { label_counts, supervised_tokens }
    }
}

impl Prepared {
    /// Lays out a step's micro-batches for `model`'s device.
    ///
    /// - `is_rounded`: whether to round the sizes of all micro-batches up to the same extent
    pub fn new(
        model: &RoutedModel,
        config: &Config,
        batches: &[Batch],
        seeding: Option<SeedingPhase>,
        num_domains: usize,
        is_rounded: bool,
    ) -> Self {
        let device = model.device();
        let experts = domain_targets(config);
        let source = source(config, seeding);
        let named: Vec<Option<Vec<i64>>> =
            batches.iter().map(|batch| Some(named_experts(batch, seeding?))).collect();
        let rows = batches.iter().zip(&named).map(|(batch, named)| {
            let rows = Rows::of_batch(batch, source.reads_records());
            Rows { expert_ids: named.as_deref().or(rows.expert_ids), ..rows }
        });
        let rows: Vec<Rows<'_>> = rows.collect();
        let rounded = is_rounded.then(|| Extent::rounded(&rows));
        let micro_batches = rows.into_iter().zip(batches).map(|(rows, batch)| {
            // rows of nothing but padding have one filler in place of labelled positions
            let is_empty = batch.label_tokens() == 0;
            let exact = || if is_empty { Extent::rounded(&[rows]) } else { Extent::of(&rows) };
            let extent = rounded.unwrap_or_else(exact);
            HostInputs::new(rows, extent, &batch.domains, experts.as_ref(), device)
        });
        let micro_batches = micro_batches.collect();
        let label_counts = domain_tokens(batches, num_domains);
        let supervised_tokens = experts.map_or(0, |experts| supervised_tokens(batches, &experts));
        Self {
            micro_batches,
            label_counts,
            supervised_tokens,
            seeding,
            added: seeding.or_else(|| added(config)),
            is_rounded,
            stops: false,
            device,
        }
    }

    /// The same micro-batches as a part of a step with these counts.
    #[must_use]
    pub fn part_of(self, counts: StepCounts) -> Self {
        let StepCounts { label_counts, supervised_tokens } = counts;
        Self { label_counts, supervised_tokens, ..self }
    }

    /// Number of micro-batches of this process.
    pub fn num_micro_batches(&self) -> usize {
        self.micro_batches.len()
    }

    /// The shapes of the micro-batches.
    pub(crate) fn layouts(&self) -> Vec<InputLayout> {
        self.micro_batches.iter().map(|batch| batch.layout.clone()).collect()
    }

    /// The micro-batches' numbers on the device.
    pub fn flats(&self) -> Vec<Tensor> {
        self.micro_batches.iter().map(|batch| batch.to_device(self.device)).collect()
    }

    /// The step's other numbers on the device, f64. The host does not wait for the transfer.
    ///
    /// - `update`: the numbers for the optimizer's update
    pub fn scalars(&self, update: &[f64]) -> Tensor {
        let all: u64 = self.label_counts.iter().sum();
        let new = self.added.map_or(0, |phase| self.label_counts[phase.domain as usize]);
        let per_supervised = 1.0 / self.supervised_tokens.max(1) as f64;
        let stops = f64::from(u8::from(self.stops));
        let mut numbers =
            vec![1.0 / all as f64, new as f64, (all - new) as f64, per_supervised, stops];
        numbers.extend_from_slice(update);
        let numbers = ffi::staged(Tensor::from_slice(&numbers), self.device);
        numbers.to_device_(self.device, Kind::Double, true, false)
    }

    /// The step whose numbers are `flats` and `scalars`, as views of them.
    pub fn tensors(&self, flats: &[Tensor], scalars: &Tensor) -> StepTensors {
        let layouts = self.micro_batches.iter().map(|batch| &batch.layout);
        StepTensors {
            micro_batches: layouts.zip(flats).map(|(of, flat)| of.inputs(flat)).collect(),
            per_token: scalars.get(0),
            seeded_tokens: [scalars.get(1), scalars.get(2)],
            per_supervised_token: scalars.get(3),
            stops: scalars.get(4),
            update: scalars.narrow(0, 5, scalars.size()[0] - 5),
            seeding: self.seeding,
            added: self.added,
            num_domains: self.label_counts.len(),
        }
    }
}

/// A step's numbers on the device, and its shape.
#[derive(Debug)]
pub struct StepTensors {
    /// The micro-batches, whose groups of tokens are the domains.
    pub micro_batches: Vec<Inputs>,
    /// 1 / label tokens of the step, 0-dim, f64.
    pub per_token: Tensor,
    /// Label tokens of the new domain and of the others, each 0-dim, f64.
    pub seeded_tokens: [Tensor; 2],
    /// 1 / tokens of the step whose domain has experts, 0-dim, f64.
    pub per_supervised_token: Tensor,
    /// 1 if this process was asked to stop, and otherwise 0, 0-dim, f64.
    pub stops: Tensor,
    /// The numbers of [`super::optim::Optimizer::scalars`], f64.
    pub update: Tensor,
    /// The seeding phase, if the step belongs to one.
    pub seeding: Option<SeedingPhase>,
    /// The expert and the domain that the stage adds, if it adds one.
    pub added: Option<SeedingPhase>,
    /// Number of domains.
    pub num_domains: usize,
}

/// The expert and the domain that the stage of `config` adds, if it adds one.
fn added(config: &Config) -> Option<SeedingPhase> {
    let growth = config.growth.as_ref()?;
    let domain = config.data.domains.iter().position(|domain| domain.name == growth.domain)?;
    Some(SeedingPhase { expert: config.lora.num_experts - 1, domain: domain as u32 })
}

/// The experts of the domains, if something in training depends on them.
fn domain_targets(config: &Config) -> Option<DomainTargets> {
    let names = config.data.domains.iter().map(|domain| domain.name.as_str());
    config.reads_domains().then(|| DomainTargets::of_config(config, names)).flatten()
}

/// What decides the routing weights of a step.
pub fn source(config: &Config, seeding: Option<SeedingPhase>) -> RoutingSource {
    match seeding {
        Some(_) => RoutingSource::RecordOrRouter,
        None => RoutingSource::from(config.train.routing),
    }
}

/// The new expert at each position of the new domain and -1 elsewhere, `[b t]`.
fn named_experts(batch: &Batch, phase: SeedingPhase) -> Vec<i64> {
    let of_row = |&domain| if domain == phase.domain { phase.expert } else { -1 };
    batch.domains.iter().map(of_row).flat_map(|e| std::iter::repeat_n(e, batch.seq_len)).collect()
}

/// Number of tokens, padding excluded, whose domain has experts.
fn supervised_tokens(batches: &[Batch], experts: &DomainTargets) -> u64 {
    let rows = batches
        .iter()
        .flat_map(|batch| batch.document_ids.chunks(batch.seq_len).zip(&batch.domains));
    let of_row = |(ids, &domain): (&[i64], &u32)| match experts.of(domain as usize) {
        [] => 0,
        _ => ids.iter().filter(|id| **id >= 0).count() as u64,
    };
    rows.map(of_row).sum()
}

/// Number of label tokens of each domain.
fn domain_tokens(batches: &[Batch], num_domains: usize) -> Vec<u64> {
    let mut counts = vec![0; num_domains];
    for batch in batches {
        for (labels, &domain) in batch.labels.chunks(batch.seq_len).zip(&batch.domains) {
            counts[domain as usize] += labels.iter().filter(|&&label| label >= 0).count() as u64;
        }
    }
    counts
}
