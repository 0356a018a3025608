//! Routers during runs: the temperature, hybrid rules, resumption and evaluation.

use anyhow::Result;
use dylora::checkpoint;
use dylora::checkpoint::load_model;
use dylora::checkpoint::routing_state::{ExpertMaturity, RoutingState};
use dylora::config::{Config, EvalRule, Maturity, Plateau, RouterConfig, TemperatureSchedule};
use dylora::ffi;
use dylora::train::Trainer;
use dylora::train::metrics::{Metrics, StepMetrics, WindowMetrics};
use tch::{Device, Tensor};

use crate::{World, alone, check_same_tensors, data, mixture, open_base, train};

/// The lines of a run's metrics, with times and memory set to zero.
pub(crate) fn metrics(config: &Config) -> Result<Vec<Metrics>> {
    let text = fs_err::read_to_string(config.run.dir.join("metrics.jsonl"))?;
    let lines = text.lines().map(|line| {
        let mut metrics: Metrics = serde_json::from_str(line)?;
        match &mut metrics {
            Metrics::Train(step) => {
                (step.step_secs, step.host_secs) = (0.0, 0.0);
                (step.tokens_per_sec, step.peak_memory_bytes) = (0.0, 0);
            }
            Metrics::Validation(validation) => validation.eval_secs = 0.0,
            Metrics::Window(_) => {}
        }
        Ok(metrics)
    });
    lines.collect()
}

/// The metrics of a run's steps.
pub(crate) fn steps(config: &Config) -> Result<Vec<StepMetrics>> {
    let steps = metrics(config)?.into_iter().filter_map(|metrics| match metrics {
        Metrics::Train(step) => Some(step),
        _ => None,
    });
    Ok(steps.collect())
}

/// The metrics of a run's windows.
pub(crate) fn windows(config: &Config) -> Result<Vec<WindowMetrics>> {
    let windows = metrics(config)?.into_iter().filter_map(|metrics| match metrics {
        Metrics::Window(window) => Some(window),
        _ => None,
    });
    Ok(windows.collect())
}

#[test]
fn the_temperature_falls_in_a_geometric_sequence_to_its_value() {
    let schedule = Some(TemperatureSchedule { start: 8.0, steps: 3 });
    let config = RouterConfig {
        temperature: 1.0,
        temperature_schedule: schedule,
        ..RouterConfig::default()
    };
    let row: Vec<f64> =
        (1..=6).map(|step| RoutingState::default().rule(&config, step).temperature).collect();
    for (found, expected) in row.iter().zip([8.0, 4.0, 2.0, 1.0, 1.0, 1.0]) {
        assert!((found - expected).abs() < 1e-14, "{row:?}");
    }
    // the temperature can also rise
    let schedule = Some(TemperatureSchedule { start: 0.5, steps: 2 });
    let rising = RouterConfig { temperature_schedule: schedule, temperature: 2.0, ..config };
    let row: Vec<f64> =
        (1..=4).map(|step| RoutingState::default().rule(&rising, step).temperature).collect();
    assert!((row[0] - 0.5).abs() < 1e-15 && (row[1] - 1.0).abs() < 1e-15, "{row:?}");
    assert_eq!(row[2..], [2.0, 2.0]);
    let constant = RouterConfig { temperature_schedule: None, ..rising };
    assert_eq!(
        [1, 2, 99].map(|step| RoutingState::default().rule(&constant, step).temperature),
        [2.0; 3]
    );
}

#[test]
fn a_run_has_each_steps_temperature_and_its_checkpoint_the_last() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = [
        "router.temperature=0.5",
        "router.temperature_schedule={start=4.0, steps=6}",
        "train.duration={steps=8}",
        "train.keep_last=9",
    ];
    let config = world.config("run", &overrides)?;
    train(&config, None)?;
    for step in steps(&config)? {
        let found = step.temperature.expect("there is a router");
        assert_eq!(
            found,
            RoutingState::default().rule(&config.router, step.step).temperature,
            "step {}",
            step.step
        );
    }
    let base = open_base(&config)?;
    for (step, expected) in [(4, 4.0 * 0.125f64.powf(3.0 / 6.0)), (8, 0.5)] {
        let dir = config.run.dir.join(format!("checkpoints/step-{step:08}"));
        let model = load_model(&dir, &config, &base, Device::Cpu)?;
        let found = model.router_spec().temperature;
        assert!((found - expected).abs() < 1e-14, "step {step}: {found} is not {expected}");
    }
    Ok(())
}

/// The `top_k` of the model in the checkpoint of a step.
fn top_k(config: &Config, step: u64) -> Result<Option<i64>> {
    let dir = config.run.dir.join(format!("checkpoints/step-{step:08}"));
    let model = load_model(&dir, config, &open_base(config)?, Device::Cpu)?;
    Ok(model.router_spec().top_k)
}

/// Whether each expert's load is a whole number of the step's label tokens. This is so if each
/// token chooses one expert.
fn is_top_1(step: &StepMetrics) -> bool {
    let load = step.expert_load.as_ref().expect("there is a router");
    let counts = load.iter().map(|share| share * step.label_tokens as f64);
    counts.into_iter().all(|count| (count - count.round()).abs() < 1e-9)
}

/// [`is_top_1`] for each evaluation of a run.
fn validations_are_top_1(config: &Config) -> Result<Vec<bool>> {
    let validation = data(config, &open_base(config)?)?.validation;
    let blocks = validation.eval_order().into_iter();
    let label_tokens: u64 = blocks.map(|block| validation.label_tokens(block)).sum();
    let is_whole = |share: &f64| {
        let count = share * label_tokens as f64;
        (count - count.round()).abs() < 1e-6
    };
    let loads = metrics(config)?.into_iter().filter_map(|metrics| match metrics {
        Metrics::Validation(validation) => validation.expert_load,
        _ => None,
    });
    Ok(loads.map(|load| load.iter().all(is_whole)).collect())
}

#[test]
fn a_hybrid_rule_by_tokens_is_dense_until_every_expert_has_had_them() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = [
        "router.top_k=1",
        "router.hybrid={tokens=90}",
        "train.checkpoint_every_steps=1",
        "train.keep_last=99",
    ];
    let config = world.config("run", &overrides)?;
    train(&config, None)?;
    let steps = steps(&config)?;
    // as long as routing is dense, the load of a step is its mean routing weights
    let mut tokens = [0.0; 3];
    let mut switch = None;
    for step in &steps {
        assert_eq!(is_top_1(step), switch.is_some(), "step {}", step.step);
        let load = step.expert_load.as_ref().expect("there is a router");
        for (tokens, share) in tokens.iter_mut().zip(load) {
            *tokens += share * step.label_tokens as f64;
        }
        let mature = tokens.iter().filter(|tokens| **tokens >= 90.0).count();
        if switch.is_none() {
            assert_eq!(step.mature_experts, Some(mature as u64), "step {}", step.step);
        }
        if mature == 3 && switch.is_none() {
            switch = Some(step.step);
        }
    }
    let switch = switch.expect("the run is long enough");
    assert!(switch > 2 && switch < 11, "step {switch} leaves both phases long enough");
    for step in 1..=12 {
        let expected = (step >= switch).then_some(1);
        assert_eq!(top_k(&config, step)?, expected, "after step {step}");
    }
    Ok(())
}

#[test]
fn an_expert_whose_loss_no_longer_falls_is_mature() {
    let plateau = Plateau { window_steps: 2, min_delta: 0.1 };
    let config = RouterConfig {
        top_k: Some(1),
        hybrid: Some(Maturity::Plateau(plateau)),
        ..RouterConfig::default()
    };
    let mut state = RoutingState::new(&config, 2);
    let site = |weights: [f64; 2]| dylora::eval::routing::SiteTotals {
        site: "all layers".into(),
        experts: vec![0, 1],
        tokens: vec![weights.iter().sum()],
        probs: weights.to_vec(),
        weights: vec![weights.to_vec()],
        assignments: vec![weights.to_vec()],
        entropy: vec![0.0],
        squared_lse: 0.0,
    };
    // the mean losses of the windows: 3.0, 2.8 and 2.75 for the first expert until it is mature,
    // and 3.0, 2.5, 2.2 and 2.15 for the second
    let losses = [(3.0, 3.0), (2.8, 2.5), (2.75, 2.2), (9.0, 2.15)];
    let mature = [(false, false), (false, false), (true, false), (true, true)];
    for (window, ((first, second), expected)) in losses.into_iter().zip(mature).enumerate() {
        for half in 0..2 {
            let step = 2 * window as u64 + half + 1;
            let weights = if half == 0 { [30.0, 10.0] } else { [10.0, 30.0] };
            // the losses of the two steps differ, but their weighted mean is that of the window
            let off = if half == 0 { 0.2 } else { -0.6 };
            let of_second = if half == 0 { 0.6 } else { -0.2 };
            let losses = [weights[0] * (first + off), weights[1] * (second + of_second)];
            let before: Vec<bool> = state.experts.iter().map(|expert| expert.is_mature).collect();
            state.note(&config, step, &[site(weights)], Some(&losses));
            if half == 0 {
                let now: Vec<bool> = state.experts.iter().map(|expert| expert.is_mature).collect();
                assert_eq!(now, before, "a window is judged at its end");
            }
        }
        let found: Vec<bool> = state.experts.iter().map(|expert| expert.is_mature).collect();
        assert_eq!(found, [expected.0, expected.1], "window {window}");
        assert_eq!(state.rule(&config, 1).top_k, (expected == (true, true)).then_some(1));
        let count = u64::from(expected.0) + u64::from(expected.1);
        assert_eq!(state.mature_experts(), Some(count));
    }
    assert!(state.experts.iter().all(|expert: &ExpertMaturity| expert.tokens == 160.0));
}

/// No loss falls by 100 nats, so all experts are mature after the second window.
#[test]
fn a_hybrid_rule_by_plateau_is_dense_until_the_losses_no_longer_fall() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = [
        "router.top_k=1",
        "router.hybrid={plateau={window_steps=3, min_delta=100.0}}",
        "train.eval_every_steps=3",
        "train.checkpoint_every_steps=1",
        "train.keep_last=99",
    ];
    let config = world.config("run", &overrides)?;
    train(&config, None)?;
    for step in steps(&config)? {
        assert_eq!(is_top_1(&step), step.step > 6, "step {}", step.step);
        let mature = if step.step < 6 { 0 } else { 3 };
        assert_eq!(step.mature_experts, Some(mature), "step {}", step.step);
        assert_eq!(top_k(&config, step.step)?, (step.step >= 6).then_some(1));
    }
    assert_eq!(validations_are_top_1(&config)?, [false, true, true, true]);
    // each token's weights sum to 1, so the experts' losses of a window sum to the loss of its
    // tokens
    let state = checkpoint::read_state(&config.run.dir.join("checkpoints/step-00000003"))?;
    let experts = &state.routing.experts;
    let weight: f64 = experts.iter().map(|expert| expert.tokens).sum();
    assert!((weight - state.tokens_seen as f64).abs() < 1e-2, "{weight}");
    let sum: f64 = experts.iter().map(|e| e.tokens * e.last_loss.expect("a window is over")).sum();
    let window = steps(&config)?.into_iter().take(3);
    let expected: f64 = window.map(|step| step.loss * step.label_tokens as f64).sum();
    assert!((sum - expected).abs() < 1e-4 * expected, "{sum} is not {expected}");
    Ok(())
}

/// The cases cover every kind of routing state. A run resumes within a window, between evaluations,
/// and before and after its experts are mature.
#[test]
fn a_run_resumed_within_a_window_equals_an_unbroken_one_with_every_line_of_its_metrics()
-> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let common = ["train.checkpoint_every_steps=1", "train.keep_last=99", "router.window_steps=4"];
    let cases: [&[&str]; 4] = [
        &[
            "router.top_k=1",
            "router.hybrid={tokens=90}",
            "router.noise={gaussian=0.3}",
            "router.temperature_schedule={start=3.0, steps=9}",
            "router.balance_bias_rate=0.01",
        ],
        &[
            "router.scope=layer",
            "router.input=layer_input",
            "router.top_k=2",
            "router.hybrid={plateau={window_steps=3, min_delta=0.2}}",
            "router.noise={jitter=0.1}",
            "router.hidden_layers=1",
            "lora.orthogonality={a=0.1}",
        ],
        &[
            "router.scope=module",
            "router.level=sequence",
            "router.uniform_mse_coef=0.1",
            "router.z_loss_coef=0.01",
            "router.entropy_coef=-0.01",
            "router.eval={top_k=1}",
        ],
        &["lora.experts_per_layer=[1, 3]", "router.top_k=2", "router.balance_bias_rate=0.1"],
    ];
    for (case, own) in cases.into_iter().enumerate() {
        let overrides = [&common[..], own].concat();
        let config = world.config(&format!("unbroken-{case}"), &overrides)?;
        let (losses, unbroken) = train(&config, None)?;
        let expected = metrics(&config)?;
        assert_eq!(windows(&config)?.iter().map(|w| w.step).collect::<Vec<_>>(), [4, 8, 12]);
        for from in [3, 6, 9] {
            let dir = config.run.dir.join(format!("checkpoints/step-{from:08}"));
            let again = world.config(&format!("resumed-{case}-{from}"), &overrides)?;
            // the folder holds the metrics of a run that was interrupted after the checkpoint
            fs_err::create_dir_all(&again.run.dir)?;
            fs_err::copy(
                config.run.dir.join("metrics.jsonl"),
                again.run.dir.join("metrics.jsonl"),
            )?;
            let (rest, resumed) = train(&again, Some(&dir))?;
            assert_eq!(rest, losses[from..], "case {case}, from step {from}");
            assert_eq!(resumed.state, unbroken.state);
            assert_eq!(metrics(&again)?, expected, "case {case}, from step {from}");
            check_same_tensors(&unbroken, &resumed)?;
        }
    }
    Ok(())
}

#[test]
fn evaluation_is_without_noise_and_leaves_the_generator_alone() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let run = |name: &str, noise: &str| -> Result<(f64, f64)> {
        let config = world.config(name, &[noise])?;
        let base = open_base(&config)?;
        let validation = data(&config, &base)?.validation;
        let start = mixture(&config, &base)?;
        let trainer =
            Trainer::new(config.clone(), &base, &start, data(&config, &base)?, Device::Cpu)?;
        let generator = ffi::rng_state(Device::Cpu)?;
        let [once, twice] = [(), ()].map(|()| trainer.evaluate(&validation, &|_, _| ()));
        assert!(generator.equal(&ffi::rng_state(Device::Cpu)?));
        Ok((once?.loss, twice?.loss))
    };
    let (once, twice) = run("gaussian", "router.noise={gaussian=2.0}")?;
    assert_eq!(once, twice);
    assert_eq!(run("jitter", "router.noise={jitter=0.5}")?, (once, once));
    assert_eq!(run("none", "router.noise=none")?, (once, once));
    Ok(())
}

#[test]
fn a_run_evaluates_by_the_rule_for_evaluation() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    for (name, overrides, expected) in [
        ("same", &["router.top_k=1"][..], true),
        ("dense", &["router.top_k=1", "router.eval=dense"], false),
        ("top-1", &["router.eval={top_k=1}"], true),
        ("none", &[], false),
    ] {
        let config = world.config(name, overrides)?;
        train(&config, None)?;
        assert_eq!(validations_are_top_1(&config)?, [expected; 3], "{name}");
    }
    let config = world.config("x", &["router.eval={top_k=1}"])?;
    assert_eq!(config.router.eval, Some(EvalRule::TopK(1)));
    Ok(())
}

/// Reference: each step moves the bias by its rate against the sign of each expert's surplus over
/// an even load.
#[test]
fn a_run_moves_the_selection_bias_after_each_step() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = [
        "router.top_k=1",
        "router.balance_bias_rate=0.25",
        "train.checkpoint_every_steps=1",
        "train.keep_last=99",
    ];
    let config = world.config("run", &overrides)?;
    train(&config, None)?;
    let mut expected = [0.0f32; 3];
    for step in steps(&config)? {
        let load = step.expert_load.expect("there is a router");
        for (bias, share) in expected.iter_mut().zip(load) {
            // numbers of label tokens are whole, so a load is exactly a third of them or clearly
            // not
            let surplus = share * step.label_tokens as f64 - step.label_tokens as f64 / 3.0;
            *bias -= if surplus.abs() < 1e-6 { 0.0 } else { 0.25 * surplus.signum() as f32 };
        }
        let dir = config.run.dir.join(format!("checkpoints/step-{:08}", step.step));
        let found = &checkpoint::read_model(&dir)?["router.selection_bias"];
        assert!(found.equal(&Tensor::from_slice(&expected)), "step {}: {found:?}", step.step);
    }
    assert!(expected.iter().any(|bias| *bias != 0.0));
    Ok(())
}
