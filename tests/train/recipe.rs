//! Runs with the settings of new configs: supervised routers of layers or modules, a part that is
//! always on, ranks by domain, limits and warm-ups of single groups, and the automatic duration.

use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dylora::checkpoint::{self, Preferred, load_model};
use dylora::config::{Config, DomainExperts};
use dylora::growth::assign::{assign_experts, set_capacity};
use dylora::growth::stage_config::{Growth, grown_config};
use dylora::mixture::Mixture;
use dylora::model::RoutingSource;
use dylora::model::experts::spec::ExpertSpec;
use dylora::train::plan::num_steps;
use dylora::train::{Event, Trainer};
use tch::Device;

use crate::growth::growth;
use crate::routing::steps;
use crate::{World, alone, check_same_tensors, data, mixture, open_base, train};

/// The routers of new configs.
pub(crate) const NEW: [&str; 6] = [
    "router.input=layer_input",
    "router.scope=layer",
    "router.normalize_input=true",
    "router.detach_input=true",
    "router.domain_supervision=0.1",
    "lora.scale=mixture",
];

/// Kinds of runs that differ in what they train and in which order they draw random numbers.
fn kinds() -> Vec<Vec<&'static str>> {
    let with = |more: &[&'static str]| [&NEW, more].concat();
    vec![
        with(&[]),
        with(&["lora.shared_rank=2"]),
        with(&["lora.shared_rank=4", "router.top_k=2", "train.gradient_checkpointing=true"]),
        with(&["lora.num_experts=1", "lora.shared_rank=2", "router.domain_supervision=0.0"]),
        with(&["router.input=module_input", "router.scope=module", "lora.shared_rank=2"]),
        with(&["router.noise={gaussian=0.3}", "router.init=zero", "lora.use_dora=true"]),
        with(&["train.routing=domain", "router.domain_supervision=0.0", "lora.shared_rank=2"]),
        with(&[
            "optimizer.router={learning_rate=5e-2, warmup_steps=6, max_grad_norm=0.05}",
            "optimizer.adapters={learning_rate=2e-2, max_grad_norm=0.2}",
        ]),
    ]
}

fn routed(set: &[&str]) -> Vec<&'static str> {
    // a single expert and routing by domain have no router's losses
    let unrouted = ["lora.num_experts=1", "train.routing=domain"];
    match set.iter().any(|item| unrouted.contains(item)) {
        true => vec!["router.load_balancing_coef=0.0"],
        false => vec![],
    }
}

#[test]
fn every_kind_of_run_resumes_to_the_bit() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    for (index, kind) in kinds().into_iter().enumerate() {
        let common = ["train.checkpoint_every_steps=5", "train.keep_last=9"];
        let set = [&common[..], &kind, &routed(&kind)].concat();
        let config = world.config(&format!("unbroken-{index}"), &set)?;
        let (losses, unbroken) = train(&config, None)?;
        assert!(losses[11] < losses[0] - 0.1, "{kind:?}: {losses:?}");
        let from = config.run.dir.join("checkpoints/step-00000005");
        let (rest, resumed) =
            train(&world.config(&format!("resumed-{index}"), &set)?, Some(&from))?;
        assert_eq!(rest, losses[5..], "{kind:?}");
        assert_eq!(resumed.state, unbroken.state, "{kind:?}");
        check_same_tensors(&unbroken, &resumed)?;
        let specs = checkpoint::read_experts(&resumed.checkpoint)?;
        let is_shared = kind.iter().any(|item| item.starts_with("lora.shared_rank"));
        assert_eq!(specs.last().is_some_and(|spec| spec.shared), is_shared, "{kind:?}");
    }
    Ok(())
}

/// B starts at zero, so the first loss is the base's, whatever the experts are and how they are
/// routed.
#[test]
fn every_kind_of_run_starts_from_the_base() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let of = |name: &str, set: &[&str]| -> Result<f64> {
        let common = ["train.duration={steps=1}", "lora.dropout=0.0"];
        let set = [&common[..], set, &routed(set)].concat();
        Ok(train(&world.config(name, &set)?, None)?.0[0])
    };
    let base = of("plain", &[])?;
    for (index, kind) in kinds().into_iter().enumerate() {
        let first = of(&format!("kind-{index}"), &kind)?;
        assert!((first - base).abs() < 1e-5, "{kind:?}: {first}, not {base}");
    }
    Ok(())
}

/// Each group's rate is `peak * s / (w + 1)` in the warm-up of `w` steps, and after that
/// `peak * (m + (1 - m) (1 + cos(pi (s - 1 - w) / (n - w))) / 2)`.
#[test]
fn metrics_have_the_rate_of_each_group_by_its_own_warm_up() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let set = [
        "optimizer.router={learning_rate=5e-2, warmup_steps=6, max_grad_norm=0.05}",
        "schedule={kind='cosine', warmup_steps=2, min_ratio=0.1}",
    ];
    let config = world.config("run", &set)?;
    train(&config, None)?;
    let steps = steps(&config)?;
    assert_eq!(steps.len(), 12);
    for metrics in steps {
        let factor = |warmup: f64| {
            let (s, n) = (metrics.step as f64, 12.0);
            match s <= warmup {
                true => s / (warmup + 1.0),
                false => 0.1 + 0.9 * (1.0 + (PI * (s - 1.0 - warmup) / (n - warmup)).cos()) / 2.0,
            }
        };
        let rates = [("adapters", 2e-2 * factor(2.0)), ("router", 5e-2 * factor(6.0))];
        assert_eq!(metrics.learning_rates.len(), 2);
        for (group, expected) in rates {
            let found = metrics.learning_rates[group];
            assert!((found - expected).abs() < 1e-15, "{group}, step {}: {found}", metrics.step);
        }
    }
    Ok(())
}

/// Without a number of steps, the warm-up is a tenth of the run, but at most 50 steps.
#[test]
fn an_automatic_warm_up_follows_from_the_number_of_steps() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let set = ["schedule={kind='constant'}", "train.duration={steps=30}"];
    let config = world.config("run", &[&set[..], &["train.eval_every_steps=30"]].concat())?;
    train(&config, None)?;
    let factors: Vec<f64> =
        steps(&config)?.iter().map(|step| step.learning_rates["adapters"] / 2e-2).collect();
    let close = |found: f64, expected: f64| (found - expected).abs() < 1e-12;
    assert!([0.25, 0.5, 0.75, 1.0, 1.0].iter().zip(&factors).all(|(&e, &f)| close(f, e)));
    Ok(())
}

#[test]
fn an_automatic_duration_is_three_epochs_or_a_hundred_steps() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let steps = |set: &[&str]| -> Result<(u64, u64)> {
        let config = world.config("auto", &[&["train.duration=auto"], set].concat())?;
        let train = data(&config, &open_base(&config)?)?.train;
        let blocks: u64 = (0..3).map(|epoch| train.epoch_blocks(epoch)).sum();
        let trainer = crate::trainer(&config, None)?;
        assert_eq!(trainer.num_steps(), num_steps(&config, &train)?);
        Ok((trainer.num_steps(), blocks))
    };
    // three epochs of so few blocks are fewer steps
    let (few, blocks) = steps(&[])?;
    assert!(blocks.div_ceil(6) < 100, "{blocks}");
    assert_eq!(few, 100);
    // one block in a step
    let set = ["train.micro_batch_size=1", "train.grad_accum_steps=1"];
    let (many, blocks) = steps(&set)?;
    assert!(blocks > 100, "{blocks}");
    assert_eq!(many, blocks);
    // the last step need not be full
    let (many, blocks) = steps(&["train.micro_batch_size=2", "train.grad_accum_steps=1"])?;
    assert_eq!(many, blocks.div_ceil(2).max(100));
    Ok(())
}

/// A run of automatic duration goes on past its epochs until its steps are done.
#[test]
fn a_run_of_automatic_duration_runs_for_a_hundred_steps() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let set = ["train.duration=auto", "train.eval_every_steps=100", "train.grad_accum_steps=1"];
    let (losses, summary) = train(&world.config("run", &set)?, None)?;
    assert_eq!((losses.len(), summary.state.step), (100, 100));
    assert!(summary.state.position.epoch > 3, "{:?}", summary.state.position);
    Ok(())
}

/// The mixture of a config as `dylora train` makes it.
fn prepared(config: &mut Config) -> Result<Mixture> {
    let base = open_base(config)?;
    let train = data(config, &base)?.train;
    let mut mixture = mixture(config, &base)?;
    assign_experts(config, &train, &base, Device::Cpu)?;
    set_capacity(&mut mixture.specs, config, &train, &base.spec)?;
    Ok(mixture)
}

/// Three experts of rank 4 have 12 rows in all. `up` has three quarters of the blocks.
#[test]
fn ranks_by_domain_follow_the_blocks_of_the_domains() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let sizes = |set: &[&str]| -> Result<(Vec<i64>, Vec<DomainExperts>)> {
        let set = [&NEW[..], &["lora.capacity=by_domain"], set].concat();
        let mut config = world.config("run", &set)?;
        config.data.domains[0].weight = 3.0;
        let even = mixture(&config, &open_base(&config)?)?;
        let mixture = prepared(&mut config)?;
        for (spec, even) in mixture.specs.iter().zip(&even.specs) {
            for (&path, size) in &spec.modules {
                assert_eq!(size.rank, spec.modules.values().next().expect("one").rank);
                let [found, expected] = [spec, even].map(|spec| spec.scaling(path).expect("it is"));
                assert!((found - expected).abs() < 1e-12, "the scaling stays");
            }
        }
        let rank = |spec: &ExpertSpec| spec.modules.values().next().expect("it has some").rank;
        let experts = config.data.domains.iter().map(|d| d.expert.clone().expect("it has one"));
        Ok((mixture.specs.iter().map(rank).collect(), experts.collect()))
    };
    let one = DomainExperts::One;
    let several = DomainExperts::Several;
    // the domain that has more blocks has the expert that is left over
    let (ranks, experts) = sizes(&["data.mixing=weights"])?;
    assert_eq!(experts, [several(vec![0, 1]), one(2)]);
    assert_eq!(ranks, [5, 4, 3]);
    let (ranks, experts) =
        sizes(&["data.mixing=weights", "lora.num_experts=2", "lora.shared_rank=5"])?;
    assert_eq!(experts, [one(0), one(1)]);
    assert_eq!(ranks, [6, 2, 5], "what is always on keeps its rank");
    let (ranks, _) = sizes(&["data.mixing=weights", "lora.num_experts=2", "lora.use_rslora=true"])?;
    assert_eq!(ranks, [6, 2]);
    Ok(())
}

#[test]
fn ranks_by_domain_above_the_components_of_a_weight_are_refused() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let set = [&NEW[..], &["lora.capacity=by_domain", "lora.init=pissa", "lora.rank=12"]].concat();
    let mut config = world.config("run", &[&set[..], &["lora.num_experts=2"]].concat())?;
    config.data.domains[0].weight = 9.0;
    let error = format!("{:#}", prepared(&mut config).expect_err("the base is 16 wide"));
    insta::assert_snapshot!(
        error,
        @"expert 0 by `lora.capacity = \"by_domain\"`: `init` takes components of the base's \
          weight: `h.0.attn.c_attn` has 16, fewer than the rank 22"
    );
    let shared = world.config("run", &["lora.init=pissa", "lora.shared_rank=17"])?;
    let error = mixture(&shared, &open_base(&shared)?).expect_err("the base is 16 wide");
    insta::assert_snapshot!(
        format!("{error:#}"),
        @"`lora.shared_rank`: `init` takes components of the base's weight: `h.0.attn.c_attn` has \
          16, fewer than the rank 17"
    );
    Ok(())
}

#[test]
fn a_run_with_ranks_by_domain_trains_and_resumes() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let set = [&NEW[..], &["lora.capacity=by_domain", "lora.shared_rank=2", "data.mixing=weights"]];
    let mut config = world.config("run", &set.concat())?;
    config.data.domains[0].weight = 3.0;
    let given = config.clone();
    let start = prepared(&mut config)?;
    let base = open_base(&config)?;
    let mut trainer =
        Trainer::new(config.clone(), &base, &start, data(&config, &base)?, Device::Cpu)?;
    let mut losses = vec![];
    let summary = trainer.run(&AtomicBool::new(false), &mut |event| {
        if let Event::Step(metrics) = event {
            losses.push(metrics.loss);
        }
    })?;
    let from = config.run.dir.join("checkpoints/step-00000008");
    let mut again = given;
    again.run.dir = world.path("again");
    let (rest, resumed) = train(&again, Some(&from))?;
    assert_eq!((&rest[..], resumed.state), (&losses[8..], summary.state));
    let specs = checkpoint::read_experts(&resumed.checkpoint)?;
    assert_eq!(specs, start.specs);
    let model = load_model(&resumed.checkpoint, &config, &base, Device::Cpu)?;
    assert_eq!(model.specs(), start.specs);
    Ok(())
}

/// A domain without an expert was only evaluated. It gets no share of the replay.
#[test]
fn a_supervised_mixture_with_a_domain_that_is_only_evaluated_can_grow() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let growth = growth(&world, "grown")?;
    let mut config = world.config("run", &NEW)?;
    let mut third = growth.domain.clone();
    (third.name, third.weight) = ("seen".into(), 0.0);
    config.data.domains.insert(1, third);
    prepared(&mut config)?;
    let experts: Vec<bool> = config.data.domains.iter().map(|d| d.expert.is_some()).collect();
    assert_eq!(experts, [true, false, true]);
    let grown = grown_config(&config, 1.0, &growth)?;
    dylora::config::load::validate(&grown)?;
    let weights: Vec<f64> = grown.data.domains.iter().map(|domain| domain.weight).collect();
    assert_eq!(weights, [0.25, 0.0, 0.25, 0.5]);
    assert_eq!(grown.data.domains[3].expert, Some(DomainExperts::One(3)));
    // without replay, the old domains have weight 0 and experts, and come back in the next stage
    let still = grown_config(&config, 1.0, &Growth { replay: 0.0, ..growth.clone() })?;
    dylora::config::load::validate(&still)?;
    let mut next = growth;
    next.domain.name = "fourth".into();
    let next = grown_config(&still, 1.0, &next)?;
    dylora::config::load::validate(&next)?;
    let weights: Vec<f64> = next.data.domains.iter().map(|domain| domain.weight).collect();
    let share = 0.5 / 3.0;
    assert_eq!(weights, [share, 0.0, share, share, 0.5]);
    Ok(())
}

/// What is always on is trained whatever decides the weights, and it alone under weight 0.
#[test]
fn a_part_that_is_always_on_learns_beside_the_experts() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let set = [&NEW[..], &["lora.shared_rank=2", "lora.dropout=0.0"]].concat();
    let config = world.config("run", &set)?;
    train(&config, None)?;
    let dir = checkpoint::find(&config.run.dir, Preferred::Last)?;
    let tensors = checkpoint::read_model(&dir)?;
    let moved: BTreeMap<&str, bool> = ["expert_0", "expert_1", "expert_2", "shared"]
        .map(|part| {
            let b = &tensors[&format!("h.1.mlp.c_fc.{part}.lora_b")];
            (part, b.abs().max().double_value(&[]) > 1e-3)
        })
        .into();
    assert!(moved.values().all(|moved| *moved), "{moved:?}");
    let base = open_base(&config)?;
    let model = load_model(&dir, &config, &base, Device::Cpu)?;
    let validation = data(&config, &base)?.validation;
    let settings = dylora::eval::EvalSettings::default;
    let loss = |source: RoutingSource| -> Result<f64> {
        Ok(dylora::eval::evaluate(&model, &validation, &source, settings(), &|_, _| ())?.loss)
    };
    let off = RoutingSource::Given(tch::Tensor::zeros([3], (tch::Kind::Float, Device::Cpu)));
    let (base, shared, all) =
        (loss(RoutingSource::Base)?, loss(off)?, loss(RoutingSource::Router)?);
    assert!(shared < base - 0.01 && all < base - 0.01, "{base}, {shared}, {all}");
    Ok(())
}
