//! Steps that are launched before the results of the step in front of them are known. On a GPU,
//! these are replays of CUDA graphs; here, the steps are run anew on the memory that a graph would
//! read.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use dylora::config::Config;
use dylora::train::graph::Capture;
use dylora::train::metrics::StepMetrics;
use dylora::train::{Ending, Event, Summary};

use crate::{World, alone, check_same_checkpoints, check_same_tensors};

/// Dropout, a falling temperature and a moving selection bias make every step different.
/// Evaluations and checkpoints come between the steps.
const SETTINGS: [&str; 9] = [
    "train.duration={steps=20}",
    "train.eval_every_steps=8",
    "train.checkpoint_every_steps=5",
    "train.keep_last=9",
    "router.temperature_schedule={start=2.0,steps=20}",
    "router.top_k=2",
    "router.balance_bias_rate=0.01",
    "router.window_steps=1",
    "router.dead_share=1e-9",
];

/// The routing may stop the run after each step, so that no step is launched ahead.
const CHECKS_EACH_STEP: [&str; 2] = ["router.on_collapse=\"stop\"", "router.collapse_share=1.0"];

fn config(world: &World, run: &str, more: &[&str]) -> Result<Config> {
    world.config(run, &[&SETTINGS, more].concat())
}

/// Trains from the start, or from the checkpoint `resume`, to the end or to step `stop_at`. Returns
/// the metrics of the steps without times and memory.
fn run(
    config: &Config,
    resume: Option<&Path>,
    stop_at: u64,
) -> Result<(Vec<StepMetrics>, Summary)> {
    let mut trainer = crate::trainer(config, resume)?;
    trainer.set_capture(Capture::Rerun);
    let interrupt = AtomicBool::new(false);
    let mut steps = vec![];
    let summary = trainer.run(&interrupt, &mut |event| {
        if let Event::Step(metrics) = event {
            let mut step = metrics.clone();
            (step.step_secs, step.host_secs, step.tokens_per_sec) = (0.0, 0.0, 0.0);
            step.peak_memory_bytes = 0;
            steps.push(step);
            interrupt.fetch_or(metrics.step == stop_at, Ordering::Relaxed);
        }
    })?;
    Ok((steps, summary))
}

#[test]
fn a_run_that_launches_ahead_equals_one_that_does_not_to_the_bit() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let waiting = config(&world, "waiting", &CHECKS_EACH_STEP)?;
    let ahead = config(&world, "ahead", &[])?;
    let (expected, waiting) = run(&waiting, None, 20)?;
    let (steps, ahead) = run(&ahead, None, 20)?;
    assert_eq!(steps.len(), 20);
    assert_eq!(steps, expected);
    assert_eq!(ahead.state, waiting.state);
    check_same_tensors(&waiting, &ahead)
}

/// The step that is in flight when the run is asked to stop is the last one. The two steps before
/// the first capture are not launched ahead, and neither is a step behind an evaluation or a
/// checkpoint.
#[test]
fn an_interrupted_run_ends_with_the_step_in_flight_and_can_go_on() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let (expected, unbroken) = run(&config(&world, "unbroken", &[])?, None, 20)?;
    for (stop_at, last) in [(1, 1), (2, 2), (3, 4), (4, 5), (5, 5), (6, 7), (8, 8), (19, 20)] {
        let config = config(&world, &format!("interrupted-{stop_at}"), &[])?;
        let (mut steps, first) = run(&config, None, stop_at)?;
        let ending = if last == 20 { Ending::Completed } else { Ending::Interrupted };
        assert_eq!((first.ending, first.state.step), (ending, last), "stopped at {stop_at}");
        if ending == Ending::Completed {
            continue;
        }
        let (rest, second) = run(&config, Some(&first.checkpoint), 20)?;
        steps.extend(rest);
        assert_eq!(steps, expected);
        assert_eq!(second.state, unbroken.state);
        check_same_tensors(&unbroken, &second)?;
    }
    Ok(())
}

/// A router whose rule depends on the progress of the experts is waited for in each step.
#[test]
fn a_hybrid_rule_sees_the_results_of_the_step_before() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let hybrid = ["router.hybrid={tokens=140}"];
    let waiting = [&CHECKS_EACH_STEP, &hybrid[..]].concat();
    let (expected, _) = run(&config(&world, "waiting", &waiting)?, None, 20)?;
    let (steps, _) = run(&config(&world, "run", &hybrid)?, None, 20)?;
    assert_eq!(steps, expected);
    let last_young = steps.iter().rposition(|step| step.mature_experts < Some(3));
    // after steps 5 and 8, nothing is launched ahead anyway
    assert_eq!(last_young, Some(5), "all experts are mature after step 7");
    Ok(())
}

/// The checkpoint of a run that stops holds the step after which the routing had collapsed.
#[test]
fn no_step_is_launched_where_the_routing_may_stop_the_run() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let windows = ["router.window_steps=4", "router.collapse_share=0.1"];
    let stops = [&windows[..], &["router.on_collapse=\"stop\""]].concat();
    let warns = [&windows[..], &["train.checkpoint_every_steps=4"]].concat();
    let (expected, _) = run(&config(&world, "warns", &warns)?, None, 4)?;
    let (steps, stopped) = run(&config(&world, "stops", &stops)?, None, 20)?;
    assert_eq!((stopped.ending, stopped.state.step), (Ending::Collapsed, 4));
    assert_eq!(steps, expected);
    let expected = world.path("warns/checkpoints/step-00000004");
    check_same_checkpoints(&expected, &stopped.checkpoint)
}
