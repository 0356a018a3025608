//! Layers with experts of their own (MoLA, arXiv:2402.08562).

use anyhow::Result;
use dylora::config::{
    Config, Family, LoraConfig, RouterConfig, RouterInput, RouterScope, RoutingLevel, load,
};
use dylora::eval::routing::{RouterLosses, SiteExperts};
use dylora::model::batch::Labelled;
use dylora::model::decoder::spec::DecoderSpec;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::routing::totals::add_totals;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use super::gradients::assert_slope;
use crate::common::{
    ROUTER_INPUTS, SCOPES, assert_close, gradients, logits, max_difference, mean_loss, on_the_host,
    plain_router, randomize, seed, tiny_base, tiny_config, tiny_lora, two_rows,
};

/// The numbers of experts of the three layers.
const PER_LAYER: [i64; 3] = [1, 2, 3];

/// A model of three layers, each of which routes over its own experts.
fn model_of(lora: &LoraConfig, router: &RouterConfig) -> Result<RoutedModel> {
    let base = tiny_base(DecoderSpec { num_layers: 3, ..tiny_config() });
    let specs = ExpertSpec::all(lora, &base.spec)?;
    let spec = RouterSpec { own_experts: true, ..RouterSpec::from(router) };
    let model = RoutedModel::with_experts(&base, &specs, &spec, Device::Cpu, Kind::Double);
    randomize(&model)?;
    Ok(model)
}

/// A model with the same tensors that routes over all experts in every layer.
fn over_all(model: &RoutedModel) -> Result<RoutedModel> {
    let spec = RouterSpec { own_experts: false, ..model.router_spec().clone() };
    let (base, specs, tensors) = (model.base(), model.specs(), model.tensors());
    RoutedModel::from_tensors(base, specs, &spec, &tensors, Device::Cpu, Kind::Double)
}

fn lora() -> LoraConfig {
    LoraConfig { experts_per_layer: Some(PER_LAYER.to_vec()), ..tiny_lora() }
}

/// Routers of every scope, input, level and rule.
fn routers() -> Vec<RouterConfig> {
    let mut routers = vec![];
    for (scope, input) in SCOPES.into_iter().flat_map(|s| ROUTER_INPUTS.map(|i| (s, i))) {
        for level in [RoutingLevel::Token, RoutingLevel::Sequence] {
            for top_k in [None, Some(1), Some(2)] {
                let temperature = 0.7;
                let default = plain_router();
                routers.push(RouterConfig { scope, input, level, top_k, temperature, ..default });
            }
        }
    }
    routers
}

#[test]
fn a_layer_has_the_modules_of_its_own_experts_alone() -> Result<()> {
    let _generator = seed(240);
    let model = model_of(&lora(), &plain_router())?;
    for (path, experts) in model.modules() {
        let own: Vec<usize> = (0..3).filter(|&e| experts.scaling(e).is_some()).collect();
        assert_eq!(own, (0..PER_LAYER[path.layer] as usize).collect::<Vec<_>>(), "{path}");
    }
    let of = |expert: usize, spec: &ExpertSpec| {
        let layers = (0..3).filter(|&layer| (expert as i64) < PER_LAYER[layer]).count();
        assert_eq!(spec.modules.len(), layers * Family::Gpt2.modules().len());
    };
    model.specs().iter().enumerate().for_each(|(expert, spec)| of(expert, spec));
    Ok(())
}

#[test]
fn a_config_with_experts_per_layer_routes_over_a_layers_own() -> Result<()> {
    let text = "base = { source = { path = \"x\" } }\n[data]\nseq_len = 16\n\
                domains = [{ name = \"x\", train = [\"x\"] }]";
    let config = |set: &[String]| -> Result<Config> { load::parse(text, set) };
    assert!(!RouterSpec::of_config(&config(&[])?).own_experts);
    let set = ["lora.experts_per_layer=[1, 4]".to_owned()];
    assert!(RouterSpec::of_config(&config(&set)?).own_experts);
    Ok(())
}

/// The routing weights of the experts that a layer has, `[b, t, m]`, from their scores: the softmax
/// over these experts, or its k largest values, found by sorting and divided by their sum.
fn literal(scores: &Tensor, top_k: Option<i64>) -> Tensor {
    let exp = (scores / 0.7).exp();
    let probs = &exp / exp.sum_dim_intlist(-1, true, Kind::Double);
    let m = *scores.size().last().expect("scores are [b, t, m]");
    let Some(k) = top_k.filter(|&k| k < m) else { return probs };
    let (sorted, _) = probs.sort(-1, true);
    let least = sorted.narrow(-1, k - 1, 1);
    let kept = &probs * probs.ge_tensor(&least).to_kind(Kind::Double);
    &kept / kept.sum_dim_intlist(-1, true, Kind::Double)
}

#[test]
fn a_layers_weights_are_the_softmax_over_its_own_experts() -> Result<()> {
    let _generator = seed(241);
    for router in routers() {
        let model = model_of(&lora(), &router)?;
        let all = over_all(&model)?;
        let source = &RoutingSource::Router;
        let output = model.forward(&two_rows(), source, ForwardMode::EVAL, None);
        let sites = model.sites();
        assert!(sites.iter().all(|site| site.layer.is_some()), "each layer routes for itself");
        assert_eq!(output.routing.len(), sites.len());
        for (site, routing) in sites.into_iter().zip(&output.routing) {
            let what = format!("{site}, {router:?}");
            let m = PER_LAYER[site.layer.expect("it has one")];
            assert_eq!(model.experts_at(site), (0..m as usize).collect::<Vec<_>>());
            assert_eq!(routing.logits.size(), [2, 7, m]);
            assert_close(&what, &routing.probs, &literal(&routing.logits, None), 1e-14);
            let own = routing.weights.narrow(-1, 0, m);
            assert_close(&what, &own, &literal(&routing.logits, router.top_k), 1e-14);
            let absent = routing.weights.narrow(-1, m, 3 - m);
            assert_eq!(absent.count_nonzero(None::<i64>).int64_value(&[]), 0);
            if m == 1 {
                assert_eq!(max_difference(&own, &own.ones_like()), 0.0, "one expert has weight 1");
            }
        }
        // the scores are the same if the router is over all experts, but then experts that the
        // layer lacks get a part of the weight
        let whole = all.routing(&two_rows(), ForwardMode::EVAL);
        let first = (&output.routing[0], &whole[0]);
        assert_close("scores", &first.0.logits, &first.1.logits.narrow(-1, 0, 1), 1e-13);
        let [own, shared] = [&model, &all].map(|model| logits(model, &two_rows(), source));
        assert!(max_difference(&own, &shared) > 1e-3, "{router:?}");
    }
    Ok(())
}

/// The three layers have the experts 0 and 2, 1 and 2, and 1.
#[test]
fn a_layers_own_experts_need_not_be_the_first() -> Result<()> {
    let _generator = seed(246);
    let per_layer: [&[i64]; 3] = [&[0, 2], &[1, 2], &[1]];
    let base = tiny_base(DecoderSpec { num_layers: 3, ..tiny_config() });
    let mut specs = ExpertSpec::all(&tiny_lora(), &base.spec)?;
    for (expert, spec) in specs.iter_mut().enumerate() {
        spec.modules.retain(|path, _| per_layer[path.layer].contains(&(expert as i64)));
    }
    for top_k in [None, Some(1)] {
        let router = RouterConfig { top_k, ..plain_router() };
        let spec = RouterSpec { own_experts: true, ..RouterSpec::from(&router) };
        let model = RoutedModel::with_experts(&base, &specs, &spec, Device::Cpu, Kind::Double);
        randomize(&model)?;
        let whole = over_all(&model)?.routing(&two_rows(), ForwardMode::EVAL).remove(0).logits;
        let routing = model.routing(&two_rows(), ForwardMode::EVAL);
        assert_eq!(routing.len(), 3);
        for (own, routing) in per_layer.into_iter().zip(&routing) {
            let own = Tensor::from_slice(own);
            let scores = whole.index_select(-1, &own);
            assert_close("scores", &routing.logits, &scores, 1e-13);
            let exp = scores.exp();
            let probs = &exp / exp.sum_dim_intlist(-1, true, Kind::Double);
            assert_close("probs", &routing.probs, &probs, 1e-13);
            let found = routing.weights.index_select(-1, &own);
            let (best, expected) = match top_k {
                None => (None, probs),
                Some(_) => {
                    let best = probs.argmax(-1, false);
                    let kept = best.one_hot(own.size()[0]).to_kind(Kind::Double);
                    (Some(own.take(&best)), kept)
                }
            };
            assert_close("weights", &found, &expected, 1e-13);
            let rest = routing.weights.sum(Kind::Double) - found.sum(Kind::Double);
            assert_eq!(rest.double_value(&[]), 0.0, "absent experts have no weight");
            match (best.filter(|_| own.size()[0] > 1), &routing.selected) {
                (Some(best), Some(selected)) => assert!(selected.squeeze_dim(-1).equal(&best)),
                (best, selected) => assert!(best.is_none() && selected.is_none()),
            }
        }
        let mut totals = vec![];
        let inputs = two_rows();
        let groups = inputs.labelled.zeros_like();
        let labelled =
            Labelled { rows: &inputs.labelled, groups: &groups, num_groups: 1, counted: None };
        add_totals(&mut totals, &routing, labelled);
        for (totals, routing) in totals.iter().zip(&routing) {
            let sum = totals.expert_load().sum(Kind::Double).double_value(&[]);
            assert!((sum - 1.0).abs() < 1e-14, "{sum}");
            let m = *routing.logits.size().last().expect("scores are [b, t, m]");
            assert_eq!(totals.num_experts(), m);
        }
        let experts = model.sites().into_iter().map(|site| model.experts_at(site));
        assert_eq!(experts.collect::<Vec<_>>(), [vec![0, 2], vec![1, 2], vec![1]]);
    }
    Ok(())
}

/// If every layer has all experts, routing over a layer's own experts is routing over all experts.
#[test]
fn own_experts_change_nothing_if_every_layer_has_all_experts() -> Result<()> {
    let _generator = seed(242);
    for router in routers() {
        let lora = LoraConfig { experts_per_layer: Some(vec![3; 3]), ..tiny_lora() };
        let own = model_of(&lora, &router)?;
        let all = over_all(&own)?;
        let [own, all] = [own, all].map(|m| logits(&m, &two_rows(), &RoutingSource::Router));
        assert_eq!(max_difference(&own, &all), 0.0, "{router:?}");
    }
    Ok(())
}

#[test]
fn routers_over_own_experts_have_the_slopes_of_finite_differences() -> Result<()> {
    let _generator = seed(243);
    for (scope, input) in SCOPES.into_iter().flat_map(|s| ROUTER_INPUTS.map(|i| (s, i))) {
        let router = RouterConfig { scope, input, top_k: Some(2), ..plain_router() };
        let model = model_of(&lora(), &router)?;
        let loss = || {
            let source = &RoutingSource::Router;
            model.loss(&two_rows(), source, ForwardMode::EVAL, mean_loss(12)).0.loss
        };
        let grads = gradients(&model, &loss());
        let routers = model.router_tensors().into_iter();
        for (name, tensor) in routers.filter(|(name, _)| name.ends_with("weight")) {
            let what = format!("{name}, {scope:?}, {input:?}");
            assert_slope(&what, &grads[&name], &tensor, || loss().double_value(&[]));
        }
    }
    Ok(())
}

/// A router also has columns for experts that its layer lacks. These columns have no gradient.
#[test]
fn the_columns_of_absent_experts_have_no_gradient() -> Result<()> {
    let _generator = seed(244);
    let router = RouterConfig {
        scope: RouterScope::Layer,
        input: RouterInput::LayerInput,
        ..plain_router()
    };
    let model = model_of(&lora(), &router)?;
    let source = &RoutingSource::Router;
    let loss = model.loss(&two_rows(), source, ForwardMode::EVAL, mean_loss(12)).0.loss;
    let grads = gradients(&model, &loss);
    for (layer, m) in PER_LAYER.into_iter().enumerate() {
        let grad = &grads[&format!("h.{layer}.router.weight")];
        let used = grad.narrow(0, 0, m).abs().max().double_value(&[]);
        // a single expert has weight 1 whatever its score
        assert_eq!(used > 0.0, m > 1, "layer {layer}: {used:e}");
        let absent = grad.narrow(0, m, 3 - m).count_nonzero(None::<i64>).int64_value(&[]);
        assert_eq!(absent, 0, "layer {layer}");
    }
    Ok(())
}

#[test]
fn totals_and_losses_are_over_a_layers_own_experts() -> Result<()> {
    let _generator = seed(245);
    for top_k in [None, Some(2)] {
        let router = RouterConfig { top_k, ..plain_router() };
        let model = model_of(&lora(), &router)?;
        let inputs = two_rows();
        let routing = model.routing(&inputs, ForwardMode::EVAL);
        let rows = &inputs.labelled;
        let (groups, mut totals) = (rows.zeros_like(), vec![]);
        let labelled = Labelled { rows, groups: &groups, num_groups: 1, counted: None };
        add_totals(&mut totals, &routing, labelled);
        for (layer, (m, totals)) in PER_LAYER.into_iter().zip(&totals).enumerate() {
            assert_eq!(totals.num_experts(), m);
            let load = totals.expert_load();
            assert!((load.sum(Kind::Double).double_value(&[]) - 1.0).abs() < 1e-14);
            let weights = totals.weights().sum(Kind::Double).double_value(&[]);
            assert!(
                (weights - totals.num_tokens().double_value(&[])).abs() < 1e-12,
                "layer {layer}"
            );
        }
        let experts: Vec<Vec<usize>> =
            SiteExperts::of(&model).into_iter().map(|site| site.experts).collect();
        assert_eq!(experts, [vec![0], vec![0, 1], vec![0, 1, 2]]);
        // with a single expert, every loss is at its minimum
        let of_one = on_the_host(&totals[..1]);
        let losses = RouterLosses::new(&of_one).expect("a site");
        assert_eq!((losses.load_balancing_loss, losses.uniform_mse), (1.0, 0.0));
        assert_eq!(losses.routing_entropy, 0.0);
    }
    Ok(())
}
