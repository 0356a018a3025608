//! `dylora bench`: how fast the mixture is here, and what it costs beside other ways to compute.

use std::str::FromStr;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde_json::json;
use tch::Device;

use super::bench_report::{as_text, header, print_line, row_line};
use super::open::{base_source, open_base, parse_dtype};
use super::progress::CountBar;
use super::{Shared, device, usage};
use crate::bench::{Bench, BenchSettings, Row};
use crate::config::{
    BaseConfig, BaseSource, Config, DataConfig, DeviceChoice, DomainConfig, Dtype, Duration,
    HubSource, LoraConfig, LossOn, Method, Mixing, OnBadRecord, OnExhausted, OptimizerConfig,
    RouterConfig, RouterScope, RunConfig, ScheduleConfig, TargetModule, TrainConfig, load,
};
use crate::ffi;
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::families::gpt2;

/// Keys that `--set` does not reach, and the flags that do.
const KEYS_OF_FLAGS: [(&str, &str); 5] = [
    ("base.source", "--base"),
    ("base.dtype", "--dtype"),
    ("data.seq_len", "--seq-len"),
    ("run.device", "--device"),
    ("train.micro_batch_size", "--batch"),
];

/// The dense bf16 peak of NVIDIA's H100 SXM and H200, TFLOP/s (NVIDIA H100 data sheet, without sparsity).
const HOPPER_TFLOPS: f64 = 989.4;

/// Arguments of `dylora bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// `auto`, `cpu` or `cuda[:N]`.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Random weights of this shape: gpt2, gpt2-medium, gpt2-large or gpt2-xl [default: gpt2].
    #[arg(long, value_name = "NAME", conflicts_with = "base")]
    size: Option<Size>,
    /// Given weights: a folder, or a Hub id as `NAME[@REVISION]`.
    #[arg(long, value_name = "DIR")]
    base: Option<String>,
    /// What the base computes in [default: bf16 on CUDA, f32 on the CPU].
    #[arg(long, value_name = "f32|bf16", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
    /// Tokens of a block.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    seq_len: usize,
    /// Sequences of a forward; each number is measured.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "8")]
    batch: Vec<usize>,
    /// Forwards of a step.
    #[arg(long, value_name = "N", default_value_t = 1)]
    accumulate: usize,
    /// Short documents, packed, of this median length in tokens (lognormal, sigma 0.6) [default: each
    /// block is one document].
    #[arg(long, value_name = "MEDIAN")]
    documents: Option<f64>,
    #[command(flatten)]
    mixture: MixtureArgs,
    /// What is measured [default: all]: base, single_lora, single_lora_wide, one_pass, one_pass_loop,
    /// two_passes, n_passes, eval.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    rows: Vec<Row>,
    /// Steps that count [default: 30 on CUDA, 10 on the CPU].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Steps before them that do not; the first replays of a CUDA graph are slow [default: 10 on CUDA, 5 on the CPU].
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,
    /// Seeds weights, tokens and dropout.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The device's peak, for the MFU [default: 989.4 on an H100 or H200 in bf16, else no MFU].
    #[arg(long, value_name = "TFLOPS")]
    peak_tflops: Option<f64>,
    /// Set any other key of the mixture's config, repeatable, as `router.top_k=2`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print JSON: a line for the setting, then a line for each row.
    #[arg(long)]
    json: bool,
}

/// The mixture that is measured.
#[derive(Debug, Args)]
struct MixtureArgs {
    /// s1: c_attn, rank 8, 4 experts, alpha 16; s2: all four linear layers, rank 16, 8 experts, alpha
    /// 32. The other flags go first [default: s1].
    #[arg(long, value_name = "s1|s2")]
    preset: Option<Preset>,
    /// Experts.
    #[arg(long, value_name = "N")]
    experts: Option<i64>,
    /// Rank of an expert.
    #[arg(long, value_name = "N")]
    rank: Option<i64>,
    /// Numerator of the scaling `alpha / rank`.
    #[arg(long, value_name = "NUMBER")]
    alpha: Option<f64>,
    /// Linear layers with experts, as `attn.c_attn,mlp.c_fc`, or `all`.
    #[arg(long, value_name = "NAME,..|all")]
    modules: Option<Modules>,
    /// Dropout of the experts' inputs.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// One router for all layers (`shared`), or one for each `layer` or `module`.
    #[arg(long, value_name = "shared|layer|module", default_value = "shared", value_parser = parse_scope)]
    routers: RouterScope,
}

/// GPT-2's four shapes.
#[derive(Debug, Clone, Copy)]
struct Size {
    name: &'static str,
    n_layer: i64,
    n_head: i64,
    n_embd: i64,
}

impl Size {
    const ALL: [Self; 4] = [
        Self { name: "gpt2", n_layer: 12, n_head: 12, n_embd: 768 },
        Self { name: "gpt2-medium", n_layer: 24, n_head: 16, n_embd: 1024 },
        Self { name: "gpt2-large", n_layer: 36, n_head: 20, n_embd: 1280 },
        Self { name: "gpt2-xl", n_layer: 48, n_head: 25, n_embd: 1600 },
    ];

    fn config(self) -> DecoderSpec {
        let Self { n_layer, n_head, n_embd, .. } = self;
        let json = json!({
            "model_type": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
        });
        gpt2::from_json(&json).expect("the four shapes are sound")
    }
}

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let size = Self::ALL.into_iter().find(|size| size.name == text);
        size.ok_or_else(|| anyhow!("must be `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`"))
    }
}

/// The settings that are measured most.
#[derive(Debug, Clone, Copy)]
enum Preset {
    S1,
    S2,
}

impl FromStr for Preset {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "s1" => Ok(Self::S1),
            "s2" => Ok(Self::S2),
            _ => bail!("must be `s1` or `s2`"),
        }
    }
}

impl Preset {
    fn lora(self) -> LoraConfig {
        let target_modules = match self {
            Self::S1 => vec![TargetModule::AttnCAttn],
            Self::S2 => TargetModule::ALL.to_vec(),
        };
        let (num_experts, rank, alpha) = match self {
            Self::S1 => (4, 8, 16.0),
            Self::S2 => (8, 16, 32.0),
        };
        LoraConfig { num_experts, rank, alpha, target_modules, ..LoraConfig::default() }
    }
}

/// Target modules by name.
#[derive(Debug, Clone)]
struct Modules(Vec<TargetModule>);

impl FromStr for Modules {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "all" {
            return Ok(Self(TargetModule::ALL.to_vec()));
        }
        let find = |name: &str| TargetModule::ALL.into_iter().find(|module| module.name() == name);
        let modules: Option<Vec<_>> = text.split(',').map(find).collect();
        modules.map(Self).ok_or_else(|| {
            let names = TargetModule::ALL.map(|module| format!("`{}`", module.name()));
            anyhow!("must be `all` or some of {}, with commas between", names.join(", "))
        })
    }
}

fn parse_scope(text: &str) -> Result<RouterScope> {
    match text {
        "shared" => Ok(RouterScope::Shared),
        "layer" => Ok(RouterScope::Layer),
        "module" => Ok(RouterScope::Module),
        _ => bail!("must be `shared`, `layer` or `module`"),
    }
}

/// Runs the command.
pub fn run(args: BenchArgs, shared: &Shared) -> Result<()> {
    let device = device(args.device)?;
    let on_cuda = matches!(device, Device::Cuda(_));
    let dtype = args.dtype.unwrap_or(if on_cuda { Dtype::Bf16 } else { Dtype::F32 });
    args.check().map_err(usage)?;
    let (warmup, steps) = if on_cuda { (10, 30) } else { (5, 10) };
    let (warmup, steps) = (args.warmup.unwrap_or(warmup), args.steps.unwrap_or(steps));
    let text = load::to_toml(&args.config(dtype, on_cuda, warmup + steps)?);
    let config = load::resolve(&text, &args.set).map_err(usage)?;
    if config.lora.experts.iter().any(|expert| expert.source.is_some()) {
        return Err(usage(anyhow!(
            "`lora.experts` must have no `source`: the bench draws new experts"
        )));
    }
    let (label, weights) = args.weights(&config.base, shared)?;
    let device_model = ffi::device_model(device).unwrap_or_else(|| "unknown".into());
    let hopper = device_model.contains("H100") || device_model.contains("H200");
    let known = (on_cuda && hopper && dtype == Dtype::Bf16).then_some(HOPPER_TFLOPS);
    let peak_tflops = args.peak_tflops.or(known);
    let settings = BenchSettings {
        config,
        warmup,
        steps,
        document_median: args.documents,
        peak_flops: peak_tflops.map(|tflops| tflops * 1e12),
    };
    let header = header(&settings, &label, &weights.spec, device, &device_model);
    let bench = Bench::new(settings, &weights, device);
    drop(weights);
    let rows = if args.rows.is_empty() { Row::ALL.to_vec() } else { args.rows };
    if args.json {
        print_line(&header)?;
    }
    let bar =
        CountBar::new(shared.show_progress, "measuring", (rows.len() * args.batch.len()) as u64);
    let mut reports = vec![];
    for &batch in &args.batch {
        for &row in &rows {
            let report = bench.measure(row, batch);
            if args.json {
                print_line(&row_line(&report)?)?;
            }
            reports.push(report);
            bar.set(reports.len() as u64);
        }
    }
    bar.finish();
    if !args.json {
        println!("{}", as_text(&header, &reports));
    }
    Ok(())
}

impl BenchArgs {
    /// The mixture's config; its micro-batch size is each row's own.
    fn config(&self, dtype: Dtype, on_cuda: bool, num_steps: usize) -> Result<Config> {
        let size = self.size.map_or("gpt2", |size| size.name);
        let source = match &self.base {
            Some(text) => base_source(text)?,
            // for its name alone: the weights are random
            None => BaseSource::Hub(HubSource { repo: size.into(), revision: "main".into() }),
        };
        let mixture = &self.mixture;
        let mut lora = mixture.preset.unwrap_or(Preset::S1).lora();
        lora.num_experts = mixture.experts.unwrap_or(lora.num_experts);
        lora.rank = mixture.rank.unwrap_or(lora.rank);
        lora.alpha = mixture.alpha.unwrap_or(lora.alpha);
        if let Some(Modules(modules)) = &mixture.modules {
            lora.target_modules.clone_from(modules);
        }
        lora.dropout = mixture.dropout;
        let random = DomainConfig {
            name: "random".into(),
            train: vec!["random".into()],
            validation: None,
            weight: 1.0,
            record_domain: None,
        };
        Ok(Config {
            method: Method::RoutedLora,
            run: RunConfig { seed: self.seed, device: self.device, ..RunConfig::default() },
            base: BaseConfig { source, tokenizer: None, dtype },
            data: DataConfig {
                seq_len: self.seq_len,
                loss_on: LossOn::All,
                on_bad_record: OnBadRecord::default(),
                mixing: Mixing::default(),
                on_exhausted: OnExhausted::default(),
                domains: vec![random],
            },
            lora,
            router: RouterConfig { scope: mixture.routers, ..RouterConfig::default() },
            train: TrainConfig {
                duration: Duration::Steps(num_steps as u64),
                grad_accum_steps: self.accumulate,
                // as the configs for GPT-2 have it: small chunks save memory, and cost time on a GPU
                loss_chunk_tokens: if on_cuda { 4096 } else { 1024 },
                ..TrainConfig::default()
            },
            optimizer: OptimizerConfig { max_grad_norm: Some(1.0), ..OptimizerConfig::default() },
            schedule: ScheduleConfig::default(),
            growth: None,
        })
    }

    /// Checks what the config does not.
    fn check(&self) -> Result<()> {
        if self.steps == Some(0) {
            bail!("`--steps` must be at least 1, got 0");
        }
        if self.batch.contains(&0) {
            bail!("`--batch` must be at least 1, got 0");
        }
        let keys = self.set.iter().filter_map(|item| Some(item.split_once('=')?.0.trim()));
        for set in keys {
            if let Some((key, flag)) = KEYS_OF_FLAGS.iter().find(|(key, _)| set.starts_with(key)) {
                bail!("`--set {key}` has no effect on the bench: use `{flag}`");
            }
        }
        for (flag, value) in [("--documents", self.documents), ("--peak-tflops", self.peak_tflops)]
        {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                bail!("`{flag}` must be a number above 0, got {value}");
            }
        }
        Ok(())
    }

    /// The base's name and weights, f32 on the CPU.
    fn weights(&self, config: &BaseConfig, shared: &Shared) -> Result<(String, Decoder)> {
        let check_seq_len = |n_positions: i64| match self.seq_len as i64 > n_positions {
            false => Ok(()),
            true => Err(usage(anyhow!(
                "`--seq-len` must be at most the base's {n_positions} positions, got {}",
                self.seq_len
            ))),
        };
        if self.base.is_some() {
            let base = open_base(config, shared)?;
            check_seq_len(base.spec.n_positions)?;
            return Ok((base.label.clone(), base.weights()?));
        }
        let size = self.size.unwrap_or(Size::ALL[0]);
        check_seq_len(size.config().n_positions)?;
        tch::manual_seed(self.seed as i64);
        Ok((format!("{} (random weights)", size.name), Decoder::random(size.config())))
    }
}
