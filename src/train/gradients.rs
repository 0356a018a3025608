//! The gradients of a step, and what is measured on the way.
//!
//! They are exact under accumulation: each forward's loss is divided by the label tokens of the whole step, and
//! the routers' losses are those of the whole step too. Where one of them depends on the step's means and there
//! are several micro-batches, the routers' totals are taken over all of them, with the random numbers that come,
//! before the first is differentiated; elsewhere each forward's own do.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::losses::{self, Seeding, needs_totals, router_losses};
use super::optim::GradientSum;
use super::prepared::{Prepared, SeedingPhase, StepTensors, source};
use crate::config::{Config, Maturity, RouterInput, RouterNoise, RoutingChoice};
use crate::data::Batch;
use crate::ffi;
use crate::model::batch::Labelled;
use crate::model::experts::dropout::LoraDropout;
use crate::model::loss::{ChunkedLoss, LossSettings};
use crate::model::routing::router::Routing;
use crate::model::routing::totals::{RoutingTotals, add_totals, rows};
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Trained};

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

/// The gradients of the mean loss over the label tokens of all micro-batches, and of the other losses
/// over them: the same however they are cut.
pub fn gradients(
    model: &RoutedModel,
    trained: &Trained,
    config: &Config,
    batches: &[Batch],
    seeding: Option<SeedingPhase>,
    num_domains: usize,
) -> Result<StepGradients> {
    let step = Prepared::new(model, config, batches, seeding, num_domains, false);
    let tensors = step.tensors(&step.flats(), &step.scalars(&[]));
    gradients_of(model, trained, config, &tensors)
}

/// The same of a step on the device. The host looks at none of its numbers.
pub fn gradients_of(
    model: &RoutedModel,
    trained: &Trained,
    config: &Config,
    step: &StepTensors,
) -> Result<StepGradients> {
    let StepTensors { micro_batches, per_token, seeding, num_domains, .. } = step;
    let num_groups = *num_domains as i64;
    let source = source(config, *seeding);
    // while a new expert is seeded, the router decides on a part of the tokens only
    let counts = config.train.routing == RoutingChoice::Router && seeding.is_none();
    let ahead = counts && takes_totals_ahead(config, micro_batches.len());
    let mut routing = match ahead {
        true => totals_ahead(model, config, micro_batches, &source, num_groups)?,
        false => vec![],
    };
    let mut grads = GradientSum::default();
    let mut domain_sums = Tensor::zeros([num_groups], (Kind::Double, model.device()));
    let finds_plateaus = matches!(config.router.hybrid, Some(Maturity::Plateau(_)));
    let mut expert_losses: Option<Tensor> = None;
    let orthogonality = config.lora.orthogonality.and_then(|of| {
        let loss = model.orthogonality(of)?;
        // experts that are all frozen have it, but no gradient
        if loss.requires_grad() {
            grads.add(&(&loss * of.coef()), trained);
        }
        Some(loss.detach())
    });
    for inputs in micro_batches {
        let (output, of_batch) = forward(model, config, &source, inputs, per_token);
        let labelled = inputs.label_rows(num_groups);
        if !ahead {
            add_totals(&mut routing, &of_batch, labelled);
        }
        let mut loss = output.loss;
        if counts {
            let others = router_losses(&config.router, &of_batch, &routing, labelled, per_token);
            loss = others.into_iter().fold(loss, |loss, other| loss + other);
        }
        if let Some(phase) = seeding {
            loss = &loss + seeding_part(model, config, step, labelled, &of_batch, *phase);
        }
        grads.add(&loss, trained);
        let token_losses = output.token_losses.to_kind(Kind::Double);
        domain_sums = domain_sums.index_add(0, &inputs.groups, &token_losses);
        if finds_plateaus && !of_batch.is_empty() {
            let new = losses_by_expert(model, &of_batch, &inputs.labelled, &token_losses);
            expert_losses = Some(match expert_losses {
                Some(sum) => sum + new,
                None => new,
            });
        }
    }
    let grads = grads.of_parameters(trained);
    Ok(StepGradients { grads, domain_sums, routing, expert_losses, orthogonality })
}

/// Whether the routers' totals are taken before any micro-batch is differentiated.
fn takes_totals_ahead(config: &Config, num_micro_batches: usize) -> bool {
    needs_totals(&config.router) && num_micro_batches > 1
}

/// Whether a step sets the generators back, so that random numbers come twice.
pub(super) fn rewinds_generators(config: &Config) -> bool {
    let drops = config.lora.dropout > 0.0;
    let is_routed = config.train.routing == RoutingChoice::Router;
    let ahead = is_routed && takes_totals_ahead(config, config.train.grad_accum_steps);
    ahead && totals_draw(config) || config.train.gradient_checkpointing && drops
}

/// Whether the routers' totals depend on random numbers.
fn totals_draw(config: &Config) -> bool {
    let reads_layers = config.router.input == RouterInput::LayerInput;
    config.router.noise != RouterNoise::None || config.lora.dropout > 0.0 && reads_layers
}

/// The seeding loss of a micro-batch with its factor.
fn seeding_part(
    model: &RoutedModel,
    config: &Config,
    step: &StepTensors,
    labelled: Labelled<'_>,
    routing: &[Routing],
    phase: SeedingPhase,
) -> Tensor {
    let coef = config.growth.as_ref().map_or(0.0, |growth| growth.seed_router_coef);
    let tokens = step.seeded_tokens.each_ref();
    let seeding = Seeding { expert: phase.expert, group: i64::from(phase.domain), tokens };
    losses::seeding_loss(routing, model.temperature(), labelled, seeding) * coef
}

/// Sums of `token_losses`, `[n]`, each times its routing weight for an expert, the mean over the places
/// that have it, `[e]`.
fn losses_by_expert(
    model: &RoutedModel,
    routing: &[Routing],
    labelled: &Tensor,
    token_losses: &Tensor,
) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let options = (Kind::Double, token_losses.device());
    let mut sums = Tensor::zeros([model.num_experts()], options);
    let mut places = sums.zeros_like();
    for (site, routing) in model.sites().into_iter().zip(routing) {
        let weights_ne = rows(&routing.weights, labelled);
        sums = &sums + weights_ne.to_kind(Kind::Double).tr().mv(token_losses);
        places = match model.present_at(site) {
            None => places + 1.0,
            Some(experts) => places.index_add(0, experts, &Tensor::ones(experts.size(), options)),
        };
    }
    sums / places.clamp_min(1.0)
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
    model: &RoutedModel,
    config: &Config,
    source: &RoutingSource,
    inputs: &Inputs,
    per_token: &Tensor,
) -> (ChunkedLoss, Vec<Routing>) {
    let settings = LossSettings {
        chunk_tokens: config.train.loss_chunk_tokens,
        label_smoothing: config.train.label_smoothing,
        scale: per_token.shallow_clone(),
        with_grad: true,
    };
    model.loss(inputs, source, mode(config), settings)
}

/// The routers' totals over all micro-batches of a step, before any of them is differentiated. The
/// generators are left as they were, so that the same noise and dropout masks come again.
fn totals_ahead(
    model: &RoutedModel,
    config: &Config,
    micro_batches: &[Inputs],
    source: &RoutingSource,
    num_groups: i64,
) -> Result<Vec<RoutingTotals>> {
    let device = model.device();
    let generator = totals_draw(config).then(|| ffi::rng_state(device)).transpose()?;
    let mut totals = vec![];
    for inputs in micro_batches {
        let routing = tch::no_grad(|| model.routing_by(inputs, source, mode(config)));
        add_totals(&mut totals, &routing, inputs.label_rows(num_groups));
    }
    if let Some(generator) = generator {
        ffi::set_rng_state(device, &generator)?;
    }
    Ok(totals)
}
