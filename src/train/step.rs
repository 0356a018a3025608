//! One optimizer update: forwards, gradients, clipping, AdamW, and what is measured on the way.
//!
//! Gradients are exact under accumulation: each forward's loss is divided by the label tokens of the
//! whole step, and the load-balancing loss is that of the whole step too. Where it counts and there are
//! several micro-batches, the routers' totals are taken over all of them, with the dropout masks that
//! come, before the first is differentiated; elsewhere each forward's own totals do.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::optim::{GradientSum, Optimizer};
use crate::config::{Config, RoutingChoice};
use crate::data::{Batch, BlockId, TokenDataset};
use crate::model::lora::LoraDropout;
use crate::model::loss::{ChunkedLoss, LossSettings};
use crate::model::router::{Routing, RoutingTotals, add_totals};
use crate::model::{ForwardMode, Inputs, RoutedGpt2, RoutingSource, Trained};
use crate::{eval, ffi};

/// What one step measured.
#[derive(Debug)]
pub struct StepResult {
    /// Mean over the step's label tokens, nats, without label smoothing.
    pub loss: f64,
    /// The same by domain, for the domains that the step has seen.
    pub domain_losses: BTreeMap<String, f64>,
    /// Label tokens.
    pub label_tokens: u64,
    /// Of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Each router's totals; none if no router decides.
    pub routing: Vec<RoutingTotals>,
}

/// The gradients of a step, before they are clipped.
#[derive(Debug)]
pub struct StepGradients {
    /// One for each trained parameter.
    pub grads: Vec<Tensor>,
    /// Sums of the label tokens' losses by domain, nats, `[domains]`, f64.
    pub domain_sums: Tensor,
    /// Each router's totals; none if no router decides.
    pub routing: Vec<RoutingTotals>,
}

/// A micro-batch on the device.
struct MicroBatch {
    inputs: Inputs,
    label_domains: Tensor,
}

/// Makes one update from `blocks`.
///
/// # Errors
/// A loss or gradient that is NaN or infinite; the parameters are then as before the step.
pub fn step(
    model: &RoutedGpt2,
    trained: &Trained,
    optimizer: &mut Optimizer,
    config: &Config,
    dataset: &TokenDataset,
    blocks: &[BlockId],
    lr_factor: f64,
) -> Result<StepResult> {
    let batches: Vec<Batch> =
        blocks.chunks(config.train.micro_batch_size).map(|chunk| dataset.batch(chunk)).collect();
    let counts = domain_tokens(&batches, dataset.domains.len());
    let StepGradients { grads, domain_sums, routing } =
        gradients(model, trained, config, &batches, dataset.domains.len())?;
    let grad_norm = optimizer.clip(&grads)?.double_value(&[]);
    let domain_sums = Vec::<f64>::try_from(domain_sums)?;
    let label_tokens: u64 = counts.iter().sum();
    let loss = domain_sums.iter().sum::<f64>() / label_tokens as f64;
    check_finite(loss, grad_norm)?;
    optimizer.update(&grads, lr_factor)?;
    let domain_losses = dataset
        .domains
        .iter()
        .zip(domain_sums.iter().zip(&counts))
        .filter(|(_, (_, count))| **count > 0)
        .map(|(domain, (sum, count))| (domain.name.clone(), sum / *count as f64));
    let domain_losses = domain_losses.collect();
    Ok(StepResult { loss, domain_losses, label_tokens, grad_norm, routing })
}

/// The gradients of the mean loss over the label tokens of all micro-batches, and of the
/// load-balancing loss over them: the same however they are cut.
pub fn gradients(
    model: &RoutedGpt2,
    trained: &Trained,
    config: &Config,
    micro_batches: &[Batch],
    num_domains: usize,
) -> Result<StepGradients> {
    let device = model.device();
    let label_tokens: u64 = micro_batches.iter().map(Batch::label_tokens).sum();
    let source = RoutingSource::from(config.train.routing);
    let micro_batches: Vec<MicroBatch> = micro_batches
        .iter()
        .map(|batch| MicroBatch {
            inputs: eval::inputs(batch, &source, device),
            label_domains: eval::label_domains(batch, device),
        })
        .collect();
    let balances =
        config.router.load_balancing_coef > 0.0 && config.train.routing == RoutingChoice::Router;
    let ahead = balances && micro_batches.len() > 1;
    let mut routing = match ahead {
        true => totals_ahead(model, &micro_batches, mode(config))?,
        false => vec![],
    };
    let mut grads = GradientSum::default();
    let mut domain_sums = Tensor::zeros([num_domains as i64], (Kind::Double, device));
    for micro_batch in &micro_batches {
        let (output, of_batch) =
            forward(model, config, &source, micro_batch, 1.0 / label_tokens as f64);
        if !ahead {
            add_totals(&mut routing, &of_batch, &micro_batch.inputs.labelled);
        }
        let mut loss = output.loss;
        if balances && !of_batch.is_empty() {
            let coef = config.router.load_balancing_coef;
            loss += balance_loss(&of_batch, &routing, &micro_batch.inputs.labelled) * coef;
        }
        grads.add(&loss, trained);
        let token_losses = output.token_losses.to_kind(Kind::Double);
        domain_sums = domain_sums.index_add(0, &micro_batch.label_domains, &token_losses);
    }
    Ok(StepGradients { grads: grads.of_parameters(trained), domain_sums, routing })
}

fn mode(config: &Config) -> ForwardMode {
    ForwardMode {
        dropout: LoraDropout { probability: config.lora.dropout, masks: config.lora.dropout_masks },
        gradient_checkpointing: config.train.gradient_checkpointing,
    }
}

/// The loss of one micro-batch, and what the routers did.
fn forward(
    model: &RoutedGpt2,
    config: &Config,
    source: &RoutingSource,
    micro_batch: &MicroBatch,
    scale: f64,
) -> (ChunkedLoss, Vec<Routing>) {
    let settings = LossSettings {
        chunk_tokens: config.train.loss_chunk_tokens,
        label_smoothing: config.train.label_smoothing,
        scale,
        with_grad: true,
    };
    model.loss(&micro_batch.inputs, source, mode(config), settings)
}

/// What has the gradient of the load-balancing loss of the whole step, whose totals are `totals`, with
/// respect to one batch: the mean over the routers.
fn balance_loss(routing: &[Routing], totals: &[RoutingTotals], labelled: &Tensor) -> Tensor {
    let terms: Tensor = routing
        .iter()
        .zip(totals)
        .map(|(routing, totals)| {
            let gradient_e = totals.balance_gradient().to_kind(routing.probs.kind());
            let probs_ne = routing.probs.view([-1, gradient_e.size()[0]]).index_select(0, labelled);
            (probs_ne * gradient_e).sum(routing.probs.kind())
        })
        .sum();
    terms / routing.len() as f64
}

/// The routers' totals over all micro-batches of a step, before any of them is differentiated. The
/// generators are left as they were, so that the dropout masks come again.
fn totals_ahead(
    model: &RoutedGpt2,
    micro_batches: &[MicroBatch],
    mode: ForwardMode,
) -> Result<Vec<RoutingTotals>> {
    let device = model.device();
    let generator = ffi::rng_state(device)?;
    let mut totals = vec![];
    for micro_batch in micro_batches {
        let routing = tch::no_grad(|| model.routing(&micro_batch.inputs, mode));
        add_totals(&mut totals, &routing, &micro_batch.inputs.labelled);
    }
    ffi::set_rng_state(device, &generator)?;
    Ok(totals)
}

/// Label tokens of each domain.
fn domain_tokens(batches: &[Batch], num_domains: usize) -> Vec<u64> {
    let mut counts = vec![0; num_domains];
    for batch in batches {
        for (labels, &domain) in batch.labels.chunks(batch.seq_len).zip(&batch.domains) {
            counts[domain as usize] += labels.iter().filter(|&&label| label >= 0).count() as u64;
        }
    }
    counts
}

fn check_finite(loss: f64, grad_norm: f64) -> Result<()> {
    if loss.is_finite() && grad_norm.is_finite() {
        return Ok(());
    }
    bail!(
        "the loss is {loss} and the gradient norm {grad_norm}\nhint: try a smaller \
         `optimizer.*.learning_rate`, a `schedule.warmup_steps` or `optimizer.max_grad_norm`"
    );
}
