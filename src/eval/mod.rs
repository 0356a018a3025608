//! Loss, perplexity and routing statistics of a model on a dataset.
//!
//! Each document is cut into windows of at most `seq_len` tokens that do not overlap, so the stride
//! is `seq_len`. A token sees the tokens before it in its window, and each target is scored once.
//! The loss of a domain is the mean over its label tokens, `loss` is the mean over the domains, and
//! `token_loss` is the mean over all label tokens. Perplexity is `exp` of a loss. Routing
//! statistics are means over the same tokens, except for those of the domain supervision, which
//! counts prompts too.

pub mod experts;
mod histogram;
pub mod routing;
mod supervision;

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::config::{Config, EvalRule, RouterConfig, RoutingChoice};
use crate::data::{BlockId, TokenDataset};
use crate::model::batch::DomainTargets;
use crate::model::loss::LossSettings;
use crate::model::routing::router::Routing;
use crate::model::routing::totals::{RoutingTotals, add_totals};
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};
use histogram::HistogramTotals;
pub use histogram::{NUM_BUCKETS, WeightHistogram};
pub use routing::{RoutingReport, SiteReport};
use routing::{SiteExperts, SiteSupervision, SiteTotals};
use supervision::{Supervision, SupervisionTotals};

/// The results of an evaluation.
#[derive(Debug, Clone, Serialize)]
pub struct EvalReport {
    /// Length of the longest window, in tokens.
    pub seq_len: usize,
    /// Distance between windows, in tokens; equal to `seq_len`.
    pub stride: usize,
    /// Mean of the domains' losses, nats: each domain counts the same.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Mean loss over all label tokens, nats.
    pub token_loss: f64,
    /// `exp(token_loss)`.
    pub token_perplexity: f64,
    /// Label tokens of all domains.
    pub label_tokens: u64,
    /// The results of each domain that has label tokens.
    pub domains: Vec<DomainReport>,
    /// The domain supervision, nats, as a mean over the tokens of all domains that have experts and
    /// over the sites; absent if there are none or no router decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_supervision: Option<f64>,
    /// Share of the same tokens whose most probable expert is one of their domain's, as a mean over
    /// the sites; absent likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_accuracy: Option<f64>,
    /// Routing over all domains; `None` without a router.
    pub routing: Option<RoutingReport>,
    /// How the routing weights of each expert are distributed; empty without a router, or if
    /// [`EvalSettings::weight_histograms`] is off.
    #[serde(skip)]
    pub weight_histograms: Vec<Option<WeightHistogram>>,
}

/// The results of one domain.
#[derive(Debug, Clone, Serialize)]
pub struct DomainReport {
    /// Its name.
    pub name: String,
    /// Number of documents that were scored.
    pub documents: u64,
    /// Label tokens.
    pub label_tokens: u64,
    /// Mean loss over the domain's label tokens, nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// As [`EvalReport::domain_supervision`], over this domain's tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_supervision: Option<f64>,
    /// As [`EvalReport::domain_accuracy`], over this domain's tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_accuracy: Option<f64>,
    /// Routing of this domain's tokens; `None` without a router.
    pub routing: Option<RoutingReport>,
}

impl EvalReport {
    /// Each domain's loss, nats, by its name.
    pub fn domain_losses(&self) -> BTreeMap<String, f64> {
        self.domains.iter().map(|domain| (domain.name.clone(), domain.loss)).collect()
    }

    /// Each expert's mean routing weight on each domain, by the domain's name; empty without a
    /// router.
    pub fn domain_routing_weights(&self) -> BTreeMap<String, Vec<f64>> {
        let weights = |domain: &DomainReport| {
            let routing = domain.routing.as_ref()?;
            Some((domain.name.clone(), routing.mean_routing_weights.clone()))
        };
        self.domains.iter().filter_map(weights).collect()
    }

    /// Each domain's accuracy, by its name, where it is known.
    pub fn domain_accuracies(&self) -> BTreeMap<String, f64> {
        let known = |domain: &DomainReport| Some((domain.name.clone(), domain.domain_accuracy?));
        self.domains.iter().filter_map(known).collect()
    }
}

/// How to evaluate.
#[derive(Debug, Clone)]
pub struct EvalSettings {
    /// Sequences in one forward pass.
    pub batch_size: usize,
    /// Number of positions whose logits are in memory at the same time.
    pub loss_chunk_tokens: i64,
    /// The routing rule; `None` for the model's own.
    pub rule: Option<EvalRule>,
    /// An expert is dead if its mean routing weight is less than this part of an even weight.
    pub dead_share: f64,
    /// The experts of the dataset's domains; `None` if they have none.
    pub domains: Option<DomainTargets>,
    /// Whether the report has histograms of the routing weights.
    pub weight_histograms: bool,
}

impl EvalSettings {
    /// The settings of a run's evaluations: its micro-batches and chunks, with the routing rule for
    /// evaluation.
    pub fn of_run(config: &Config, model: &RoutedModel, dataset: &TokenDataset) -> Self {
        Self {
            batch_size: config.train.micro_batch_size,
            loss_chunk_tokens: config.train.loss_chunk_tokens,
            rule: model.router_spec().eval,
            dead_share: config.router.dead_share,
            domains: domain_targets(config, model, dataset),
            weight_histograms: false,
        }
    }
}

impl Default for EvalSettings {
    fn default() -> Self {
        let dead_share = RouterConfig::default().dead_share;
        Self {
            batch_size: 8,
            loss_chunk_tokens: 1024,
            rule: None,
            dead_share,
            domains: None,
            weight_histograms: false,
        }
    }
}

/// The experts that a run's config gives the domains of `dataset`. `None` if it gives none, or if
/// `model` has not as many experts as the config, as before one is added.
pub fn domain_targets(
    config: &Config,
    model: &RoutedModel,
    dataset: &TokenDataset,
) -> Option<DomainTargets> {
    let names = dataset.domains.iter().map(|domain| domain.name.as_str());
    let targets = DomainTargets::of_config(config, names)?;
    (targets.num_experts as i64 == model.num_experts()).then_some(targets)
}

/// Evaluates `model` on every block of `dataset`, with routing weights from `source`.
///
/// - `progress`: receives the number of blocks done and the number of all blocks
///
/// # Errors
/// Fails if the data has no label token.
pub fn evaluate(
    model: &RoutedModel,
    dataset: &TokenDataset,
    source: &RoutingSource,
    settings: EvalSettings,
    progress: &dyn Fn(u64, u64),
) -> Result<EvalReport> {
    if dataset.num_blocks() == 0 {
        bail!("there is nothing to evaluate: the data holds no label token");
    }
    let _no_grad = tch::no_grad_guard();
    let num_groups = dataset.domains.len() as i64;
    let mut sums = Sums::default();
    let mut totals: Vec<RoutingTotals> = vec![];
    let mut histograms: Option<HistogramTotals> = None;
    let mut supervision = SupervisionTotals::default();
    let (mut done, num_blocks) = (0, dataset.num_blocks() as u64);
    let order = dataset.eval_order();
    for index in 0..dataset.domains.len() {
        let of_domain = |block: &&BlockId| block.domain as usize == index;
        let blocks: Vec<BlockId> = order.iter().filter(of_domain).copied().collect();
        let (mut loss_sum, mut label_tokens) = (0.0, 0);
        for chunk in blocks.chunks(settings.batch_size) {
            let batch = dataset.batch(chunk);
            let (by_record, experts) = (source.reads_records(), settings.domains.as_ref());
            let inputs = Inputs::of_domains(&batch, by_record, experts, model.device());
            let (loss, routing) = score(model, &inputs, source, &settings);
            loss_sum += loss;
            label_tokens += batch.label_tokens();
            add_totals(&mut totals, &routing, inputs.label_rows(num_groups));
            if settings.weight_histograms {
                HistogramTotals::add(&mut histograms, &routing, inputs.label_rows(num_groups));
            }
            supervision.add(index, &routing, model.temperature(), &inputs);
            done += chunk.len() as u64;
            progress(done, num_blocks);
        }
        sums.losses.push((loss_sum, label_tokens));
    }
    sums.routing = routing::fetch(SiteExperts::of(model), &totals)?;
    sums.supervision = supervision.fetch()?;
    let histograms = histograms.map(|totals| totals.fetch()).transpose()?.unwrap_or_default();
    Ok(EvalReport { weight_histograms: histograms, ..sums.report(dataset, settings.dead_share) })
}

/// The loss of one domain of `dataset`, nats, with routing weights from `source`; `None` if it has
/// no label token.
///
/// - `domain`: its index
pub fn domain_loss(
    model: &RoutedModel,
    dataset: &TokenDataset,
    domain: usize,
    source: &RoutingSource,
    settings: &EvalSettings,
) -> Option<f64> {
    let _no_grad = tch::no_grad_guard();
    let blocks = dataset.eval_order().into_iter().filter(|block| block.domain as usize == domain);
    let (mut loss_sum, mut label_tokens) = (0.0, 0);
    for chunk in blocks.collect::<Vec<_>>().chunks(settings.batch_size) {
        let batch = dataset.batch(chunk);
        let inputs = Inputs::of_batch(&batch, source.reads_records(), model.device());
        loss_sum += score(model, &inputs, source, settings).0;
        label_tokens += batch.label_tokens();
    }
    (label_tokens > 0).then(|| loss_sum / label_tokens as f64)
}

/// The sums over a dataset, on the host.
#[derive(Debug, Default)]
struct Sums {
    /// The summed loss of each domain, nats, and its number of label tokens.
    losses: Vec<(f64, u64)>,
    /// The routing totals of each site.
    routing: Vec<SiteTotals>,
    /// How well the routers know the domains.
    supervision: Supervision,
}

impl Sums {
    fn report(&self, dataset: &TokenDataset, dead_share: f64) -> EvalReport {
        let of_routers = |domain| {
            let sites = self.supervision.of(domain);
            let routing = RoutingReport::new(&self.routing, domain, dead_share);
            let routing = routing.map(|report| report.with_supervision(sites.as_deref()));
            (sites.and_then(|sites| SiteSupervision::mean(&sites)), routing)
        };
        let domains = dataset.domains.iter().zip(&self.losses).enumerate();
        let scored = domains.filter(|(_, (_, sums))| sums.1 > 0);
        let domains: Vec<DomainReport> = scored
            .map(|(index, (domain, (loss_sum, label_tokens)))| {
                let loss = loss_sum / *label_tokens as f64;
                let (supervision, routing) = of_routers(Some(index));
                DomainReport {
                    name: domain.name.clone(),
                    documents: domain.counts.documents,
                    label_tokens: *label_tokens,
                    loss,
                    perplexity: loss.exp(),
                    domain_supervision: supervision.map(|mean| mean.loss),
                    domain_accuracy: supervision.map(|mean| mean.accuracy),
                    routing,
                }
            })
            .collect();
        let label_tokens: u64 = domains.iter().map(|domain| domain.label_tokens).sum();
        let all_losses = self.losses.iter().map(|(loss, _)| loss).sum::<f64>();
        let token_loss = all_losses / label_tokens as f64;
        let loss = domains.iter().map(|domain| domain.loss).sum::<f64>() / domains.len() as f64;
        let (supervision, routing) = of_routers(None);
        EvalReport {
            seq_len: dataset.seq_len,
            stride: dataset.seq_len,
            loss,
            perplexity: loss.exp(),
            token_loss,
            token_perplexity: token_loss.exp(),
            label_tokens,
            domains,
            domain_supervision: supervision.map(|mean| mean.loss),
            domain_accuracy: supervision.map(|mean| mean.accuracy),
            routing,
            weight_histograms: vec![],
        }
    }
}

/// The summed loss of a batch, nats, and its routing at each site.
fn score(
    model: &RoutedModel,
    inputs: &Inputs,
    source: &RoutingSource,
    settings: &EvalSettings,
) -> (f64, Vec<Routing>) {
    let loss_settings = LossSettings {
        chunk_tokens: settings.loss_chunk_tokens,
        label_smoothing: 0.0,
        scale: Tensor::ones([], (Kind::Float, model.device())),
        with_grad: false,
    };
    let mode = ForwardMode { rule: settings.rule, ..ForwardMode::EVAL };
    let (loss, routing) = model.loss(inputs, source, mode, loss_settings);
    (loss.token_losses.sum(Kind::Double).double_value(&[]), routing)
}

/// Checks that a dataset can be routed by `routing` over `num_experts` experts.
///
/// # Errors
/// Fails with `record` if a document names no expert or one that does not exist.
pub fn check_records(
    dataset: &TokenDataset,
    routing: RoutingChoice,
    num_experts: i64,
) -> Result<()> {
    if routing != RoutingChoice::Record {
        return Ok(());
    }
    let records = dataset.record_experts();
    if records.documents_without > 0 {
        bail!(
            "routing by `record` needs an `expert` in each record, {} have none\nhint: a number \
             from 0, or `\"__base__\"` for no expert; or route otherwise, as by `uniform`",
            records.documents_without
        );
    }
    match records.largest {
        Some(largest) if largest >= num_experts => {
            bail!("a record names `expert` {largest}, the model has {num_experts} from 0")
        }
        _ => Ok(()),
    }
}

/// Checks that a dataset can be routed by `routing` where its domains have the experts `experts`.
///
/// # Errors
/// Fails with `domain` if a domain has no expert.
pub fn check_domains(
    dataset: &TokenDataset,
    routing: RoutingChoice,
    experts: Option<&DomainTargets>,
) -> Result<()> {
    if routing != RoutingChoice::Domain {
        return Ok(());
    }
    let has_none = |index: usize| experts.is_none_or(|experts| experts.of(index).is_empty());
    let mut domains = dataset.domains.iter().enumerate();
    match domains.find(|(index, domain)| domain.num_blocks() > 0 && has_none(*index)) {
        Some((_, domain)) => bail!(
            "routing by `domain` needs an expert for each domain, `{}` has none\nhint: name one \
             by `data.domains[].expert` in the run's config; or route otherwise, as by `uniform`",
            domain.name
        ),
        None => Ok(()),
    }
}
