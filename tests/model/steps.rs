//! Whole steps: the optimizer's update, skipped steps, and steps that read their data from the
//! memory that a captured graph would read.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::config::{Config, OptimizerConfig, RouterConfig, RouterInput, RoutingChoice};
use dylora::data::Batch;
use dylora::model::RoutedModel;
use dylora::train::graph::Capture;
use dylora::train::optim::Optimizer;
use dylora::train::prepared::Prepared;
use dylora::train::step::{NotFinite, StepInFlight, StepResult, Stepper};
use tch::{Device, Kind, Tensor};

use crate::accumulation::{config, cut, dataset};
use crate::common::{DOUBLE, assert_close, plain_router, seed, tiny_lora, tiny_model};

fn stepper(model: &RoutedModel, config: &OptimizerConfig, capture: Capture) -> Stepper {
    let trained = model.trained(RoutingChoice::Router, None);
    Stepper::new(Optimizer::new(config, &trained.parameters), capture, Device::Cpu)
}

/// Reference: AdamW (arXiv:1711.05101, algorithm 2), in f64.
#[test]
fn an_update_by_numbers_on_the_device_is_adamw() -> Result<()> {
    let _generator = seed(95);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let mut settings = OptimizerConfig::default();
    settings.adapters.learning_rate = 0.03;
    settings.adapters.weight_decay = 0.1;
    let trained = model.trained(RoutingChoice::Router, None);
    let mut optimizer = Optimizer::new(&settings, &trained.parameters);
    let mut expected: Vec<(Tensor, Tensor, Tensor)> = trained
        .parameters
        .iter()
        .map(|parameter| {
            let zeros = parameter.tensor.zeros_like();
            (parameter.tensor.copy(), zeros.shallow_clone(), zeros)
        })
        .collect();
    for (update, factor) in (1..).zip([1.0, 0.3, 0.7]) {
        let grads: Vec<_> =
            trained.parameters.iter().map(|p| Tensor::randn(p.tensor.size(), DOUBLE)).collect();
        let scalars = Tensor::from_slice(&optimizer.scalars(&|_| factor));
        assert_eq!(scalars.double_value(&[0]), f64::from(update));
        let state = |optimizer: &Optimizer| -> BTreeMap<String, Tensor> {
            optimizer.state().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
        };
        let before: Vec<_> = trained.parameters.iter().map(|p| p.tensor.copy()).collect();
        let moments = state(&optimizer);
        optimizer.update(&grads, &scalars, &Tensor::from(true))?;
        for (parameter, before) in trained.parameters.iter().zip(&before) {
            assert!(parameter.tensor.equal(before), "a skipped update moves `{}`", parameter.name);
        }
        assert!(state(&optimizer).iter().all(|(name, tensor)| tensor.equal(&moments[name])));
        optimizer.update(&grads, &scalars, &Tensor::from(false))?;
        optimizer.count_update();
        for ((p, m, v), (parameter, grad)) in
            expected.iter_mut().zip(trained.parameters.iter().zip(&grads))
        {
            let is_router = parameter.name.contains("router");
            let group = if is_router { settings.router } else { settings.adapters };
            let rate = group.learning_rate * factor;
            *m = &*m * 0.9 + grad * 0.1;
            *v = &*v * 0.999 + grad.square() * 0.001;
            let m_hat = &*m / (1.0 - 0.9f64.powi(update));
            let v_hat = &*v / (1.0 - 0.999f64.powi(update));
            *p = &*p * (1.0 - rate * group.weight_decay) - m_hat / (v_hat.sqrt() + 1e-8) * rate;
            assert_close(&parameter.name, &parameter.tensor, p, 1e-12);
        }
    }
    Ok(())
}

/// Copies of all tensors that a step may change, by name.
fn everything(model: &RoutedModel, stepper: &Stepper) -> BTreeMap<String, Tensor> {
    let all = model.tensors().into_iter().chain(stepper.optimizer.state());
    all.map(|(name, tensor)| (name, tensor.copy())).collect()
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_and_says_so() -> Result<()> {
    let _generator = seed(96);
    let router = RouterConfig { balance_bias_rate: 0.1, top_k: Some(1), ..plain_router() };
    let config = config(&router, &[])?;
    let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
    let trained = model.trained(RoutingChoice::Router, None);
    for capture in [Capture::Off, Capture::Rerun] {
        let mut stepper = stepper(&model, &config.optimizer, capture);
        let batches = cut(&dataset(16), &[1], false);
        let step = |stepper: &mut Stepper| -> Result<StepResult> {
            let data = stepper.prepare(&model, &config, &batches, None, 1);
            let update = stepper.optimizer.scalars(&|_| 1.0);
            let pending = stepper.launch(&model, &trained, &config, &data, &update)?;
            stepper.wait(pending)
        };
        step(&mut stepper)?;
        let name = "h.0.attn.c_attn.expert_0.lora_a";
        let healthy = model.tensors()[name].copy();
        model.load_some(&BTreeMap::from([(name.to_owned(), healthy.full_like(f64::NAN))]))?;
        let before = everything(&model, &stepper);
        let error = step(&mut stepper).unwrap_err().to_string();
        assert!(error.starts_with("the loss is NaN and the gradient norm NaN"), "{error}");
        for (name, tensor) in everything(&model, &stepper) {
            let (found, expected) = (
                tensor.nan_to_num(7.0, None::<f64>, None::<f64>),
                before[&name].nan_to_num(7.0, None::<f64>, None::<f64>),
            );
            assert!(found.equal(&expected), "`{name}` has moved");
        }
        assert_eq!(stepper.optimizer.num_updates(), 1);
        model.load_some(&BTreeMap::from([(name.to_owned(), healthy)]))?;
        step(&mut stepper)?;
        assert_eq!(stepper.optimizer.num_updates(), 2);
        assert!(everything(&model, &stepper).iter().any(|(name, now)| !now.equal(&before[name])));
    }
    Ok(())
}

/// Three steps are launched before the first one is waited for. The second one is not finite. The
/// third one is finite, because the parameters have been repaired, but it must not make its update
/// either: otherwise the model would be one that no run without launching ahead can reach.
#[test]
fn no_step_behind_one_that_is_not_finite_changes_anything() -> Result<()> {
    let _generator = seed(100);
    let router = RouterConfig { balance_bias_rate: 0.1, top_k: Some(1), ..plain_router() };
    let config = config(&router, &[])?;
    for capture in [Capture::Off, Capture::Rerun] {
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let trained = model.trained(RoutingChoice::Router, None);
        let mut stepper = stepper(&model, &config.optimizer, capture);
        let batches = cut(&dataset(16), &[1], false);
        let launch = |stepper: &mut Stepper| -> Result<StepInFlight> {
            let data = stepper.prepare(&model, &config, &batches, None, 1);
            let update = stepper.optimizer.scalars(&|_| 1.0);
            stepper.launch(&model, &trained, &config, &data, &update)
        };
        let first = launch(&mut stepper)?;
        let before = everything(&model, &stepper);
        let name = "h.0.attn.c_attn.expert_0.lora_a";
        let healthy = &before[name];
        model.load_some(&BTreeMap::from([(name.to_owned(), healthy.full_like(f64::NAN))]))?;
        let second = launch(&mut stepper)?;
        model.load_some(&BTreeMap::from([(name.to_owned(), healthy.copy())]))?;
        let third = launch(&mut stepper)?;
        assert_eq!(stepper.optimizer.num_updates(), 3);
        stepper.wait(first)?;
        let error = stepper.wait(second).unwrap_err();
        assert!(error.downcast_ref::<NotFinite>().is_some(), "{error}");
        assert_eq!(stepper.optimizer.num_updates(), 1);
        let error = stepper.wait(third).unwrap_err().to_string();
        assert_eq!(error, "the step was launched behind one that was not finite");
        assert_eq!(stepper.optimizer.num_updates(), 1);
        for (name, tensor) in everything(&model, &stepper) {
            assert!(tensor.equal(&before[&name]), "`{name}` has moved");
        }
        let next = launch(&mut stepper)?;
        stepper.wait(next)?;
        assert_eq!(stepper.optimizer.num_updates(), 2);
        assert!(!model.tensors()[name].equal(&before[name]));
    }
    Ok(())
}

/// Runs steps of two shapes in turn. Learning rates, temperatures, dropout masks and noise change
/// from step to step.
fn run(
    model: &mut RoutedModel,
    config: &Config,
    capture: Capture,
) -> Result<(Vec<String>, Stepper)> {
    let trained = model.trained(RoutingChoice::Router, None);
    let mut stepper = stepper(model, &config.optimizer, capture);
    let blocks = cut(&dataset(10), &[1, 1, 1, 1], false);
    let shapes: [Vec<Batch>; 3] =
        [blocks[..2].to_vec(), blocks[2..4].to_vec(), vec![blocks[1].clone()]];
    tch::manual_seed(5);
    let mut results = vec![];
    for step in 0..12usize {
        model.set_rule(1.0 + step as f64 / 7.0, Some(2));
        // the sizes are rounded with both settings, so that only `capture` differs
        let data = Prepared::new(model, config, &shapes[step % 3], None, 1, true);
        let factor = 1.0 / (1.0 + step as f64);
        let update = stepper.optimizer.scalars(&|_| factor);
        let pending = stepper.launch(model, &trained, config, &data, &update)?;
        results.push(format!("{:?}", stepper.wait(pending)?));
    }
    Ok((results, stepper))
}

#[test]
fn steps_through_the_memory_of_captured_ones_are_the_same_to_the_bit() -> Result<()> {
    let _generator = seed(97);
    for input in [RouterInput::Embeddings, RouterInput::LayerInput] {
        let router = RouterConfig {
            input,
            top_k: Some(2),
            balance_bias_rate: 0.01,
            noise: dylora::config::RouterNoise::Gaussian(0.1),
            ..plain_router()
        };
        let config = config(&router, &["lora.dropout=0.2", "optimizer.max_grad_norm=0.5"])?;
        let mut ends = vec![];
        for capture in [Capture::Off, Capture::Rerun] {
            tch::manual_seed(98);
            let mut model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
            let (results, stepper) = run(&mut model, &config, capture)?;
            ends.push((results, everything(&model, &stepper)));
        }
        assert_eq!(ends[0].0, ends[1].0);
        for (name, tensor) in &ends[0].1 {
            assert!(tensor.equal(&ends[1].1[name]), "`{name}` differs");
        }
        let distinct: std::collections::BTreeSet<&String> = ends[0].0.iter().collect();
        assert_eq!(distinct.len(), 12, "the steps are to differ");
    }
    Ok(())
}

/// Sizes are rounded only if a step is to be captured.
#[test]
fn what_cannot_be_captured_is_run_step_by_step() -> Result<()> {
    let _generator = seed(99);
    let accumulates = "train.grad_accum_steps=2";
    let drops = "lora.dropout=0.1";
    for (input, overrides, captured) in [
        (RouterInput::Embeddings, vec![], true),
        (RouterInput::Embeddings, vec![accumulates, drops], true),
        (RouterInput::LayerInput, vec![accumulates], true),
        (RouterInput::LayerInput, vec![drops], true),
        (RouterInput::LayerInput, vec![accumulates, drops], false),
        (RouterInput::Embeddings, vec!["train.gradient_checkpointing=true"], true),
        (RouterInput::Embeddings, vec!["train.gradient_checkpointing=true", drops], false),
        (RouterInput::Embeddings, vec!["train.kernels=\"reference\""], false),
    ] {
        let router = RouterConfig { input, ..plain_router() };
        let config = config(&router, &overrides)?;
        let model = tiny_model(&tiny_lora(), &router, Kind::Double)?;
        let batches = &cut(&dataset(16), &[1], false)[..config.train.grad_accum_steps];
        for (capture, expected) in [(Capture::Rerun, captured), (Capture::Off, false)] {
            let mut stepper = stepper(&model, &config.optimizer, capture);
            let data = stepper.prepare(&model, &config, batches, None, 1);
            assert_eq!(data.is_rounded, expected, "{input:?}, {overrides:?}, {capture:?}");
        }
    }
    Ok(())
}
