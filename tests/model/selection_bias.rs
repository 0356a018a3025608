//! The selection bias, which is added to choose the k best experts, but not to weight them
//! (arXiv:2408.15664).

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{RouterConfig, RouterInput, RouterNoise, RouterScope, RoutingChoice};
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::{Router, RouterSpec, Routing, RoutingRule};
use dylora::model::routing::totals::RoutingTotals;
use dylora::model::{ForwardMode, RoutedModel};
use dylora::train::balance::balance_biases;
use tch::{Device, Kind, Tensor};

use crate::common::{
    DOUBLE, SCOPES, add_of_one_domain, assert_close, max_difference, plain_router, seed, tiny_base,
    tiny_config, tiny_lora, tiny_model, two_rows,
};

fn biased(scope: RouterScope, input: RouterInput, top_k: Option<i64>) -> RouterConfig {
    RouterConfig { scope, input, top_k, balance_bias_rate: 0.01, ..plain_router() }
}

/// The update is not skipped.
fn not_skipped() -> Tensor {
    Tensor::from(false)
}

fn bias(model: &RoutedModel, router: usize) -> Vec<f64> {
    let bias = model.routers()[router].selection_bias.as_ref().expect("it has a bias");
    Vec::try_from(bias).expect("it is on the CPU")
}

/// The totals of a site at which the given experts were chosen, one for each token.
fn chosen(experts: &[i64]) -> RoutingTotals {
    let n = experts.len() as i64;
    let selected = Tensor::from_slice(experts).view([1, n, 1]);
    let weights = selected.squeeze_dim(-1).one_hot(3).to_kind(Kind::Double);
    let probs = Tensor::full([1, n, 3], 1.0 / 3.0, DOUBLE);
    let selected = Some(selected);
    let routing = Routing {
        clean: probs.zeros_like(),
        logits: probs.zeros_like(),
        probs,
        weights,
        selected,
        present: None,
    };
    let mut totals = vec![];
    let rows = Tensor::arange(n, (Kind::Int64, Device::Cpu));
    add_of_one_domain(&mut totals, &[routing], &rows);
    totals.remove(0)
}

/// The loads are 4/6, 2/6 and 0: the first is above an even share of 1/3, the second equals it and
/// the third is below it.
#[test]
fn the_bias_moves_by_its_rate_from_experts_with_more_than_their_share_to_those_with_less()
-> Result<()> {
    let _generator = seed(260);
    let router = biased(RouterScope::Shared, RouterInput::Embeddings, Some(1));
    let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
    let start = Tensor::from_slice(&[0.5, -0.25, 0.125]);
    model.load_some(&[("router.selection_bias".to_owned(), start)].into())?;
    balance_biases(&model, &[chosen(&[0, 0, 0, 0, 1, 1])], 0.01, None, &not_skipped());
    assert_eq!(bias(&model, 0), [0.5 - 0.01, -0.25, 0.125 + 0.01]);
    balance_biases(&model, &[chosen(&[2, 2, 2, 2, 2, 0])], 0.01, None, &not_skipped());
    assert_eq!(bias(&model, 0), [0.5 - 0.01 + 0.01, -0.25 + 0.01, 0.125 + 0.01 - 0.01]);
    let before = bias(&model, 0);
    balance_biases(&model, &[chosen(&[2, 0, 1, 1, 0, 2, 0, 1, 2])], 0.01, None, &not_skipped());
    assert_eq!(bias(&model, 0), before, "an even load moves nothing");
    Ok(())
}

#[test]
fn each_router_follows_the_loads_of_the_sites_that_it_decides_for() -> Result<()> {
    let _generator = seed(261);
    let totals = || [chosen(&[0, 0, 0]), chosen(&[1, 1, 2])];
    let layers = biased(RouterScope::Layer, RouterInput::Embeddings, Some(1));
    let model = tiny_model(&tiny_lora(), &layers, Kind::Double)?;
    let zeros = |model: &RoutedModel| {
        let biases = model.router_tensors().into_iter();
        let biases = biases.filter(|(name, _)| name.ends_with("selection_bias"));
        model.load_some(&biases.map(|(name, t)| (name, t.zeros_like())).collect())
    };
    zeros(&model)?;
    balance_biases(&model, &totals(), 0.5, None, &not_skipped());
    assert_eq!((bias(&model, 0), bias(&model, 1)), (vec![-0.5, 0.5, 0.5], vec![0.5, -0.5, 0.0]));
    // one router for both layers follows the sum of their loads: 3, 2 and 1 of 6
    let shared = biased(RouterScope::Shared, RouterInput::LayerInput, Some(1));
    let model = tiny_model(&tiny_lora(), &shared, Kind::Double)?;
    zeros(&model)?;
    balance_biases(&model, &totals(), 0.5, None, &not_skipped());
    assert_eq!(bias(&model, 0), [-0.5, 0.0, 0.5]);
    Ok(())
}

/// Dense routing chooses no experts, so there is nothing to balance. A hybrid rule routes densely
/// until its experts are mature.
#[test]
fn dense_routing_leaves_the_bias_alone() -> Result<()> {
    let _generator = seed(262);
    for scope in SCOPES {
        let router = biased(scope, RouterInput::Embeddings, None);
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let inputs = two_rows();
        let mut totals = vec![];
        let routing = model.routing(&inputs, ForwardMode::EVAL);
        add_of_one_domain(&mut totals, &routing, &inputs.labelled);
        let before = bias(&model, 0);
        balance_biases(&model, &totals, 0.01, None, &not_skipped());
        assert_eq!(bias(&model, 0), before, "{scope:?}");
    }
    Ok(())
}

#[test]
fn the_bias_changes_which_experts_are_chosen_and_not_their_weights() {
    let _generator = seed(263);
    let router = |selection_bias| Router {
        hidden: vec![],
        weight: Tensor::randn([3, 16], DOUBLE) * 0.1,
        bias: Tensor::zeros([3], DOUBLE),
        selection_bias,
        normalizes: false,
    };
    let plain = router(None);
    let with = |bias: &[f64]| Router {
        hidden: vec![],
        weight: plain.weight.shallow_clone(),
        bias: plain.bias.shallow_clone(),
        selection_bias: Some(Tensor::from_slice(bias)),
        normalizes: false,
    };
    let x = Tensor::randn([2, 50, 16], DOUBLE);
    let noise = RouterNoise::None;
    for (top_k, renormalize) in [1, 2].into_iter().flat_map(|k| [(Some(k), true), (Some(k), false)])
    {
        let rule = RoutingRule { temperature: 1.0.into(), top_k, renormalize, noise };
        let route = |router: &Router| router.forward(&x, &rule, None);
        let without = route(&plain);
        let same = route(&with(&[0.0; 3]));
        assert_eq!(max_difference(&same.weights, &without.weights), 0.0);
        let biased = route(&with(&[0.0, 0.0, 2.0]));
        assert_eq!(max_difference(&biased.probs, &without.probs), 0.0);
        let selected = |routing: &Routing| routing.selected.as_ref().expect("k < 3").eq(2);
        let takes_last = |routing: &Routing| selected(routing).any_dim(-1, false);
        let share = |routing: &Routing| {
            takes_last(routing).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
        };
        assert!(share(&without) < 0.9 && share(&biased) == 1.0, "probs are at most 1");
        // the weights of the chosen experts depend only on their probs
        let kept = &biased.probs * biased.weights.gt(0.0).to_kind(Kind::Double);
        let expected = match renormalize {
            true => &kept / kept.sum_dim_intlist(-1, true, Kind::Double),
            false => kept,
        };
        assert_close("weights", &biased.weights, &expected, 1e-15);
        let chosen = biased.weights.count_nonzero(None::<i64>).int64_value(&[]);
        assert_eq!(chosen, 100 * top_k.expect("it is top-k"));
    }
}

#[test]
fn the_bias_is_saved_and_loaded_and_not_trained() -> Result<()> {
    let _generator = seed(264);
    for (scope, count) in SCOPES.into_iter().zip([1, 2, 8]) {
        let router = biased(scope, RouterInput::Embeddings, Some(2));
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let trained = model.trained(RoutingChoice::Router, None).parameters;
        assert!(trained.iter().all(|parameter| !parameter.name.contains("selection_bias")));
        let tensors: BTreeMap<_, _> =
            model.tensors().into_iter().map(|(name, t)| (name, t.copy())).collect();
        assert_eq!(tensors.keys().filter(|name| name.ends_with("selection_bias")).count(), count);
        let base = tiny_base(tiny_config());
        let specs = ExpertSpec::all(&tiny_lora(), &base.spec)?;
        let spec = RouterSpec::from(&router);
        let cpu = Device::Cpu;
        let read = RoutedModel::from_tensors(&base, &specs, &spec, &tensors, cpu, Kind::Double)?;
        for router in 0..count {
            assert_eq!(bias(&read, router), bias(&model, router));
            assert!(bias(&model, router).iter().all(|&bias| bias != 0.0));
        }
    }
    Ok(())
}
