//! The reports of a run after each window of steps, and the detection of collapsed routing.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dylora::checkpoint::{self, Preferred};
use dylora::config::Config;
use dylora::train::metrics::{StepMetrics, WindowMetrics};
use dylora::train::{Ending, Event, Summary, Trainer};
use tch::{Device, Tensor};

use crate::routing::{steps, windows};
use crate::{World, alone, data, mixture, open_base, train};

/// Trains a mixture whose router starts with the given bias.
fn train_from_bias(config: &Config, bias: &[f32]) -> Result<(Vec<WindowMetrics>, Summary)> {
    let base = open_base(config)?;
    let mut start = mixture(config, &base)?;
    start.tensors.insert("router.bias".into(), Tensor::from_slice(bias));
    let mut trainer =
        Trainer::new(config.clone(), &base, &start, data(config, &base)?, Device::Cpu)?;
    let mut observed = vec![];
    let summary = trainer.run(&AtomicBool::new(false), &mut |event| {
        if let Event::Window(window) = event {
            observed.push(window.clone());
        }
    })?;
    assert_eq!(observed, windows(config)?, "what is observed is what is written");
    Ok((observed, summary))
}

/// A bias that gives one expert all the weight. Only this expert then gets a gradient, so that the
/// others stay without weight.
const PLANTED: [f32; 3] = [0.0, 60.0, 0.0];

#[test]
fn a_planted_collapse_is_reported_after_every_window() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &["router.window_steps=3"])?;
    let (windows, summary) = train_from_bias(&config, &PLANTED)?;
    assert_eq!((summary.ending, summary.state.step), (Ending::Completed, 12));
    assert_eq!(
        windows.iter().map(|w| (w.step, w.window_steps)).collect::<Vec<_>>(),
        [(3, 3), (6, 3), (9, 3), (12, 3)]
    );
    for window in &windows {
        let routing = window.routing.as_ref().expect("there is a router");
        assert_eq!(routing.sites[0].largest(), (1, 1.0));
        assert_eq!(routing.sites[0].dead_experts, [0, 2]);
        assert_eq!(routing.dead_share, 2.0 / 3.0);
        let information = routing.mutual_information.expect("there are two domains");
        assert!(information < 1e-20, "{information}");
    }
    insta::assert_snapshot!(windows[3].collapse.join("\n"), @"
    expert_1 takes 1.000 of the routing weight at `all layers`, more than 0.9 (1 of 1 sites)
    2 of 3 experts are dead at `all layers` (expert_0, expert_2), with less than 0.05 of an even \
    weight (1 of 1 sites)
    ");
    assert!(summary.state.routing.collapsed);
    Ok(())
}

/// In a run of 12 steps, the steps after the last complete window form a window too. A run that is
/// shorter than a window has one window.
#[test]
fn the_last_steps_are_a_window_of_their_own() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    for (steps, expected) in [(5, vec![(5, 5), (10, 5), (12, 2)]), (50, vec![(12, 12)])] {
        let window = format!("router.window_steps={steps}");
        let config = world.config(&format!("run-{steps}"), &[&window])?;
        let (windows, _) = train_from_bias(&config, &PLANTED)?;
        let found: Vec<_> = windows.iter().map(|w| (w.step, w.window_steps)).collect();
        assert_eq!(found, expected);
        assert!(windows.iter().all(|window| !window.collapse.is_empty()));
    }
    Ok(())
}

#[test]
fn a_planted_collapse_stops_the_run_behind_a_whole_checkpoint() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let stop = ["router.window_steps=3", "router.on_collapse=stop"];
    let config = world.config("run", &stop)?;
    let (windows, summary) = train_from_bias(&config, &PLANTED)?;
    assert_eq!((summary.ending, windows.len()), (Ending::Collapsed, 1));
    let last = checkpoint::find(&config.run.dir, Preferred::Last)?;
    assert_eq!(fs_err::canonicalize(&last)?, fs_err::canonicalize(&summary.checkpoint)?);
    let state = checkpoint::read_state(&last)?;
    assert_eq!((state.step, state.routing.collapsed, state.routing.window_steps), (3, true, 0));
    assert_eq!(state, summary.state);
    // with `warn`, the run can be resumed
    let on = world.config("run", &["router.window_steps=3", "router.on_collapse=warn"])?;
    let (rest, resumed) = train(&on, Some(Path::new(&last)))?;
    assert_eq!((rest.len(), resumed.ending), (9, Ending::Completed));
    Ok(())
}

#[test]
fn a_run_that_loses_its_balance_is_stopped_and_one_that_keeps_it_is_not() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let common = [
        "router.window_steps=5",
        "router.on_collapse=stop",
        "router.load_balancing_coef=0.0",
        "train.duration={steps=60}",
        "train.eval_every_steps=60",
    ];
    // the entropy loss concentrates each token on one expert, and most tokens on the same one
    let falls = ["router.entropy_coef=20.0", "optimizer.router.learning_rate=0.2"];
    let config = world.config("falls", &[&common[..], &falls].concat())?;
    let (_, summary) = train(&config, None)?;
    assert_eq!(summary.ending, Ending::Collapsed);
    assert!(summary.state.step < 60 && summary.state.step.is_multiple_of(5));
    assert!(!windows(&config)?.last().expect("it was told").collapse.is_empty());
    for (name, keeps) in [
        ("slow", &["optimizer.router.learning_rate=1e-5"][..]),
        ("balanced", &["router.load_balancing_coef=5.0"]),
    ] {
        let config = world.config(name, &[&common[..], keeps].concat())?;
        let (_, summary) = train(&config, None)?;
        assert_eq!((summary.ending, summary.state.routing.collapsed), (Ending::Completed, false));
        let windows = windows(&config)?;
        assert!(windows.iter().all(|window| window.collapse.is_empty()), "{name}");
        assert_eq!(windows.len(), 12);
    }
    Ok(())
}

/// The figures of a window are means over the tokens of all its steps, by domain and in total.
#[test]
fn a_window_tells_of_the_domains_and_of_their_mix() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &["router.window_steps=4", "router.top_k=1"])?;
    train(&config, None)?;
    let (steps, of_router) = (steps(&config)?, windows(&config)?);
    assert_eq!(of_router.len(), 3);
    for (window, steps) in of_router.iter().zip(steps.chunks(4)) {
        let routing = window.routing.as_ref().expect("there is a router");
        let tokens: f64 = steps.iter().map(|step| step.label_tokens as f64).sum();
        for expert in 0..3 {
            let load = |step: &StepMetrics| step.expert_load.as_ref().expect("a router")[expert];
            let expected: f64 = steps.iter().map(|s| load(s) * s.label_tokens as f64).sum();
            let found = routing.expert_load[expert];
            assert!((found - expected / tokens).abs() < 1e-12, "{found}");
        }
        let entropy = |step: &StepMetrics| step.routing_entropy.expect("there is a router");
        let expected: f64 = steps.iter().map(|s| entropy(s) * s.label_tokens as f64).sum();
        assert!((routing.routing_entropy - expected / tokens).abs() < 1e-12);
        let names: Vec<&str> = window.domain_routing_weights.keys().map(String::as_str).collect();
        assert_eq!(names, ["down", "up"]);
        for weights in window.domain_routing_weights.values() {
            // the weights were computed in f32
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-6);
        }
        let realised: f64 = window.mix.values().map(|share| share.realised).sum();
        assert!((realised - 1.0).abs() < 1e-12);
    }
    let uniform =
        ["train.routing=uniform", "router.load_balancing_coef=0", "router.window_steps=6"];
    let config = world.config("uniform", &uniform)?;
    train(&config, None)?;
    for window in windows(&config)? {
        assert_eq!((window.routing, window.collapse.len(), window.mix.len()), (None, 0, 2));
        assert!(window.domain_routing_weights.is_empty());
    }
    Ok(())
}
