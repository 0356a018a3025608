//! Loss, perplexity and routing statistics of a model on a dataset.
//!
//! Each document is cut into windows of at most `seq_len` tokens that do not overlap, so the stride
//! is `seq_len`. A token sees the tokens before it in its window, and each target is scored once.
//! The loss of a domain is the mean over its label tokens, `loss` is the mean over the domains, and
//! `token_loss` is the mean over all label tokens. Perplexity is `exp` of a loss. Routing
//! statistics are means over the same tokens.

pub mod routing;

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::config::{Config, EvalRule, RouterConfig, RoutingChoice};
use crate::data::{BlockId, TokenDataset};
use crate::model::loss::LossSettings;
use crate::model::routing::router::Routing;
use crate::model::routing::totals::{RoutingTotals, add_totals};
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};
use routing::SiteExperts;
pub use routing::{RoutingReport, SiteReport};

/// The results of an evaluation.
#[derive(Debug, Clone, Serialize)]
pub struct EvalReport {
    /// Length of the longest window, in tokens.
    pub seq_len: usize,
    /// Distance between windows, in tokens; equal to `seq_len`.
    pub stride: usize,
    /// Mean of the domains' losses, nats.
    pub loss: f64,
    /// Mean loss over all label tokens, nats.
    pub token_loss: f64,
    /// `exp(token_loss)`.
    pub perplexity: f64,
    /// Label tokens of all domains.
    pub label_tokens: u64,
    /// The results of each domain that has label tokens.
    pub domains: Vec<DomainReport>,
    /// Routing over all domains; `None` without a router.
    pub routing: Option<RoutingReport>,
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
    /// Routing of this domain's tokens; `None` without a router.
    pub routing: Option<RoutingReport>,
}

impl EvalReport {
    /// Each domain's loss, nats, by its name.
    pub fn domain_losses(&self) -> BTreeMap<String, f64> {
        self.domains.iter().map(|domain| (domain.name.clone(), domain.loss)).collect()
    }
}

/// How to evaluate.
#[derive(Debug, Clone, Copy)]
pub struct EvalSettings {
    /// Sequences in one forward pass.
    pub batch_size: usize,
    /// Number of positions whose logits are in memory at the same time.
    pub loss_chunk_tokens: i64,
    /// The routing rule; `None` for the model's own.
    pub rule: Option<EvalRule>,
    /// An expert is dead if its mean routing weight is less than this part of an even weight.
    pub dead_share: f64,
}

impl EvalSettings {
    /// The settings of a run's evaluations: its micro-batches and chunks, with the routing rule
    /// `rule`.
    pub fn of_run(config: &Config, rule: Option<EvalRule>) -> Self {
        Self {
            batch_size: config.train.micro_batch_size,
            loss_chunk_tokens: config.train.loss_chunk_tokens,
            rule,
            dead_share: config.router.dead_share,
        }
    }
}

impl Default for EvalSettings {
    fn default() -> Self {
        let dead_share = RouterConfig::default().dead_share;
        Self { batch_size: 8, loss_chunk_tokens: 1024, rule: None, dead_share }
    }
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
    let device = model.device();
    let num_groups = dataset.domains.len() as i64;
    let mut sums = vec![];
    let mut totals: Vec<RoutingTotals> = vec![];
    let (mut done, num_blocks) = (0, dataset.num_blocks() as u64);
    let order = dataset.eval_order();
    for index in 0..dataset.domains.len() {
        let of_domain = |block: &&BlockId| block.domain as usize == index;
        let blocks: Vec<BlockId> = order.iter().filter(of_domain).copied().collect();
        let (mut loss_sum, mut label_tokens) = (0.0, 0);
        for chunk in blocks.chunks(settings.batch_size) {
            let batch = dataset.batch(chunk);
            let inputs = Inputs::of_batch(&batch, source.reads_records(), device);
            let (loss, routing) = score(model, &inputs, source, settings);
            loss_sum += loss;
            label_tokens += batch.label_tokens();
            add_totals(&mut totals, &routing, inputs.label_rows(num_groups));
            done += chunk.len() as u64;
            progress(done, num_blocks);
        }
        sums.push((loss_sum, label_tokens));
    }
    let totals = routing::fetch(SiteExperts::of(model), &totals)?;
    let routing = |domain| RoutingReport::new(&totals, domain, settings.dead_share);
    let scored = dataset.domains.iter().zip(&sums).enumerate().filter(|(_, (_, sums))| sums.1 > 0);
    let domains: Vec<DomainReport> = scored
        .map(|(index, (domain, (loss_sum, label_tokens)))| {
            let loss = loss_sum / *label_tokens as f64;
            DomainReport {
                name: domain.name.clone(),
                documents: domain.counts.documents,
                label_tokens: *label_tokens,
                loss,
                perplexity: loss.exp(),
                routing: routing(Some(index)),
            }
        })
        .collect();
    let label_tokens: u64 = domains.iter().map(|domain| domain.label_tokens).sum();
    let token_loss = sums.iter().map(|(loss, _)| loss).sum::<f64>() / label_tokens as f64;
    Ok(EvalReport {
        seq_len: dataset.seq_len,
        stride: dataset.seq_len,
        loss: domains.iter().map(|domain| domain.loss).sum::<f64>() / domains.len() as f64,
        token_loss,
        perplexity: token_loss.exp(),
        label_tokens,
        domains,
        routing: routing(None),
    })
}

/// The summed loss of a batch, nats, and its routing at each site.
fn score(
    model: &RoutedModel,
    inputs: &Inputs,
    source: &RoutingSource,
    settings: EvalSettings,
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
