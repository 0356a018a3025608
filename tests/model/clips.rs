//! Clipping of the gradients of single parameter groups, compared with torch's formula
//! (`torch.nn.utils.clip_grad_norm_`):
//!
//! ```text
//! g min(1, max_norm / (|all g| + 1e-6))
//! ```

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{GroupConfig, OptimizerConfig, RoutingChoice};
use dylora::model::parameters::OldParts;
use dylora::model::{ParameterGroup, RoutedModel, Trained};
use dylora::train::graph::Capture;
use dylora::train::optim::Optimizer;
use dylora::train::step::{Stepper, gradients};
use tch::{Device, Kind, Tensor};

use crate::accumulation::{config, cut, dataset};
use crate::common::{
    DOUBLE, assert_close, plain_router, seed, tiny_base, tiny_config, tiny_lora, tiny_model,
};

/// A config of the optimizer with these limits of all groups together and of single groups.
fn limits(all: f64, adapters: Option<f64>, router: Option<f64>) -> OptimizerConfig {
    let group = |max_grad_norm| GroupConfig { max_grad_norm, ..GroupConfig::at(0.01) };
    OptimizerConfig {
        adapters: group(adapters),
        router: group(router),
        max_grad_norm: all,
        ..OptimizerConfig::default()
    }
}

fn norm<'a>(grads: impl Iterator<Item = &'a Tensor>) -> f64 {
    grads.map(|grad| grad.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt()
}

/// The gradients that the formula makes of `grads`, of which those in one part are clipped
/// together.
///
/// - `part`: the number of the part of a parameter's group and its limit; 0 means none
fn clipped(
    trained: &Trained,
    grads: &[Tensor],
    part: &dyn Fn(ParameterGroup) -> (usize, f64),
) -> Vec<Tensor> {
    let of = |index: usize| part(trained.parameters[index].group);
    let in_part = |number: usize| (0..grads.len()).filter(move |&index| of(index).0 == number);
    let clip = |index: usize| {
        let (number, limit) = of(index);
        let norm = norm(in_part(number).map(|index| &grads[index]));
        let factor = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
        &grads[index] * factor
    };
    (0..grads.len()).map(clip).collect()
}

/// The limits to check, and which groups each part has.
fn cases() -> Vec<(OptimizerConfig, [(usize, f64); 2])> {
    // adapters, router
    vec![
        (limits(0.5, None, None), [(0, 0.5), (0, 0.5)]),
        (limits(0.0, None, None), [(0, 0.0), (0, 0.0)]),
        (limits(0.5, None, Some(0.125)), [(0, 0.5), (1, 0.125)]),
        (limits(0.0, None, Some(0.125)), [(0, 0.0), (1, 0.125)]),
        (limits(0.5, None, Some(0.0)), [(0, 0.5), (1, 0.0)]),
        (limits(0.0625, Some(0.25), None), [(0, 0.25), (1, 0.0625)]),
        (limits(2.0, Some(0.25), Some(0.125)), [(0, 0.25), (1, 0.125)]),
        // too large to clip anything
        (limits(1e6, None, Some(1e6)), [(0, 1e6), (1, 1e6)]),
    ]
}

fn part_of(parts: [(usize, f64); 2]) -> impl Fn(ParameterGroup) -> (usize, f64) {
    move |group| match group {
        ParameterGroup::Adapters => parts[0],
        _ => parts[1],
    }
}

#[test]
fn a_group_with_a_limit_of_its_own_is_clipped_by_itself() -> Result<()> {
    let _generator = seed(630);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let old = OldParts {
        num_experts: 2,
        experts_rate: 0.5,
        columns_rate: 0.25,
        new_column_learning_rate: 1e-3,
    };
    for trained in [None, Some(old)].map(|old| model.trained(RoutingChoice::Router, old)) {
        for (settings, parts) in cases() {
            let optimizer = Optimizer::new(&settings, &trained.parameters);
            let grads: Vec<Tensor> =
                trained.parameters.iter().map(|p| Tensor::randn(p.tensor.size(), DOUBLE)).collect();
            let expected = clipped(&trained, &grads, &part_of(parts));
            let all = norm(grads.iter());
            let found = optimizer.clip(&grads)?.double_value(&[]);
            // what is reported is the norm of all gradients before clipping
            assert!((found - all).abs() < 1e-10 * all, "{settings:?}: {found}, {all}");
            for ((grad, expected), parameter) in
                grads.iter().zip(&expected).zip(&trained.parameters)
            {
                assert_close(&format!("{settings:?}, {}", parameter.name), grad, expected, 1e-12);
            }
        }
    }
    Ok(())
}

/// The two groups of a base that is trained have one section, `[optimizer.base]`.
#[test]
fn a_trained_base_is_clipped_as_one_group() -> Result<()> {
    let _generator = seed(631);
    let base = tiny_base(tiny_config());
    let model = RoutedModel::plain(&base, Device::Cpu, Kind::Double, true);
    let trained = model.trained(RoutingChoice::Router, None);
    for (own, limit) in [(None, 2.0), (Some(0.5), 0.5), (Some(0.0), 0.0)] {
        let mut settings = limits(2.0, None, None);
        settings.base.max_grad_norm = own;
        let optimizer = Optimizer::new(&settings, &trained.parameters);
        let grads: Vec<Tensor> =
            trained.parameters.iter().map(|p| Tensor::randn(p.tensor.size(), DOUBLE)).collect();
        let expected = clipped(&trained, &grads, &|_| (0, limit));
        assert!(optimizer.clip(&grads)?.double_value(&[]) > 2.0);
        for (grad, expected) in grads.iter().zip(&expected) {
            assert_close(&format!("{own:?}"), grad, expected, 1e-12);
        }
    }
    Ok(())
}

/// Reference: AdamW (arXiv:1711.05101, algorithm 2) on gradients that are clipped by the formula.
/// With an `eps` of 1, its first update is nearly proportional to the gradient.
#[test]
fn a_step_updates_by_the_clipped_gradients() -> Result<()> {
    let _generator = seed(632);
    let router = plain_router();
    for (limits, parts) in cases() {
        for capture in [Capture::Off, Capture::Rerun] {
            let mut config = config(&router, &[])?;
            config.optimizer = OptimizerConfig { eps: 1.0, ..limits.clone() };
            let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
            let trained = model.trained(RoutingChoice::Router, None);
            let batches = cut(&dataset(16), &[1, 2], false);
            let grads = gradients(&model, &trained, &config, &batches, None, 1)?.grads;
            let all = norm(grads.iter());
            let clipped = clipped(&trained, &grads, &part_of(parts));
            let is_clipped = grads.iter().zip(&clipped).any(|(a, b)| !a.equal(b));
            let limited = parts.iter().any(|(_, limit)| *limit > 0.0 && *limit < 1e6);
            assert_eq!(is_clipped, limited, "{limits:?}");
            let expected: BTreeMap<&str, Tensor> = trained
                .parameters
                .iter()
                .zip(&clipped)
                .map(|(p, g)| (p.name.as_str(), &p.tensor - g / (g.abs() + 1.0) * 0.01))
                .collect();
            let optimizer = Optimizer::new(&config.optimizer, &trained.parameters);
            let mut stepper = Stepper::new(optimizer, capture, Device::Cpu);
            let data = stepper.prepare(&model, &config, &batches, None, 1);
            let update = stepper.optimizer.scalars(&|_| 1.0);
            let pending = stepper.launch(&model, &trained, &config, &data, &update)?;
            let result = stepper.wait(pending)?;
            assert!((result.grad_norm - all).abs() < 1e-9 * all, "{limits:?}");
            for parameter in &trained.parameters {
                let name = parameter.name.as_str();
                let what = format!("{limits:?}, {capture:?}, {name}");
                assert_close(&what, &parameter.tensor, &expected[name], 1e-11);
            }
        }
    }
    Ok(())
}

#[test]
fn a_group_with_a_warm_up_of_its_own_gets_its_own_factor() -> Result<()> {
    let _generator = seed(633);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let trained = model.trained(RoutingChoice::Router, None);
    let mut settings = limits(0.0, None, None);
    settings.router.warmup_steps = Some(7);
    let optimizer = Optimizer::new(&settings, &trained.parameters);
    let factor = |own: Option<u64>| own.map_or(0.5, |steps| steps as f64);
    let scalars = optimizer.scalars(&factor);
    assert_eq!(scalars, [1.0, 0.01 * 0.5, 0.01 * 7.0]);
    let rates = optimizer.learning_rates(&scalars);
    assert_eq!(rates, [("adapters".into(), 0.005), ("router".into(), 0.07)].into());
    Ok(())
}
