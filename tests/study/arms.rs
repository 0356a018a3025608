//! The configs of a study's arms.

use dylora::config::load::{resolve, to_toml, validate};
use dylora::config::{
    Capacity, Config, DOMAIN_SUPERVISION, DomainExperts, Duration, LoraScale, Method, RouterInit,
    RoutingChoice,
};
use dylora::study::arms::{Arm, check, check_arms, on_one_domain};

const MIXTURE: &str = r#"
    [run]
    dir = "/runs/a"
    [base]
    source = { path = "/base" }
    [data]
    seq_len = 64
    [[data.domains]]
    name = "math"
    train = ["/math.jsonl"]
    validation = { fraction = 0.1 }
    [[data.domains]]
    name = "code"
    train = ["/code.jsonl"]
    validation = { fraction = 0.1 }
    [lora]
    num_experts = 4
    rank = 8
    alpha = 16.0
    shared_rank = 3
    [train]
    duration = { steps = 100 }
    eval_every_steps = 50
"#;

pub(crate) fn mixture(overrides: &[&str]) -> Config {
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    resolve(MIXTURE, &overrides).expect("the config is valid")
}

/// The arm's config, which must be valid and stay as it is when it is written and read.
fn config(arm: Arm, mixture: &Config) -> Config {
    let config = arm.config(mixture);
    validate(&config).expect("an arm's config is valid");
    assert_eq!(resolve(&to_toml(&config), &[]).expect("it can be read"), config, "{arm}");
    config
}

const EVERY: [Arm; 9] = [
    Arm::Single,
    Arm::SingleActive,
    Arm::Uniform,
    Arm::Random,
    Arm::Learned,
    Arm::Supervised,
    Arm::Oracle,
    Arm::PerDomain,
    Arm::Full,
];

#[test]
fn single_loras_have_the_total_and_the_active_rank_at_the_same_scaling() {
    for (overrides, total, active) in [
        (&[][..], 35, 11),
        (&["lora.shared_rank=0"], 32, 8),
        (&["router.top_k=2"], 35, 19),
        (&["lora.capacity=by_domain"], 35, 11),
    ] {
        let mixture = mixture(overrides);
        for (arm, rank) in [(Arm::Single, total), (Arm::SingleActive, active), (Arm::PerDomain, 8)]
        {
            let lora = config(arm, &mixture).lora;
            assert_eq!((lora.rank, lora.num_experts, lora.shared_rank), (rank, 1, 0));
            assert!((lora.alpha / lora.rank as f64 - 2.0).abs() < 1e-12, "{arm}");
            assert_eq!(lora.capacity, Capacity::Even);
        }
    }
    let lora = config(Arm::Single, &mixture(&["lora.use_rslora=true"])).lora;
    let scaling = lora.alpha / (lora.rank as f64).sqrt();
    assert!((scaling - 16.0 / 8.0_f64.sqrt()).abs() < 1e-12);
}

#[test]
fn every_arm_keeps_the_data_the_steps_and_the_batches() {
    let mixture = mixture(&["data.mixing=interleaved"]);
    for arm in EVERY {
        let config = config(arm, &mixture);
        let mut data = config.data.clone();
        data.domains.iter_mut().for_each(|domain| domain.expert = None);
        assert_eq!(data, mixture.data, "{arm}");
        assert_eq!(config.train.duration, mixture.train.duration);
        assert_eq!(config.optimizer, mixture.optimizer);
        assert_eq!(config.method == Method::Full, arm == Arm::Full);
    }
}

#[test]
fn the_arms_of_a_mixture_differ_in_what_decides() {
    let named = ["data.domains=[{name=\"a\",train=[\"/a\"],validation={fraction=0.1},expert=1},\
                  {name=\"b\",train=[\"/b\"],validation={fraction=0.1},expert=[0,2,3]}]"];
    let losses = ["router.load_balancing_coef=0.1", "lora.capacity=by_domain"];
    let mixture = mixture(&[&named[..], &losses[..]].concat());
    for (arm, routing, coef, balance, trainable, capacity) in [
        (Arm::Uniform, RoutingChoice::Uniform, 0.0, 0.0, true, Capacity::Even),
        (Arm::Random, RoutingChoice::Router, 0.0, 0.0, false, Capacity::Even),
        (Arm::Learned, RoutingChoice::Router, 0.0, 0.1, true, Capacity::Even),
        (Arm::Supervised, RoutingChoice::Router, 0.1, 0.1, true, Capacity::ByDomain),
        (Arm::Oracle, RoutingChoice::Domain, 0.0, 0.0, true, Capacity::ByDomain),
    ] {
        let config = config(arm, &mixture);
        assert_eq!((config.train.routing, config.lora.num_experts), (routing, 4), "{arm}");
        let router = &config.router;
        assert_eq!(router.domain_supervision, Some(coef), "{arm}");
        assert_eq!((router.load_balancing_coef, router.trainable), (balance, trainable));
        assert_eq!((config.lora.capacity, config.lora.rank), (capacity, 8), "{arm}");
        let expert = Some(DomainExperts::One(1)).filter(|_| capacity == Capacity::ByDomain);
        assert_eq!(config.data.domains[0].expert, expert, "{arm}");
    }
    // a supervised arm has the config's coefficient, or the default
    let coef = |coef: &str| {
        let mixture = crate::arms::mixture(&[&format!("router.domain_supervision={coef}")]);
        config(Arm::Supervised, &mixture).router.domain_supervision
    };
    assert_eq!((coef("0.3"), coef("0.0")), (Some(0.3), Some(DOMAIN_SUPERVISION)));
}

#[test]
fn settings_of_the_router_that_an_arm_cannot_have_are_left_out() {
    let mixture = mixture(&[
        "router.top_k=2",
        "router.hybrid={tokens=100}",
        "router.eval=dense",
        "router.balance_bias_rate=0.01",
        "router.init=zero",
        "lora.scale=per_expert",
        "lora.orthogonality={a=0.1}",
    ]);
    for arm in EVERY.into_iter().filter(|arm| *arm != Arm::Learned) {
        assert_eq!(config(arm, &mixture).lora.scale, LoraScale::PerExpert, "{arm}");
    }
    assert_eq!(config(Arm::Random, &mixture).router.init, RouterInit::Normal);
    // a router that starts at zero chooses the same experts for ever without supervision
    let fault = check_arms(&mixture, &EVERY).expect_err("it is refused");
    assert_eq!(fault.to_string(), "in the arm `learned`");
}

#[test]
fn rates_are_those_of_what_is_trained() {
    let mixture = mixture(&[]);
    for arm in EVERY {
        let mut config = arm.config(&mixture);
        let before = (config.optimizer.adapters.learning_rate, config.optimizer.base);
        arm.scale_rate(&mut config, 2.0);
        let (adapters, base) = match arm {
            Arm::Full => (1.0, 2.0),
            _ => (2.0, 1.0),
        };
        assert_eq!(config.optimizer.adapters.learning_rate, adapters * before.0);
        assert_eq!(config.optimizer.base.learning_rate, base * before.1.learning_rate);
        assert_eq!(arm.rate(&config), 2.0 * arm.rate(&arm.config(&mixture)));
        assert_eq!(config.optimizer.router, mixture.optimizer.router);
    }
}

#[test]
fn a_domain_alone_has_its_share_of_the_steps() {
    let mixture = mixture(&["schedule.warmup_steps=20", "data.mixing=interleaved"]);
    let mut config = Arm::PerDomain.config(&mixture);
    on_one_domain(&mut config, 1, 100, 0.25);
    validate(&config).expect("it is valid");
    assert_eq!(config.data.domains.len(), 1);
    assert_eq!(config.data.domains[0].name, "code");
    assert_eq!(config.train.duration, Duration::Steps(25));
    assert_eq!(config.schedule.warmup_steps, Some(5));
    assert_eq!(config.train.eval_every_steps, Some(13));
}

#[test]
fn a_config_of_which_no_study_can_be_made_is_refused_by_name() {
    let said =
        |overrides: &[&str]| check(&mixture(overrides)).expect_err("it is refused").to_string();
    check(&mixture(&[])).expect("it is accepted");
    insta::assert_snapshot!(said(&[
        "lora.experts=[{rank=4}]",
        "lora.rank_pattern={c_attn=4}",
        "lora.alpha_pattern={c_attn=4}",
        "router.domain_supervision=0",
        "router.trainable=false",
        "router.source=/router",
    ]), @"
    `lora.experts` does not go with a study, whose single LoRAs have one rank and one alpha
    `lora.rank_pattern` does not go with a study, whose single LoRAs have one rank and one alpha
    `lora.alpha_pattern` does not go with a study, whose single LoRAs have one rank and one alpha
    `router.source` does not go with a study, whose arms all start anew
    `router.trainable` must be true for a study: the arm `random` has a frozen router
    ");
    insta::assert_snapshot!(
        said(&["train.routing=uniform"]),
        @"`train.routing` must be `router` for a study, whose arms set it, got `uniform`"
    );
    insta::assert_snapshot!(
        said(&["lora.num_experts=1"]),
        @"`lora.num_experts` must be at least 2 for a study, got 1"
    );
    insta::assert_snapshot!(
        said(&["method=full"]),
        @"`method` must be `routed_lora`: the arm `full` is the full fine-tune"
    );
    let layers = said(&["lora.experts_per_layer=[2,4]"]);
    assert!(layers.starts_with("`lora.experts_per_layer` does not go with a study"), "{layers}");
    let one = "data.domains=[{name=\"a\",train=[\"/a\"]}]";
    insta::assert_snapshot!(said(&[one]), @"
    `data.domains` must have at least 2 domains for a study, got 1
    `data.domains[0].validation` is needed for a study: rates are chosen on one half of it, and \
    losses are reported on the other
    ");
    let evaluated = "data.domains=[{name=\"a\",train=[\"/a\"],weight=0,\
                     validation={fraction=0.1}},\
                     {name=\"b\",train=[\"/b\"],validation={fraction=0.1}}]";
    insta::assert_snapshot!(
        said(&[evaluated]),
        @"`data.domains[0].weight` must be above 0 for a study, whose arms are compared where \
          they are trained"
    );
}
