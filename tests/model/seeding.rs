//! The seeding of a new expert: the routing weights, and the loss for its router column.

use anyhow::Result;
use dylora::config::{GrowthConfig, LossOn, RouterConfig, RouterInput, RoutingChoice};
use dylora::data::{Batch, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::model::Inputs;
use dylora::model::batch::Labelled;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::parameters::OldParts;
use dylora::model::routing::router::Routing;
use dylora::model::routing::totals::RoutingTotals;
use dylora::model::{ForwardMode, ParameterGroup, RoutedModel, RoutingSource};
use dylora::train::losses::{Seeding, seeding_loss};
use dylora::train::step::{self, SeedingPhase, StepGradients};
use tch::{Device, Kind, Tensor};

use super::accumulation::{config, cut, routers};
use crate::common::{
    ROUTER_INPUTS, SCOPES, assert_close, max_difference, plain_router, seed, tiny_lora, tiny_model,
    two_rows,
};

/// The last of the three experts of [`tiny_lora`] is new.
const PHASE: SeedingPhase = SeedingPhase { expert: 2, domain: 1 };

/// The weights of each site, `[b, t, e]`.
fn weights(all: &[RoutingWeights]) -> Vec<Tensor> {
    let tensor = |weights: &RoutingWeights| match weights {
        RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) => {
            weights.shallow_clone()
        }
        RoutingWeights::Off | RoutingWeights::Ones => panic!("there are routers"),
    };
    all.iter().map(tensor).collect()
}

#[test]
fn a_named_expert_has_all_of_a_token_and_the_router_decides_on_the_others() -> Result<()> {
    let _generator = seed(400);
    for (input, scope) in ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope))) {
        for (top_k, gradient_checkpointing) in [(None, false), (Some(2), true), (Some(1), false)] {
            let router = RouterConfig { input, scope, top_k, ..plain_router() };
            let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
            // both rows have named and unnamed tokens
            let named = [[-1i64, 2, 2, -1, 0, -1, -1], [1, -1, -1, -1, 2, 2, 2]];
            let named = Tensor::from_slice2(&named);
            let mut inputs = two_rows();
            inputs.expert_ids = Some(named.shallow_clone());
            let mode = ForwardMode { gradient_checkpointing, ..ForwardMode::EVAL };
            let output = model.forward(&inputs, &RoutingSource::RecordOrRouter, mode, None);
            let is_named = named.ge(0).unsqueeze(-1);
            let one_hot = named.clamp_min(0).one_hot(3).to_kind(Kind::Double);
            for (site, (used, routing)) in
                weights(&output.weights).iter().zip(&output.routing).enumerate()
            {
                let what = format!("{router:?}, site {site}");
                assert!(routing.weights.equal(used), "{what}: told otherwise");
                let by_rule = match &routing.selected {
                    None => routing.probs.shallow_clone(),
                    Some(chosen) => {
                        let ones = routing.probs.ones_like();
                        let kept = routing.probs.zeros_like().scatter(-1, chosen, &ones);
                        let kept = kept * &routing.probs;
                        &kept / kept.sum_dim_intlist(-1, true, Kind::Double)
                    }
                };
                let expected = one_hot.where_self(&is_named, &by_rule);
                assert_close(&what, used, &expected, 1e-15);
                if input != RouterInput::LayerInput {
                    let alone = model.routing(&inputs, ForwardMode::EVAL);
                    let expected = one_hot.where_self(&is_named, &alone[site].weights);
                    assert!(used.equal(&expected), "{what}: not the router's own");
                }
            }
            // if no token names an expert, the result equals the router's to the bit
            inputs.expert_ids = Some(named.full_like(-1));
            let none = model.forward(&inputs, &RoutingSource::RecordOrRouter, mode, None);
            let router = model.forward(&inputs, &RoutingSource::Router, mode, None);
            assert!(none.hidden.equal(&router.hidden), "{input:?}, {scope:?}, {top_k:?}");
            assert!(max_difference(&none.hidden, &output.hidden) > 1e-3);
        }
    }
    Ok(())
}

#[test]
fn gradient_checkpointing_changes_no_gradient_of_a_seeding_step() -> Result<()> {
    let _generator = seed(401);
    for (input, scope) in ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope))) {
        let router = RouterConfig { input, scope, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batches = cut(&two_domains(5, 4), &[2, 3], false);
        let plain = gradients(&model, &router, &[], &batches, 1.0)?;
        let set = ["train.gradient_checkpointing=true"];
        let checkpointed = gradients(&model, &router, &set, &batches, 1.0)?;
        for (a, b) in plain.grads.iter().zip(&checkpointed.grads) {
            assert_close(&format!("{input:?}, {scope:?}"), a, b, 1e-12);
        }
    }
    Ok(())
}

/// Two domains of documents of 2 to 10 tokens, each in blocks of 16.
fn two_domains(num_old: u32, num_new: u32) -> TokenDataset {
    let document = |n: u32, step: u32| MemoryDocument {
        tokens: (0..2 + n % 9).map(|i| (n * 7 + i * step) % 61).collect(),
        prompt_len: n % 9 / 3,
        expert: None,
    };
    let domain = |name: &str, count, step| MemoryDomain {
        name: name.into(),
        weight: 1.0,
        documents: (1..=count).map(|n| document(n, step)).collect(),
    };
    let domains = vec![domain("old", num_old, 5), domain("new", num_new, 11)];
    TokenDataset::in_memory(16, LossOn::Completion, domains)
}

/// The settings of a growth by the domain `new`, with the full learning rate for all parts.
pub(super) fn growth(seed_router_coef: f64) -> GrowthConfig {
    GrowthConfig {
        domain: "new".into(),
        old_experts_rate: 1.0,
        old_columns_rate: 1.0,
        seed_steps: 1,
        seed_router_coef,
        column_learning_rate: 1e-3,
        consolidation_rate: 1.0,
    }
}

/// The gradients of a step in the seeding phase, with all other losses too.
fn gradients(
    model: &RoutedModel,
    router: &RouterConfig,
    overrides: &[&str],
    batches: &[Batch],
    seed_router_coef: f64,
) -> Result<StepGradients> {
    let mut config = config(router, overrides)?;
    config.growth = Some(growth(seed_router_coef));
    let trained = model.trained(RoutingChoice::Router, None);
    step::gradients(model, &trained, &config, batches, Some(PHASE), 2)
}

#[test]
fn a_seeding_steps_gradients_do_not_depend_on_how_it_is_cut() -> Result<()> {
    let _generator = seed(402);
    let dataset = two_domains(7, 6);
    for router in routers() {
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let whole = gradients(&model, &router, &[], &cut(&dataset, &[], false), 1.0)?;
        let totals = |of: &StepGradients| {
            Tensor::cat(&of.routing.iter().map(RoutingTotals::flat).collect::<Vec<_>>(), 0)
        };
        for (sizes, reversed) in [(vec![1; 20], false), (vec![2, 1], true)] {
            let batches = cut(&dataset, &sizes, reversed);
            let cut = gradients(&model, &router, &[], &batches, 1.0)?;
            let what = format!("{router:?}, {sizes:?}");
            assert_close(&what, &totals(&cut), &totals(&whole), 1e-10);
            for (a, b) in cut.grads.iter().zip(&whole.grads) {
                assert_close(&what, a, b, 1e-10);
            }
        }
    }
    Ok(())
}

/// The seeding loss by its formula over all label tokens at once, as the mean over the sites.
fn literal(routing: &[Routing], temperature: f64, rows: &Tensor, is_new: &Tensor) -> Tensor {
    let is_new = is_new.to_kind(Kind::Double);
    let is_old: Tensor = 1.0 - &is_new;
    let of_site = |routing: &Routing| {
        let exp = (routing.logits.view([-1, 3]).index_select(0, rows) / temperature).exp();
        let p = exp.select(-1, PHASE.expert) / exp.sum_dim_intlist(-1, false, Kind::Double);
        let mean =
            |values: Tensor, of: &Tensor| (values * of).sum(Kind::Double) / of.sum(Kind::Double);
        -mean(p.log(), &is_new) - mean((-p).log1p(), &is_old)
    };
    let sites: Vec<Tensor> = routing.iter().map(of_site).collect();
    Tensor::stack(&sites, 0).mean(Kind::Double)
}

/// The batch as a seeding step routes it: the tokens of the new domain name the new expert.
fn seeded(batch: &Batch) -> Batch {
    let named = |domain: &u32| if *domain == PHASE.domain { PHASE.expert } else { -1 };
    let rows = batch.domains.iter().flat_map(|domain| vec![named(domain); batch.seq_len]);
    Batch { expert_ids: rows.collect(), ..batch.clone() }
}

/// Both domains have the same share in the loss, however many tokens each has.
#[test]
fn the_seeding_loss_adds_the_gradient_of_the_formula_over_all_tokens() -> Result<()> {
    let _generator = seed(403);
    let dataset = two_domains(9, 3);
    for router in routers() {
        let router = RouterConfig { temperature: 0.7, ..router };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batch = seeded(&cut(&dataset, &[], false).remove(0));
        let inputs = Inputs::of_batch(&batch, true, Device::Cpu);
        let source = &RoutingSource::RecordOrRouter;
        let routing = model.forward(&inputs, source, ForwardMode::EVAL, None).routing;
        let is_new = inputs.groups.eq(1);
        let count = is_new.to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]) as u64;
        let tokens = [count, batch.label_tokens() - count];
        assert!(tokens[0] * 2 < tokens[1], "{tokens:?} are to be uneven");
        let expected = literal(&routing, 0.7, &inputs.labelled, &is_new);
        let tokens = tokens.map(|count| Tensor::from(count as f64));
        let phase = Seeding { expert: PHASE.expert, group: 1, tokens: tokens.each_ref() };
        let found = seeding_loss(&routing, &0.7.into(), inputs.label_rows(2), phase);
        assert_close(&format!("{router:?}"), &found, &expected, 1e-12);

        let trained = model.trained(RoutingChoice::Router, None);
        let expected = Tensor::run_backward(&[expected], &trained.leaves, false, false);
        let expected = expected.iter().zip(&trained.leaves).map(|(grad, leaf)| {
            if grad.defined() { grad.shallow_clone() } else { leaf.detach().zeros_like() }
        });
        let expected = trained.split(&expected.collect::<Vec<_>>());
        let batches = cut(&dataset, &[1, 2, 1], true);
        let with = gradients(&model, &router, &[], &batches, 1.5)?;
        let without = gradients(&model, &router, &[], &batches, 0.0)?;
        for ((with, without), (expected, parameter)) in
            with.grads.iter().zip(&without.grads).zip(expected.iter().zip(&trained.parameters))
        {
            let what = format!("{} by {router:?}", parameter.name);
            assert_close(&what, &(with - without), &(expected * 1.5), 1e-10);
        }
    }
    Ok(())
}

/// A site with the given scores, one row for each token.
fn site(scores: &[[f64; 3]], kind: Kind) -> Routing {
    let logits = Tensor::from_slice(scores.as_flattened()).to_kind(kind);
    let logits = logits.view([1, -1, 3]).set_requires_grad(true);
    let probs = logits.softmax(-1, kind);
    let weights = probs.shallow_clone();
    Routing { clean: logits.shallow_clone(), logits, probs, weights, selected: None, present: None }
}

fn loss_of(routing: &Routing, is_new: &[bool], tokens: [u64; 2]) -> Tensor {
    let rows = Tensor::arange(is_new.len() as i64, (Kind::Int64, Device::Cpu));
    let groups = Tensor::from_slice(is_new).to_kind(Kind::Int64);
    let labelled = Labelled { rows: &rows, groups: &groups, num_groups: 2, counted: None };
    let tokens = tokens.map(|count| Tensor::from(count as f64));
    let phase = Seeding { expert: 2, group: 1, tokens: tokens.each_ref() };
    seeding_loss(std::slice::from_ref(routing), &1.0.into(), labelled, phase)
}

#[test]
fn the_seeding_loss_is_two_ln_2_where_the_new_expert_has_half() {
    // e^0 + e^0 = e^(ln 2), so p = 1/2 for every token
    let half = site(&[[0.0, 0.0, 2f64.ln()]; 5], Kind::Double);
    let loss = loss_of(&half, &[true, false, false, false, false], [1, 4]);
    assert_close("half", &loss, &Tensor::from(2.0 * 2f64.ln()), 1e-15);
}

#[test]
fn a_step_without_tokens_of_one_side_has_the_other_sides_loss() {
    let half = site(&[[0.0, 0.0, 2f64.ln()]; 3], Kind::Double);
    for (is_new, tokens) in [(true, [3, 0]), (false, [0, 3])] {
        let loss = loss_of(&half, &[is_new; 3], tokens);
        assert_close("one side", &loss, &Tensor::from(2f64.ln()), 1e-15);
    }
}

/// For every p, d(-ln(1 - p)) / d s_new = p and d(-ln p) / d s_new = p - 1.
#[test]
fn tokens_that_are_surely_on_the_wrong_side_keep_their_whole_gradient() {
    for kind in [Kind::Float, Kind::Double] {
        let wrong = site(&[[0.0, 0.0, 40.0], [40.0, 0.0, -60.0]], kind);
        let loss = loss_of(&wrong, &[false, true], [1, 1]);
        assert_close("loss", &loss, &Tensor::from(40.0 - 2f64.ln() + 100.0), 1e-4);
        loss.backward();
        let grad = wrong.logits.grad().view([2, 3]).select(-1, 2);
        assert_close("gradient", &grad, &Tensor::from_slice(&[1.0, -1.0]), 1e-6);
    }
}

#[test]
fn with_frozen_old_parts_only_the_new_column_of_a_router_is_trained() -> Result<()> {
    let _generator = seed(404);
    for (input, scope) in ROUTER_INPUTS.into_iter().flat_map(|i| SCOPES.map(|scope| (i, scope))) {
        for hidden_layers in [0, 1] {
            let router =
                RouterConfig { input, scope, hidden_layers, hidden_width: 5, ..plain_router() };
            let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
            let frozen = OldParts {
                num_experts: 2,
                experts_rate: 0.0,
                columns_rate: 0.0,
                new_column_learning_rate: 0.125,
            };
            let trained = model.trained(RoutingChoice::Router, Some(frozen));
            let of_router = trained.parameters.iter().filter(|p| p.name.contains("router"));
            for parameter in of_router.clone() {
                assert!(parameter.name.ends_with(".new"), "{}", parameter.name);
                assert_eq!((parameter.tensor.size()[0], parameter.rate), (1, 0.125));
                assert_eq!(parameter.group, ParameterGroup::NewColumn);
            }
            assert_eq!(of_router.count(), 2 * model.routers().len());
            let slow = OldParts { columns_rate: 0.25, ..frozen };
            let trained = model.trained(RoutingChoice::Router, Some(slow));
            for parameter in trained.parameters.iter().filter(|p| p.name.contains("router")) {
                let rate = if parameter.name.ends_with(".new") { 0.125 } else { 0.25 };
                assert_eq!(parameter.rate, rate, "{}", parameter.name);
            }
        }
    }
    Ok(())
}
