//! One optimizer update: forwards, gradients, clipping, AdamW, and what is measured on the way.
//!
//! Gradients are exact under accumulation: each forward's loss is divided by the label tokens of the
//! whole step, and the load-balancing loss is that of the whole step too, because the router's totals
//! are taken over all micro-batches before the first of them is differentiated.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::optim::{GradientSum, Optimizer};
use crate::config::Config;
use crate::data::{Batch, BlockId, TokenDataset};
use crate::eval;
use crate::model::lora::LoraDropout;
use crate::model::loss::LossSettings;
use crate::model::router::RoutingTotals;
use crate::model::{ForwardMode, Inputs, RoutedGpt2, RoutingSource, TrainedParameter};

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
    /// The router's totals, if there is one.
    pub routing: Option<RoutingTotals>,
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
    parameters: &[TrainedParameter],
    optimizer: &mut Optimizer,
    config: &Config,
    dataset: &TokenDataset,
    blocks: &[BlockId],
    lr_factor: f64,
) -> Result<StepResult> {
    let device = model.device();
    let batches = blocks
        .chunks(config.train.micro_batch_size)
        .map(|chunk| dataset.batch(chunk))
        .collect::<Vec<Batch>>();
    let label_tokens: u64 = batches.iter().map(Batch::label_tokens).sum();
    let counts = domain_tokens(&batches, dataset.domains.len());
    let micro_batches: Vec<MicroBatch> = batches
        .iter()
        .map(|batch| MicroBatch {
            inputs: eval::inputs(batch, device),
            label_domains: eval::label_domains(batch, device),
        })
        .collect();
    let routing = routing_totals(model, &micro_batches);
    let balance =
        routing.as_ref().filter(|_| config.router.load_balancing_coef > 0.0).map(|totals| {
            totals.balance_gradient().to_kind(Kind::Float) * config.router.load_balancing_coef
        });
    let mut grads = GradientSum::default();
    let mut domain_sums = Tensor::zeros([dataset.domains.len() as i64], (Kind::Double, device));
    for micro_batch in &micro_batches {
        let (loss, token_losses) =
            forward(model, config, micro_batch, 1.0 / label_tokens as f64, balance.as_ref());
        grads.add(&loss, parameters);
        let token_losses = token_losses.to_kind(Kind::Double);
        domain_sums = domain_sums.index_add(0, &micro_batch.label_domains, &token_losses);
    }
    let grads = grads.into_inner();
    let grad_norm = optimizer.clip(&grads)?.double_value(&[]);
    let domain_sums = Vec::<f64>::try_from(domain_sums)?;
    let loss = domain_sums.iter().sum::<f64>() / label_tokens as f64;
    check_finite(loss, grad_norm)?;
    optimizer.update(&grads, lr_factor)?;
    let domain_losses = dataset
        .domains
        .iter()
        .zip(domain_sums.iter().zip(&counts))
        .filter(|(_, (_, count))| **count > 0)
        .map(|(domain, (sum, count))| (domain.name.clone(), sum / *count as f64));
    Ok(StepResult {
        loss,
        domain_losses: domain_losses.collect(),
        label_tokens,
        grad_norm,
        routing,
    })
}

/// The loss of one micro-batch to differentiate, and the losses of its label tokens.
fn forward(
    model: &RoutedGpt2,
    config: &Config,
    micro_batch: &MicroBatch,
    scale: f64,
    balance: Option<&Tensor>,
) -> (Tensor, Tensor) {
    let mode = ForwardMode {
        dropout: LoraDropout { probability: config.lora.dropout, masks: config.lora.dropout_masks },
        gradient_checkpointing: config.train.gradient_checkpointing,
    };
    let settings = LossSettings {
        chunk_tokens: config.train.loss_chunk_tokens,
        label_smoothing: config.train.label_smoothing,
        scale,
        with_grad: true,
    };
    let inputs = &micro_batch.inputs;
    let (output, routing) = model.loss(inputs, RoutingSource::Router, mode, settings);
    let mut loss = output.loss;
    if let (Some(balance_e), Some(routing)) = (balance, routing) {
        let probs_ne = routing.probs.view([-1, balance_e.size()[0]]);
        let probs_ne = probs_ne.index_select(0, &inputs.labelled);
        loss += (probs_ne * balance_e).sum(Kind::Float);
    }
    (loss, output.token_losses)
}

/// The router's totals over all micro-batches of a step.
fn routing_totals(model: &RoutedGpt2, micro_batches: &[MicroBatch]) -> Option<RoutingTotals> {
    let mut sum: Option<RoutingTotals> = None;
    for micro_batch in micro_batches {
        let routing = tch::no_grad(|| model.route(&micro_batch.inputs))?;
        let totals = RoutingTotals::new(&routing, &micro_batch.inputs.labelled);
        match &mut sum {
            Some(sum) => sum.add(&totals),
            None => sum = Some(totals),
        }
    }
    sum
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
