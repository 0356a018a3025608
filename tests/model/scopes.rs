//! The scopes, the depth and the noise of routers, and the rule of evaluation.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{EvalRule, RouterConfig, RouterInput, RouterNoise, RouterScope};
use dylora::model::routing::router::{Router, RouterSpec, Routing, RoutingRule};
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Kind, Tensor};

use crate::common::{
    DOUBLE, ROUTER_INPUTS, SCOPES, assert_close, gradients, logits, max_difference, mean_loss,
    new_model, plain_router, seed, tiny_base, tiny_config, tiny_lora, tiny_model, two_rows,
};

/// Routers of every scope and input.
fn scopes_and_inputs() -> impl Iterator<Item = (RouterScope, RouterInput)> {
    SCOPES.into_iter().flat_map(|scope| ROUTER_INPUTS.map(|input| (scope, input)))
}

#[test]
fn there_is_one_router_or_one_for_each_layer_or_module_and_its_names_say_so() -> Result<()> {
    let _generator = seed(220);
    let modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];
    let modules = (0..2).flat_map(|l| modules.map(|module| format!("h.{l}.{module}.router")));
    let expected: [Vec<String>; 3] =
        [vec!["router".into()], vec!["h.0.router".into(), "h.1.router".into()], modules.collect()];
    for (scope, names) in SCOPES.into_iter().zip(expected) {
        let router = RouterConfig { scope, ..plain_router() };
        let deep = RouterConfig {
            hidden_layers: 2,
            hidden_width: 5,
            top_k: Some(1),
            balance_bias_rate: 0.1,
            ..router.clone()
        };
        let plain: &[(&str, &[i64])] = &[("bias", &[3]), ("weight", &[3, 16])];
        let all: &[(&str, &[i64])] = &[
            ("bias", &[3]),
            ("hidden.0.bias", &[5]),
            ("hidden.0.weight", &[5, 16]),
            ("hidden.1.bias", &[5]),
            ("hidden.1.weight", &[5, 5]),
            ("selection_bias", &[3]),
            ("weight", &[3, 5]),
        ];
        for (router, tensors) in [(router, plain), (deep, all)] {
            let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
            let shapes: BTreeMap<String, Vec<i64>> =
                model.router_tensors().into_iter().map(|(name, t)| (name, t.size())).collect();
            let named = names.iter().flat_map(|name| {
                tensors.iter().map(move |(key, shape)| (format!("{name}.{key}"), shape.to_vec()))
            });
            assert_eq!(shapes, named.collect());
            assert_eq!(model.router_names(), names);
            assert_eq!(model.routers().len(), names.len());
            let trained = tensors.iter().filter(|(key, _)| *key != "selection_bias");
            let of_one: i64 = trained.map(|(_, shape)| shape.iter().product::<i64>()).sum();
            assert_eq!(RouterSpec::from(&router).num_parameters(3, 16), of_one);
        }
    }
    Ok(())
}

#[test]
fn routing_is_decided_once_or_at_each_layer_or_module() -> Result<()> {
    let _generator = seed(221);
    for (scope, input) in scopes_and_inputs() {
        let router = RouterConfig { scope, input, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let sites: Vec<String> = model.sites().iter().map(ToString::to_string).collect();
        let expected: Vec<String> = match (scope, input) {
            (RouterScope::Shared, RouterInput::LayerInput) | (RouterScope::Layer, _) => {
                vec!["h.0".into(), "h.1".into()]
            }
            (RouterScope::Shared, _) => vec!["all layers".into()],
            (RouterScope::Module, _) => model.modules().map(|(path, _)| path.to_string()).collect(),
        };
        assert_eq!(sites, expected, "{scope:?}, {input:?}");
        let source = &RoutingSource::Router;
        let output = model.forward(&two_rows(), source, ForwardMode::EVAL, None);
        assert_eq!((output.weights.len(), output.routing.len()), (sites.len(), sites.len()));
    }
    Ok(())
}

/// Loads the tensors of `shared` into `model`, whatever its scope: each router becomes a copy of
/// the shared one.
fn as_shared(model: &RoutedModel, shared: &RoutedModel) -> Result<()> {
    let of_shared = shared.tensors();
    let own = model.tensors().into_keys().map(|name| {
        let from = match name.find("router.") {
            Some(at) => &name[at..],
            None => &name[..],
        };
        let tensor = of_shared[from].shallow_clone();
        (name, tensor)
    });
    model.load(&own.collect())
}

#[test]
fn routers_that_are_alike_everywhere_are_one_shared_router() -> Result<()> {
    let _generator = seed(222);
    for (input, top_k) in ROUTER_INPUTS.into_iter().flat_map(|i| [(i, None), (i, Some(2))]) {
        let router = RouterConfig { input, top_k, hidden_layers: 1, ..plain_router() };
        let shared = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let expected = logits(&shared, &two_rows(), &RoutingSource::Router);
        for scope in [RouterScope::Layer, RouterScope::Module] {
            let router = RouterConfig { scope, ..router.clone() };
            let model = new_model(shared.base(), &tiny_lora(), &router, Kind::Double);
            as_shared(&model, &shared)?;
            let own = logits(&model, &two_rows(), &RoutingSource::Router);
            assert_close(&format!("{scope:?}, {input:?}"), &own, &expected, 1e-13);
        }
    }
    Ok(())
}

/// Routers that read the embeddings or the base do not depend on other routers. Routers that read
/// their layer's input depend on the routers of earlier layers.
#[test]
fn another_router_of_one_module_moves_that_site_alone() -> Result<()> {
    let _generator = seed(223);
    for input in ROUTER_INPUTS {
        let router = RouterConfig { input, scope: RouterScope::Module, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let probs = || -> Vec<Tensor> {
            let routing = model.routing(&two_rows(), ForwardMode::EVAL);
            routing.into_iter().map(|routing| routing.probs).collect()
        };
        let before = probs();
        let changed = 2;
        let name = "h.0.mlp.c_fc.router.weight";
        assert_eq!(model.sites()[changed].to_string(), "h.0.mlp.c_fc");
        model.load_some(&[(name.to_owned(), Tensor::randn([3, 16], DOUBLE))].into())?;
        for (site, (before, after)) in before.iter().zip(probs()).enumerate() {
            let moved = max_difference(before, &after);
            // all modules of a layer read the same input, so only the next layer is affected
            let may_move = site == changed || (input == RouterInput::LayerInput && site >= 4);
            assert_eq!(moved > 1e-4, may_move, "{input:?}, site {site}: {moved:e}");
        }
    }
    Ok(())
}

#[test]
fn each_scope_reaches_every_router_with_a_gradient_of_its_own() -> Result<()> {
    let _generator = seed(224);
    for (scope, input) in scopes_and_inputs() {
        let router = RouterConfig { scope, input, hidden_layers: 1, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let source = &RoutingSource::Router;
        let loss = model.loss(&two_rows(), source, ForwardMode::EVAL, mean_loss(12)).0.loss;
        let grads: Vec<_> = gradients(&model, &loss)
            .into_iter()
            .filter(|(name, _)| name.ends_with("router.weight"))
            .collect();
        assert_eq!(grads.len(), model.routers().len());
        for (i, (name, grad)) in grads.iter().enumerate() {
            assert!(max_difference(grad, &grad.zeros_like()) > 1e-6, "`{name}`");
            for (other, of_other) in &grads[..i] {
                assert!(max_difference(grad, of_other) > 1e-6, "`{name}` and `{other}`");
            }
        }
    }
    Ok(())
}

fn random_router(hidden: Vec<(Tensor, Tensor)>, width: i64) -> Router {
    Router {
        hidden,
        weight: Tensor::randn([3, width], DOUBLE),
        bias: Tensor::randn([3], DOUBLE),
        selection_bias: None,
        normalizes: false,
    }
}

fn rule(noise: RouterNoise) -> RoutingRule {
    RoutingRule { temperature: Tensor::from(0.7), top_k: None, renormalize: true, noise }
}

/// Reference: `W2 relu(W1 relu(W0 x + b0) + b1) + b2`, computed number by number.
#[test]
fn hidden_layers_are_the_formula_written_out() -> Result<()> {
    let _generator = seed(225);
    let layer = |o: i64, i: i64| (Tensor::randn([o, i], DOUBLE), Tensor::randn([o], DOUBLE));
    let router = random_router(vec![layer(5, 16), layer(4, 5)], 4);
    let x = Tensor::randn([2, 7, 16], DOUBLE);
    let apply = |weight: &Tensor, bias: &Tensor, x: &[f64]| -> Result<Vec<f64>> {
        let (rows, bias) = (Vec::<Vec<f64>>::try_from(weight)?, Vec::<f64>::try_from(bias)?);
        let dot = |row: &Vec<f64>| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        Ok(rows.iter().zip(bias).map(|(row, bias)| dot(row) + bias).collect())
    };
    let Routing { logits, probs, .. } = router.forward(&x, &rule(RouterNoise::None), None);
    for (b, t) in (0..2).flat_map(|b| (0..7).map(move |t| (b, t))) {
        let mut h = Vec::<f64>::try_from(x.get(b).get(t))?;
        for (weight, bias) in &router.hidden {
            h = apply(weight, bias, &h)?.into_iter().map(|h| h.max(0.0)).collect();
        }
        let scores = apply(&router.weight, &router.bias, &h)?;
        let sum: f64 = scores.iter().map(|score| (score / 0.7).exp()).sum();
        let expected: Vec<f64> = scores.iter().map(|score| (score / 0.7).exp() / sum).collect();
        let at = |x: &Tensor| x.get(b).get(t);
        assert_close("logits", &at(&logits), &Tensor::from_slice(&scores), 1e-12);
        assert_close("probs", &at(&probs), &Tensor::from_slice(&expected), 1e-12);
    }
    Ok(())
}

/// Biases start at 0 and weights near 0, so the routing weights are nearly even at the start.
#[test]
fn a_fresh_router_mixes_nearly_evenly_but_not_all_tokens_alike() {
    let _generator = seed(226);
    for (hidden_layers, scope) in [0, 1, 3].into_iter().flat_map(|n| SCOPES.map(|s| (n, s))) {
        let router = RouterConfig { hidden_layers, scope, ..plain_router() };
        let model = new_model(&tiny_base(tiny_config()), &tiny_lora(), &router, Kind::Double);
        for routing in model.routing(&two_rows(), ForwardMode::EVAL) {
            let even = routing.probs.full_like(1.0 / 3.0);
            let distance = max_difference(&routing.probs, &even);
            assert!(distance > 1e-6 && distance < 0.1, "{hidden_layers}, {scope:?}: {distance}");
        }
    }
}

fn moments(x: &Tensor) -> (f64, f64) {
    let number = |x: Tensor| x.double_value(&[]);
    (number(x.mean(Kind::Double)), number(x.std(true)))
}

/// Over 24000 scores, the standard error of the mean is 0.0032 and that of the standard deviation
/// is 0.0023.
#[test]
fn gaussian_noise_is_added_to_each_score_with_its_std() {
    let _generator = seed(227);
    let router = random_router(vec![], 16);
    let x = Tensor::randn([8, 1000, 16], DOUBLE);
    let quiet = router.forward(&x, &rule(RouterNoise::None), None);
    let noisy = router.forward(&x, &rule(RouterNoise::Gaussian(0.5)), None);
    assert_close("the scores told are raw", &noisy.logits, &quiet.logits, 0.0);
    // the probs give the scores up to a constant of each token: temperature (ln p - mean ln p)
    let centered = |x: &Tensor| x - x.mean_dim(-1, true, Kind::Double);
    let noise = centered(&noisy.probs.log()) * 0.7 - centered(&quiet.logits);
    let (mean, std) = moments(&noise);
    // subtracting the mean of three numbers leaves 2 / 3 of their variance
    let expected = 0.5 * (2.0f64 / 3.0).sqrt();
    assert!(mean.abs() < 1e-12, "{mean}");
    assert!((std - expected).abs() < 0.02 * expected, "{std} is not {expected}");
    // each token and expert draws its own noise
    let tokens = noise.view([-1, 3]);
    let (first, second) = (tokens.narrow(0, 0, 4000), tokens.narrow(0, 4000, 4000));
    let product = (first * second).mean(Kind::Double).double_value(&[]);
    assert!(product.abs() < 0.01, "{product}");
}

#[test]
fn jitter_multiplies_each_feature_with_a_number_that_is_even_between_its_bounds() {
    let _generator = seed(228);
    let identity = Router {
        hidden: vec![],
        weight: Tensor::eye(3, DOUBLE),
        bias: Tensor::zeros([3], DOUBLE),
        selection_bias: None,
        normalizes: false,
    };
    let x = Tensor::ones([8, 1000, 3], DOUBLE);
    let factors = identity.forward(&x, &rule(RouterNoise::Jitter(0.2)), None).logits;
    let (mean, std) = moments(&factors);
    assert!((mean - 1.0).abs() < 0.003, "{mean}");
    assert!((std - 0.2 / 3f64.sqrt()).abs() < 0.002, "{std}");
    let (low, high) = (factors.min().double_value(&[]), factors.max().double_value(&[]));
    assert!((0.8..0.801).contains(&low) && (1.199..1.2).contains(&high), "{low} to {high}");
}

/// The noise depends only on the generator. Without noise, a forward pass does not depend on it.
#[test]
fn noise_disturbs_a_forward_pass_in_training_alone() -> Result<()> {
    let _generator = seed(229);
    for (scope, input) in scopes_and_inputs() {
        let router =
            RouterConfig { scope, input, noise: RouterNoise::Gaussian(0.5), ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let probs = |noise, seed| {
            tch::manual_seed(seed);
            let mode = ForwardMode { noise, ..ForwardMode::EVAL };
            model.routing(&two_rows(), mode).remove(0).probs
        };
        let quiet = probs(RouterNoise::None, 1);
        assert_eq!(max_difference(&probs(RouterNoise::None, 2), &quiet), 0.0);
        for noise in [router.noise, RouterNoise::Jitter(0.3)] {
            let once = probs(noise, 1);
            assert_eq!(max_difference(&probs(noise, 1), &once), 0.0);
            assert!(max_difference(&once, &quiet) > 1e-3, "{noise:?}");
            assert!(max_difference(&probs(noise, 2), &once) > 1e-3, "{noise:?}");
        }
    }
    Ok(())
}

/// The same model with another `top_k` in training.
fn with_rule(
    model: &RoutedModel,
    router: &RouterConfig,
    top_k: Option<i64>,
) -> Result<RoutedModel> {
    let router = RouterConfig { top_k, ..router.clone() };
    let other = new_model(model.base(), &tiny_lora(), &router, Kind::Double);
    other.load(&model.tensors())?;
    Ok(other)
}

#[test]
fn the_rule_of_a_forward_pass_is_that_of_a_model_trained_by_it() -> Result<()> {
    let _generator = seed(230);
    for (scope, input) in scopes_and_inputs() {
        let router = RouterConfig { scope, input, temperature: 0.6, ..plain_router() };
        let dense = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let top_2 = with_rule(&dense, &router, Some(2))?;
        let run = |model: &RoutedModel, rule| {
            let mode = ForwardMode { rule, ..ForwardMode::EVAL };
            let output = model.forward(&two_rows(), &RoutingSource::Router, mode, None);
            (output.hidden, output.routing.into_iter().next().expect("a site").selected.is_some())
        };
        let ((dense_hidden, dense_selects), (top_hidden, top_selects)) =
            (run(&dense, None), run(&top_2, None));
        assert!(!dense_selects && top_selects);
        assert!(max_difference(&dense_hidden, &top_hidden) > 1e-3);
        let (hidden, selects) = run(&dense, Some(EvalRule::TopK(2)));
        assert!(selects && hidden.equal(&top_hidden), "{scope:?}, {input:?}");
        let (hidden, selects) = run(&top_2, Some(EvalRule::Dense));
        assert!(!selects && hidden.equal(&dense_hidden), "{scope:?}, {input:?}");
    }
    Ok(())
}
