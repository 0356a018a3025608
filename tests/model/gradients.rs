//! Gradients compared with finite differences, and which parameters have no gradient.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{LoraConfig, ModulePath, RouterConfig, RoutingChoice, TargetModule};
use dylora::model::experts::dropout::LoraDropout;
use dylora::model::experts::weights::RoutingWeights;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Kind, Tensor};

use crate::common::{
    DOUBLE, ROUTER_INPUTS, assert_close, gradients, mean_loss, new_model, plain_router, seed,
    tiny_base, tiny_config, tiny_lora, tiny_model, two_rows,
};

fn loss(model: &RoutedModel, source: &RoutingSource) -> Tensor {
    model.loss(&two_rows(), source, ForwardMode::EVAL, mean_loss(12)).0.loss
}

/// `(f(x + h v) - f(x - h v)) / 2h` along a random direction v, and v itself. `x` is restored
/// afterwards.
fn slope(x: &Tensor, f: impl Fn() -> f64) -> (f64, Tensor) {
    const H: f64 = 1e-5;
    let direction = Tensor::randn(x.size(), DOUBLE);
    let mut x = x.shallow_clone();
    let original = x.detach().copy();
    let at = |x: &mut Tensor, h: f64| {
        tch::no_grad(|| x.copy_(&(&original + &direction * h)));
        f()
    };
    let slope = (at(&mut x, H) - at(&mut x, -H)) / (2.0 * H);
    tch::no_grad(|| x.copy_(&original));
    (slope, direction)
}

/// Checks a gradient against finite differences of `f` along three random directions.
#[track_caller]
pub(super) fn assert_slope(name: &str, grad: &Tensor, x: &Tensor, f: impl Fn() -> f64) {
    for _ in 0..3 {
        let (slope, direction) = slope(x, &f);
        let expected = (grad * direction).sum(Kind::Double).double_value(&[]);
        let difference = (slope - expected).abs();
        assert!(difference < 1e-6 * expected.abs().max(1.0), "`{name}`: {slope} is not {expected}");
    }
}

/// Checks A, B and the router's weight and bias, for every input that a router can read.
#[test]
fn trained_tensors_have_the_slopes_of_finite_differences() -> Result<()> {
    let _generator = seed(60);
    for (input, top_k) in
        ROUTER_INPUTS.into_iter().flat_map(|input| [(input, None), (input, Some(2))])
    {
        let router = RouterConfig { input, top_k, temperature: 0.8, ..plain_router() };
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let grads = gradients(&model, &loss(&model, &RoutingSource::Router));
        for (name, tensor) in model.tensors() {
            let f = || loss(&model, &RoutingSource::Router).double_value(&[]);
            assert_slope(&format!("{name} by {input:?}, {top_k:?}"), &grads[&name], &tensor, f);
        }
    }
    Ok(())
}

/// DoRA's norm counts as a constant in the backward pass, so the gradients of A and B are not the
/// slopes. Those of the magnitudes and of the router are.
#[test]
fn magnitudes_and_the_router_over_dora_have_the_slopes_of_finite_differences() -> Result<()> {
    let _generator = seed(61);
    let lora = LoraConfig { use_dora: true, ..tiny_lora() };
    let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
    let grads = gradients(&model, &loss(&model, &RoutingSource::Router));
    let tensors = model.tensors().into_iter();
    for (name, tensor) in tensors.filter(|(name, _)| !name.contains("lora_")) {
        let f = || loss(&model, &RoutingSource::Router).double_value(&[]);
        assert_slope(&name, &grads[&name], &tensor, f);
    }
    Ok(())
}

/// The leaves are the layer's input and the scores before the softmax.
#[test]
fn inputs_and_router_logits_have_the_slopes_of_finite_differences() -> Result<()> {
    let _generator = seed(62);
    for use_dora in [false, true] {
        let lora = LoraConfig { use_dora, ..tiny_lora() };
        let model = tiny_model(&lora, &plain_router(), Kind::Double)?;
        let path = ModulePath { layer: 1, module: TargetModule::MlpCFc };
        let experts = model.experts(path).expect("every module is a target");
        let linear = &model.base().blocks[1].linears[&path.module];
        let x = Tensor::randn([2, 5, 16], DOUBLE).set_requires_grad(true);
        let logits = Tensor::randn([2, 5, 3], DOUBLE).set_requires_grad(true);
        let target = Tensor::randn([2, 5, 64], DOUBLE);
        let f = || {
            let g = RoutingWeights::PerToken(logits.softmax(-1, Kind::Double));
            let y = experts.add(linear.forward(&x), &x, linear, &g, LoraDropout::NONE);
            (y * &target).sum(Kind::Double)
        };
        let grads = Tensor::run_backward(&[f()], &[&x, &logits], false, false);
        assert_slope("x", &grads[0], &x, || f().double_value(&[]));
        assert_slope("router_logits", &grads[1], &logits, || f().double_value(&[]));
        // the same through the whole model, with given routing weights
        let logits = Tensor::randn([2, 7, 3], DOUBLE).set_requires_grad(true);
        let f = || loss(&model, &RoutingSource::Given(logits.softmax(-1, Kind::Double)));
        let grads = Tensor::run_backward(&[f()], &[&logits], false, false);
        assert_slope("router_logits", &grads[0], &logits, || f().double_value(&[]));
    }
    Ok(())
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

/// With B = 0 the update of an expert is zero, so its A and the router receive no gradient.
#[test]
fn from_b_zero_only_b_has_a_gradient() -> Result<()> {
    let _generator = seed(63);
    for input in ROUTER_INPUTS {
        let router = RouterConfig { input, ..plain_router() };
        let base = tiny_base(tiny_config());
        let model = new_model(&base, &tiny_lora(), &router, Kind::Double);
        for (name, grad) in gradients(&model, &loss(&model, &RoutingSource::Router)) {
            assert_eq!(largest(&grad) > 0.0, name.ends_with("lora_b"), "`{name}`: {grad:?}");
        }
    }
    Ok(())
}

/// Moves every trained tensor a step against its gradient.
fn descend(model: &RoutedModel, grads: &BTreeMap<String, Tensor>) {
    let tensors = model.tensors();
    tch::no_grad(|| {
        for (name, grad) in grads {
            let _ = tensors[name].shallow_clone().g_sub_(&(grad * 0.1));
        }
    });
}

#[test]
fn after_a_step_every_trained_tensor_has_a_finite_gradient_that_is_not_zero() -> Result<()> {
    let _generator = seed(64);
    for (input, use_dora) in ROUTER_INPUTS.into_iter().flat_map(|i| [(i, false), (i, true)]) {
        let router = RouterConfig { input, ..plain_router() };
        let lora = LoraConfig { use_dora, ..tiny_lora() };
        let base = tiny_base(tiny_config());
        let fresh = new_model(&base, &lora, &router, Kind::Double);
        let random = tiny_model(&lora, &router, Kind::Double)?;
        for model in [fresh, random] {
            let source = &RoutingSource::Router;
            descend(&model, &gradients(&model, &loss(&model, source)));
            let grads = gradients(&model, &loss(&model, source));
            assert_eq!(grads.len(), model.trained(RoutingChoice::Router, None).parameters.len());
            for (name, grad) in grads {
                let size = largest(&grad);
                assert!(size > 0.0 && size.is_finite(), "`{name}` by {input:?}: {size}");
            }
        }
    }
    Ok(())
}

/// Only the experts and routers that the source of routing weights uses are trained, and only they
/// have gradients.
#[test]
fn only_parameters_that_a_source_uses_are_trained() -> Result<()> {
    let _generator = seed(65);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let names = |choice| -> Vec<String> {
        model.trained(choice, None).parameters.into_iter().map(|p| p.name).collect()
    };
    let all = names(RoutingChoice::Router);
    assert_eq!(all.iter().filter(|name| name.starts_with("router.")).count(), 2);
    for choice in [RoutingChoice::Uniform, RoutingChoice::All, RoutingChoice::Record] {
        assert_eq!(names(choice), all[..all.len() - 2], "{choice}");
    }
    let second = names(RoutingChoice::Expert(1));
    assert!(second.iter().all(|name| name.contains(".expert_1.")) && second.len() == 16);
    let trained = model.trained(RoutingChoice::Expert(1), None);
    let loss = loss(&model, &RoutingSource::Expert(1));
    let leaf_grads = Tensor::run_backward(&[&loss], &trained.leaves, false, false);
    let own: f64 = trained
        .split(&leaf_grads)
        .iter()
        .map(|g| g.square().sum(Kind::Double))
        .map(|x| x.double_value(&[]))
        .sum();
    let every: f64 =
        leaf_grads.iter().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum();
    assert!(own > 0.0);
    assert_close("squared norm", &Tensor::from(own), &Tensor::from(every), 1e-12);
    Ok(())
}
