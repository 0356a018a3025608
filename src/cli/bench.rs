//! `dylora bench`: measures how fast a mixture is on a device, and compares it with other ways to
//! compute it.

use std::str::FromStr;

use anyhow::{Result, anyhow, bail};
use clap::{Args, ValueEnum};
use serde_json::json;
use tch::Device;

use super::bench_report::{as_text, header, name, print_line};
use super::open::{base_source, open_base};
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

/// Config keys that `--set` cannot change, each with the flag that does.
const KEYS_OF_FLAGS: [(&str, &str); 5] = [
    ("base.source", "--base"),
    ("base.dtype", "--dtype"),
    ("data.seq_len", "--seq-len"),
    ("run.device", "--device"),
    ("train.micro_batch_size", "--batch"),
];

/// The dense bf16 peak of NVIDIA's H100 SXM and H200, in TFLOP/s (NVIDIA's data sheet of the H100,
/// without sparsity).
const HOPPER_TFLOPS: f64 = 989.4;

/// Arguments of `dylora bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The device to measure: `auto`, `cpu` or `cuda[:N]`.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Measure a base with the shape of this model and random weights.
    #[arg(long, value_name = "NAME", default_value = "gpt2", conflicts_with = "base")]
    size: Size,
    /// Measure this base: a folder, or a Hub id, `NAME[@REVISION]`.
    #[arg(long, value_name = "DIR")]
    base: Option<String>,
    /// The dtype that the base computes in [default: `bf16` on CUDA, `f32` on the CPU].
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Length of a block, in tokens.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    seq_len: usize,
    /// Number of sequences in one forward pass. With several numbers, each is measured.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "8")]
    batch: Vec<usize>,
    /// Number of forward passes in one step.
    #[arg(long, value_name = "N", default_value_t = 1)]
    accumulate: usize,
    /// Pack short documents with this median length, in tokens. The lengths are lognormal with a
    /// sigma of 0.6 [default: each block is one document].
    #[arg(long, value_name = "MEDIAN")]
    documents: Option<f64>,
    #[command(flatten)]
    mixture: MixtureArgs,
    /// The rows to measure [default: all].
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    rows: Vec<Row>,
    /// Number of steps that count [default: 30 on CUDA, 10 on the CPU].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Number of steps before the measured ones, because the first replays of a CUDA graph are slow
    /// [default: 10 on CUDA, 5 on the CPU].
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,
    /// The seed of weights, tokens and dropout.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The device's peak in TFLOP/s, from which the MFU is computed [default: 989.4 on an H100 or
    /// H200 in bf16; otherwise the MFU is left out].
    #[arg(long, value_name = "TFLOPS")]
    peak_tflops: Option<f64>,
    /// Set any other key of the mixture's config, for example `router.top_k=2`. The option can be
    /// repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print lines of JSON: one for the setting, then one for each row.
    #[arg(long)]
    json: bool,
}

/// The arguments that describe the mixture.
#[derive(Debug, Args)]
struct MixtureArgs {
    /// The mixture to start from. `--experts`, `--rank`, `--alpha` and `--modules` change it.
    #[arg(long, default_value = "s1")]
    preset: Preset,
    /// Number of experts [default: the preset's].
    #[arg(long, value_name = "N")]
    experts: Option<i64>,
    /// Rank of each expert [default: the preset's].
    #[arg(long, value_name = "N")]
    rank: Option<i64>,
    /// Numerator of the scaling `alpha / rank` [default: the preset's].
    #[arg(long, value_name = "NUMBER")]
    alpha: Option<f64>,
    /// The linear layers that get experts, for example `attn.c_attn,mlp.c_fc`, or `all` [default:
    /// the preset's].
    #[arg(long, value_name = "NAME,..|all")]
    modules: Option<Modules>,
    /// Dropout of the experts' inputs.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// How many routers there are.
    #[arg(long, default_value = "shared")]
    routers: RouterScope,
}

/// GPT-2's four shapes.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Size {
    /// 12 layers of width 768: 124 million parameters.
    Gpt2,
    /// 24 layers of width 1024: 355 million parameters.
    Gpt2Medium,
    /// 36 layers of width 1280: 774 million parameters.
    Gpt2Large,
    /// 48 layers of width 1600: 1.6 billion parameters.
    Gpt2Xl,
}

impl Size {
    fn spec(self) -> DecoderSpec {
        let (n_layer, n_head, n_embd) = match self {
            Self::Gpt2 => (12, 12, 768),
            Self::Gpt2Medium => (24, 16, 1024),
            Self::Gpt2Large => (36, 20, 1280),
            Self::Gpt2Xl => (48, 25, 1600),
        };
        let json = json!({
            "model_type": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
        });
        gpt2::from_json(&json).expect("the four shapes are sound")
    }
}

/// The mixtures that are measured most.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Preset {
    /// 4 experts of rank 8 and alpha 16 on c_attn.
    S1,
    /// 8 experts of rank 16 and alpha 32 on all four linear layers.
    S2,
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

/// The value of `--modules`.
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

/// Runs the command.
pub fn run(args: BenchArgs, shared: &Shared) -> Result<()> {
    let device = device(args.device)?;
    args.check().map_err(usage)?;
    let device_model = ffi::device_model(device).unwrap_or_else(|| "unknown".into());
    let settings = args.settings(device, &device_model)?;
    let (base, weights) = args.weights(&settings.config.base, shared)?;
    let header = header(&settings, base, &weights.spec, device, device_model);
    let bench = Bench::new(settings, &weights, device);
    drop(weights);
    if args.json {
        print_line(&header)?;
    }
    let rows = if args.rows.is_empty() { Row::value_variants() } else { &args.rows };
    let num_reports = rows.len() * args.batch.len();
    let bar = CountBar::new(shared.show_progress, "measuring", num_reports as u64);
    let mut reports = vec![];
    for &batch in &args.batch {
        for &row in rows {
            let report = bench.measure(row, batch);
            if args.json {
                print_line(&report)?;
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
    /// The settings of the bench.
    ///
    /// - `device_model`: the device's name as its maker gives it, which says whether its peak is
    ///   known
    fn settings(&self, device: Device, device_model: &str) -> Result<BenchSettings> {
        let on_cuda = matches!(device, Device::Cuda(_));
        let dtype = self.dtype.unwrap_or(if on_cuda { Dtype::Bf16 } else { Dtype::F32 });
        let (warmup, steps) = if on_cuda { (10, 30) } else { (5, 10) };
        let (warmup, steps) = (self.warmup.unwrap_or(warmup), self.steps.unwrap_or(steps));
        let text = load::to_toml(&self.config(dtype, on_cuda, warmup + steps)?);
        let config = load::resolve(&text, &self.set).map_err(usage)?;
        if config.lora.experts.iter().any(|expert| expert.source.is_some()) {
            return Err(usage(anyhow!(
                "`lora.experts` must have no `source`: the bench draws new experts"
            )));
        }
        let is_hopper = device_model.contains("H100") || device_model.contains("H200");
        let known_peak = (on_cuda && is_hopper && dtype == Dtype::Bf16).then_some(HOPPER_TFLOPS);
        Ok(BenchSettings {
            config,
            warmup,
            steps,
            document_median: self.documents,
            peak_flops: self.peak_tflops.or(known_peak).map(|tflops| tflops * 1e12),
        })
    }

    /// The mixture's config. Its micro-batch size does not count, because each row sets its own.
    fn config(&self, dtype: Dtype, on_cuda: bool, num_steps: usize) -> Result<Config> {
        let source = match &self.base {
            Some(text) => base_source(text)?,
            // nothing is read from there, because the weights are random
            None => BaseSource::Hub(HubSource { repo: name(self.size), revision: "main".into() }),
        };
        let mixture = &self.mixture;
        let mut lora = mixture.preset.lora();
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
                // as in the configs for GPT-2: small chunks save memory but cost time on a GPU
                loss_chunk_tokens: if on_cuda { 4096 } else { 1024 },
                ..TrainConfig::default()
            },
            optimizer: OptimizerConfig { max_grad_norm: Some(1.0), ..OptimizerConfig::default() },
            schedule: ScheduleConfig::default(),
            growth: None,
        })
    }

    /// Checks what the validation of the config does not cover.
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

    /// The base's name and weights, in f32 on the CPU.
    fn weights(&self, config: &BaseConfig, shared: &Shared) -> Result<(String, Decoder)> {
        let check_seq_len = |n_positions: i64| {
            if self.seq_len as i64 > n_positions {
                return Err(usage(anyhow!(
                    "`--seq-len` must be at most the base's {n_positions} positions, got {}",
                    self.seq_len
                )));
            }
            Ok(())
        };
        if self.base.is_some() {
            let base = open_base(config, shared)?;
            check_seq_len(base.spec.n_positions)?;
            return Ok((base.label.clone(), base.weights()?));
        }
        let spec = self.size.spec();
        check_seq_len(spec.n_positions)?;
        tch::manual_seed(self.seed as i64);
        Ok((format!("{} (random weights)", name(self.size)), Decoder::random(spec)))
    }
}
