//! N processes make the steps of one process with N times the accumulation, in f64: every loss,
//! routing rule, input and level, blocks that do not divide evenly, packed documents, and processes
//! without a block.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use dylora::config::{
    Config, LoraConfig, LossOn, Maturity, Orthogonality, Plateau, RouterConfig, RouterInput,
    RouterScope, RoutingChoice, RoutingLevel, load,
};
use dylora::data::{Batch, BlockId, MemoryDocument, MemoryDomain, TokenDataset};
use dylora::dist::shard::shares;
use dylora::dist::{Limits, World};
use dylora::model::RoutedModel;
use dylora::tensor_file::{read_tensors, write_tensors};
use dylora::train::graph::Capture;
use dylora::train::optim::Optimizer;
use dylora::train::prepared::{Prepared, SeedingPhase, StepCounts};
use dylora::train::step::{StepResult, Stepper};
use tch::{Device, Kind, Tensor};

use crate::common::{
    assert_close, family_specs, gpt2_spec, new_model, plain_and, plain_router, randomize, seed,
    tiny_base, tiny_lora,
};
use crate::processes::{own_world, run};

/// Steps of a job.
const NUM_STEPS: usize = 20;
/// Blocks of the steps in turn: divisible by the number of processes or not, and fewer than there
/// are processes.
const BLOCKS: [usize; 5] = [12, 7, 12, 2, 1];

/// What a job trains.
struct Case {
    config: Config,
    model: RoutedModel,
    seeding: Option<SeedingPhase>,
    capture: Capture,
    is_rounded: bool,
}

/// The names of the cases.
const CASES: [&str; 18] = [
    "dense",
    "top_k",
    "layer",
    "own_routers",
    "module",
    "base_hidden",
    "detached",
    "dora",
    "sequence",
    "plateau",
    "biases",
    "seeding",
    "captured",
    "checkpointed",
    "unrouted",
    "deep",
    "upper_layers",
    "one_layer",
];

fn config(router: RouterConfig, overrides: &[&str]) -> Result<Config> {
    let text = "base = { source = { path = \"x\" } }\n[data]\nseq_len = 16\n\
                domains = [{ name = \"a\", train = [\"x\"], expert = 0 }, \
                           { name = \"b\", train = [\"x\"] }, \
                           { name = \"c\", train = [\"x\"], expert = [1, 2] }]";
    let mut set = plain_and(overrides);
    set.push("lora.num_experts=3".into());
    set.push("optimizer.max_grad_norm=0.7".into());
    let mut config = load::parse(text, &set)?;
    config.router = RouterConfig {
        load_balancing_coef: 0.7,
        uniform_mse_coef: 3.0,
        z_loss_coef: 0.05,
        entropy_coef: -0.2,
        domain_supervision: Some(0.3),
        ..router
    };
    config.lora.orthogonality = Some(Orthogonality::Ba(0.4));
    Ok(config)
}

impl Case {
    fn new(name: &str) -> Result<Self> {
        let router = router(name);
        let overrides: &[&str] = match name {
            "checkpointed" => &["train.gradient_checkpointing=true"],
            "unrouted" => &["train.routing=\"uniform\""],
            _ => &[],
        };
        let _generator = seed(70);
        let base = match name.strip_prefix("family ") {
            None => gpt2_spec(num_layers(name), 4, 16),
            Some(family) => {
                let specs = family_specs();
                let found = specs.into_iter().find(|(name, _)| *name == family);
                found.context("a family of this name")?.1
            }
        };
        let model = new_model(&tiny_base(base), &lora(name)?, &router, Kind::Double);
        randomize(&model)?;
        let config = config(router, overrides)?;
        let seeding = (name == "seeding").then_some(SeedingPhase { expert: 2, domain: 1 });
        let capture = if name == "captured" { Capture::Rerun } else { Capture::Off };
        Ok(Self { config, model, seeding, capture, is_rounded: name == "captured" })
    }
}

fn router(name: &str) -> RouterConfig {
    let plain = plain_router();
    let top = |top_k, balance_bias_rate| RouterConfig {
        top_k: Some(top_k),
        balance_bias_rate,
        ..plain_router()
    };
    let of_layer = RouterConfig { input: RouterInput::LayerInput, ..plain_router() };
    match name {
        "top_k" | "captured" => top(2, 0.0),
        "biases" => {
            RouterConfig { load_balancing_coef: 0.0, uniform_mse_coef: 0.0, ..top(1, 0.05) }
        }
        "layer" | "checkpointed" => of_layer,
        "detached" => RouterConfig { detach_input: true, ..of_layer },
        "own_routers" | "deep" | "upper_layers" => {
            RouterConfig { scope: RouterScope::Layer, ..plain }
        }
        "base_hidden" => RouterConfig { input: RouterInput::BaseHidden, ..plain },
        "module" => {
            RouterConfig { input: RouterInput::ModuleInput, scope: RouterScope::Module, ..plain }
        }
        "sequence" => RouterConfig { level: RoutingLevel::Sequence, ..plain },
        "plateau" => RouterConfig {
            hybrid: Some(Maturity::Plateau(Plateau { window_steps: 2, min_delta: 0.01 })),
            ..top(2, 0.0)
        },
        _ => plain,
    }
}

fn num_layers(name: &str) -> i64 {
    match name {
        "deep" => 7,
        "upper_layers" => 5,
        _ => 2,
    }
}

/// The experts of a case on GPT-2.
fn lora(name: &str) -> Result<LoraConfig> {
    let modules: &[&str] = match name {
        "upper_layers" => &["h.3.attn.c_attn", "h.4.mlp.c_fc"],
        "one_layer" => &["h.1.mlp.c_fc"],
        "dora" => return Ok(LoraConfig { use_dora: true, ..tiny_lora() }),
        _ => return Ok(tiny_lora()),
    };
    let target_modules = serde_json::from_value(serde_json::json!(modules))?;
    Ok(LoraConfig { target_modules, ..tiny_lora() })
}

/// Documents of 2 to 30 tokens of three domains.
fn dataset() -> TokenDataset {
    let domain = |name: &str, first: u32| {
        let document = |n: u32| MemoryDocument {
            tokens: (0..2 + n % 29).map(|i| (n * 7 + i * (n + 3)) % 61).collect(),
            prompt_len: n % 29 / 3,
            expert: None,
        };
        let documents = (first..first + 20).map(document).collect();
        MemoryDomain { name: name.into(), weight: 1.0, documents }
    };
    let domains = [("a", 0), ("b", 7), ("c", 100)].map(|(name, first)| domain(name, first));
    TokenDataset::in_memory(16, LossOn::Completion, domains.into())
}

/// Runs the steps of a case as one process of `world`, and returns all that they change and say.
fn train(case: &Case, world: &Arc<World>) -> Result<(BTreeMap<String, Tensor>, Vec<f64>)> {
    let Case { config, model, seeding, capture, is_rounded } = case;
    let dataset = dataset();
    let trained = model.trained(config.train.routing, None);
    let optimizer = Optimizer::new(&config.optimizer, &trained.parameters);
    let mut stepper = Stepper::new(optimizer, *capture, Device::Cpu);
    stepper.enter(world);
    let order = dataset.epoch_order(3, 0);
    let mut blocks = order.iter().copied().cycle();
    let mut said = vec![];
    for step in 0..NUM_STEPS {
        let of_step: Vec<BlockId> = blocks.by_ref().take(BLOCKS[step % BLOCKS.len()]).collect();
        let costs: Vec<f64> =
            of_step.iter().map(|&block| dataset.label_tokens(block) as f64).collect();
        let own = &shares(&costs, world.size())[world.dist_rank()];
        let own: Vec<BlockId> = own.iter().map(|&index| of_step[index]).collect();
        let mut batches: Vec<Batch> = own.chunks(2).map(|chunk| dataset.batch(chunk)).collect();
        if batches.is_empty() {
            batches.push(Batch::padding(dataset.seq_len));
        }
        let counts = StepCounts::new(config, &dataset, &of_step);
        let data = Prepared::new(model, config, &batches, *seeding, 3, *is_rounded);
        let data = data.part_of(counts);
        let update = stepper.optimizer.scalars(&|_| 1.0);
        let pending = stepper.launch(model, &trained, config, &data, &update)?;
        said.extend(numbers(&stepper.wait(pending)?));
    }
    let all = model.tensors().into_iter().chain(stepper.optimizer.state());
    Ok((all.map(|(name, tensor)| (name, tensor.contiguous())).collect(), said))
}

/// All numbers of a result.
fn numbers(result: &StepResult) -> Vec<f64> {
    // without tokens of a domain with experts, the means over these are NaN
    let number = |x: f64| if x.is_nan() { -1.0 } else { x };
    let mut all = vec![result.loss, result.grad_norm, result.label_tokens as f64];
    all.extend(result.domain_losses.iter().map(|loss| loss.unwrap_or(-1.0)));
    all.extend(result.expert_losses.iter().flatten());
    let supervision = result.supervision.iter().flat_map(|site| [site.loss, site.accuracy]);
    all.extend(supervision.map(number));
    all.extend(result.orthogonality);
    for site in &result.routing {
        all.extend(site.tokens.iter().chain(&site.probs).chain(&site.entropy));
        all.extend(site.weights.iter().chain(&site.assignments).flatten());
        all.push(site.squared_lse);
    }
    all
}

/// The job of a process: all cases. Each process saves what it ends with.
pub fn work(dir: &Path, names: &str) -> Result<()> {
    // three processes add up each step's few gradients at once, and two or four in two operations
    let mut limits = Limits::default();
    if std::env::var("WORLD_SIZE")? != "3" {
        limits.overlap_bytes = 0;
    }
    let world = own_world(limits)?;
    tch::set_num_threads(1);
    for name in names.split(',') {
        let (mut tensors, said) = train(&Case::new(name)?, &world)?;
        tensors.insert("said".into(), Tensor::from_slice(&said));
        let file = dir.join(format!("{name}.{}", world.dist_rank()));
        write_tensors(&file, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
    }
    world.leave(None)
}

/// Checks that 2, 3 and 4 processes do what one does.
fn check(names: &[String]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let single = Arc::new(World::single());
    let alone: Vec<_> =
        names.iter().map(|name| train(&Case::new(name)?, &single)).collect::<Result<_>>()?;
    for size in [2, 3, 4] {
        run(size, &format!("steps {}", names.join(",")), dir.path())?;
        for (name, (tensors, said)) in names.iter().zip(&alone) {
            let of = |rank: usize| -> Result<BTreeMap<String, Tensor>> {
                let tensors = read_tensors(&dir.path().join(format!("{name}.{rank}")))?;
                Ok(tensors.into_iter().collect())
            };
            let first = of(0)?;
            assert_close(
                &format!("{name}, {size}"),
                &first["said"],
                &Tensor::from_slice(said),
                1e-9,
            );
            let mut moved = 0.0_f64;
            for (tensor, expected) in tensors {
                let what = format!("`{tensor}` of {name} with {size} processes");
                assert_close(&what, &first[tensor], expected, 1e-10);
                moved = moved.max(expected.abs().max().double_value(&[]));
            }
            assert!(moved > 0.0);
            for rank in 1..size {
                for (tensor, value) in of(rank)? {
                    assert!(value.equal(&first[&tensor]), "`{tensor}` of {name} on rank {rank}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn processes_make_the_steps_of_one_with_more_accumulation() -> Result<()> {
    check(&CASES.map(str::to_owned))
}

#[test]
fn they_do_so_on_every_family() -> Result<()> {
    let names = family_specs().into_iter().map(|(name, _)| format!("family {name}"));
    check(&names.collect::<Vec<_>>())
}

/// Each case has what it is named for.
#[test]
fn the_cases_are_what_they_say() -> Result<()> {
    assert_eq!(Case::new("unrouted")?.config.train.routing, RoutingChoice::Uniform);
    assert_eq!(Case::new("biases")?.config.router.top_k, Some(1));
    assert!(Case::new("seeding")?.seeding.is_some());
    assert!(Case::new("checkpointed")?.config.train.gradient_checkpointing);
    // the layer below which the graph is cut
    for (name, layer) in [
        ("dense", Some(1)),
        ("deep", Some(2)),
        ("upper_layers", Some(4)),
        ("one_layer", None),
        ("family qwen3", Some(1)),
    ] {
        let Case { config, model, .. } = Case::new(name)?;
        assert_eq!(model.trained(config.train.routing, None).cut_layer(), layer, "{name}");
    }
    Ok(())
}
