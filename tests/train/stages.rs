//! The configs of a mixture's stages, and how much it has forgotten.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use dylora::cli::describe;
use dylora::config::{
    Config, DomainConfig, Duration, EvalRule, GrowthConfig, Mixing, OnExhausted, RoutingChoice,
    load,
};
use dylora::growth::stage_config::{
    Growth, divide_replay, grown_config, is_trainable, shrunk_config,
};
use dylora::growth::stages::{Stage, forgetting};
use dylora::lifecycle::shrink::without_use;

/// A config of three experts on two domains; the second expert has another rank than the others.
fn config(overrides: &[&str]) -> Result<Config> {
    let text = r#"
        base = { source = { path = "/base" } }
        run.dir = "/old"
        [data]
        seq_len = 128
        mixing = { temperature = 2.0 }
        on_exhausted = "end"
        [[data.domains]]
        name = "math"
        train = ["/math.jsonl"]
        weight = 3.0
        [[data.domains]]
        name = "code"
        train = ["/code.jsonl"]
        [lora]
        num_experts = 3
        rank = 8
        experts = [{}, { rank = 4 }]
        [router]
        domain_supervision = 0.0
        temperature = 0.5
        temperature_schedule = { start = 4.0, steps = 100 }
        top_k = 3
        eval = { top_k = 2 }
        [train]
        duration = { epochs = 3 }
    "#;
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    load::resolve(text, &overrides)
}

fn growth() -> Growth {
    let domain = DomainConfig {
        name: "verse".into(),
        train: vec!["/verse.jsonl".into()],
        validation: None,
        weight: 7.0,
        ..DomainConfig::default()
    };
    Growth {
        domain,
        replay: 0.25,
        steps: 50,
        seed_steps: 20,
        old_experts_rate: 0.0,
        old_columns_rate: 0.5,
        consolidation_rate: 0.2,
        run_dir: "/new".into(),
    }
}

fn trainable(config: &Config) -> Vec<bool> {
    config.lora.experts.iter().map(|expert| expert.trainable).collect()
}

#[test]
fn a_grown_config_has_one_expert_and_one_domain_more() -> Result<()> {
    let old = config(&[])?;
    let grown = grown_config(&old, 1.25, &growth())?;
    assert_eq!(grown.run.dir, PathBuf::from("/new"));
    assert_eq!(grown.lora.num_experts, 4);
    // the rate 0 freezes the old experts, while their own setting `trainable` stays as it is
    assert_eq!(trainable(&grown), [true; 3]);
    assert_eq!([0, 1, 2, 3].map(|e| is_trainable(&grown, e)), [false, false, false, true]);
    assert_eq!(grown.lora.of_expert(1).rank, 4);
    assert_eq!(grown.lora.of_expert(3).rank, 8);
    let weights: Vec<(&str, f64)> =
        grown.data.domains.iter().map(|d| (d.name.as_str(), d.weight)).collect();
    assert_eq!(weights, [("math", 0.125), ("code", 0.125), ("verse", 0.75)]);
    assert_eq!(
        (grown.data.mixing, grown.data.on_exhausted),
        (Mixing::Weights, OnExhausted::Repeat)
    );
    assert_eq!((grown.router.temperature, grown.router.temperature_schedule), (1.25, None));
    assert_eq!((grown.router.top_k, grown.router.eval), (Some(3), Some(EvalRule::TopK(2))));
    assert_eq!(grown.train.duration, Duration::Steps(50));
    let expected = GrowthConfig {
        domain: "verse".into(),
        old_experts_rate: 0.0,
        old_columns_rate: 0.5,
        seed_steps: 20,
        seed_router_coef: 1.0,
        column_learning_rate: 3e-4,
        consolidation_rate: 0.2,
    };
    assert_eq!(grown.growth, Some(expected));
    // other sections do not change
    assert_eq!((&grown.base, &grown.optimizer), (&old.base, &old.optimizer));
    Ok(())
}

#[test]
fn old_experts_with_a_rate_are_trainable_even_if_an_earlier_stage_froze_them() -> Result<()> {
    let frozen = grown_config(&config(&[])?, 1.0, &growth())?;
    let mut next = Growth { old_experts_rate: 0.1, replay: 0.0, ..growth() };
    next.domain.name = "sums".into();
    let grown = grown_config(&frozen, 1.0, &next)?;
    assert_eq!([0, 1, 2, 3, 4].map(|e| is_trainable(&grown, e)), [true; 5]);
    // without replay, the old domains are only evaluated
    let weights: Vec<f64> = grown.data.domains.iter().map(|domain| domain.weight).collect();
    assert_eq!(weights, [0.0, 0.0, 0.0, 1.0]);
    Ok(())
}

#[test]
fn a_grown_config_reads_back_as_itself() -> Result<()> {
    let grown = grown_config(&config(&[])?, 1.25, &growth())?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("config.toml");
    let text = load::to_toml(&grown);
    assert!(text.contains("\n[growth]\ndomain = \"verse\"\n"), "{text}");
    fs_err::write(&file, text)?;
    assert_eq!(load::load(&file, &[])?, grown);
    assert!(!load::to_toml(&config(&[])?).contains("growth"));
    Ok(())
}

#[test]
fn faults_of_growth_are_reported_with_their_paths() -> Result<()> {
    let mut grown = grown_config(&config(&["router.top_k=1"])?, 1.0, &growth())?;
    (grown.lora.num_experts, grown.router.eval) = (1, None);
    grown.lora.experts.truncate(1);
    grown.train.routing = RoutingChoice::Uniform;
    grown.growth = Some(GrowthConfig {
        domain: "prose".into(),
        old_experts_rate: -1.0,
        old_columns_rate: f64::NAN,
        seed_steps: 0,
        seed_router_coef: f64::INFINITY,
        column_learning_rate: -1.0,
        consolidation_rate: 0.0,
    });
    insta::assert_snapshot!(describe(&load::validate(&grown).unwrap_err()), @r"
    `growth.domain` must name one of `data.domains`, got `prose`
    `growth.seed_steps` must be at least 1, got 0
    `lora.num_experts` needs an old and a new expert, got 1
    `growth.old_experts_rate` must be a number of at least 0, got -1
    `growth.old_columns_rate` must be a number of at least 0, got NaN
    `growth.seed_router_coef` must be a number of at least 0, got inf
    `growth.consolidation_rate` must be a number above 0, got 0
    `growth.column_learning_rate` must be a number above 0, got -1
    `train.routing` must be `router` where an expert is added, got `uniform`
    ");
    Ok(())
}

#[test]
fn what_cannot_grow_says_why() -> Result<()> {
    let refused = |overrides: &[&str], growth: Growth| -> Result<String> {
        Ok(describe(&grown_config(&config(overrides)?, 1.0, &growth).unwrap_err()))
    };
    let mut known = growth();
    known.domain.name = "code".into();
    let messages = [
        refused(&["method=full"], growth())?,
        refused(&["lora.num_experts=3", "lora.experts_per_layer=[3, 2]"], growth())?,
        refused(&["train.routing=uniform"], growth())?,
        refused(&[], known)?,
    ];
    insta::assert_snapshot!(messages.join("\n"), @r"
    a base that was trained in full has no experts
    experts are not added to or taken from a mixture with `lora.experts_per_layer`
    the mixture was trained with weights by `uniform`, not by a router
    the mixture has a domain `code` already
    ");
    Ok(())
}

fn shrunk(overrides: &[&str], expert: usize) -> Result<Config> {
    shrunk_config(&config(overrides)?, 1.25, expert, None, "/new".into())
}

#[test]
fn a_shrunk_config_has_one_expert_less_and_rules_that_fit() -> Result<()> {
    let old = config(&[])?;
    let without = shrunk(&[], 0)?;
    assert_eq!(without.run.dir, PathBuf::from("/new"));
    assert_eq!((without.lora.num_experts, without.lora.of_expert(0).rank), (2, 4));
    assert_eq!((without.router.top_k, without.router.eval), (Some(2), Some(EvalRule::TopK(2))));
    assert_eq!((without.router.temperature, without.router.temperature_schedule), (1.25, None));
    assert_eq!((&without.data, &without.train), (&old.data, &old.train));
    // an expert that is not listed in `lora.experts` has the common settings
    let without = shrunk(&[], 2)?;
    assert_eq!([0, 1].map(|expert| without.lora.of_expert(expert).rank), [8, 4]);
    let last = shrunk_config(&without, 1.0, 0, None, "/new".into())?;
    assert_eq!((last.router.top_k, last.router.eval), (Some(1), Some(EvalRule::TopK(1))));
    Ok(())
}

#[test]
fn the_experts_of_domains_follow_their_numbers() -> Result<()> {
    let names = |experts: [&str; 3]| {
        let domain = |(name, of): (&str, &str)| {
            format!("{{name=\"{name}\", train=[\"/{name}\"], expert={of}}}")
        };
        let domains: Vec<String> = ["a", "b", "c"].into_iter().zip(experts).map(domain).collect();
        format!("data.domains=[{}]", domains.join(", "))
    };
    let domains = names(["[0, 1]", "[2, 3]", "4"]);
    let old = config(&["lora.num_experts=5", &domains])?;
    let of = |expert, merged_into| -> Result<Vec<Vec<i64>>> {
        let shrunk = shrunk_config(&old, 1.0, expert, merged_into, "/new".into())?;
        let experts = shrunk.data.domains.iter().map(|domain| domain.expert.as_ref());
        Ok(experts.map(|of| of.expect("it has experts").experts().to_vec()).collect())
    };
    // removed: one of two, and the only one of a domain, which is then free to choose
    assert_eq!(of(0, None)?, [vec![0], vec![1, 2], vec![3]]);
    assert_eq!(of(3, None)?, [vec![0, 1], vec![2], vec![3]]);
    assert_eq!(of(4, None)?, [vec![0, 1], vec![2, 3], vec![0, 1, 2, 3]]);
    // merged: two of a domain, two of different domains, and the only one of a domain
    assert_eq!(of(1, Some(0))?, [vec![0], vec![1, 2], vec![3]]);
    assert_eq!(of(2, Some(1))?, [vec![0, 1], vec![1, 2], vec![3]]);
    assert_eq!(of(4, Some(3))?, [vec![0, 1], vec![2, 3], vec![3]]);
    Ok(())
}

#[test]
fn a_merge_is_useless_only_if_a_removal_is_better() {
    let message = |without| without_use([1, 3], 0.8, without);
    assert_eq!(message([0.9, 0.8]), None);
    // less than a hundredth better
    assert_eq!(message([0.9, 0.795]), None);
    insta::assert_snapshot!(message([0.7, 0.79]).expect("a removal is better"), @"
    merging expert_1 and expert_3 brings nothing: the mean loss would be 0.8000, and without \
    expert_1 instead it is 0.7000
    hint: name experts that are more alike with `--experts A,B`, or use `remove-expert --expert 1`
    ");
}

#[test]
fn routing_by_one_expert_follows_its_number() -> Result<()> {
    assert_eq!(shrunk(&["train.routing=expert:2"], 0)?.train.routing, RoutingChoice::Expert(1));
    assert_eq!(shrunk(&["train.routing=expert:1"], 2)?.train.routing, RoutingChoice::Expert(1));
    assert_eq!(shrunk(&["train.routing=all"], 2)?.train.routing, RoutingChoice::All);
    Ok(())
}

#[test]
fn domains_like_the_new_one_are_replayed_more() -> Result<()> {
    let old = config(&["data.domains=[{name=\"a\",train=[\"/a\"]},{name=\"b\",train=[\"/b\"]},\
                        {name=\"c\",train=[\"/c\"]}]"])?;
    let mut grown = grown_config(&old, 1.0, &Growth { replay: 0.4, ..growth() })?;
    let cosine = |name: &str| match name {
        "a" => 0.5,
        "b" => -0.7,
        _ => 0.0,
    };
    let weights = |config: &Config| -> Vec<f64> {
        config.data.domains.iter().map(|domain| domain.weight).collect()
    };
    let even = weights(&grown);
    divide_replay(&mut grown, &cosine);
    let expected = [0.2, 0.1, 0.1, 0.6];
    let close = |found: &[f64], expected: &[f64]| {
        found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12)
    };
    assert!(close(&weights(&grown), &expected), "{:?}", weights(&grown));
    // weights that differ were set by the user
    divide_replay(&mut grown, &|_| 0.0);
    assert!(close(&weights(&grown), &expected), "{:?}", weights(&grown));
    // among domains that are all like the new one or all unlike it, it stays even
    for c in [-0.2, 0.0, 0.9] {
        let mut same = grown_config(&old, 1.0, &Growth { replay: 0.4, ..growth() })?;
        divide_replay(&mut same, &|_| c);
        assert!(close(&weights(&same), &even), "{:?}", weights(&same));
    }
    // without replay, no domain gets any
    let mut none = grown_config(&old, 1.0, &Growth { replay: 0.0, ..growth() })?;
    divide_replay(&mut none, &cosine);
    assert_eq!(weights(&none), [0.0, 0.0, 0.0, 1.0]);
    Ok(())
}

/// Otherwise the checkpoint's config could train nothing, and could not be read again.
#[test]
fn experts_that_were_frozen_for_a_new_one_are_trainable_after_its_removal() -> Result<()> {
    let grown = grown_config(&config(&[])?, 1.0, &growth())?;
    let mut shrunk = shrunk_config(&grown, 1.0, 3, None, "/new".into())?;
    assert_eq!((trainable(&shrunk), &shrunk.growth), (vec![true; 3], &None));
    for _ in 0..2 {
        shrunk.lora.experts[0].trainable = false;
        shrunk = shrunk_config(&shrunk, 1.0, 1, None, "/new".into())?;
        load::validate(&shrunk)?;
    }
    assert_eq!((shrunk.lora.num_experts, trainable(&shrunk)), (1, vec![true]));
    Ok(())
}

#[test]
fn what_cannot_shrink_says_why() -> Result<()> {
    let refused = |overrides: &[&str]| -> Result<String> {
        Ok(describe(&shrunk_config(&config(overrides)?, 1.0, 1, None, "/new".into()).unwrap_err()))
    };
    let messages = [
        refused(&["method=full"])?,
        refused(&["lora.experts_per_layer=[3, 2]"])?,
        refused(&["train.routing=expert:1"])?,
        refused(&["train.routing=record"])?,
    ];
    insta::assert_snapshot!(messages.join("\n"), @r"
    a base that was trained in full has no experts
    experts are not added to or taken from a mixture with `lora.experts_per_layer`
    the mixture is routed to `expert:1` alone, which is to go
    the mixture is routed by `record`, and records name experts by number
    ");
    Ok(())
}

fn stage(name: &str, learned: &[&str], losses: &[(&str, f64)]) -> Stage {
    let learned = learned.iter().map(|name| (*name).to_owned()).collect();
    let losses = losses.iter().map(|(name, loss)| ((*name).to_owned(), *loss));
    Stage { losses: losses.collect(), ..Stage::new(name, learned, 2) }
}

#[test]
fn forgetting_is_the_loss_now_less_that_after_the_stage_it_was_learned_in() {
    assert_eq!(forgetting(&[]), BTreeMap::new());
    let mut stages = vec![
        // `verse` is measured before it is learned
        stage(
            "train",
            &["math", "code", "unseen"],
            &[("math", 2.0), ("code", 1.5), ("verse", 5.0)],
        ),
        stage("add verse", &["verse"], &[("math", 2.5), ("code", 1.25), ("verse", 3.0)]),
    ];
    let of = |stages: &[Stage]| forgetting(stages).into_iter().collect::<Vec<_>>();
    let expected = [("code", -0.25), ("math", 0.5), ("verse", 0.0)];
    assert_eq!(of(&stages), expected.map(|(name, rise)| (name.to_owned(), rise)));
    // the loss is compared with the stage in which the domain was learned, not with the one before
    stages.push(stage("remove expert_0", &[], &[("math", 4.0), ("verse", 3.125), ("other", 1.0)]));
    let expected = [("math", 2.0), ("verse", 0.125)];
    assert_eq!(of(&stages), expected.map(|(name, rise)| (name.to_owned(), rise)));
    // after a stage without an evaluation, nothing is known about forgetting
    stages.push(stage("add x", &["x"], &[]));
    assert_eq!(of(&stages), []);
}
