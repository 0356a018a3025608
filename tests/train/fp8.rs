//! Runs whose products of the base are in FP8 (`train.base_products`). On the CPU, they are
//! simulated.

use anyhow::Result;
use dylora::checkpoint::load_model;
use dylora::config::BaseProducts;
use dylora::eval::{EvalSettings, evaluate};
use dylora::model::RoutingSource;
use tch::Device;

use super::{World, alone, check_same_tensors, data, open_base, train};

const FP8: [&str; 4] = [
    "train.base_products=\"fp8\"",
    "base.dtype=\"bf16\"",
    "train.checkpoint_every_steps=5",
    "train.keep_last=9",
];

/// The losses of steps are near those of exact products, but not equal, and fall as theirs do. A
/// resumed run equals an unbroken one to the bit.
#[test]
fn a_run_in_fp8_learns_and_resumes() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let (exact, _) = train(&world.config("exact", &FP8[1..])?, None)?;
    let (losses, unbroken) = train(&world.config("unbroken", &FP8)?, None)?;
    assert_eq!(losses.len(), exact.len());
    assert_ne!(losses, exact);
    for (step, (loss, exact)) in losses.iter().zip(&exact).enumerate() {
        assert!((loss - exact).abs() < 0.05, "step {}: {loss} and {exact}", step + 1);
    }
    let from = world.path("unbroken/checkpoints/step-00000005");
    let (rest, resumed) = train(&world.config("resumed", &FP8)?, Some(&from))?;
    assert_eq!(rest, losses[5..]);
    check_same_tensors(&unbroken, &resumed)
}

/// The run's own evaluation is that of its checkpoint with exact products.
#[test]
fn evaluations_are_exact() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let set = [&FP8[..], &["train.eval_every_steps=12"]].concat();
    let config = world.config("run", &set)?;
    let (_, summary) = train(&config, None)?;
    let base = open_base(&config)?;
    let mut plain = config.clone();
    plain.train.base_products = BaseProducts::Exact;
    let model = load_model(&summary.checkpoint, &plain, &base, Device::Cpu)?;
    let validation = data(&config, &base)?.validation;
    let settings = EvalSettings::of_run(&plain, &model, &validation);
    let found = evaluate(&model, &validation, &RoutingSource::Router, settings, &|_, _| ())?;
    assert_eq!(summary.state.best.expect("the run has evaluated").loss, found.loss);
    Ok(())
}

/// A config that asks for FP8 together with a setting that excludes it is refused.
#[test]
fn settings_that_exclude_fp8_are_refused() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    for (setting, need) in [
        ("base.dtype=\"f32\"", "`base.dtype = \"bf16\"`"),
        ("train.kernels=\"reference\"", "`train.kernels = \"auto\"`"),
        ("lora.dropout_masks=\"per_expert\"", "`lora.dropout_masks = \"shared\"`"),
        ("lora.use_dora=true", "`lora.use_dora = false`"),
        ("method=\"full\"", "`method = \"routed_lora\"`"),
        ("router.input=\"module_input\"", "another `router.input` than `module_input`"),
    ] {
        let error = world.config("run", &[&FP8[..], &[setting]].concat()).unwrap_err();
        let expected = format!("`train.base_products` needs {need} to be `fp8`");
        assert!(format!("{error:#}").contains(&expected), "{setting}: {error:#}");
    }
    let experts = "lora.experts=[{}, {use_dora=true}, {}]";
    let error = train(&world.config("run", &[&FP8[..], &[experts]].concat())?, None).unwrap_err();
    assert_eq!(
        format!("{error:#}"),
        "`train.base_products = \"fp8\"` does not work here: some experts are DoRA experts"
    );
    Ok(())
}
