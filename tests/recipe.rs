//! The defaults of new configs, what configs of former runs still mean, which of the new settings
//! do not go together, and what `lora.scale` makes of alpha.

mod common;

use std::collections::BTreeMap;

use anyhow::Result;
use dylora::cli::describe;
use dylora::config::{
    Capacity, Config, Duration, ExpertConfig, GroupConfig, GrowthConfig, LoraScale, LossOn,
    RouterInit, RouterInput, RouterScope, ScheduleKind, load,
};
use dylora::data::{Batch, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::routing::router::RouterSpec;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use dylora::train::graph::Capture;
use dylora::train::optim::Optimizer;
use dylora::train::step::{Stepper, gradients};
use tch::{Device, Kind, Tensor};

use common::{assert_close, logits, seed, tiny_base, tiny_config, two_rows};

/// A config with two domains and nothing else that could be left out.
const NEW: &str = r#"
[base]
source = { path = "/base" }
[data]
seq_len = 12
[[data.domains]]
name = "law"
train = ["/law.jsonl"]
[[data.domains]]
name = "verse"
train = ["/verse.jsonl"]
"#;

/// The config that a run of dylora saved before `lora.scale` existed, with the defaults of then.
const FORMER: &str = r#"
method = "routed_lora"

[run]
dir = "/runs/former"
seed = 0
device = "auto"
tensorboard = true

[base]
dtype = "f32"

[base.source]
path = "/base"

[data]
seq_len = 16
loss_on = "completion"
on_bad_record = "fail"
mixing = "proportional"
on_exhausted = "repeat"

[[data.domains]]
name = "law"
train = ["/law.jsonl"]
weight = 1.0

[[data.domains]]
name = "verse"
train = ["/verse.jsonl"]
weight = 1.0

[data.domains.validation]
files = ["/verse.validation.jsonl"]

[lora]
num_experts = 4
rank = 8
alpha = 16.0
target_modules = ["all-linear"]
use_rslora = false
use_dora = false
init = "default"
dropout = 0.0
dropout_masks = "shared"

[router]
input = "embeddings"
scope = "shared"
level = "token"
hidden_layers = 0
hidden_width = 64
temperature = 1.0
renormalize = true
noise = "none"
load_balancing_coef = 0.0
uniform_mse_coef = 0.0
z_loss_coef = 0.0
entropy_coef = 0.0
balance_bias_rate = 0.0
window_steps = 50
on_collapse = "warn"
collapse_share = 0.9
dead_share = 0.05

[train]
routing = "router"
micro_batch_size = 8
grad_accum_steps = 1
label_smoothing = 0.0
gradient_checkpointing = false
kernels = "auto"
loss_chunk_tokens = 1024
keep_last = 2
save_dtype = "f32"

[train.duration]
epochs = 1

[optimizer]
betas = [0.9, 0.999]
eps = 0.00000001

[optimizer.adapters]
learning_rate = 0.001
weight_decay = 0.0

[optimizer.router]
learning_rate = 0.001
weight_decay = 0.0

[optimizer.base]
learning_rate = 0.0006
weight_decay = 0.1

[schedule]
kind = "constant"
warmup_steps = 0
min_ratio = 0.0
"#;

fn owned(set: &[&str]) -> Vec<String> {
    set.iter().map(|item| (*item).to_owned()).collect()
}

fn new(set: &[&str]) -> Result<Config> {
    load::resolve(NEW, &owned(set))
}

fn refusal(set: &[&str]) -> String {
    describe(&new(set).expect_err("it is refused"))
}

#[test]
fn a_new_config_has_the_defaults_of_the_recipe() -> Result<()> {
    let config = new(&[])?;
    let Config { lora, router, optimizer, schedule, train, .. } = &config;
    assert_eq!((lora.scale, lora.shared_rank), (LoraScale::Mixture, 0));
    assert_eq!((lora.capacity, lora.num_experts), (Capacity::Even, 4));
    assert_eq!((router.input, router.scope), (RouterInput::LayerInput, RouterScope::Layer));
    assert!(router.normalize_input && router.detach_input);
    assert_eq!((router.init, router.domain_supervision), (RouterInit::Normal, Some(0.1)));
    assert_eq!(
        (optimizer.adapters, optimizer.router),
        (GroupConfig::at(1.5e-3), GroupConfig::at(1e-3))
    );
    assert_eq!(optimizer.max_grad_norm, 1.0);
    assert_eq!((schedule.kind, schedule.warmup_steps), (ScheduleKind::Cosine, None));
    assert_eq!((schedule.min_ratio, train.duration), (0.1, Duration::Auto));
    // a run saves what it has filled in, and reads it back
    let saved = load::to_toml(&config);
    assert!(saved.contains("domain_supervision = 0.1\n"), "{saved}");
    assert_eq!(load::resolve(&saved, &[])?, config);
    Ok(())
}

/// With one domain there is nothing to tell apart, and without a router nothing to supervise.
#[test]
fn a_group_keeps_the_defaults_of_what_it_does_not_set() -> Result<()> {
    let set = ["optimizer.router.max_grad_norm=0.5", "optimizer.adapters={weight_decay=0.01}"];
    let optimizer = new(&[&set[..], &["optimizer.base={learning_rate=1e-4}"]].concat())?.optimizer;
    let expected = GroupConfig { max_grad_norm: Some(0.5), ..GroupConfig::at(1e-3) };
    assert_eq!(optimizer.router, expected);
    let expected = GroupConfig { weight_decay: 0.01, ..GroupConfig::at(1.5e-3) };
    assert_eq!(optimizer.adapters, expected);
    assert_eq!(optimizer.base, GroupConfig { weight_decay: 0.1, ..GroupConfig::at(1e-4) });
    Ok(())
}

#[test]
fn supervision_is_on_by_default_where_several_domains_are_trained_by_a_router() -> Result<()> {
    let supervision = |text: &str, set: &[&str]| -> Result<Option<f64>> {
        Ok(load::resolve(text, &owned(set))?.router.domain_supervision)
    };
    assert_eq!(supervision(NEW, &[])?, Some(0.1));
    assert_eq!(supervision(NEW, &["router.domain_supervision=0.3"])?, Some(0.3));
    assert_eq!(supervision(NEW, &["router.top_k=2"])?, Some(0.1));
    let (one, _) = NEW.rsplit_once("[[data.domains]]").expect("there are two");
    let evaluated = format!("{NEW}weight = 0.0\n");
    for text in [one, &evaluated] {
        assert_eq!(supervision(text, &[])?, Some(0.0), "{text}");
        // it may be asked for all the same
        assert_eq!(supervision(text, &["router.domain_supervision=0.3"])?, Some(0.3));
    }
    for without in [
        "router.domain_supervision=0",
        "lora.num_experts=1",
        "train.routing=uniform",
        "train.routing=domain",
        "train.routing=expert:1",
        "lora.experts_per_layer=[2, 4]",
        "method=full",
    ] {
        assert_eq!(supervision(NEW, &[without])?, Some(0.0), "{without}");
    }
    Ok(())
}

#[test]
fn a_config_that_a_former_run_saved_means_what_it_meant() -> Result<()> {
    let config = load::resolve(FORMER, &[])?;
    let Config { lora, router, optimizer, schedule, train, .. } = &config;
    assert_eq!((lora.scale, lora.shared_rank), (LoraScale::PerExpert, 0));
    assert_eq!(lora.capacity, Capacity::Even);
    assert_eq!((router.input, router.scope), (RouterInput::Embeddings, RouterScope::Shared));
    assert!(!router.normalize_input && !router.detach_input);
    assert_eq!((router.init, router.domain_supervision), (RouterInit::Normal, Some(0.0)));
    assert_eq!(optimizer.max_grad_norm, 0.0);
    assert_eq!(
        (optimizer.adapters, optimizer.router),
        (GroupConfig::at(1e-3), GroupConfig::at(1e-3))
    );
    assert_eq!((schedule.kind, schedule.warmup_steps), (ScheduleKind::Constant, Some(0)));
    assert_eq!((schedule.min_ratio, train.duration), (0.0, Duration::Epochs(1)));
    // what it says is kept in the form of now
    let saved = load::to_toml(&config);
    for line in [
        "scale = \"per_expert\"\n",
        "normalize_input = false\n",
        "detach_input = false\n",
        "domain_supervision = 0.0\n",
        "max_grad_norm = 0.0\n",
    ] {
        assert!(saved.contains(line), "{line} is not in {saved}");
    }
    assert_eq!(load::resolve(&saved, &[])?, config);
    Ok(())
}

#[test]
fn overrides_and_keys_that_a_former_config_has_win() -> Result<()> {
    let with_limit = FORMER.replace("eps = 0.00000001", "eps = 0.00000001\nmax_grad_norm = 0.5");
    let config = load::resolve(&with_limit, &owned(&["router.top_k=2"]))?;
    assert_eq!((config.optimizer.max_grad_norm, config.router.top_k), (0.5, Some(2)));
    assert_eq!((config.lora.scale, config.router.detach_input), (LoraScale::PerExpert, false));
    let set =
        ["lora.scale=mixture", "router.normalize_input=true", "router.domain_supervision=0.2"];
    let config = load::resolve(FORMER, &owned(&set))?;
    assert_eq!((config.lora.scale, config.router.normalize_input), (LoraScale::Mixture, true));
    assert_eq!(config.router.domain_supervision, Some(0.2));
    assert_eq!((config.router.detach_input, config.optimizer.max_grad_norm), (false, 0.0));
    // a fault is reported with its line in the file that was read
    let fault = FORMER.replace("on_collapse = \"warn\"", "on_collapse = \"ignore\"");
    let fault = describe(&load::resolve(&fault, &[]).expect_err("it is refused"));
    assert!(fault.contains("on_collapse = \"ignore\""), "{fault}");
    assert!(
        fault.contains("line 62: `router.on_collapse` must be `\"warn\"` or `\"stop\"`"),
        "{fault}"
    );
    Ok(())
}

/// A config that a person has written lacks some key that every saved one has.
#[test]
fn a_written_config_is_never_taken_for_a_saved_one() -> Result<()> {
    for key in ["tensorboard = true\n", "dropout_masks = \"shared\"\n", "device = \"auto\"\n"] {
        let config = load::resolve(&FORMER.replace(key, ""), &[])?;
        assert_eq!(config.lora.scale, LoraScale::Mixture, "{key}");
        assert!(config.router.normalize_input && config.router.detach_input, "{key}");
        assert_eq!(
            (config.router.domain_supervision, config.optimizer.max_grad_norm),
            (Some(0.1), 1.0)
        );
    }
    let saved_now = load::to_toml(&new(&[])?);
    assert_eq!(load::resolve(&saved_now, &[])?.lora.scale, LoraScale::Mixture);
    Ok(())
}

#[test]
fn supervision_is_refused_where_no_router_decides_for_all_experts() {
    let with = |set: &str| refusal(&["router.domain_supervision=0.5", set]);
    let refused = [
        with("lora.experts_per_layer=[2, 4]"),
        with("train.routing=uniform"),
        with("train.routing=record"),
        with("lora.num_experts=1"),
        with("method=full"),
        with("router.domain_supervision=-0.1"),
    ];
    insta::assert_snapshot!(refused.join("\n"), @"
    `router.domain_supervision` must be 0 where layers have experts of their own, by \
    `lora.experts_per_layer`, got 0.5
    `router.domain_supervision` must be 0 where the router does not decide, got 0.5
    `router.domain_supervision` must be 0 where the router does not decide, got 0.5
    `router.domain_supervision` must be 0 where there is no router, got 0.5
    `router.domain_supervision` must be 0 where there is no router, got 0.5
    `router.domain_supervision` must be a number of at least 0, got -0.1
    ");
}

#[test]
fn an_even_start_does_not_go_with_top_k_unless_it_is_supervised() -> Result<()> {
    insta::assert_snapshot!(
        refusal(&["router.init=zero", "router.top_k=2", "router.domain_supervision=0"]),
        @"`router.init` gives all experts the same score, of which `router.top_k` always takes the \
          first; it needs `router.domain_supervision`"
    );
    for set in [
        &["router.init=zero", "router.top_k=2"][..],
        &["router.init=zero", "router.domain_supervision=0"],
        &["router.init=zero", "router.top_k=4", "router.domain_supervision=0"],
    ] {
        assert_eq!(new(set)?.router.init, RouterInit::Zero, "{set:?}");
    }
    Ok(())
}

#[test]
fn the_input_of_modules_needs_routers_of_modules_and_no_checkpointing() -> Result<()> {
    let input = "router.input=module_input";
    insta::assert_snapshot!(refusal(&[input]),
        @"`router.scope` must be `module` with `router.input = \"module_input\"`");
    insta::assert_snapshot!(
        refusal(&[input, "router.scope=shared", "train.gradient_checkpointing=true"]),
        @r#"
        `router.scope` must be `module` with `router.input = "module_input"`
        `train.gradient_checkpointing` does not go with `router.input = "module_input"`
        "#
    );
    insta::assert_snapshot!(
        refusal(&[input, "router.scope=module", "train.gradient_checkpointing=true"]),
        @"`train.gradient_checkpointing` does not go with `router.input = \"module_input\"`"
    );
    assert_eq!(new(&[input, "router.scope=module"])?.router.input, RouterInput::ModuleInput);
    Ok(())
}

/// [`NEW`] with experts of its domains; a domain without gets no key.
fn with_experts(law: &str, verse: &str) -> String {
    let key = |experts: &str| match experts {
        "" => String::new(),
        experts => format!("expert = {experts}\n"),
    };
    let law = format!("train = [\"/law.jsonl\"]\n{}", key(law));
    NEW.replace("train = [\"/law.jsonl\"]\n", &law) + &key(verse)
}

#[test]
fn faults_of_the_experts_of_domains_name_the_domain() -> Result<()> {
    let refused = |law: &str, verse: &str| {
        describe(&load::resolve(&with_experts(law, verse), &[]).expect_err("it is refused"))
    };
    insta::assert_snapshot!(refused("4", "-1"), @"
    `data.domains[0].expert` must be at least 0 and below `lora.num_experts` 4, got 4
    `data.domains[1].expert` must be at least 0 and below `lora.num_experts` 4, got -1
    ");
    insta::assert_snapshot!(refused("[0, 1, 0]", "[]"), @"
    `data.domains[0].expert` names expert 0 twice
    `data.domains[1].expert` must name at least one expert, got none
    ");
    insta::assert_snapshot!(refused("", "[1, 5]"), @"
    `data.domains[1].expert` must be at least 0 and below `lora.num_experts` 4, got 5
    `data.domains[0].expert` is missing, while other trained domains have it
    ");
    insta::assert_snapshot!(refused("\"law\"", "1"), @r#"
    line 9: `data.domains[0].expert` must be an integer or a list of integers, got `"law"`
      |
    9 | expert = "law"
      |          ^^^^^
    "#);
    let config = load::resolve(&with_experts("[3, 1]", "3"), &[])?;
    let experts: Vec<&[i64]> = config
        .data
        .domains
        .iter()
        .map(|domain| domain.expert.as_ref().expect("it has some").experts())
        .collect();
    assert_eq!(experts, [&[3, 1][..], &[3]]);
    // a domain that is only evaluated needs no expert, and may have one all the same
    for (law, verse) in [("1", ""), ("", "2"), ("1", "2")] {
        load::resolve(&(with_experts(law, verse) + "weight = 0.0\n"), &[])?;
    }
    assert_eq!(load::resolve(&load::to_toml(&config), &[])?, config);
    Ok(())
}

#[test]
fn ranks_by_domain_need_experts_of_domains_and_nothing_else_that_sets_ranks() -> Result<()> {
    let with = |set: &[&str]| refusal(&[&["lora.capacity=by_domain"], set].concat());
    insta::assert_snapshot!(with(&["router.domain_supervision=0"]), @"
    `lora.capacity` `by_domain` needs experts that belong to domains: \
    `router.domain_supervision`, `train.routing = \"domain\"` or `data.domains[].expert`
    ");
    insta::assert_snapshot!(with(&["lora.experts_per_layer=[2, 4]"]), @"
    `lora.capacity` `by_domain` needs experts that belong to domains: \
    `router.domain_supervision`, `train.routing = \"domain\"` or `data.domains[].expert`
    `lora.capacity` `by_domain` does not go with `lora.experts_per_layer`
    ");
    insta::assert_snapshot!(with(&["lora.experts=[{rank=4}]"]), 
        @"`lora.capacity` `by_domain` sets the ranks, and so does `lora.experts`");
    insta::assert_snapshot!(with(&["lora.experts=[{source={path='x'}}]"]), @"
    `lora.capacity` `by_domain` needs experts that belong to domains: \
    `router.domain_supervision`, `train.routing = \"domain\"` or `data.domains[].expert`
    `lora.capacity` `by_domain` sets the ranks, and so does `lora.experts`
    ");
    insta::assert_snapshot!(
        with(&["lora.experts=[{rank_pattern={c_fc=4}}]", "lora.rank_pattern={c_fc=4}"]),
        @"
        `lora.capacity` `by_domain` sets the ranks, and so does `lora.experts`
        `lora.capacity` `by_domain` sets the ranks, and so does `lora.rank_pattern`
        "
    );
    for set in [&[][..], &["train.routing=domain"], &["lora.experts=[{alpha=3.0}]"]] {
        let config = new(&[&["lora.capacity=by_domain"], set].concat())?;
        assert_eq!(config.lora.capacity, Capacity::ByDomain);
    }
    let named = with_experts("0", "[1, 2]");
    let set = ["lora.capacity=by_domain", "train.routing=uniform"];
    assert_eq!(load::resolve(&named, &owned(&set))?.lora.capacity, Capacity::ByDomain);
    Ok(())
}

#[test]
fn a_negative_shared_rank_and_limits_below_zero_are_refused() {
    insta::assert_snapshot!(
        refusal(&[
            "lora.shared_rank=-1",
            "optimizer.max_grad_norm=-1",
            "optimizer.router={learning_rate=1e-3, max_grad_norm=nan}",
        ]),
        @"
        `lora.shared_rank` must be at least 0, got -1
        `optimizer.router.max_grad_norm` must be a number of at least 0, got NaN
        `optimizer.max_grad_norm` must be a number of at least 0, got -1
        "
    );
}

/// The alphas of the experts of a config over its `lora.alpha`, which is 16.
fn factors(config: &Config) -> Result<Vec<f64>> {
    let base = tiny_config();
    let factor = |expert| -> Result<f64> {
        let spec = ExpertSpec::of_config(config, expert, &base)?;
        let alphas = spec.modules.values().map(|size| size.alpha / 16.0);
        let alphas: Vec<f64> = alphas.collect();
        assert!(alphas.windows(2).all(|pair| pair[0] == pair[1]), "{alphas:?}");
        Ok(alphas[0])
    };
    (0..config.lora.num_experts as usize).map(factor).collect()
}

#[test]
fn alpha_is_multiplied_where_the_weights_of_experts_are_shares() -> Result<()> {
    let unsupervised = "router.domain_supervision=0";
    for (set, expected) in [
        // each expert has about 1 / E of the weight, or 1 / k
        (&[unsupervised][..], 4.0),
        (&[unsupervised, "lora.num_experts=6"], 6.0),
        (&[unsupervised, "router.top_k=1"], 1.0),
        (&[unsupervised, "router.top_k=2"], 2.0),
        (&[unsupervised, "router.top_k=3", "router.hybrid={tokens=9}"], 3.0),
        (&["train.routing=uniform"], 4.0),
        (&["train.routing=uniform", "router.top_k=2"], 4.0),
        // one expert has most of it
        (&[], 1.0),
        (&["router.top_k=2"], 1.0),
        (&["train.routing=record"], 1.0),
        (&["train.routing=domain"], 1.0),
        (&["train.routing=expert:2"], 1.0),
        (&["train.routing=all"], 1.0),
        (&["lora.num_experts=1"], 1.0),
        (&["lora.num_experts=1", "train.routing=uniform"], 1.0),
        // and here it is asked for
        (&[unsupervised, "lora.scale=per_expert"], 1.0),
        (&["train.routing=uniform", "lora.scale=per_expert"], 1.0),
    ] {
        let config = new(set)?;
        let count = config.lora.num_experts as usize;
        assert_eq!(factors(&config)?, vec![expected; count], "{set:?}");
        // the part that is always on keeps its alpha: 3 is its rank, 8 that of the experts
        let config = new(&[set, &["lora.shared_rank=3"]].concat())?;
        let shared = ExpertSpec::of_shared(&config.lora, &tiny_config())?.expect("it has a rank");
        assert!(shared.modules.values().all(|size| size.alpha == 16.0 * 3.0 / 8.0), "{set:?}");
        assert_eq!(factors(&config)?, vec![expected; count], "{set:?}");
    }
    Ok(())
}

#[test]
fn an_added_expert_and_one_from_an_adapter_keep_their_alpha() -> Result<()> {
    let mut config = new(&["router.domain_supervision=0"])?;
    config.lora.experts = vec![ExpertConfig::default(); 2];
    config.lora.experts[1].alpha = Some(8.0);
    assert_eq!(factors(&config)?, [4.0, 2.0, 4.0, 4.0]);
    let source = dylora::config::AdapterSource::Path("/adapter".into());
    config.lora.experts[1] = ExpertConfig { source: Some(source), ..ExpertConfig::default() };
    assert_eq!([0, 1, 2, 3].map(|expert| config.scale_factor(expert)), [4.0, 1.0, 4.0, 4.0]);
    config.lora.experts.clear();
    config.growth = Some(GrowthConfig {
        domain: "verse".into(),
        old_experts_rate: 0.0,
        old_columns_rate: 0.0,
        seed_steps: 1,
        seed_router_coef: 1.0,
        column_learning_rate: GrowthConfig::COLUMN_LEARNING_RATE,
        consolidation_rate: 1.0,
    });
    assert_eq!(factors(&config)?, [4.0, 4.0, 4.0, 1.0]);
    Ok(())
}

fn model(config: &Config) -> Result<RoutedModel> {
    let base = tiny_base(tiny_config());
    let specs: Vec<ExpertSpec> = (0..config.lora.num_experts as usize)
        .map(|expert| ExpertSpec::of_config(config, expert, &base.spec))
        .collect::<Result<_>>()?;
    let router = RouterSpec::of_config(config);
    Ok(RoutedModel::with_experts(&base, &specs, &router, Device::Cpu, Kind::Double))
}

fn batches() -> Vec<Batch> {
    let document = |n: u32| MemoryDocument {
        tokens: (0..3 + n % 6).map(|i| (n * 7 + i * (n + 3)) % 61).collect(),
        prompt_len: n % 3,
        expert: None,
    };
    let documents = (0..9).map(document).collect();
    let domain = MemoryDomain { name: "law".into(), weight: 1.0, documents };
    let dataset = TokenDataset::in_memory(12, LossOn::Completion, vec![domain]);
    vec![dataset.batch(&dataset.eval_order())]
}

/// Runs one step of training.
fn step(model: &RoutedModel, config: &Config) -> Result<()> {
    let trained = model.trained(config.train.routing, None);
    let optimizer = Optimizer::new(&config.optimizer, &trained.parameters);
    let mut stepper = Stepper::new(optimizer, Capture::Off, Device::Cpu);
    let data = stepper.prepare(model, config, &batches(), None, 2);
    let update = stepper.optimizer.scalars(&|_| 1.0);
    let pending = stepper.launch(model, &trained, config, &data, &update)?;
    stepper.wait(pending)?;
    Ok(())
}

/// Random A and B of the experts of a model, by name.
fn random(model: &RoutedModel) -> BTreeMap<String, Tensor> {
    let experts = model.tensors().into_iter().filter(|(name, _)| name.contains("expert_"));
    let new = |size: Vec<i64>| Tensor::randn(size, (Kind::Double, Device::Cpu)) * 0.2;
    experts.map(|(name, tensor)| (name, new(tensor.size()))).collect()
}

/// The A and B of `num_experts` experts stacked to those of one LoRA, of the rank of all together.
fn stacked(tensors: &BTreeMap<String, Tensor>, num_experts: i64) -> BTreeMap<String, Tensor> {
    let first = tensors.keys().filter(|name| name.contains(".expert_0.lora_"));
    let stack = |name: &String| {
        let of = |expert| name.replace(".expert_0.", &format!(".expert_{expert}."));
        let parts: Vec<Tensor> =
            (0..num_experts).map(|expert| tensors[&of(expert)].shallow_clone()).collect();
        let dim = if name.ends_with("lora_a") { 0 } else { 1 };
        (name.clone(), Tensor::cat(&parts, dim))
    };
    first.map(stack).collect()
}

/// The gradients of the experts, by the name of the tensor and in its layout.
fn expert_gradients(model: &RoutedModel, config: &Config) -> Result<BTreeMap<String, Tensor>> {
    let trained = model.trained(config.train.routing, None);
    let grads = gradients(model, &trained, config, &batches(), None, 2)?.grads;
    let named = trained.parameters.iter().map(|p| p.name.clone()).zip(grads);
    let of_experts = named.filter(|(name, _)| name.contains(".expert_"));
    let as_saved = |(name, grad): (String, Tensor)| match name.ends_with("lora_b") {
        true => (name, grad.tr()),
        false => (name, grad),
    };
    Ok(of_experts.map(as_saved).collect())
}

/// A mixture with even weights is one LoRA with the A and B of all experts and the scaling
/// `alpha / rank` of `[lora]`, before a step and after it.
#[test]
fn an_even_mixture_is_and_learns_as_one_lora_of_all_ranks_with_the_scaling_of_lora() -> Result<()> {
    let _generator = seed(640);
    // the gradients of the mixture's routers count in a norm of all
    let unclipped = "optimizer.max_grad_norm=0";
    let common = ["lora.rank=3", "lora.alpha=6", "router.domain_supervision=0", unclipped];
    for (count, mixing) in [
        (4, &["router.init=zero"][..]),
        (4, &["router.init=zero", "router.scope=shared", "router.input=embeddings"]),
        (7, &["router.init=zero", "router.scope=module", "router.input=module_input"]),
        (4, &["train.routing=uniform"]),
        (2, &["train.routing=uniform"]),
    ] {
        let count_set = format!("lora.num_experts={count}");
        // the routers of distinct experts learn, which is to leave the weights even here
        let rest = [count_set.as_str(), "optimizer.router={learning_rate=1e-20}"];
        let config = new(&[&common[..], mixing, &rest].concat())?;
        let (rank, alpha) =
            (format!("lora.rank={}", 3 * count), format!("lora.alpha={}", 6 * count));
        let alone = new(&["lora.num_experts=1", &rank, &alpha, unclipped])?;
        tch::manual_seed(641);
        let mixture = model(&config)?;
        tch::manual_seed(641);
        let single = model(&alone)?;
        let tensors = random(&mixture);
        mixture.load_some(&tensors)?;
        single.load(&stacked(&tensors, count))?;
        let source = || RoutingSource::from(config.train.routing);
        let both = |what: &str, tolerance| {
            let [one, many] = [&single, &mixture].map(|m| logits(m, &two_rows(), &source()));
            assert_close(&format!("{what}: {count}, {mixing:?}"), &many, &one, tolerance);
            one
        };
        let before = both("before the step", 1e-11);
        let grads = stacked(&expert_gradients(&mixture, &config)?, count);
        for (name, grad) in expert_gradients(&single, &alone)? {
            assert_close(&format!("{count}, {mixing:?}, {name}"), &grads[&name], &grad, 1e-12);
        }
        step(&mixture, &config)?;
        step(&single, &alone)?;
        let after = both("after the step", 1e-7);
        assert!((after - before).abs().max().double_value(&[]) > 1e-3);
    }
    Ok(())
}

/// So each expert adds at its even weight what one LoRA of the same rank and alpha adds, and E
/// equal experts add E times that. The same holds for the k chosen ones with top-k.
#[test]
fn each_expert_adds_at_its_even_weight_what_one_lora_of_the_same_alpha_adds() -> Result<()> {
    let _generator = seed(642);
    let common = ["lora.rank=3", "router.domain_supervision=0"];
    let alone = new(&[common[0], "lora.num_experts=1"])?;
    for (rule, k) in [("router.init=zero", 4), ("router.top_k=1", 1), ("router.top_k=3", 3)] {
        let config = new(&[&common[..], &[rule]].concat())?;
        tch::manual_seed(643);
        let mixture = model(&config)?;
        tch::manual_seed(643);
        let single = model(&alone)?;
        let tensors = random(&single);
        single.load(&tensors)?;
        let copies = (0..4).flat_map(|expert| {
            let part = format!(".expert_{expert}.");
            let named =
                tensors.iter().map(|(name, t)| (name.replace(".expert_0.", &part), t.copy()));
            named.collect::<Vec<_>>()
        });
        mixture.load_some(&copies.collect())?;
        // routers whose rows are equal score all experts alike
        let routers = mixture.router_tensors().into_iter();
        let even = routers.map(|(name, t)| (name, t.narrow(0, 0, 1).expand_as(&t).copy()));
        mixture.load_some(&even.collect())?;
        let used = mixture.routing(&two_rows(), ForwardMode::EVAL).remove(0).weights.gt(0.0);
        let used = used.to_kind(Kind::Double).sum_dim_intlist(-1, false, Kind::Double);
        assert!(
            used.min().double_value(&[]) == f64::from(k)
                && used.equal(&used.full_like(i64::from(k)))
        );
        let routed = logits(&mixture, &two_rows(), &RoutingSource::Router);
        let times = |k: f64| RoutingSource::Given(Tensor::from_slice(&[k]));
        let expected = logits(&single, &two_rows(), &times(f64::from(k)));
        assert_close(&format!("{rule}: together"), &routed, &expected, 1e-10);
        let share = Tensor::from_slice(&[0.0, 1.0 / f64::from(k), 0.0, 0.0]);
        let one = logits(&mixture, &two_rows(), &RoutingSource::Given(share));
        let expected = logits(&single, &two_rows(), &times(1.0));
        assert_close(&format!("{rule}: one of them"), &one, &expected, 1e-10);
    }
    Ok(())
}
