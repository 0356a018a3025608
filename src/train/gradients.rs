//! The gradients of a step, and what is measured while they are computed.
//!
//! Gradients are exact under accumulation: each forward pass divides its loss by the label tokens
//! of the whole step, and the routers' losses are those of the whole step too. If one of the
//! routers' losses depends on means over the step, and the step has several micro-batches, the
//! routers' totals over all of them are computed before the first micro-batch is differentiated,
//! with the random numbers that the later passes draw again. Otherwise each forward pass gives the
//! totals itself.
//!
//! In a world of several processes, each computes its part: the gradients and sums of its own
//! micro-batches, which are then added up (`exchange.rs`). The counts by which losses are
//! divided are those of the whole step, and so are the routers' totals that losses depend on. If
//! there are many gradients, the graph of its last micro-batch is cut, so that those of the upper
//! layers can be added up while those of the lower layers are computed.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::losses::{self, Seeding, needs_totals, router_losses};
use super::optim::{GradientSum, PartBelow};
use super::prepared::{Prepared, SeedingPhase, StepTensors, source};
use crate::config::{Config, Maturity, RouterInput, RouterNoise, RoutingChoice};
use crate::data::Batch;
use crate::ffi;
use crate::model::batch::Labelled;
use crate::model::cut::Cut;
use crate::model::experts::dropout::LoraDropout;
use crate::model::loss::{ChunkedLoss, LossSettings};
use crate::model::routing::router::Routing;
use crate::model::routing::supervision::SupervisionSums;
use crate::model::routing::totals::{RoutingTotals, add_totals, rows};
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource, Trained};

/// The gradients of a step before clipping, and what was measured with them.
#[derive(Debug)]
pub struct StepGradients {
    /// The gradients, one for each trained parameter.
    pub grads: Vec<Tensor>,
    /// Sums of the label tokens' losses by domain, nats, `[domains]`, f64.
    pub domain_sums: Tensor,
    /// The routing totals of each site.
    pub routing: Vec<RoutingTotals>,
    /// Sums of the label tokens' losses, nats, `[e]`, f64. Each loss is multiplied by the token's
    /// routing weight for the expert, which is the mean over the sites that have the expert. `None`
    /// unless routers take part and `router.hybrid` looks for plateaus.
    pub expert_losses: Option<Tensor>,
    /// The sums of the domain supervision at each site, `[sites, 2]`, f64: its loss, nats, and the
    /// number of tokens whose most probable expert is one of their domain's. `None` without it.
    pub supervision: Option<Tensor>,
    /// The orthogonality loss without its factor, 0-dim; `None` without `lora.orthogonality` or if
    /// no module has two experts.
    pub orthogonality: Option<Tensor>,
    /// Whether `routing` covers the whole step, and not only this process's part of it.
    pub has_whole_routing: bool,
    /// Number of processes that were asked to stop, 0-dim, f64.
    pub stops: Tensor,
}

/// The gradients of a step's loss: the mean loss over the label tokens of all micro-batches, and
/// the other losses over the same tokens. The result does not depend on how the tokens are split
/// into micro-batches.
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

/// As [`gradients`], for a step whose numbers are on the device. The host reads none of them.
pub fn gradients_of(
    model: &RoutedModel,
    trained: &Trained,
    config: &Config,
    step: &StepTensors,
) -> Result<StepGradients> {
    let ahead = match takes_totals_ahead(config, step.seeding, step.micro_batches.len()) {
        true => Some(totals_ahead(model, config, step)?),
        false => None,
    };
    let part = Part { ahead, is_first: true, cut: None };
    begin_gradients(model, trained, config, step, part)?.finish(trained)
}

/// What a process must know in order to compute its part of a step.
#[derive(Debug)]
pub(super) struct Part {
    /// The routers' totals over the whole step, if the losses depend on them.
    pub ahead: Option<Vec<RoutingTotals>>,
    /// Whether this is the first process, with which the losses that depend on no token count.
    pub is_first: bool,
    /// The layer below which the graph of the last micro-batch is cut; `None` for no cut.
    pub cut: Option<usize>,
}

/// The gradients and sums of this process's micro-batches, of which the gradients of the last one
/// below its cut are still to come.
#[derive(Debug)]
pub(super) struct BegunGradients {
    /// All but the gradients.
    sums: StepGradients,
    grads: GradientSum,
    below: PartBelow,
    /// As in [`Part::cut`].
    cut: Option<usize>,
}

impl BegunGradients {
    /// The gradients of the parameters above the cut.
    pub fn upper(&self, trained: &Trained) -> Vec<Tensor> {
        let above = trained.parameters.iter().filter(|parameter| parameter.is_above(self.cut));
        above.map(|parameter| self.grads.of(parameter)).collect()
    }

    /// Differentiates the part below the cut.
    pub fn finish(mut self, trained: &Trained) -> Result<StepGradients> {
        self.grads.add_below(self.below, trained, &trained.leaves_below(self.cut))?;
        Ok(StepGradients { grads: self.grads.of_parameters(trained), ..self.sums })
    }
}

/// Computes the sums of this process's micro-batches, and their gradients but for the part below
/// the cut.
pub(super) fn begin_gradients(
    model: &RoutedModel,
    trained: &Trained,
    config: &Config,
    step: &StepTensors,
    part: Part,
) -> Result<BegunGradients> {
    let StepTensors { micro_batches, per_token, seeding, num_domains, .. } = step;
    let num_groups = *num_domains as i64;
    let source = source(config, *seeding);
    let counts = counts_routers(config, *seeding);
    let has_whole_routing = part.ahead.is_some();
    let mut routing = part.ahead.unwrap_or_default();
    let mut grads = GradientSum::default();
    let mut domain_sums = Tensor::zeros([num_groups], (Kind::Double, model.device()));
    let finds_plateaus = matches!(config.router.hybrid, Some(Maturity::Plateau(_)));
    let mut expert_losses: Option<Tensor> = None;
    let mut supervision: Option<Tensor> = None;
    let orthogonality = add_orthogonality(model, trained, config, part.is_first, &mut grads)?;
    let mut below = PartBelow::default();
    for (index, inputs) in micro_batches.iter().enumerate() {
        let mut cut = Cut::below(part.cut.filter(|_| index + 1 == micro_batches.len()));
        let (output, of_batch) = forward(model, config, &source, inputs, per_token, &mut cut);
        let labelled = inputs.label_rows(num_groups);
        if !has_whole_routing {
            add_totals(&mut routing, &of_batch, labelled);
        }
        let mut loss = output.loss;
        if counts {
            let others = router_losses(&config.router, &of_batch, &routing, labelled, per_token);
            loss = others.into_iter().fold(loss, |loss, other| loss + other);
        }
        if config.supervises()
            && let Some((term, sums)) = supervision_part(model, config, step, inputs, &of_batch)
        {
            loss = &loss + term;
            supervision = Some(match supervision {
                Some(before) => before + sums,
                None => sums,
            });
        }
        if let Some(phase) = step.added.as_ref().filter(|_| column_coef(config) > 0.0) {
            loss = &loss + seeding_part(model, config, step, labelled, &of_batch, *phase);
        }
        below = grads.add_above(&loss, trained, cut)?;
        let token_losses = output.token_losses.to_kind(Kind::Double);
        domain_sums += (labelled.by_group() * &token_losses).sum_dim_intlist(1, false, None);
        if finds_plateaus && !of_batch.is_empty() {
            let new = losses_by_expert(model, &of_batch, &inputs.labelled, &token_losses);
            expert_losses = Some(match expert_losses {
                Some(sum) => sum + new,
                None => new,
            });
        }
    }
    let sums = StepGradients {
        grads: vec![],
        domain_sums,
        routing,
        has_whole_routing,
        expert_losses,
        supervision,
        orthogonality,
        stops: step.stops.shallow_clone(),
    };
    Ok(BegunGradients { sums, grads, below, cut: part.cut })
}

/// The orthogonality loss, and its gradient. It depends on no token, and counts in the first
/// process alone; the others have 0.
fn add_orthogonality(
    model: &RoutedModel,
    trained: &Trained,
    config: &Config,
    is_first: bool,
    grads: &mut GradientSum,
) -> Result<Option<Tensor>> {
    let Some(of) = config.lora.orthogonality else { return Ok(None) };
    let Some(loss) = model.orthogonality(of) else { return Ok(None) };
    if !is_first {
        return Ok(Some(loss.zeros_like().detach()));
    }
    // if all experts are frozen, the loss exists but has no gradient
    if loss.requires_grad() {
        grads.add(&(&loss * of.coef()), trained)?;
    }
    Ok(Some(loss.detach()))
}

/// Whether the routers' losses count. While a new expert is seeded, the router decides for only
/// some of the tokens.
fn counts_routers(config: &Config, seeding: Option<SeedingPhase>) -> bool {
    config.train.routing == RoutingChoice::Router && seeding.is_none()
}

/// Whether the routers' totals are computed before any micro-batch is differentiated.
///
/// - `num_micro_batches`: those of the whole step
pub(super) fn takes_totals_ahead(
    config: &Config,
    seeding: Option<SeedingPhase>,
    num_micro_batches: usize,
) -> bool {
    counts_routers(config, seeding) && needs_totals(&config.router) && num_micro_batches > 1
}

/// Whether a step sets the generators back in order to draw the same random numbers twice.
pub(super) fn rewinds_generators(config: &Config, num_micro_batches: usize) -> bool {
    let drops = config.lora.dropout > 0.0;
    let ahead = takes_totals_ahead(config, None, num_micro_batches);
    ahead && totals_draw(config) || config.train.gradient_checkpointing && drops
}

/// Whether the routers' totals depend on random numbers.
fn totals_draw(config: &Config) -> bool {
    let input = config.router.input;
    let reads_layers = matches!(input, RouterInput::LayerInput | RouterInput::ModuleInput);
    config.router.noise != RouterNoise::None || config.lora.dropout > 0.0 && reads_layers
}

/// The domain supervision of a micro-batch times its factor, as its part of the step's mean, and
/// its sums at each site, `[sites, 2]`; `None` without a router.
fn supervision_part(
    model: &RoutedModel,
    config: &Config,
    step: &StepTensors,
    inputs: &Inputs,
    routing: &[Routing],
) -> Option<(Tensor, Tensor)> {
    let sums = SupervisionSums::new(routing, model.temperature(), inputs)?;
    let coef = config.router.supervision() / routing.len() as f64;
    let factor = (&step.per_supervised_token * coef).to_kind(sums.loss.kind());
    Some((sums.loss * factor, sums.by_site))
}

/// The factor of the loss that trains the router column of a new expert.
fn column_coef(config: &Config) -> f64 {
    config.growth.as_ref().map_or(0.0, |growth| growth.seed_router_coef)
}

/// The seeding loss of a micro-batch times its factor.
fn seeding_part(
    model: &RoutedModel,
    config: &Config,
    step: &StepTensors,
    labelled: Labelled<'_>,
    routing: &[Routing],
    phase: SeedingPhase,
) -> Tensor {
    let tokens = step.seeded_tokens.each_ref();
    let seeding = Seeding { expert: phase.expert, group: i64::from(phase.domain), tokens };
    losses::seeding_loss(routing, model.temperature(), labelled, seeding) * column_coef(config)
}

/// Sums of `token_losses`, `[n]`, for each expert, `[e]`. Each loss is multiplied by the token's
/// routing weight for the expert, which is the mean over the sites that have the expert.
fn losses_by_expert(
    model: &RoutedModel,
    routing: &[Routing],
    labelled: &Tensor,
    token_losses: &Tensor,
) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let options = (Kind::Double, token_losses.device());
    let mut sums = Tensor::zeros([model.num_experts()], options);
    let mut sites_e = sums.zeros_like();
    for (site, routing) in model.sites().into_iter().zip(routing) {
        let weights_ne = rows(&routing.weights, labelled);
        sums = &sums + weights_ne.to_kind(Kind::Double).tr().mv(token_losses);
        sites_e = match model.present_at(site) {
            None => sites_e + 1.0,
            Some(experts) => sites_e.index_add(0, experts, &Tensor::ones(experts.size(), options)),
        };
    }
    sums / sites_e.clamp_min(1.0)
}

fn mode(config: &Config) -> ForwardMode {
    ForwardMode {
        dropout: LoraDropout { probability: config.lora.dropout, masks: config.lora.dropout_masks },
        noise: config.router.noise,
        detaches_routers: config.router.detach_input,
        keeps_features: false,
        rule: None,
        base_products: config.train.base_products,
        gradient_checkpointing: config.train.gradient_checkpointing,
    }
}

/// The loss of one micro-batch, and its routing at each site.
fn forward(
    model: &RoutedModel,
    config: &Config,
    source: &RoutingSource,
    inputs: &Inputs,
    per_token: &Tensor,
    cut: &mut Cut,
) -> (ChunkedLoss, Vec<Routing>) {
    let settings = LossSettings {
        chunk_tokens: config.train.loss_chunk_tokens,
        label_smoothing: config.train.label_smoothing,
        scale: per_token.shallow_clone(),
        with_grad: true,
    };
    model.loss_cut(inputs, source, mode(config), settings, cut)
}

/// The routers' totals over this process's micro-batches of a step, before any of them is
/// differentiated. The generators are set back afterwards, so that the same noise and dropout masks
/// are drawn again.
pub(super) fn totals_ahead(
    model: &RoutedModel,
    config: &Config,
    step: &StepTensors,
) -> Result<Vec<RoutingTotals>> {
    let StepTensors { micro_batches, seeding, num_domains, .. } = step;
    let (source, num_groups) = (&source(config, *seeding), *num_domains as i64);
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
