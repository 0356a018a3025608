//! Runs with other sources of routing weights, and runs from imported experts.

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::checkpoint::{self, load_model};
use dylora::config::{Config, RoutingChoice};
use dylora::durable::output::Output;
use dylora::eval::{EvalSettings, evaluate};
use dylora::export::peft::{self, Layout};
use dylora::mixture::Mixture;
use dylora::model::{RoutedModel, RoutingSource};
use tch::{Device, Kind, Tensor};

use super::{
    World, alone, check_same_tensors, data, find_adapter, mixture, open_base, provenance, record,
    train,
};

/// Turns the load-balancing loss off, which is refused if the router does not decide.
const NO_BALANCE: &str = "router.load_balancing_coef=0.0";

/// The tensors of a run's model before the first step.
fn start(config: &Config) -> Result<BTreeMap<String, Tensor>> {
    let base = open_base(config)?;
    tch::manual_seed(config.run.seed as i64);
    let model = mixture(config, &base)?.put_on(&base.weights()?, Device::Cpu, Kind::Float)?;
    Ok(model.tensors())
}

/// The names of the tensors that a run has changed.
fn changed(config: &Config) -> Result<Vec<String>> {
    let before = start(config)?;
    let (_, summary) = train(config, None)?;
    let after = checkpoint::read_model(&summary.checkpoint)?;
    assert!(before.keys().eq(after.keys()));
    let differs = |(name, tensor): (String, Tensor)| (!tensor.equal(&after[&name])).then_some(name);
    Ok(before.into_iter().filter_map(differs).collect())
}

/// Trains three experts, one of them with DoRA and one of another rank, and exports them. Returns
/// the overrides with which a run starts from the export.
fn exported(world: &World) -> Result<Vec<String>> {
    let experts = "lora.experts=[{rank=2, alpha=3.0}, {use_dora=true}, \
                   {target_modules=[\"attn.c_attn\"], use_rslora=true}]";
    let config = world.config("source", &[experts, "router.temperature=0.7"])?;
    let (_, summary) = train(&config, None)?;
    let base = open_base(&config)?;
    let model = load_model(&summary.checkpoint, &config, &base, Device::Cpu)?;
    let dir = world.path("export");
    peft::export(&Output::new(&dir), &model, &provenance(&base)?, Layout::Dylora)?;
    Ok(vec![
        "router.temperature=0.7".into(),
        format!("router.source=\"{}\"", dir.display()),
        sources(world, ""),
    ])
}

/// The override that loads the exported experts, each with the further keys `more`.
fn sources(world: &World, more: &str) -> String {
    let source = |expert: i64| {
        let dir = world.path(&format!("export/expert_{expert}"));
        format!("{{source={{path=\"{}\"}}{more}}}", dir.display())
    };
    format!("lora.experts=[{}]", (0..3).map(source).collect::<Vec<_>>().join(", "))
}

fn config(world: &World, run: &str, overrides: &[String], more: &[&str]) -> Result<Config> {
    let overrides: Vec<&str> =
        overrides.iter().map(String::as_str).chain(more.iter().copied()).collect();
    world.config(run, &overrides)
}

#[test]
fn only_the_router_of_frozen_imported_experts_is_trained() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let mut overrides = exported(&world)?;
    overrides[2] = sources(&world, ", trainable=false");
    let config = config(&world, "run", &overrides, &["optimizer.adapters.weight_decay=0.1"])?;
    assert_eq!(changed(&config)?, ["router.bias", "router.weight"]);
    // the experts are the same to the bit as when they were imported
    let imported =
        Mixture::of_folder(&world.path("export"), &open_base(&config)?.spec, &find_adapter)?;
    let last = checkpoint::find(&config.run.dir, checkpoint::Preferred::Last)?;
    let trained = checkpoint::read_model(&last)?;
    for (name, tensor) in imported.tensors.iter().filter(|(name, _)| name.contains("expert_")) {
        assert!(tensor.equal(&trained[name]), "`{name}` has changed");
    }
    Ok(())
}

#[test]
fn a_frozen_expert_stays_while_its_neighbours_are_trained() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let experts = "lora.experts=[{}, {trainable=false}, {use_dora=true}]";
    let overrides = [experts, "optimizer.adapters.weight_decay=0.1"];
    let config = world.config("run", &overrides)?;
    let changed = changed(&config)?;
    let all: Vec<String> = start(&config)?.into_keys().collect();
    let expected: Vec<String> =
        all.into_iter().filter(|name| !name.contains(".expert_1.")).collect();
    assert_eq!(changed, expected);
    Ok(())
}

#[test]
fn only_parameters_that_a_source_uses_are_trained() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    for n in 0..40i64 {
        for (name, step) in [("up", 1), ("down", 29)] {
            add_record(&world, name, n, step)?;
        }
    }
    for routing in ["uniform", "all", "record", "expert:2"] {
        let routing_key = format!("train.routing={routing}");
        let decay = "optimizer.adapters.weight_decay=0.1";
        let run = routing.replace(':', "-");
        let config = world.config(&run, &[&routing_key, decay, NO_BALANCE])?;
        let changed = changed(&config)?;
        assert!(changed.iter().all(|name| !name.starts_with("router.")), "{routing}: {changed:?}");
        let of = |expert: &str| changed.iter().filter(|name| name.contains(expert)).count();
        let counts = [of(".expert_0."), of(".expert_1."), of(".expert_2.")];
        let expected = if routing == "expert:2" { [0, 0, 8] } else { [8, 8, 8] };
        assert_eq!(counts, expected, "{routing}");
    }
    Ok(())
}

/// Writes record `n` with an `expert` to the files of a domain. Record 0 replaces their content,
/// and later records are appended.
fn add_record(world: &World, name: &str, n: i64, step: i64) -> Result<()> {
    use std::io::Write;
    for split in ["train", "validation"] {
        let path = world.path(&format!("{name}.{split}.jsonl"));
        let mut options = fs_err::OpenOptions::new();
        let mut file = options.write(true).append(n > 0).truncate(n == 0).open(&path)?;
        let mut json = record(if split == "train" { n } else { 100 + n }, step);
        json["expert"] = (n % 3).into();
        writeln!(file, "{json}")?;
    }
    Ok(())
}

#[test]
fn routing_by_record_asks_for_an_expert_in_each_record() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &["train.routing=record", NO_BALANCE])?;
    let error = format!("{:#}", train(&config, None).unwrap_err());
    assert!(error.contains("needs an `expert` in each record, 80 have none"), "{error}");
    for n in 0..3 {
        add_record(&world, "up", n, 1)?;
        add_record(&world, "down", n, 29)?;
    }
    let two = ["train.routing=record", "lora.num_experts=2", NO_BALANCE];
    let config = world.config("two", &two)?;
    let error = format!("{:#}", train(&config, None).unwrap_err());
    assert!(error.contains("names `expert` 2, the model has 2 from 0"), "{error}");
    Ok(())
}

/// The experts have mixed ranks, DoRA, PiSSA, OLoRA and invocation tokens, and each layer has a
/// router. Resuming needs neither the adapters that the run began with nor a new factorisation of
/// the base.
#[test]
fn every_kind_of_expert_resumes_to_the_bit() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    exported(&world)?;
    let source = world.path("export/expert_1");
    let experts = format!(
        "lora.experts=[{{init=\"pissa\", rank=3}}, {{init=\"olora\", use_dora=true}}, \
         {{source={{path=\"{}\"}}}}, {{rank=2, alora_invocation_tokens=[7], init=\"gaussian\"}}]",
        source.display()
    );
    let overrides = [
        experts.as_str(),
        "lora.num_experts=4",
        "router.input=layer_input",
        "router.scope=layer",
        "train.checkpoint_every_steps=5",
        "train.keep_last=9",
    ];
    let config = world.config("unbroken", &overrides)?;
    let (losses, unbroken) = train(&config, None)?;
    fs_err::remove_dir_all(world.path("export"))?;
    let from = world.path("unbroken/checkpoints/step-00000005");
    let (rest, resumed) = train(&world.config("resumed", &overrides)?, Some(&from))?;
    assert_eq!(rest, losses[5..]);
    check_same_tensors(&unbroken, &resumed)
}

fn losses(config: &Config, model: &RoutedModel, routing: RoutingChoice) -> Result<Vec<f64>> {
    let validation = data(config, &open_base(config)?)?.validation;
    let settings = EvalSettings { batch_size: 4, loss_chunk_tokens: 64, ..EvalSettings::default() };
    let report = evaluate(model, &validation, &RoutingSource::from(routing), settings, &|_, _| ())?;
    Ok(report.domains.iter().map(|domain| domain.loss).collect())
}

#[test]
fn an_exported_run_is_imported_again_whole_and_as_initial_values() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = exported(&world)?;
    let run = config(&world, "again", &overrides, &[])?;
    let base = open_base(&run)?;
    let (weights, device) = (base.weights()?, Device::Cpu);
    let last = checkpoint::find(&world.path("source"), checkpoint::Preferred::Last)?;
    let original = load_model(&last, &checkpoint::read_config(&last)?, &base, device)?;
    let whole = Mixture::of_folder(&world.path("export"), &base.spec, &find_adapter)?;
    let whole = whole.put_on(&weights, device, Kind::Float)?;
    let start = mixture(&run, &base)?.put_on(&weights, device, Kind::Float)?;
    for routing in [RoutingChoice::Router, RoutingChoice::Uniform, RoutingChoice::Expert(1)] {
        let expected = losses(&run, &original, routing)?;
        assert_eq!(losses(&run, &whole, routing)?, expected, "{routing}");
        assert_eq!(losses(&run, &start, routing)?, expected, "{routing}");
    }
    let other = config(&world, "other", &overrides, &["router.temperature=1.0"])?;
    let error = format!("{:#}", mixture(&other, &base).unwrap_err());
    assert!(error.contains("has `temperature` 0.7, the config 1"), "{error}");
    Ok(())
}

#[test]
fn a_router_of_other_experts_is_refused() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = exported(&world)?;
    let config = config(&world, "run", &overrides[..2], &["lora.num_experts=2"])?;
    let refusal = mixture(&config, &open_base(&config)?).expect_err("it is for three experts");
    let dir = world.path("export");
    let expected = format!(
        "`router.source`: the router of `{}` scores 3 experts, the config has 2",
        dir.display()
    );
    assert_eq!(format!("{refusal:#}"), expected);
    Ok(())
}
