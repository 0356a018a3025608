//! Runs of a tiny model: the loss curve, exact resumption, exact accumulation, and the files that
//! stay on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use dylora::base::Base;
use dylora::checkpoint::load_model;
use dylora::checkpoint::{self, Preferred};
use dylora::config::{AdapterSource, Config, SaveDtype, load};
use dylora::data::{DataOptions, Datasets, load_datasets};
use dylora::durable::output::Output;
use dylora::eval::{EvalSettings, evaluate};
use dylora::export::peft::{Layout, Origin, Provenance};
use dylora::export::{hugging_face, peft};
use dylora::hub::{self, AdapterFiles, HubSettings};
use dylora::mixture::Mixture;
use dylora::model::RoutingSource;
use dylora::model::decoder::Decoder;
use dylora::model::families;
use dylora::tensor_file::read_tensors;
use dylora::train::optim::load_rng_states;
use dylora::train::{Ending, Event, Summary, Trainer};
use tch::{Device, Tensor};

mod ahead;
mod fp8;
mod frozen_router;
mod growth;
mod lifecycle;
mod new_columns;
mod open_column;
mod recipe;
mod routing;
mod sources;
mod stages;
mod windows;

/// Keeps other tests from running at the same time. libtorch has a single CPU generator, so runs
/// that draw from it must not overlap. It also sets libtorch to one thread: the tensors are so tiny
/// that several threads would wait for each other longer than they compute.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    tch::set_num_threads(1);
    guard
}

/// A folder with a random base of two blocks, a tokenizer of 32 words and two domains.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Result<Self> {
        let world = Self { dir: tempfile::tempdir()? };
        let words: BTreeMap<String, u32> = (0..31)
            .map(|i| (format!("w{i}"), i))
            .chain([("<|endoftext|>".to_owned(), 31)])
            .collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "decoder": null, "truncation": null, "padding": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" },
            "model": { "type": "WordLevel", "vocab": words, "unk_token": "w0" },
        });
        fs_err::write(world.path("tokenizer.json"), tokenizer.to_string())?;
        let shape = serde_json::json!({
            "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24,
            "vocab_size": 32, "eos_token_id": 31,
        });
        tch::manual_seed(7);
        let shape = families::from_json(&shape)?;
        // the matrices are ten times GPT-2's initial ones, so that the frozen head distinguishes
        // tokens
        let random = Decoder::random(shape.clone()).named_parameters().into_iter();
        let scaled = random.map(|(name, t)| (name, if t.dim() == 2 { t * 10.0 } else { t }));
        let base = Decoder::new(shape, scaled.collect());
        let tokenizer = world.path("tokenizer.json");
        let dir = world.path("base");
        hugging_face::export(&Output::new(&dir), &base, SaveDtype::F32, Some(&tokenizer), &[], "")?;
        for (name, step) in [("up", 1), ("down", 29)] {
            for (split, records, first) in [("train", 40, 0), ("validation", 8, 100)] {
                let lines: Vec<String> =
                    (first..first + records).map(|n| record(n, step).to_string()).collect();
                fs_err::write(world.path(&format!("{name}.{split}.jsonl")), lines.join("\n"))?;
            }
        }
        Ok(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self, run: &str, overrides: &[&str]) -> Result<Config> {
        let dir = self.dir.path().display();
        let text = format!(
            r#"
            [run]
            dir = "{dir}/{run}"
            tensorboard = false
            [base]
            source = {{ path = "{dir}/base" }}
            [data]
            seq_len = 16
            [[data.domains]]
            name = "up"
            train = ["{dir}/up.train.jsonl"]
            validation = {{ files = ["{dir}/up.validation.jsonl"] }}
            [[data.domains]]
            name = "down"
            train = ["{dir}/down.train.jsonl"]
            validation = {{ files = ["{dir}/down.validation.jsonl"] }}
            [lora]
            num_experts = 3
            rank = 4
            scale = "per_expert"
            target_modules = ["attn.c_attn", "mlp.c_fc"]
            dropout = 0.1
            [router]
            input = "embeddings"
            scope = "shared"
            normalize_input = false
            detach_input = false
            domain_supervision = 0.0
            load_balancing_coef = 0.05
            [train]
            duration = {{ steps = 12 }}
            micro_batch_size = 3
            grad_accum_steps = 2
            eval_every_steps = 4
            [optimizer]
            adapters = {{ learning_rate = 2e-2, weight_decay = 0.01 }}
            router = {{ learning_rate = 5e-2 }}
            max_grad_norm = 1.0
            [schedule]
            kind = "cosine"
            warmup_steps = 3
            min_ratio = 0.0
            "#
        );
        let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
        let config = load::parse(&text, &overrides)?;
        load::validate(&config)?;
        Ok(config)
    }
}

/// A prompt of three words and a completion that continues their pattern. Its length depends on
/// `n`.
fn record(n: i64, step: i64) -> serde_json::Value {
    let word = |i: i64| format!("w{}", (n * 7 + i * step).rem_euclid(31));
    let words = |range: std::ops::Range<i64>| range.map(word).collect::<Vec<_>>().join(" ");
    serde_json::json!({ "prompt": words(0..3), "completion": words(3..5 + n % 7) })
}

fn open_base(config: &Config) -> Result<Base> {
    Base::open(&config.base, &HubSettings::offline("absent"), &())
}

fn data(config: &Config, base: &Base) -> Result<Datasets> {
    let eos = base.spec.eos_token_id();
    let options = DataOptions::new(&config.data, config.run.seed, eos, None);
    load_datasets(&config.data.domains, &options, base.tokenizer()?, &|_| ())
}

fn mixture(config: &Config, base: &Base) -> Result<Mixture> {
    Mixture::of_config(config, &base.spec, &find_adapter)
}

/// Finds adapters in folders only, not on the Hub.
fn find_adapter(source: &AdapterSource) -> Result<AdapterFiles> {
    hub::find_adapter(source, &HubSettings::offline("absent"), &())
}

/// A trainer of a new run, or of one that goes on from a checkpoint.
fn trainer(config: &Config, resume: Option<&Path>) -> Result<Trainer> {
    let base = open_base(config)?;
    let data = data(config, &base)?;
    match resume {
        None => Trainer::new(config.clone(), &base, &mixture(config, &base)?, data, Device::Cpu),
        Some(dir) => Trainer::resume(config.clone(), &base, data, Device::Cpu, dir),
    }
}

/// Trains from the start or from a checkpoint, and returns the losses of the steps.
fn train(config: &Config, resume: Option<&Path>) -> Result<(Vec<f64>, Summary)> {
    let mut trainer = trainer(config, resume)?;
    let mut losses = vec![];
    let summary = trainer.run(&AtomicBool::new(false), &mut |event| {
        if let Event::Step(metrics) = event {
            losses.push(metrics.loss);
        }
    })?;
    Ok((losses, summary))
}

fn tensors(checkpoint: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = read_tensors(&checkpoint.join("model.safetensors"))?;
    tensors.extend(read_tensors(&checkpoint.join("optimizer.safetensors"))?);
    Ok(tensors)
}

/// Checks that two runs ended with the same parameters and moments, to the bit.
fn check_same_tensors(unbroken: &Summary, resumed: &Summary) -> Result<()> {
    check_same_checkpoints(&unbroken.checkpoint, &resumed.checkpoint)
}

/// The same for two checkpoints.
fn check_same_checkpoints(expected: &Path, found: &Path) -> Result<()> {
    let (left, right) = (tensors(expected)?, tensors(found)?);
    assert!(left.keys().eq(right.keys()));
    for (name, tensor) in &left {
        let dir = found.display();
        assert!(tensor.equal(&right[name]), "`{name}` differs in `{dir}`");
    }
    Ok(())
}

/// Makes a checkpoint that the test has changed one of the format before, which has no sums.
fn forget_sums(checkpoint: &Path) -> Result<()> {
    let (sums, state) = (checkpoint.join("checksums.json"), checkpoint.join("state.json"));
    if sums.exists() {
        fs_err::remove_file(sums)?;
    }
    let text = fs_err::read_to_string(&state)?;
    Ok(fs_err::write(state, text.replace("\"format\": 4", "\"format\": 3"))?)
}

#[test]
fn a_tiny_run_hits_the_listed_curve() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let (losses, summary) = train(&world.config("run", &["lora.dropout=0.0"])?, None)?;
    for (step, (loss, listed)) in losses.iter().zip(LISTED).enumerate() {
        assert!((loss - listed).abs() < 2e-4, "step {}: {loss} is not {listed}", step + 1);
    }
    assert_eq!((losses.len(), summary.ending), (12, Ending::Completed));
    Ok(())
}

/// The losses of the run's steps. They depend on the order of the blocks (`src/data/order.rs`). A
/// refactoring must not change them.
const LISTED: [f64; 12] = [
    3.76027, 3.62988, 3.59587, 3.58939, 3.53865, 3.51836, 3.39646, 3.53311, 3.39411, 3.41291,
    3.39972, 3.32780,
];

#[test]
fn a_resumed_run_equals_an_unbroken_one_to_the_bit() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let every = ["train.checkpoint_every_steps=5", "train.keep_last=9"];
    let config = world.config("unbroken", &every)?;
    let (losses, unbroken) = train(&config, None)?;
    let from = world.path("unbroken/checkpoints/step-00000005");
    let (rest, resumed) = train(&world.config("resumed", &every)?, Some(&from))?;
    assert_eq!(rest, losses[5..]);
    assert_eq!(resumed.state, unbroken.state);
    check_same_tensors(&unbroken, &resumed)
}

/// The data of the next step is prepared while a step runs. If the run is interrupted, this data is
/// neither lost nor repeated, whether the same trainer goes on or another one resumes. This also
/// holds at the end of an epoch.
#[test]
fn an_interrupted_run_goes_on_with_the_very_next_blocks() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    // an epoch has about three steps
    let set = ["train.duration={steps=9}", "train.grad_accum_steps=4", "train.eval_every_steps=9"];
    let (losses, unbroken) = train(&world.config("unbroken", &set)?, None)?;
    for at in [1, 3, 8] {
        let config = world.config(&format!("interrupted-{at}"), &set)?;
        let base = open_base(&config)?;
        let mixture = mixture(&config, &base)?;
        let mut trainer =
            Trainer::new(config.clone(), &base, &mixture, data(&config, &base)?, Device::Cpu)?;
        let interrupt = AtomicBool::new(false);
        let mut seen = vec![];
        let first = trainer.run(&interrupt, &mut |event| {
            if let Event::Step(metrics) = event {
                seen.push(metrics.loss);
                interrupt.store(metrics.step == at, Ordering::Relaxed);
            }
        })?;
        assert_eq!((first.ending, first.state.step), (Ending::Interrupted, at));
        let rng = checkpoint::read_optimizer(&first.checkpoint)?;
        let (rest, resumed) = train(&config, Some(&first.checkpoint))?;
        assert_eq!(rest, losses[at as usize..]);
        assert_eq!(resumed.state, unbroken.state);
        load_rng_states(&rng, Device::Cpu, 0)?;
        let second = trainer.run(&AtomicBool::new(false), &mut |event| {
            if let Event::Step(metrics) = event {
                seen.push(metrics.loss);
            }
        })?;
        assert_eq!(seen, losses);
        assert_eq!(second.state, unbroken.state);
    }
    Ok(())
}

#[test]
fn the_last_checkpoints_and_the_best_are_kept() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = ["train.checkpoint_every_steps=1", "train.keep_last=2"];
    let config = world.config("run", &overrides)?;
    let (_, summary) = train(&config, None)?;
    let best = summary.state.best.unwrap().step;
    let expected: std::collections::BTreeSet<u64> = [best, 11, 12].into();
    assert_eq!(checkpoint::steps(&config.run.dir)?, expected.into_iter().collect::<Vec<_>>());
    Ok(())
}

#[test]
fn a_run_that_goes_on_from_further_back_replaces_what_came_after() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &["train.keep_last=9"])?;
    let (losses, first) = train(&config, None)?;
    let from = config.run.dir.join("checkpoints/step-00000004");
    let (rest, second) = train(&world.config("run", &["train.keep_last=1"])?, Some(&from))?;
    assert_eq!((&rest[..], &second.state), (&losses[4..], &first.state));
    let last = checkpoint::find(&config.run.dir, Preferred::Last)?;
    assert_eq!(checkpoint::read_state(&last)?.step, 12);
    let expected: std::collections::BTreeSet<u64> = [second.state.best.unwrap().step, 12].into();
    assert_eq!(checkpoint::steps(&config.run.dir)?, expected.into_iter().collect::<Vec<_>>());
    Ok(())
}

#[test]
fn uneven_micro_batches_equal_one_batch() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let common = ["lora.dropout=0.0", "train.duration={steps=5}", "router.top_k=2"];
    let run = |name: &str, micro: usize, accum: usize| -> Result<BTreeMap<String, Tensor>> {
        let sizes =
            [format!("train.micro_batch_size={micro}"), format!("train.grad_accum_steps={accum}")];
        let overrides: Vec<&str> =
            common.iter().copied().chain(sizes.iter().map(String::as_str)).collect();
        let (_, summary) = train(&world.config(name, &overrides)?, None)?;
        checkpoint::read_model(&summary.checkpoint)
    };
    let (one, many) = (run("one", 6, 1)?, run("many", 1, 6)?);
    for (name, tensor) in &one {
        let difference = (tensor - &many[name]).abs().max().double_value(&[]);
        assert!(difference < 1e-5, "`{name}` differs by {difference:e}");
    }
    Ok(())
}

#[test]
fn training_lowers_every_domain_and_leaves_the_base_alone() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &["train.duration={epochs=12}"])?;
    let base = open_base(&config)?;
    let data_before = data(&config, &base)?;
    let start = mixture(&config, &base)?;
    let trainer = Trainer::new(config.clone(), &base, &start, data_before, Device::Cpu)?;
    let validation = data(&config, &base)?.validation;
    let before = trainer.evaluate(&validation, &|_, _| ())?;
    let hash = trainer.model().base().hash()?;
    let (_, summary) = train(&config, None)?;
    assert_eq!(summary.state.base_hash.as_deref(), Some(hash.as_str()));
    assert_eq!(summary.frozen_hash.as_deref(), Some(hash.as_str()));
    let last = checkpoint::find(&config.run.dir, Preferred::Best)?;
    let model = load_model(&last, &config, &base, Device::Cpu)?;
    assert_eq!(model.base().hash()?, hash);
    let settings = EvalSettings { batch_size: 4, loss_chunk_tokens: 64, ..EvalSettings::default() };
    let after = evaluate(&model, &validation, &RoutingSource::Router, settings, &|_, _| ())?;
    for (before, after) in before.domains.iter().zip(&after.domains) {
        assert!(
            after.loss < before.loss - 0.3,
            "{}: {} to {}",
            after.name,
            before.loss,
            after.loss
        );
    }
    assert!((after.loss - summary.state.best.unwrap().loss).abs() < 1e-6);
    Ok(())
}

#[test]
fn a_nan_stops_the_run_and_leaves_the_last_checkpoint() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    // each step multiplies the weights by nearly minus a million
    let blow_up = [
        "optimizer.adapters.learning_rate=1000",
        "optimizer.adapters.weight_decay=1000",
        "train.checkpoint_every_steps=1",
    ];
    let config = world.config("run", &blow_up)?;
    let error = format!("{:#}", train(&config, None).unwrap_err());
    assert!(error.contains("the last checkpoint stays: the loss is"), "{error}");
    assert!(error.contains("hint: try a smaller `optimizer.*.learning_rate`"), "{error}");
    let last = checkpoint::find(&config.run.dir, Preferred::Last)?;
    assert!(checkpoint::read_state(&last)?.step >= 1);
    checkpoint::read_model(&last)?;
    checkpoint::read_optimizer(&last)?;
    Ok(())
}

#[test]
fn early_stopping_counts_evaluations_without_improvement() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let overrides = [
        "train.early_stopping={patience=2, min_delta=100.0}",
        "train.eval_every_steps=2",
        "train.duration={steps=40}",
    ];
    let config = world.config("run", &overrides)?;
    let (losses, summary) = train(&config, None)?;
    // the first evaluation always counts as an improvement; in the next two, the loss does not fall
    // by 100 nats
    assert_eq!((losses.len(), summary.ending), (6, Ending::StoppedEarly));
    assert_eq!(summary.state.evals_without_improvement, 2);
    let validation: Vec<(u64, f64)> = fs_err::read_to_string(config.run.dir.join("metrics.jsonl"))?
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line["kind"] == "validation")
        .map(|line| (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap()))
        .collect();
    let lowest = validation.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let best = checkpoint::read_state(&checkpoint::find(&config.run.dir, Preferred::Best)?)?;
    assert_eq!((best.step, best.best.unwrap().loss), *lowest);
    Ok(())
}

#[test]
fn durations_agree_with_their_units() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let blocks = {
        let config = world.config("x", &[])?;
        data(&config, &open_base(&config)?)?.train.num_blocks()
    };
    let (losses, summary) = train(&world.config("epochs", &["train.duration={epochs=2}"])?, None)?;
    assert_eq!(losses.len(), (2 * blocks).div_ceil(6));
    assert_eq!((summary.state.position.epoch, summary.state.position.offset), (2, 0));
    let (_, summary) = train(&world.config("tokens", &["train.duration={tokens=100}"])?, None)?;
    let seen = summary.state.tokens_seen;
    assert!((100..100 + 6 * 16).contains(&seen), "{seen}");
    Ok(())
}

#[test]
fn resuming_refuses_another_config_another_base_and_other_data() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &["train.duration={steps=2}"])?;
    let (_, summary) = train(&config, None)?;
    let refused =
        |config: &Config| format!("{:#}", train(config, Some(&summary.checkpoint)).unwrap_err());
    let error = refused(&world.config("run", &["lora.rank=8"])?);
    assert!(error.contains("now `rank = 8`, was `rank = 4`"), "{error}");
    let error = format!("{:#}", train(&config, None).unwrap_err());
    assert!(error.contains("holds checkpoints of an earlier run"), "{error}");
    let file = world.path("up.train.jsonl");
    let text = fs_err::read_to_string(&file)?;
    fs_err::write(&file, text.replace("w1 ", "w2 "))?;
    assert!(refused(&config).contains("the training data has changed"));
    fs_err::write(&file, text)?;
    let file = world.path("base/config.json");
    let text = fs_err::read_to_string(&file)?;
    fs_err::write(&file, text.replace("0.00001", "0.001"))?;
    assert!(refused(&config).contains("is not the file that was written"));
    // a base that dylora has not written has no marker with sums
    fs_err::remove_file(world.path("base/.dylora-output.json"))?;
    let error = refused(&config);
    assert!(error.contains("`config.json` has `layer_norm_epsilon` 0.001, not 0.00001"), "{error}");
    fs_err::write(&file, text)?;
    let weights = world.path("base/model.safetensors");
    let mut bytes = fs_err::read(&weights)?;
    *bytes.last_mut().unwrap() ^= 1;
    fs_err::write(&weights, bytes)?;
    assert!(refused(&config).contains("is not the one that the checkpoint was trained on"));
    Ok(())
}

#[test]
fn full_training_resumes_and_writes_a_folder_that_loads() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let full = ["method=full", "optimizer.base.learning_rate=1e-2", "train.keep_last=9"];
    let config = world.config("full", &full)?;
    let (losses, unbroken) = train(&config, None)?;
    let from = world.path("full/checkpoints/step-00000004");
    let mut resumed = config.clone();
    resumed.run.dir = world.path("full-resumed");
    let (rest, summary) = train(&resumed, Some(&from))?;
    assert_eq!(rest, losses[4..]);
    assert_eq!(unbroken.state, summary.state);
    assert!(losses[11] < losses[0] - 0.3, "{losses:?}");
    let base = open_base(&config)?;
    let model = load_model(&summary.checkpoint, &config, &base, Device::Cpu)?;
    let out = world.path("hf");
    hugging_face::export(&Output::new(&out), model.base(), SaveDtype::F32, None, &[], "")?;
    let shape = families::read_spec(&out.join("config.json"))?;
    let file = out.join("model.safetensors");
    let read = families::load::read(&shape, &[file], tch::Kind::Float)?;
    assert_eq!(read.hash()?, model.base().hash()?);
    Ok(())
}

fn provenance(base: &Base) -> Result<Provenance> {
    Ok(Provenance {
        base_name: base.label.clone(),
        revision: None,
        base_hash: base.weights()?.hash()?,
        dropout: 0.1,
        routing: dylora::config::RoutingChoice::Router,
        origin: Origin::new(base, None),
    })
}

#[test]
fn an_export_holds_each_expert_and_the_router() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    let config = world.config("run", &["train.duration={steps=3}"])?;
    let (_, summary) = train(&config, None)?;
    let base = open_base(&config)?;
    let model = load_model(&summary.checkpoint, &config, &base, Device::Cpu)?;
    let out = world.path("export");
    let provenance = provenance(&base)?;
    peft::export(&Output::new(&out), &model, &provenance, Layout::Dylora)?;
    let trained = checkpoint::read_model(&summary.checkpoint)?;
    for expert in 0..3 {
        let file = out.join(format!("expert_{expert}/adapter_model.safetensors"));
        let tensors = read_tensors(&file)?;
        assert_eq!(tensors.len(), 2 * 2 * 2);
        let name = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight";
        let own = &trained[&format!("h.1.mlp.c_fc.expert_{expert}.lora_b")];
        assert!(tensors[name].equal(own));
    }
    let router = read_tensors(&out.join("router.safetensors"))?;
    assert!(router["router.weight"].equal(&trained["router.weight"]));
    let error = peft::export(&Output::new(&out), &model, &provenance, Layout::Dylora).unwrap_err();
    assert!(format!("{error:#}").contains("is there already"), "{error:#}");
    Ok(())
}
