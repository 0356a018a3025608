//! The bench: what its rows compute, count and print. A row that fails does not stop the rows after
//! it.

mod common;

use std::sync::Arc;

use anyhow::{Context, Error, Result};
use clap::{Parser, ValueEnum};
use dylora::bench::flops::FlopsPerToken;
use dylora::bench::{Bench, BenchSettings, Figures, Header, Row, RowReport, passes};
use dylora::cli::{Cli, UsageError, describe};
use dylora::config::{Config, ExpertConfig, Family, LoraConfig, RouterScope, TargetModule, load};
use dylora::dist::World;
use dylora::model::experts::spec::ExpertSpec;
use dylora::model::families;
use dylora::model::{ForwardMode, RoutingSource};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use common::{
    family_specs, gradients, logits, plain_and, plain_router, seed, tiny_base, tiny_config,
    tiny_lora, tiny_model, two_rows,
};

fn config(set: &[&str]) -> Config {
    let text = "[base]\nsource = { path = 'base' }\n[data]\nseq_len = 16\nloss_on = 'all'\n\
                [[data.domains]]\nname = 'random'\ntrain = ['random']\n\
                [lora]\nrank = 2\ntarget_modules = ['attn.c_attn', 'mlp.c_fc']\n\
                [train]\nduration = { steps = 9 }\n";
    load::resolve(text, &plain_and(set)).expect("the config is sound")
}

/// A bench of one process on a tiny base.
fn alone(settings: BenchSettings) -> Result<Bench> {
    Bench::new(settings, &tiny_base(tiny_config()), Device::Cpu, &Arc::new(World::single()))
}

/// The figures of rows on a tiny base, from two steps after one step of warm-up.
fn measure(rows: &[Row], micro_batch_size: usize, set: &[&str]) -> Result<Vec<Figures>> {
    let settings = BenchSettings {
        config: config(set),
        warmup: 1,
        steps: 2,
        document_median: None,
        peak_flops: Some(1e12),
    };
    let bench = alone(settings)?;
    let measure = |&row: &Row| {
        let outcome = bench.measure(row, micro_batch_size)?.outcome;
        outcome.map_err(Error::msg).with_context(|| format!("{row:?}"))
    };
    rows.iter().map(measure).collect()
}

/// Reference: the presets s1 and s2 on GPT-2 124M, counted by hand. The base has
/// 12 * 12 * 768^2 + 50257 * 768 = 123,532,032, attention 2 * 12 * 1024 * 768 = 18,874,368. The
/// experts have 12 * 32 * (768 + 2304) in s1 and 12 * 128 * (3072 + 1536 + 3840 + 3840) in s2.
#[test]
fn a_step_has_the_operations_of_the_formula() -> Result<()> {
    let base = families::from_json(&json!({ "model_type": "gpt2" }))?;
    let flops = |num_experts, rank, modules: &[TargetModule]| -> Result<FlopsPerToken> {
        let target_modules = modules.into();
        let lora = LoraConfig { num_experts, rank, target_modules, ..LoraConfig::default() };
        Ok(FlopsPerToken::new(&base, &ExpertSpec::all(&lora, &base)?, 1024))
    };
    let s1 = flops(4, 8, &[TargetModule::AttnCAttn])?;
    let terms = FlopsPerToken { base: 123_532_032, attention: 18_874_368, experts: 1_179_648 };
    assert_eq!(s1, terms);
    assert_eq!((s1.training() as f64 / 1e5).round() / 10.0, 557.8);
    assert_eq!(s1.evaluation(), 2 * 123_532_032 + 18_874_368 + 2 * 1_179_648);
    let s2 = flops(8, 16, Family::Gpt2.modules())?;
    assert_eq!(s2.experts, 18_874_368);
    assert_eq!((s2.training() as f64 / 1e5).round() / 10.0, 664.0);
    Ok(())
}

/// B starts at zero, so the experts of a row do not change what the base computes.
#[test]
fn all_rows_start_at_the_loss_of_the_base() -> Result<()> {
    let _guard = seed(1);
    let of_blocks = Row::value_variants().iter().copied().filter(|row| !row.generates());
    let all: Vec<Row> = of_blocks.collect();
    let rows = measure(&all, 2, &[])?;
    for (row, figures) in all.iter().zip(&rows) {
        let difference = (figures.first_loss - rows[0].first_loss).abs();
        assert!(difference < 1e-5, "{row:?}: {figures:?}");
        assert_eq!((figures.tokens_per_step, figures.warmup_ms.len()), (32, 1));
        assert_eq!(figures.first_step_ms, figures.warmup_ms[0]);
        assert_eq!((figures.compile_ms, figures.capture_ms), (0.0, 0.0), "on the CPU");
        let [min, max] = [figures.min_step_ms, figures.max_step_ms];
        assert!(min <= figures.step_ms && figures.step_ms <= max && min > 0.0, "{figures:?}");
        let mfu = figures.tokens_per_sec * figures.flops_per_token as f64 / 1e12;
        assert_eq!(figures.mfu, Some(mfu));
    }
    let flops = |row| rows[all.iter().position(|&r| r == row).unwrap()].flops_per_token;
    assert!(flops(Row::Base) < flops(Row::SingleLora));
    assert!(flops(Row::SingleLora) < flops(Row::OnePass));
    assert_eq!(flops(Row::SingleLoraWide), flops(Row::OnePass));
    assert!(flops(Row::Eval) < flops(Row::Base));
    Ok(())
}

/// A step of the rows that generate adds a token to each text, and new experts change none.
#[test]
fn rows_that_generate_write_the_same_texts_at_first() -> Result<()> {
    let _guard = seed(4);
    let rows = measure(&[Row::GenerateBase, Row::Generate], 2, &[])?;
    for figures in &rows {
        assert_eq!(figures.tokens_per_step, 2);
        let per_sec = 2.0 / figures.step_ms * 1e3;
        assert!((figures.tokens_per_sec / per_sec - 1.0).abs() < 1e-9, "{figures:?}");
        assert!((figures.first_loss - rows[0].first_loss).abs() < 1e-5, "{figures:?}");
        assert!((figures.last_loss - rows[0].last_loss).abs() < 1e-5, "{figures:?}");
    }
    assert!(rows[0].flops_per_token < rows[1].flops_per_token);
    Ok(())
}

#[test]
fn rows_that_compute_the_same_train_alike_and_others_do_not() -> Result<()> {
    let _guard = seed(2);
    let last = |rows: &[Row], set: &[&str]| -> Result<Vec<f64>> {
        Ok(measure(rows, 2, set)?.iter().map(|figures| figures.last_loss).collect())
    };
    let set = ["optimizer.adapters.learning_rate=0.1"];
    let rows = [Row::OnePass, Row::OnePassLoop, Row::NPasses, Row::SingleLora, Row::Base];
    let losses = last(&rows, &set)?;
    assert!((losses[0] - losses[1]).abs() < 1e-4, "{losses:?}");
    for other in &losses[2..] {
        assert!((losses[0] - other).abs() > 1e-3, "{losses:?}");
    }
    // with a single expert, each of these rows is plain LoRA
    let losses = last(&rows, &[set[0], "lora.num_experts=1"])?;
    for same in &losses[1..4] {
        assert!((losses[0] - same).abs() < 1e-4, "{losses:?}");
    }
    Ok(())
}

/// Its gradient goes through all blocks, whether the base embeds positions or not.
#[test]
fn the_base_alone_has_the_loss_of_its_evaluation_in_every_family() -> Result<()> {
    let _guard = seed(8);
    let settings = BenchSettings {
        config: config(&["lora.target_modules=all-linear"]),
        warmup: 0,
        steps: 1,
        document_median: None,
        peak_flops: None,
    };
    let world = Arc::new(World::single());
    for (_, spec) in family_specs() {
        let bench = Bench::new(settings.clone(), &tiny_base(spec), Device::Cpu, &world)?;
        let loss = |row| -> Result<f64> {
            Ok(bench.measure(row, 2)?.outcome.map_err(Error::msg)?.first_loss)
        };
        let (base, eval) = (loss(Row::Base)?, loss(Row::Eval)?);
        assert!((base - eval).abs() < 1e-5, "{base} is not {eval}");
    }
    Ok(())
}

#[test]
fn accumulation_leaves_the_step_as_it_is() -> Result<()> {
    let _guard = seed(3);
    for row in [Row::Base, Row::OnePass, Row::NPasses, Row::Eval] {
        tch::manual_seed(3);
        let whole = measure(&[row], 4, &[])?.remove(0);
        tch::manual_seed(3);
        let parts = measure(&[row], 2, &["train.grad_accum_steps=2"])?.remove(0);
        assert_eq!(whole.tokens_per_step, parts.tokens_per_step);
        for (a, b) in [(whole.first_loss, parts.first_loss), (whole.last_loss, parts.last_loss)] {
            assert!((a - b).abs() < 1e-4, "{row:?}: {a} and {b}");
        }
    }
    Ok(())
}

/// Reference: the logits under one-hot routing weights for each expert, blended and scored here in
/// f64.
#[test]
fn n_passes_blend_the_experts_logits_by_the_routers_weights() -> Result<()> {
    let _guard = seed(4);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let inputs = two_rows();
    let weights_bte = model.routing(&inputs, ForwardMode::EVAL).remove(0).weights;
    let mut blended_btv = Tensor::zeros([2, 7, 61], common::DOUBLE);
    for (expert, one_hot) in [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]].iter().enumerate()
    {
        let given = RoutingSource::Given(Tensor::from_slice(one_hot));
        let z = logits(&model, &inputs, &given);
        blended_btv = &blended_btv + z * weights_bte.narrow(-1, expert as i64, 1);
    }
    let log_probs = blended_btv.log_softmax(-1, Kind::Double).view([-1, 61]);
    let of_labels = log_probs.index_select(0, &inputs.labelled);
    let expected = -of_labels.gather(1, &inputs.labels.unsqueeze(-1), false).sum(Kind::Double);
    let loss = passes::summed_loss(&model, &inputs, ForwardMode::EVAL)?;
    common::assert_close("loss", &loss, &expected, 1e-9);
    for (name, gradient) in gradients(&model, &loss) {
        assert!(gradient.abs().max().double_value(&[]) > 1e-6, "`{name}` has no gradient");
    }
    Ok(())
}

#[test]
fn a_row_that_cannot_be_measured_says_why() -> Result<()> {
    let _guard = seed(5);
    let mut config = config(&[]);
    let mut vast = config.clone();
    vast.lora.rank = 1 << 45;
    config.router.scope = RouterScope::Layer;
    let settings =
        BenchSettings { config, warmup: 0, steps: 1, document_median: Some(5.0), peak_flops: None };
    let bench = alone(settings.clone())?;
    let error = bench.measure(Row::NPasses, 2)?.outcome.unwrap_err();
    assert!(error.contains("one router for all layers"), "{error}");
    let mut uneven = settings.clone();
    uneven.config.lora.experts = vec![ExpertConfig { rank: Some(3), ..ExpertConfig::default() }];
    let uneven = alone(uneven)?;
    let error = uneven.measure(Row::SingleLoraWide, 2)?.outcome.unwrap_err();
    assert!(error.contains("no meaning where ranks differ"), "{error}");
    // no memory holds 2^45 rows of 16 numbers; tch panics because libtorch cannot allocate them
    let vast = BenchSettings { config: vast, ..settings };
    let report = alone(vast)?.measure(Row::OnePass, 2)?;
    let error = report.outcome.unwrap_err();
    assert!(error.contains("allocate") && !error.contains("Exception raised"), "{error}");
    let report = bench.measure(Row::OnePass, 2)?;
    assert!(report.outcome.is_ok(), "{report:?}");
    Ok(())
}

/// The experts that are measured are those of the row's config, with its scale and with a part that
/// is always on.
#[test]
fn a_row_has_the_experts_of_its_config() -> Result<()> {
    let _guard = seed(6);
    let base = tiny_base(tiny_config());
    let alphas = |row: Row, set: &[&str]| -> Result<Vec<f64>> {
        let config = row.config(&config(set))?;
        let specs = row.experts(&config, &base)?;
        let alpha = |spec: &ExpertSpec| spec.modules.values().next().expect("it has some").alpha;
        Ok(specs.iter().map(alpha).collect())
    };
    assert_eq!(alphas(Row::OnePass, &[])?, [16.0; 4]);
    assert_eq!(alphas(Row::OnePass, &["lora.scale=mixture"])?, [64.0; 4]);
    assert_eq!(alphas(Row::OnePass, &["lora.scale=mixture", "router.top_k=2"])?, [32.0; 4]);
    assert_eq!(alphas(Row::SingleLora, &["lora.scale=mixture"])?, [16.0]);
    // of rank E r, with the scaling of the mixture at even weights
    assert_eq!(alphas(Row::SingleLoraWide, &["lora.scale=mixture"])?, [64.0]);
    let shared = ["lora.shared_rank=1"];
    assert_eq!(alphas(Row::OnePass, &shared)?, [16.0, 16.0, 16.0, 16.0, 8.0]);
    assert!(alphas(Row::Base, &shared)?.is_empty());
    let rows = [Row::OnePass, Row::OnePassLoop, Row::NPasses, Row::Eval];
    let figures = measure(&rows, 2, &["lora.shared_rank=1"])?;
    assert!(figures.iter().all(|row| (row.first_loss - figures[0].first_loss).abs() < 1e-5));
    Ok(())
}

/// The keys of an object in their order, separated by commas.
fn keys(json: &Value) -> String {
    let keys = json.as_object().expect("an object").keys();
    keys.map(String::as_str).collect::<Vec<_>>().join(",")
}

/// `scripts/compare_peft.py` and users who keep the lines depend on the keys.
#[test]
fn a_row_is_a_line_with_its_figures_or_its_error() -> Result<()> {
    let figures = Figures {
        tokens_per_sec: 1.5,
        step_ms: 2.0,
        min_step_ms: 1.0,
        max_step_ms: 3.0,
        tokens_per_step: 4,
        peak_memory_bytes: Some(5),
        extra_memory_bytes: None,
        flops_per_token: 6,
        mfu: None,
        build_ms: 7.0,
        compile_ms: 0.0,
        first_step_ms: 8.0,
        first_step_unix_secs: 9.0,
        capture_ms: 0.0,
        warmup_ms: vec![8.0],
        first_loss: 10.0,
        last_loss: 11.0,
    };
    let line =
        |row, outcome| serde_json::to_string(&RowReport { row, micro_batch_size: 2, outcome });
    assert_eq!(
        line(Row::SingleLoraWide, Ok(figures))?,
        r#"{"kind":"row","row":"single_lora_wide","micro_batch_size":2,"tokens_per_sec":1.5,"#
            .to_owned()
            + r#""step_ms":2.0,"min_step_ms":1.0,"max_step_ms":3.0,"tokens_per_step":4,"#
            + r#""peak_memory_bytes":5,"extra_memory_bytes":null,"flops_per_token":6,"mfu":null,"#
            + r#""build_ms":7.0,"compile_ms":0.0,"first_step_ms":8.0,"first_step_unix_secs":9.0,"#
            + r#""capture_ms":0.0,"warmup_ms":[8.0],"first_loss":10.0,"last_loss":11.0,"#
            + r#""error":null}"#
    );
    assert_eq!(
        line(Row::Base, Err("no memory".into()))?,
        r#"{"kind":"row","row":"base","micro_batch_size":2,"error":"no memory"}"#
    );
    Ok(())
}

#[test]
fn the_header_has_the_setting_without_the_micro_batch_size() -> Result<()> {
    let config = config(&["train.micro_batch_size=3"]);
    let header = Header {
        dylora_version: "0.1.0",
        libtorch_version: "2.11.0",
        device: "cpu".into(),
        device_model: "a model".into(),
        processes: 1,
        threads: 2,
        base: "a base".into(),
        shape: json!({ "n_layer": 1 }),
        dtype: config.base.dtype,
        seq_len: 16,
        document_median: None,
        document_sigma: None,
        warmup: 1,
        steps: 2,
        seed: 0,
        peak_tflops: None,
        mfu_formula: "a formula",
        lora: config.lora.clone(),
        router: config.router.clone(),
        train: config.train.clone(),
        optimizer: config.optimizer.clone(),
    };
    let line = serde_json::to_value(&header)?;
    assert_eq!(
        keys(&line),
        "kind,dylora_version,libtorch_version,device,device_model,processes,threads,base,shape,\
         dtype,seq_len,document_median,document_sigma,warmup,steps,seed,peak_tflops,mfu_formula,\
         lora,router,train,optimizer"
    );
    assert_eq!((&line["kind"], &line["dtype"]), (&"header".into(), &"f32".into()));
    assert_eq!((&line["document_median"], &line["peak_tflops"]), (&Value::Null, &Value::Null));
    let whole = keys(&json!(config.train));
    assert_eq!(keys(&line["train"]), whole.replace("micro_batch_size,", ""));
    assert!(whole.contains("micro_batch_size,"), "{whole}");
    Ok(())
}

#[test]
fn faults_of_the_arguments_are_faults_of_usage() {
    let said = |arguments: &[&str]| {
        let arguments = [&["dylora", "bench", "--device=cpu"], arguments].concat();
        match Cli::try_parse_from(arguments) {
            Err(error) => {
                assert_eq!(error.exit_code(), 2);
                error.to_string()
            }
            Ok(cli) => {
                let error = cli.run().unwrap_err();
                assert!(error.is::<UsageError>(), "{error:#}");
                describe(&error)
            }
        }
    };
    for (fault, expected) in [
        (
            &["--rows=two"][..],
            "invalid value 'two' for '--rows <NAME,..>'\n  [possible values: base, single_lora, \
             single_lora_wide, one_pass, one_pass_loop, two_passes, n_passes, eval, \
             generate_base, generate]",
        ),
        (&["--modules=attention"], "`attention` names no linear layer"),
        (&["--modules=q_proj"], "`q_proj` matches no linear layer of the base, a `gpt2`"),
        (
            &["--size=gpt3"],
            "[possible values: gpt2, gpt2-medium, gpt2-large, gpt2-xl, smollm2-135m, qwen3-0.6b, \
             llama-3.2-1b, llama-3.1-8b]",
        ),
        (
            &["--dtype=f64"],
            "invalid value 'f64' for '--dtype <DTYPE>'\n  [possible values: f32, bf16]",
        ),
        (&["--size=gpt2", "--base=demo/base"], "cannot be used with"),
        (&["--base=demo/base", "--seq-len=512"], "`--seq-len` must be at most the base's 256"),
        (&["--preset=s3"], "[possible values: s1, s2]"),
        (&["--routers=expert"], "[possible values: shared, layer, module]"),
        (&["--steps=0"], "`--steps` must be at least 1, got 0"),
        (
            &["--set", "data.seq_len=2048"],
            "`--set data.seq_len` has no effect on the bench: use `--seq-len`",
        ),
        (&["--set=train.micro_batch_size = 3"], "use `--batch`"),
        (&["--set", "lora.experts=[{source={path='x'}}]"], "the bench draws new experts"),
        (&["--batch=2,0"], "`--batch` must be at least 1, got 0"),
        (&["--rank=0"], "`lora.rank` must be at least 1, got 0"),
        (&["--dropout=1"], "`lora.dropout` must be at least 0 and below 1, got 1"),
        (&["--accumulate=0"], "`train.grad_accum_steps` must be at least 1, got 0"),
        (&["--set=router.top_k=9"], "`router.top_k` must be from 1 to `lora.num_experts` 4, got 9"),
        (&["--set=lora.rnak=9"], "there is no key `lora.rnak`"),
        (&["--documents=-1"], "`--documents` must be a number above 0, got -1"),
    ] {
        let found = said(fault);
        assert!(found.contains(expected), "{fault:?}: {found}");
    }
}
