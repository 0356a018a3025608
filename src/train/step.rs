//! One optimizer update: forwards, gradients, clipping, AdamW, and what is measured on the way.
//!
//! Gradients are exact under accumulation: each forward's loss is divided by the label tokens of the
//! whole step, and the routers' losses are those of the whole step too. Where one of them depends on the
//! step's means and there are several micro-batches, the routers' totals are taken over all of them, with
//! the random numbers that come, before the first is differentiated; elsewhere each forward's own do.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::losses::{self, Seeding, needs_totals, router_losses};
use super::optim::{GradientSum, Optimizer};
use crate::config::{Config, Maturity, RoutingChoice};
use crate::data::{Batch, BlockId, TokenDataset};
use crate::model::lora::LoraDropout;
use crate::model::loss::{ChunkedLoss, LossSettings};
use crate::model::router::Routing;
use crate::model::routing_totals::{Labelled, RoutingTotals, add_totals, rows};
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
    /// The totals of each place where a router decides.
    pub routing: Vec<RoutingTotals>,
    /// As [`StepGradients::expert_losses`].
    pub expert_losses: Option<Vec<f64>>,
    /// As [`StepGradients::orthogonality`].
    pub orthogonality: Option<f64>,
}

/// The gradients of a step, before they are clipped.
#[derive(Debug)]
pub struct StepGradients {
    /// One for each trained parameter.
    pub grads: Vec<Tensor>,
    /// Sums of the label tokens' losses by domain, nats, `[domains]`, f64.
    pub domain_sums: Tensor,
    /// The totals of each place where a router decides.
    pub routing: Vec<RoutingTotals>,
    /// Sums of the label tokens' losses, each times the token's routing weight for the expert (the mean
    /// over the places that have it), nats, `[e]`, f64; only where the plateau of an expert is looked for.
    pub expert_losses: Option<Tensor>,
    /// The orthogonality loss before its factor, 0-dim; none if it does not count.
    pub orthogonality: Option<Tensor>,
}

/// A micro-batch on the device.
struct MicroBatch {
    inputs: Inputs,
    label_domains: Tensor,
}

/// Which phase of its growth a mixture is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedingPhase {
    /// The new expert, which gets all of the new domain's tokens.
    pub expert: i64,
    /// The new domain, as an index in the dataset.
    pub domain: u32,
}

/// What a step's place in the run decides.
#[derive(Debug, Clone, Copy)]
pub struct Phase {
    /// The seeding of a new expert, if the step is part of it.
    pub seeding: Option<SeedingPhase>,
    /// Factor of all learning rates.
    pub lr_factor: f64,
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
    phase: Phase,
) -> Result<StepResult> {
    let Phase { seeding, lr_factor } = phase;
    let batches: Vec<Batch> =
        blocks.chunks(config.train.micro_batch_size).map(|chunk| dataset.batch(chunk)).collect();
    let counts = domain_tokens(&batches, dataset.domains.len());
    let StepGradients { grads, domain_sums, routing, expert_losses, orthogonality } =
        gradients(model, trained, config, &batches, seeding, dataset.domains.len())?;
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
    let expert_losses = expert_losses.map(Vec::<f64>::try_from).transpose()?;
    let orthogonality = orthogonality.map(|loss| loss.double_value(&[]));
    Ok(StepResult {
        loss,
        domain_losses,
        label_tokens,
        grad_norm,
        routing,
        expert_losses,
        orthogonality,
    })
}

/// The gradients of the mean loss over the label tokens of all micro-batches, and of the other losses
/// over them: the same however they are cut.
pub fn gradients(
    model: &RoutedGpt2,
    trained: &Trained,
    config: &Config,
    batches: &[Batch],
    seeding: Option<SeedingPhase>,
    num_domains: usize,
) -> Result<StepGradients> {
    let device = model.device();
    let label_counts = domain_tokens(batches, num_domains);
    let label_tokens: u64 = label_counts.iter().sum();
    let source = match seeding {
        Some(_) => RoutingSource::RecordOrRouter,
        None => RoutingSource::from(config.train.routing),
    };
    let micro_batches: Vec<MicroBatch> =
        batches.iter().map(|batch| MicroBatch::new(batch, &source, seeding, model)).collect();
    let has_router = config.train.routing == RoutingChoice::Router;
    // while a new expert is seeded, the router decides on a part of the tokens only
    let counts = has_router && seeding.is_none();
    let ahead = counts && needs_totals(&config.router) && micro_batches.len() > 1;
    let mut routing = match ahead {
        true => totals_ahead(model, &micro_batches, &source, mode(config), num_domains)?,
        false => vec![],
    };
    let mut grads = GradientSum::default();
    let mut domain_sums = Tensor::zeros([num_domains as i64], (Kind::Double, device));
    let finds_plateaus = matches!(config.router.hybrid, Some(Maturity::Plateau(_)));
    let mut expert_losses = None;
    let orthogonality = config.lora.orthogonality.and_then(|of| {
        let loss = model.orthogonality(of)?;
        // experts that are all frozen have it, but no gradient
        if loss.requires_grad() {
            grads.add(&(&loss * of.coef()), trained);
        }
        Some(loss.detach())
    });
    for micro_batch in &micro_batches {
        let (output, of_batch) =
            forward(model, config, &source, micro_batch, 1.0 / label_tokens as f64);
        let labelled = &micro_batch.inputs.labelled;
        if !ahead {
            add_totals(&mut routing, &of_batch, micro_batch.labelled(num_domains));
        }
        let mut loss = output.loss;
        if counts {
            let others = router_losses(&config.router, &of_batch, &routing, labelled, label_tokens);
            loss = others.into_iter().fold(loss, |loss, other| loss + other);
        }
        if let Some(phase) = seeding {
            let seeding = seeding_part(model, config, micro_batch, &of_batch, phase, &label_counts);
            loss = &loss + seeding;
        }
        grads.add(&loss, trained);
        let token_losses = output.token_losses.to_kind(Kind::Double);
        domain_sums = domain_sums.index_add(0, &micro_batch.label_domains, &token_losses);
        if finds_plateaus && !of_batch.is_empty() {
            let new = losses_by_expert(model, &of_batch, labelled, &token_losses);
            expert_losses =
                Some(expert_losses.map_or_else(|| new.shallow_clone(), |sum| sum + &new));
        }
    }
    let grads = grads.of_parameters(trained);
    Ok(StepGradients { grads, domain_sums, routing, expert_losses, orthogonality })
}

/// The seeding loss of a micro-batch with its factor; `label_counts` are the step's, by domain.
fn seeding_part(
    model: &RoutedGpt2,
    config: &Config,
    micro_batch: &MicroBatch,
    routing: &[Routing],
    phase: SeedingPhase,
    label_counts: &[u64],
) -> Tensor {
    let coef = config.growth.as_ref().map_or(0.0, |growth| growth.seed_router_coef);
    let is_new = micro_batch.label_domains.eq(i64::from(phase.domain));
    let new = label_counts[phase.domain as usize];
    let tokens = [new, label_counts.iter().sum::<u64>() - new];
    let seeding = Seeding { expert: phase.expert, is_new: &is_new, tokens };
    let temperature = model.router_spec().temperature;
    losses::seeding_loss(routing, temperature, &micro_batch.inputs.labelled, seeding) * coef
}

impl MicroBatch {
    fn new(
        batch: &Batch,
        source: &RoutingSource,
        seeding: Option<SeedingPhase>,
        model: &RoutedGpt2,
    ) -> Self {
        let device = model.device();
        let mut inputs = eval::inputs(batch, source, device);
        if let Some(phase) = seeding {
            let named = batch.domains.iter().map(|&domain| match domain == phase.domain {
                true => phase.expert,
                false => -1,
            });
            let named = Tensor::from_slice(&named.collect::<Vec<i64>>()).unsqueeze(-1);
            let named = named.expand(inputs.input_ids.size(), false).to_device(device);
            inputs.expert_ids = Some(named);
        }
        Self { inputs, label_domains: eval::label_domains(batch, device) }
    }

    fn labelled(&self, num_domains: usize) -> Labelled<'_> {
        Labelled {
            rows: &self.inputs.labelled,
            groups: &self.label_domains,
            num_groups: num_domains as i64,
        }
    }
}

/// Sums of `token_losses`, `[n]`, each times its routing weight for an expert, the mean over the places
/// that have it, `[e]`.
fn losses_by_expert(
    model: &RoutedGpt2,
    routing: &[Routing],
    labelled: &Tensor,
    token_losses: &Tensor,
) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let options = (Kind::Double, token_losses.device());
    let e = model.num_experts();
    let mut sums = Tensor::zeros([e], options);
    let mut places = vec![0f64; e as usize];
    for (site, routing) in model.sites().into_iter().zip(routing) {
        let weights_ne = rows(&routing.weights, labelled);
        sums = &sums + weights_ne.to_kind(Kind::Double).tr().mv(token_losses);
        model.experts_at(site).into_iter().for_each(|expert| places[expert] += 1.0);
    }
    sums / Tensor::from_slice(&places).clamp_min(1.0).to_device(options.1)
}

fn mode(config: &Config) -> ForwardMode {
    ForwardMode {
        dropout: LoraDropout { probability: config.lora.dropout, masks: config.lora.dropout_masks },
        noise: config.router.noise,
        rule: None,
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

/// The routers' totals over all micro-batches of a step, before any of them is differentiated. The
/// generators are left as they were, so that the same noise and dropout masks come again.
fn totals_ahead(
    model: &RoutedGpt2,
    micro_batches: &[MicroBatch],
    source: &RoutingSource,
    mode: ForwardMode,
    num_domains: usize,
) -> Result<Vec<RoutingTotals>> {
    let device = model.device();
    let generator = ffi::rng_state(device)?;
    let mut totals = vec![];
    for micro_batch in micro_batches {
        let routing = tch::no_grad(|| model.routing_by(&micro_batch.inputs, source, mode));
        add_totals(&mut totals, &routing, micro_batch.labelled(num_domains));
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
