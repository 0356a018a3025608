//! The routing weights of a router, and the statistics that are computed from them.

use dylora::config::RouterNoise;
use dylora::model::batch::Labelled;
use dylora::model::routing::router::{Router, Routing, RoutingRule};
use dylora::model::routing::totals::{RoutingTotals, add_totals};
use tch::{Device, Kind, Tensor};

use crate::common::{DOUBLE, assert_close, losses_of, max_difference, seed};

fn random_router() -> Router {
    Router {
        hidden: vec![],
        weight: Tensor::randn([3, 16], DOUBLE).set_requires_grad(true),
        bias: Tensor::randn([3], DOUBLE).set_requires_grad(true),
        selection_bias: None,
        normalizes: false,
    }
}

fn rule(top_k: Option<i64>) -> RoutingRule {
    RoutingRule {
        temperature: Tensor::from(1.3),
        top_k,
        renormalize: true,
        noise: RouterNoise::None,
    }
}

fn forward(router: &Router, x: &Tensor, top_k: Option<i64>) -> Routing {
    router.forward(x, &rule(top_k), None)
}

fn totals_of(routing: &Routing, rows: &Tensor) -> RoutingTotals {
    let groups = rows.zeros_like();
    RoutingTotals::new(routing, Labelled { rows, groups: &groups, num_groups: 1, counted: None })
}

fn indices(rows: &[i64]) -> Tensor {
    Tensor::from_slice(rows)
}

/// `E sum_e f_e P_e` (arXiv:2101.03961, eqs. 4-6), with the two means written out and a graph for
/// autograd. With dense routing, `f = P`.
fn balance_loss(routing: &Routing, rows: &Tensor) -> Tensor {
    let probs_ne = routing.probs.view([-1, 3]).index_select(0, rows);
    let mean_probs = probs_ne.mean_dim(0, false, Kind::Double);
    let load = match &routing.selected {
        None => mean_probs.shallow_clone(),
        Some(_) => {
            let chosen_ne = routing.weights.view([-1, 3]).index_select(0, rows).gt(0.0);
            let counts = chosen_ne.to_kind(Kind::Double).sum_dim_intlist(0, false, Kind::Double);
            &counts / counts.sum(Kind::Double)
        }
    };
    (load * mean_probs).sum(Kind::Double) * 3.0
}

/// The totals of label tokens with the given probs, `[n, e]`.
fn totals(probs: &[[f64; 3]], selected: Option<&[i64]>) -> RoutingTotals {
    let n = probs.len() as i64;
    let probs = Tensor::from_slice(probs.as_flattened()).view([1, n, 3]);
    let selected = selected.map(|selected| Tensor::from_slice(selected).view([1, n, -1]));
    let weights = probs.shallow_clone();
    let routing = Routing {
        clean: probs.log(),
        logits: probs.log(),
        weights,
        probs,
        selected,
        present: None,
    };
    totals_of(&routing, &Tensor::arange(n, (Kind::Int64, Device::Cpu)))
}

#[test]
fn routing_weights_sum_to_one_and_top_k_keeps_the_k_best() {
    let _generator = seed(50);
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    for top_k in [None, Some(1), Some(2), Some(3)] {
        let Routing { probs, weights, selected, .. } = forward(&random_router(), &x, top_k);
        let sums = weights.sum_dim_intlist(-1, false, Kind::Double);
        assert_close("sum", &sums, &sums.ones_like(), 1e-14);
        let k = top_k.unwrap_or(3);
        let kept = weights.gt(0.0);
        assert_eq!(kept.sum(Kind::Int64).int64_value(&[]), 14 * k);
        assert_eq!(selected.is_some(), k < 3);
        let smallest_kept = probs.where_self(&kept, &Tensor::from(2.0)).amin(-1, false);
        let largest_left =
            probs.where_self(&kept.logical_not(), &Tensor::from(-1.0)).amax(-1, false);
        assert!(bool::try_from(smallest_kept.gt_tensor(&largest_left).all()).expect("one element"));
    }
}

#[test]
fn the_k_best_that_are_not_renormalised_keep_their_probs() {
    let _generator = seed(55);
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let router = random_router();
    for k in [1, 2, 3] {
        let rule = RoutingRule { renormalize: false, ..rule(Some(k)) };
        let kept = router.forward(&x, &rule, None);
        let scaled = forward(&router, &x, Some(k));
        assert!(kept.weights.gt(0.0).equal(&scaled.weights.gt(0.0)), "the same are chosen");
        let expected = &kept.probs * scaled.weights.gt(0.0).to_kind(Kind::Double);
        assert_close("weights", &kept.weights, &expected, 0.0);
        let sums = kept.weights.sum_dim_intlist(-1, true, Kind::Double);
        assert_close("scaled", &scaled.weights, &(&kept.weights / sums), 1e-15);
    }
}

/// If renormalised, the weight of a single best expert is 1 whatever its score. Otherwise it is the
/// expert's prob, as in Switch Transformers.
#[test]
fn the_weight_of_a_single_best_has_a_gradient_where_it_is_not_renormalised() {
    let _generator = seed(56);
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let router = random_router();
    for renormalize in [true, false] {
        let rule = RoutingRule { renormalize, ..rule(Some(1)) };
        let weights = router.forward(&x, &rule, None).weights;
        let loss = (weights * Tensor::randn([2, 7, 3], DOUBLE)).sum(Kind::Double);
        let grads = Tensor::run_backward(&[loss], &[&router.weight], false, false);
        let size = grads[0].abs().max().double_value(&[]);
        assert_eq!(size > 1e-12, !renormalize, "{size:e}");
    }
}

#[test]
fn a_temperature_divides_the_scores() {
    let _generator = seed(51);
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let warm = random_router();
    let probs = forward(&warm, &x, None).probs;
    let scores = (x.matmul(&warm.weight.tr()) + &warm.bias) / 1.3;
    assert_close("probs", &probs, &scores.softmax(-1, Kind::Double), 1e-14);
}

#[test]
fn load_balancing_loss_is_one_when_even() {
    let third = 1.0 / 3.0;
    let even = [[third; 3], [third; 3], [third; 3]];
    let loss = |totals: RoutingTotals| losses_of(&[totals]).load_balancing_loss;
    assert!((loss(totals(&even, None)) - 1.0).abs() < 1e-15);
    assert!((loss(totals(&even, Some(&[0, 1, 2]))) - 1.0).abs() < 1e-15);
    assert!((loss(totals(&even, Some(&[0, 1, 1, 2, 2, 0]))) - 1.0).abs() < 1e-15);
    // if each token is sure of a different expert, their mean is even
    let sure = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
    assert!((loss(totals(&sure, None)) - 1.0).abs() < 1e-15);
    assert!((loss(totals(&sure, Some(&[0, 1, 2]))) - 1.0).abs() < 1e-15);
}

#[test]
fn load_balancing_loss_has_its_closed_forms() {
    let probs = [[0.5, 0.3, 0.2], [0.7, 0.1, 0.2]];
    let loss = |totals: RoutingTotals| losses_of(&[totals]).load_balancing_loss;
    let dense = 3.0 * (0.6 * 0.6 + 0.2 * 0.2 + 0.2 * 0.2);
    assert!((loss(totals(&probs, None)) - dense).abs() < 1e-15);
    let top_1 = 3.0 * 0.6;
    assert!((loss(totals(&probs, Some(&[0, 0]))) - top_1).abs() < 1e-15);
    let top_2 = 3.0 * (0.5 * 0.6 + 0.25 * 0.2 + 0.25 * 0.2);
    assert!((loss(totals(&probs, Some(&[0, 1, 0, 2]))) - top_2).abs() < 1e-15);
    let collapsed = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]];
    assert!((loss(totals(&collapsed, None)) - 3.0).abs() < 1e-15);
}

/// Reference: autograd of the formula over both batches at once.
#[test]
fn balance_gradients_of_uneven_batches_are_those_of_the_formula_over_all() {
    let _generator = seed(52);
    let (x, rows) = (Tensor::randn([3, 7, 16], DOUBLE), [0, 1, 2, 5, 9, 15, 16, 20]);
    for top_k in [None, Some(1), Some(2)] {
        let router = random_router();
        let leaves = [&router.weight, &router.bias];
        let grads = |loss: &Tensor| Tensor::run_backward(&[loss], &leaves, false, false);

        let loss = balance_loss(&forward(&router, &x, top_k), &indices(&rows));
        let value = loss.double_value(&[]);
        let expected = grads(&loss);

        let batches =
            [(x.narrow(0, 0, 1), vec![0, 1, 2, 5]), (x.narrow(0, 1, 2), vec![2, 8, 9, 13])];
        let mut totals = vec![];
        for (x, rows) in &batches {
            let rows = indices(rows);
            let groups = rows.zeros_like();
            let labelled = Labelled { rows: &rows, groups: &groups, num_groups: 1, counted: None };
            add_totals(&mut totals, &[forward(&router, x, top_k)], labelled);
        }
        let factors = totals[0].balance_gradient();
        assert!((losses_of(&totals).load_balancing_loss - value).abs() < 1e-14);

        let surrogate = |(x, rows): &(Tensor, Vec<i64>)| {
            let probs_ne =
                forward(&router, x, top_k).probs.view([-1, 3]).index_select(0, &indices(rows));
            grads(&(probs_ne * &factors).sum(Kind::Double))
        };
        let (first, second) = (surrogate(&batches[0]), surrogate(&batches[1]));
        for ((first, second), expected) in first.iter().zip(&second).zip(&expected) {
            assert!(max_difference(expected, &expected.zeros_like()) > 1e-3);
            assert_close(&format!("top_k {top_k:?}"), &(first + second), expected, 1e-14);
        }
    }
}

#[test]
fn expert_load_is_the_share_of_assignments() {
    let _generator = seed(53);
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let rows = indices(&[0, 3, 4, 8, 13]);
    for top_k in [None, Some(1), Some(2)] {
        let routing = forward(&random_router(), &x, top_k);
        let load = totals_of(&routing, &rows).expert_load();
        assert!((load.sum(Kind::Double).double_value(&[]) - 1.0).abs() < 1e-14);
    }
    let probs = [[0.5, 0.3, 0.2], [0.7, 0.1, 0.2]];
    let load = totals(&probs, Some(&[0, 1, 0, 2])).expert_load();
    assert_close("load", &load, &Tensor::from_slice(&[0.5, 0.25, 0.25]), 1e-15);
}

#[test]
fn routing_statistics_ignore_unlabelled_positions() {
    let _generator = seed(54);
    let x = Tensor::randn([2, 4, 16], DOUBLE);
    let labelled = indices(&[0, 1, 4, 6]);
    let changed = x.copy();
    for row in [2, 3, 5, 7] {
        changed.get(row / 4).get(row % 4).copy_(&Tensor::randn([16], DOUBLE));
    }
    for top_k in [None, Some(2)] {
        let router = random_router();
        let route = |x: &Tensor| forward(&router, x, top_k);
        let (a, b) = (totals_of(&route(&x), &labelled), totals_of(&route(&changed), &labelled));
        assert_eq!(a.num_tokens().double_value(&[]), 4.0);
        assert_eq!(max_difference(&a.flat(), &b.flat()), 0.0);
        assert!(max_difference(&route(&x).probs, &route(&changed).probs) > 0.01);
    }
}

#[test]
fn routing_entropy_is_between_zero_and_ln_e() {
    let third = 1.0 / 3.0;
    let entropy = |probs: &[[f64; 3]]| losses_of(&[totals(probs, None)]).routing_entropy;
    assert!((entropy(&[[third; 3]]) - 3f64.ln()).abs() < 1e-15);
    assert_eq!(entropy(&[[1.0, 0.0, 0.0]]), 0.0);
    let both = entropy(&[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]);
    assert!((both - 2f64.ln() / 2.0).abs() < 1e-15);
}

/// Reference: each site by itself. Sites with and without a choice of experts are not alike.
#[test]
fn totals_of_many_sites_are_those_of_each() {
    let _generator = seed(53);
    let (rows, groups) = (indices(&[0, 3, 4, 11, 13]), indices(&[1, 0, 1, 1, 0]));
    let counted = Tensor::from_slice(&[1.0, 1.0, 0.0, 1.0, 1.0]);
    let labelled =
        Labelled { rows: &rows, groups: &groups, num_groups: 2, counted: Some(&counted) };
    let top_ks = [None, None, Some(1), Some(1), None, Some(2)];
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let sites: Vec<Routing> =
        top_ks.iter().map(|&top_k| forward(&random_router(), &x, top_k)).collect();
    let mut totals = vec![];
    add_totals(&mut totals, &sites, labelled);
    add_totals(&mut totals, &sites, labelled);
    assert_eq!(totals.len(), sites.len());
    for (at, (site, totals)) in sites.iter().zip(&totals).enumerate() {
        let twice = RoutingTotals::new(site, labelled).flat() * 2.0;
        assert_close(&format!("site {at}"), &totals.flat(), &twice, 1e-14);
    }
    assert!(max_difference(&totals[0].flat(), &totals[1].flat()) > 1e-2);
}
