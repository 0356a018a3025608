//! The routers' losses: closed forms, and gradients compared with those of the formulas written out
//! over all tokens.
//!
//! Letters of shapes: `n` label tokens, `m` the site's experts.

use anyhow::Result;
use dylora::config::{RouterConfig, RoutingChoice};
use dylora::eval::routing::RouterLosses;
use dylora::model::Inputs;
use dylora::model::routing::router::Routing;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use super::accumulation::{config, cut, dataset, gradients, routers};
use crate::common::{
    add_of_one_domain, assert_close, losses_of, mean_loss, plain_router, seed, tiny_lora,
    tiny_model,
};

/// The routers' losses over tokens with the given scores, `[n][m]`.
fn losses_of_scores(scores: &[[f64; 3]]) -> RouterLosses {
    let n = scores.len() as i64;
    let logits = Tensor::from_slice(scores.as_flattened()).view([1, n, 3]);
    let probs = logits.softmax(-1, Kind::Double);
    let weights = probs.shallow_clone();
    let routing = Routing {
        clean: logits.shallow_clone(),
        logits,
        probs,
        weights,
        selected: None,
        present: None,
    };
    let mut totals = vec![];
    let rows = Tensor::arange(n, (Kind::Int64, Device::Cpu));
    add_of_one_domain(&mut totals, &[routing], &rows);
    losses_of(&totals)
}

#[test]
fn the_distance_from_even_is_zero_when_even_and_m_less_one_over_m_squared_when_collapsed() {
    let uniform = |scores: &[[f64; 3]]| losses_of_scores(scores).uniform_mse;
    assert!(uniform(&[[0.5; 3]; 4]) < 1e-32);
    // if each token is sure of a different expert, their mean is even
    let sure = [[900.0, 0.0, 0.0], [0.0, 900.0, 0.0], [0.0, 0.0, 900.0]];
    assert!(uniform(&sure) < 1e-32);
    assert!((uniform(&[[900.0, 0.0, 0.0]; 2]) - 2.0 / 9.0).abs() < 1e-15);
    // the probs are 1/2, 1/4 and 1/4
    let half = uniform(&[[2f64.ln(), 0.0, 0.0]]);
    let by_hand = ((0.5 - 1.0 / 3.0f64).powi(2) + 2.0 * (0.25 - 1.0 / 3.0f64).powi(2)) / 3.0;
    assert!((half - by_hand).abs() < 1e-15);
}

#[test]
fn the_z_loss_is_the_mean_squared_logsumexp() {
    let z = |scores: &[[f64; 3]]| losses_of_scores(scores).router_z_loss;
    assert!((z(&[[0.0; 3]]) - 3f64.ln().powi(2)).abs() < 1e-15);
    // a shift of all scores leaves the probs unchanged and is added to the logsumexp
    assert!((z(&[[2.5; 3]]) - (2.5 + 3f64.ln()).powi(2)).abs() < 1e-14);
    let ln = |a: f64, b: f64, c: f64| [a.ln(), b.ln(), c.ln()];
    let two = [ln(1.0, 2.0, 3.0), ln(0.5, 0.25, 0.25)];
    assert!((z(&two) - 6f64.ln().powi(2) / 2.0).abs() < 1e-14);
}

/// The four losses of a site by their formulas over all label tokens at once, with a graph for
/// autograd: `[4]`, in the order of [`RouterConfig::loss_coefs`].
fn literal(routing: &Routing, rows: &Tensor) -> Tensor {
    let m = routing.probs.size()[2];
    let of_rows = |x: &Tensor| x.view([-1, m]).index_select(0, rows);
    let (p_nm, logits_nm) = (of_rows(&routing.probs), of_rows(&routing.logits));
    let mean_m = p_nm.mean_dim(0, false, Kind::Double);
    let load_m = match &routing.selected {
        None => mean_m.shallow_clone(),
        Some(_) => {
            let chosen_nm = of_rows(&routing.weights).gt(0.0).to_kind(Kind::Double);
            let counts_m = chosen_nm.sum_dim_intlist(0, false, Kind::Double);
            &counts_m / counts_m.sum(Kind::Double)
        }
    };
    let balance = (load_m * &mean_m).sum(Kind::Double) * m as f64;
    let uniform = (mean_m - 1.0 / m as f64).square().mean(Kind::Double);
    let lse_n = logits_nm.exp().sum_dim_intlist(-1, false, Kind::Double).log();
    let z = lse_n.square().mean(Kind::Double);
    let entropy = -(&p_nm * p_nm.log()).sum(Kind::Double) / p_nm.size()[0] as f64;
    Tensor::stack(&[balance, uniform, z, entropy], 0)
}

/// The mean of the [`literal`] losses over the sites, `[4]`.
fn literal_mean(routing: &[Routing], rows: &Tensor) -> Tensor {
    let sites: Vec<_> = routing.iter().map(|routing| literal(routing, rows)).collect();
    Tensor::stack(&sites, 0).mean_dim(0, false, Kind::Double)
}

/// Routers of every scope, input, level and rule, and some of them with hidden layers too.
fn all_routers() -> Vec<RouterConfig> {
    let mut all = routers();
    let deep: Vec<_> = all.iter().step_by(5).cloned().collect();
    let hidden = |router| RouterConfig { hidden_layers: 2, hidden_width: 5, ..router };
    all.extend(deep.into_iter().map(hidden));
    all
}

/// Compares a step in micro-batches with autograd through the sum of the language model's loss, the
/// literal losses and the orthogonality, each times its coefficient. The gradients and the values
/// of the losses are the same.
#[test]
fn gradients_of_a_step_are_autograds_of_the_sum_of_all_losses() -> Result<()> {
    let _generator = seed(200);
    for router in all_routers() {
        let config = config(&RouterConfig { temperature: 0.8, ..router }, &[])?;
        let what = format!("{:?}", config.router);
        let model = tiny_model(&tiny_lora(), &config.router, Kind::Double)?;
        let batch = cut(&dataset(16), &[], false).remove(0);
        let inputs = Inputs::of_batch(&batch, false, Device::Cpu);
        let settings = mean_loss(inputs.labels.size()[0]);
        let (loss, routing) =
            model.loss(&inputs, &RoutingSource::Router, ForwardMode::EVAL, settings);
        let losses = literal_mean(&routing, &inputs.labelled);
        let coefs = config.router.loss_coefs().map(|(_, coef, _)| coef);
        let of = config.lora.orthogonality.expect("it counts");
        let orthogonality = model.orthogonality(of).expect("modules have several experts");
        let sum = loss.loss
            + (&losses * Tensor::from_slice(&coefs)).sum(Kind::Double)
            + orthogonality * of.coef();
        let trained = model.trained(RoutingChoice::Router, None);
        let expected = Tensor::run_backward(&[sum], &trained.leaves, false, false);

        let step = gradients(&model, &config, &cut(&dataset(16), &[2, 1], true))?;
        let found = losses_of(&step.routing);
        let found = [
            found.load_balancing_loss,
            found.uniform_mse,
            found.router_z_loss,
            found.routing_entropy,
        ];
        assert_close(&what, &Tensor::from_slice(&found), &losses, 1e-12);
        for ((grad, expected), parameter) in
            step.grads.iter().zip(trained.split(&expected)).zip(&trained.parameters)
        {
            let scale = expected.abs().max().double_value(&[]).max(1e-3);
            assert_close(&format!("{} by {what}", parameter.name), grad, &expected, 1e-9 * scale);
        }
    }
    Ok(())
}

/// The routers' losses over a dataset, before and after a small step of the routers against their
/// gradients under `router`.
fn after_a_step(model: &RoutedModel, router: RouterConfig) -> Result<[RouterLosses; 2]> {
    let mut config = config(&plain_router(), &[])?;
    config.router = router;
    config.lora.orthogonality = None;
    let batches = cut(&dataset(16), &[2], false);
    let before = gradients(model, &config, &batches)?;
    let trained = model.trained(RoutingChoice::Router, None);
    tch::no_grad(|| {
        let routers = trained.parameters.iter().zip(&before.grads);
        for (parameter, grad) in routers.filter(|(p, _)| p.name.contains("router.")) {
            let _ = parameter.tensor.shallow_clone().g_sub_(&(grad * 1e-4));
        }
    });
    let after = gradients(model, &config, &batches)?;
    Ok([losses_of(&before.routing), losses_of(&after.routing)])
}

/// The coefficients are so large that each loss outweighs the language model's loss.
#[test]
fn a_step_against_a_loss_lowers_it_and_a_negative_factor_raises_the_entropy() -> Result<()> {
    let _generator = seed(201);
    let none = plain_router();
    type Of = fn(&RouterLosses) -> f64;
    let cases: [(RouterConfig, Of, bool); 5] = [
        (
            RouterConfig { load_balancing_coef: 100.0, ..none.clone() },
            |losses| losses.load_balancing_loss,
            true,
        ),
        (
            RouterConfig { uniform_mse_coef: 1000.0, ..none.clone() },
            |losses| losses.uniform_mse,
            true,
        ),
        (RouterConfig { z_loss_coef: 100.0, ..none.clone() }, |losses| losses.router_z_loss, true),
        (
            RouterConfig { entropy_coef: 100.0, ..none.clone() },
            |losses| losses.routing_entropy,
            true,
        ),
        (RouterConfig { entropy_coef: -100.0, ..none }, |losses| losses.routing_entropy, false),
    ];
    for (router, of, falls) in cases {
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let [before, after] = after_a_step(&model, router.clone())?.map(|losses| of(&losses));
        assert_eq!(after < before, falls, "{router:?}: {before} to {after}");
    }
    Ok(())
}

/// Probabilities that underflow to 0 have entropy 0 and finite gradients.
#[test]
fn a_router_that_is_sure_has_finite_gradients() -> Result<()> {
    let _generator = seed(202);
    let router = plain_router();
    for kind in [Kind::Float, Kind::Double] {
        let model = tiny_model(&tiny_lora(), &router, kind)?;
        let bias = Tensor::from_slice(&[5000.0, 0.0, -5000.0]);
        model.load_some(&[("router.bias".to_owned(), bias)].into())?;
        let step = gradients(&model, &config(&router, &[])?, &cut(&dataset(16), &[1], false))?;
        let losses = losses_of(&step.routing);
        assert_eq!((losses.routing_entropy, losses.load_balancing_loss), (0.0, 3.0));
        for grad in &step.grads {
            assert!(bool::try_from(grad.isfinite().all())?, "{kind:?}");
        }
    }
    Ok(())
}
