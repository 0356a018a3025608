//! Adding an expert to a mixture: a whole stage of training.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dylora::base::Base;
use dylora::checkpoint::routing_state::ExpertMaturity;
use dylora::checkpoint::{self, load_mixture};
use dylora::config::{Config, DomainConfig, Validation};
use dylora::growth::new_column;
use dylora::growth::skills::{Skill, SkillCenter, SkillLibrary, embed};
use dylora::growth::stage_config::{self, Growth};
use dylora::growth::stages::Stage;
use dylora::growth::with_expert;
use dylora::mixture::Mixture;
use dylora::model::experts::spec::ExpertSpec;
use dylora::train::metrics::Metrics;
use dylora::train::{MixtureHistory, Summary, Trainer, schedule};
use tch::{Device, Kind, Tensor};

use crate::routing::{metrics, steps, windows};
use crate::{World, alone, check_same_tensors, data, forget_sums, open_base, train};

/// A record of the third domain, which uses only four of the words. A router that sees no more than
/// the words can tell it from the others, but not for every word.
fn third_record(n: i64) -> serde_json::Value {
    let words = |range: std::ops::Range<i64>| {
        let word = |i: i64| format!("w{}", (n * 7 + i * 5).rem_euclid(4));
        range.map(word).collect::<Vec<_>>().join(" ")
    };
    serde_json::json!({ "prompt": words(0..3), "completion": words(3..5 + n % 7) })
}

/// Writes the files of a third domain of a world, and returns its config.
pub(crate) fn third_domain(world: &World) -> Result<DomainConfig> {
    let mut files = vec![];
    for (split, records, first) in [("train", 40, 0), ("validation", 8, 100)] {
        let lines: Vec<String> =
            (first..first + records).map(|n| third_record(n).to_string()).collect();
        let file = world.path(&format!("third.{split}.jsonl"));
        fs_err::write(&file, lines.join("\n"))?;
        files.push(file.display().to_string());
    }
    let validation = Some(Validation::Files(files.split_off(1)));
    Ok(DomainConfig { name: "third".into(), train: files, validation, ..DomainConfig::default() })
}

/// A stage of six steps, the first four of them for seeding, in which the old experts and router
/// columns are frozen.
pub(crate) fn growth(world: &World, run: &str) -> Result<Growth> {
    Ok(Growth {
        domain: third_domain(world)?,
        replay: 0.5,
        steps: 6,
        seed_steps: 4,
        old_experts_rate: 0.0,
        old_columns_rate: 0.0,
        consolidation_rate: 0.25,
        run_dir: world.path(run),
    })
}

/// All that is needed to begin a stage.
struct NextStage {
    config: Config,
    base: Base,
    mixture: Mixture,
    history: MixtureHistory,
    stage: Stage,
}

/// Trains two experts on two domains for four steps, and returns the stage that follows.
fn next_stage(world: &World, overrides: &[&str], growth: &Growth) -> Result<NextStage> {
    let common = ["lora.num_experts=2", "train.duration={steps=4}", "train.eval_every_steps=2"];
    let first = world.config("first", &[&common[..], overrides].concat())?;
    if !first.run.dir.exists() {
        train(&first, None)?;
    }
    let dir = checkpoint::find(&first.run.dir, checkpoint::Preferred::Last)?;
    let state = checkpoint::read_state(&dir)?;
    let old = load_mixture(&dir, &first, &state)?;
    let mut config = stage_config::grown_config(&first, old.router.temperature, growth)?;
    config.train.checkpoint_every_steps = Some(1);
    config.train.keep_last = 99;
    let base = open_base(&config)?;
    let weights = base.weights()?;
    let model = old.put_on(&weights, Device::Cpu, Kind::Float)?;
    let train_data = data(&config, &base)?.train;
    let biases = new_column::initial_biases(&model, &train_data, "third", 99)?;
    let spec = ExpertSpec::new(&config.lora, 2, &base.spec)?;
    let mut mixture = with_expert(&old, &weights, spec, &|prefix| biases[prefix])?;
    for old in &mut mixture.specs[..2] {
        old.trainable = growth.old_experts_rate > 0.0;
    }
    let embedding = embed(&model, &train_data, 2, 8, None)?;
    let mut skills = SkillLibrary::new(SkillCenter::default().of(&model)?);
    skills.skills.push(Skill {
        name: "third".into(),
        embedding: embedding.mean,
        label_tokens: embedding.label_tokens,
        expert: Some(2),
    });
    let history = MixtureHistory {
        stages: state.stages,
        tokens_seen: state.tokens_seen,
        maturity: state.routing.experts,
        skills: Some(skills),
    };
    let stage = Stage::new("add third", vec!["third".into()], 3);
    Ok(NextStage { config, base, mixture, history, stage })
}

impl NextStage {
    fn trainer(self) -> Result<Trainer> {
        let data = data(&self.config, &self.base)?;
        let Self { config, base, mixture, history, stage } = self;
        Trainer::next_stage(config, &base, &mixture, data, Device::Cpu, history, stage)
    }

    fn run(self) -> Result<Summary> {
        self.trainer()?.run(&AtomicBool::new(false), &mut |_| ())
    }
}

/// Copies of a mixture's tensors.
fn copies(mixture: &Mixture) -> BTreeMap<String, Tensor> {
    mixture.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect()
}

/// The path of a step's checkpoint.
fn at_step(config: &Config, step: u64) -> PathBuf {
    config.run.dir.join(format!("checkpoints/step-{step:08}"))
}

/// Whether the tensor called `name` belongs to one of the first two experts.
fn is_old(name: &str) -> bool {
    name.contains(".expert_0.") || name.contains(".expert_1.")
}

#[test]
fn frozen_old_parts_are_the_same_to_the_bit_after_a_stage_and_the_new_ones_are_not() -> Result<()> {
    let _alone = alone();
    for scope in ["shared", "layer", "module"] {
        let world = World::new()?;
        let scope = format!("router.scope={scope}");
        let overrides = [scope.as_str(), "router.hidden_layers=1", "router.hidden_width=32"];
        let next = next_stage(&world, &overrides, &growth(&world, "grown")?)?;
        let before = copies(&next.mixture);
        let after = checkpoint::read_model(&next.run()?.checkpoint)?;
        let (mut old, mut new) = (0, 0);
        for (name, before) in &before {
            let after = &after[name];
            if is_old(name) || name.contains(".hidden.") {
                assert!(after.equal(before), "{scope}: `{name}` has moved");
                old += 1;
            } else if name.contains("router") {
                assert!(after.narrow(0, 0, 2).equal(&before.narrow(0, 0, 2)), "{scope}: `{name}`");
                assert!(!after.get(2).equal(&before.get(2)), "{scope}: `{name}` has not moved");
                new += 1;
            } else {
                panic!("`{name}` is of no part");
            }
        }
        assert!(old > 0 && new > 0, "{old} {new}");
        for (name, tensor) in after.iter().filter(|(name, _)| name.ends_with("expert_2.lora_b")) {
            assert!(tensor.abs().max().double_value(&[]) > 1e-3, "`{name}` has not moved");
        }
    }
    Ok(())
}

#[test]
fn the_hash_of_what_is_frozen_covers_the_old_experts_alone() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let next = next_stage(&world, &[], &growth(&world, "grown")?)?;
    let weights = next.base.weights()?;
    let model = next.mixture.put_on(&weights, Device::Cpu, Kind::Float)?;
    let hash = model.frozen_hash()?;
    assert_ne!(hash, model.base().hash()?);
    assert_eq!(next.run()?.frozen_hash, Some(hash.clone()));
    let tensors = model.tensors();
    let nudge = |name: &str| tch::no_grad(|| tensors[name].shallow_clone().g_add_scalar_(1e-3));
    let _ = (nudge("h.0.attn.c_attn.expert_2.lora_a"), nudge("router.weight"));
    assert_eq!(model.frozen_hash()?, hash);
    let _ = nudge("h.1.mlp.c_fc.expert_1.lora_b");
    assert_ne!(model.frozen_hash()?, hash);
    Ok(())
}

/// Adam's first step is `learning_rate * g / (|g| + eps')`, whose size is the learning rate
/// wherever the gradient is not zero.
#[test]
fn old_parts_move_by_their_factor_of_the_learning_rate() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let no_decay = "optimizer.adapters={learning_rate=2e-2, weight_decay=0.0}";
    let overrides = [no_decay, "lora.dropout=0.0", "router.hidden_layers=1"];
    let mut growth = growth(&world, "grown")?;
    (growth.old_experts_rate, growth.old_columns_rate) = (0.125, 0.5);
    let next = next_stage(&world, &overrides, &growth)?;
    let (config, before) = (next.config.clone(), copies(&next.mixture));
    next.run()?;
    let rates = steps(&config)?.remove(0).learning_rates;
    let factor = rates["adapters"] / 2e-2;
    for (group, rate) in
        [("adapters_at_0.125", 2e-2 * 0.125), ("new_column", 3e-4), ("router_at_0.5", 5e-2 * 0.5)]
    {
        assert!((rates[group] - rate * factor).abs() < 1e-12, "{rates:?}");
    }
    let after = checkpoint::read_model(&at_step(&config, 1))?;
    let moved = |name: &str, rows: Option<(i64, i64)>| {
        let of =
            |tensor: &Tensor| rows.map_or(tensor.copy(), |(at, len)| tensor.narrow(0, at, len));
        (of(&after[name]) - of(&before[name])).abs().max().double_value(&[])
    };
    for (name, rows, rate) in [
        ("h.0.attn.c_attn.expert_0.lora_a", None, 2e-2 * 0.125),
        ("h.1.mlp.c_fc.expert_1.lora_b", None, 2e-2 * 0.125),
        ("router.weight", Some((0, 2)), 5e-2 * 0.5),
        ("router.bias", Some((0, 2)), 5e-2 * 0.5),
        ("router.hidden.0.weight", None, 5e-2 * 0.5),
        ("router.weight", Some((2, 1)), 3e-4),
    ] {
        let (moved, expected) = (moved(name, rows), rate * factor);
        assert!((moved / expected - 1.0).abs() < 2e-3, "`{name}`: {moved} is not {expected}");
    }
    // B was 0 before the step
    let new = after["h.1.mlp.c_fc.expert_2.lora_b"].abs().max().double_value(&[]);
    assert!((new / (2e-2 * factor) - 1.0).abs() < 2e-3, "{new}");
    Ok(())
}

#[test]
fn seeding_gives_the_new_domain_to_the_new_expert_and_the_router_decides_after_it() -> Result<()> {
    let _alone = alone();
    for (input, checkpointing, accum) in
        [("base_hidden", false, 2), ("layer_input", true, 1), ("layer_input", false, 2)]
    {
        let world = World::new()?;
        let overrides = [
            format!("router.input={input}"),
            format!("train.gradient_checkpointing={checkpointing}"),
            format!("train.grad_accum_steps={accum}"),
            "train.micro_batch_size=6".into(),
            "router.window_steps=1".into(),
        ];
        let overrides = overrides.each_ref().map(String::as_str);
        let next = next_stage(&world, &overrides, &growth(&world, "grown")?)?;
        let config = next.config.clone();
        next.run()?;
        let mut seen = BTreeMap::new();
        for window in windows(&config)? {
            let seeding = window.step <= 4;
            for (domain, weights) in &window.domain_routing_weights {
                let what = format!("{input}, step {}, `{domain}`: {weights:?}", window.step);
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{what}");
                if domain == "third" && seeding {
                    assert_eq!(weights[..], [0.0, 0.0, 1.0], "{what}");
                } else {
                    assert!(weights.iter().all(|weight| *weight > 0.0), "{what}");
                }
                *seen.entry((domain.clone(), seeding)).or_insert(0) += 1;
            }
        }
        assert_eq!(seen.len(), 6, "{seen:?}");
    }
    Ok(())
}

#[test]
fn all_learning_rates_have_the_rate_of_consolidation_after_seeding() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let mut growth = growth(&world, "grown")?;
    growth.old_experts_rate = 0.5;
    let next = next_stage(&world, &[], &growth)?;
    let config = next.config.clone();
    next.run()?;
    for step in steps(&config)? {
        let rate = if step.step <= 4 { 1.0 } else { 0.25 };
        let factor = rate * schedule::factor(config.schedule, None, step.step, 6);
        let expected = [("adapters", 2e-2), ("adapters_at_0.5", 1e-2), ("new_column", 3e-4)];
        let expected = expected.map(|(name, of_group)| (name.to_owned(), of_group * factor));
        assert_eq!(step.learning_rates, expected.into(), "step {}", step.step);
    }
    Ok(())
}

#[test]
fn a_stage_that_was_interrupted_equals_an_unbroken_one_to_the_bit() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let hybrid = ["router.top_k=1", "router.hybrid={tokens=40}", "router.window_steps=4"];
    let mut growth = growth(&world, "grown")?;
    growth.old_columns_rate = 0.1;
    let next = next_stage(&world, &hybrid, &growth)?;
    let (config, skills) = (next.config.clone(), next.history.skills.clone());
    let unbroken = next.run()?;
    assert!(unbroken.state.routing.experts.iter().any(|expert| expert.is_mature));
    assert_eq!(unbroken.state.stages.len(), 2);
    assert_eq!(unbroken.state.column_opened_at, Some(4));
    let of_run = steps(&config)?;
    // interrupted in the seeding phase, right before and right after its end, and later
    for from in [2, 3, 4, 5] {
        let (again, resumed) = resume(&world, &config, &at_step(&config, from), from)?;
        assert_eq!(steps(&again)?, of_run[from as usize..], "from {from}");
        check_same(&unbroken, &resumed, from)?;
        let width = open_base(&again)?.spec.width;
        assert_eq!(checkpoint::read_skills(&resumed.checkpoint, width)?, skills);
    }
    Ok(())
}

/// Resumes a stage from the checkpoint of step `from` in `dir`, in a folder of its own. Returns the
/// config of the resumed run, too.
fn resume(world: &World, config: &Config, dir: &Path, from: u64) -> Result<(Config, Summary)> {
    let mut again = config.clone();
    again.run.dir = world.path(&format!("from-{from}"));
    let base = open_base(&again)?;
    let all_data = data(&again, &base)?;
    let mut trainer = Trainer::resume(again.clone(), &base, all_data, Device::Cpu, dir)?;
    let summary = trainer.run(&AtomicBool::new(false), &mut |_| ())?;
    Ok((again, summary))
}

/// Checks that two runs ended in the same state, to the bit.
fn check_same(unbroken: &Summary, resumed: &Summary, from: u64) -> Result<()> {
    assert_eq!(resumed.state, unbroken.state, "from {from}");
    assert_eq!(resumed.frozen_hash, unbroken.frozen_hash);
    check_same_tensors(unbroken, resumed)
}

/// The seeding phase goes on if held-out tokens do not get the new expert at its end. Here, the
/// checkpoint of that step is made to say so.
#[test]
fn a_stage_whose_seeding_goes_on_resumes_to_the_bit() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let growth = Growth { steps: 8, seed_steps: 2, ..growth(&world, "grown")? };
    let next = next_stage(&world, &["router.window_steps=1"], &growth)?;
    let config = next.config.clone();
    assert_eq!(next.run()?.state.column_opened_at, Some(2));
    let dir = at_step(&config, 2);
    let state = fs_err::read_to_string(dir.join("state.json"))?;
    let closed = state.replace("\"column_opened_at\": 2,", "");
    assert_ne!(closed, state);
    fs_err::write(dir.join("state.json"), closed)?;
    forget_sums(&dir)?;
    let (extended, unbroken) = resume(&world, &config, &dir, 2)?;
    assert_eq!(unbroken.state.column_opened_at, Some(4));
    let third: Vec<(u64, Vec<f64>)> = windows(&extended)?
        .into_iter()
        .filter_map(|mut window| {
            Some((window.step, window.domain_routing_weights.remove("third")?))
        })
        .collect();
    for (step, weights) in third {
        assert_eq!(weights == [0.0, 0.0, 1.0], step <= 4, "step {step}: {weights:?}");
    }
    let of_run = steps(&extended)?;
    for from in [3, 4, 5] {
        let (again, resumed) = resume(&world, &config, &at_step(&extended, from), from)?;
        assert_eq!(steps(&again)?, of_run[from as usize - 2..], "from {from}");
        check_same(&unbroken, &resumed, from)?;
    }
    Ok(())
}

#[test]
fn a_stage_is_evaluated_beside_those_before_it() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let next = next_stage(&world, &[], &growth(&world, "grown")?)?;
    let (before, tokens) = (next.history.stages.clone(), next.history.tokens_seen);
    let (config, state) = (next.config.clone(), next.run()?.state);
    assert_eq!(state.stages[..1], before);
    assert_eq!(state.stages[0].learned, ["up", "down"]);
    let stage = &state.stages[1];
    assert_eq!((stage.name.as_str(), stage.step, stage.num_experts), ("add third", 6, 3));
    assert!(stage.losses.keys().eq(["down", "third", "up"]));
    let mut validations = metrics(&config)?.into_iter().filter_map(|metrics| match metrics {
        Metrics::Validation(validation) => Some(validation),
        _ => None,
    });
    let last = validations.next_back().expect("there is one at the end");
    assert_eq!((last.step, last.domain_losses), (6, stage.losses.clone()));
    assert!(state.tokens_seen > tokens && tokens > 0);
    Ok(())
}

#[test]
fn a_new_expert_makes_hybrid_routing_dense_until_it_is_mature() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let hybrid = ["router.top_k=1", "router.hybrid={tokens=60}"];
    let mut next = next_stage(&world, &hybrid, &growth(&world, "grown")?)?;
    let mature = ExpertMaturity { is_mature: true, tokens: 60.0, ..ExpertMaturity::default() };
    next.history.maturity = vec![mature; 2];
    let config = next.config.clone();
    let state = next.run()?.state;
    assert!(state.routing.experts.iter().all(|expert| expert.is_mature), "{state:?}");
    let counts: Vec<u64> = steps(&config)?.iter().filter_map(|step| step.mature_experts).collect();
    assert_eq!((counts[0], counts[5], counts.len()), (2, 3, 6), "{counts:?}");
    for (step, count) in (1..).zip(counts) {
        let dir = at_step(&config, step);
        let mixture = load_mixture(&dir, &config, &checkpoint::read_state(&dir)?)?;
        let top_k = (count == 3).then_some(1);
        assert_eq!(mixture.router.top_k, top_k, "after step {step}");
    }
    Ok(())
}
