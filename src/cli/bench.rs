//! `dylora bench`: how fast the mixture is here, and what it costs beside other ways to compute.

use std::io::Write;
use std::str::FromStr;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde_json::{Value, json};
use tch::Device;

use super::open::{base_source, device_name, open_base, parse_dtype};
use super::progress::CountBar;
use super::{Shared, device, table, usage};
use crate::bench::data::LENGTH_SIGMA;
use crate::bench::{Bench, BenchSettings, Figures, Row, RowReport};
use crate::config::{
    BaseConfig, BaseSource, Config, DataConfig, DeviceChoice, DomainConfig, Dtype, Duration,
    HubSource, LoraConfig, LossOn, Method, Mixing, OnBadRecord, OnExhausted, OptimizerConfig,
    RouterConfig, RouterScope, RunConfig, ScheduleConfig, TargetModule, TrainConfig, load,
};
use crate::ffi;
use crate::model::gpt2::Gpt2;
use crate::model::gpt2_config::Gpt2Config;

/// The dense bf16 peak of NVIDIA's H100 SXM and H200, TFLOP/s (NVIDIA H100 data sheet, without sparsity).
const HOPPER_TFLOPS: f64 = 989.4;

/// How [`crate::bench::flops`] counts, in one line.
const FORMULA: &str = "MFU = tokens/s * FLOPs a token / peak; FLOPs a token = 4P + 3A + 6Lo in training, 2P + A + 2Lo \
                       in evaluation; P = 12 L d^2 + V d, A = 2 L T d, Lo = sum of r (in + out) over experts and \
                       modules";

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
    /// Steps that count.
    #[arg(long, value_name = "N", default_value_t = 10)]
    steps: usize,
    /// Steps before them that do not.
    #[arg(long, value_name = "N", default_value_t = 5)]
    warmup: usize,
    /// Seeds weights, tokens and dropout.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The device's peak, for the MFU [default: 989.4 on an H100 or H200 in bf16, else no MFU].
    #[arg(long, value_name = "TFLOPS")]
    peak_tflops: Option<f64>,
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

    fn config(self) -> Gpt2Config {
        let Self { n_layer, n_head, n_embd, .. } = self;
        let json = json!({
            "model_type": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
        });
        Gpt2Config::from_json(&json).expect("the four shapes are sound")
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
    let config = args.config(dtype)?;
    args.check(&config).map_err(usage)?;
    let (label, weights) = args.weights(&config.base, shared)?;
    let device_model = ffi::device_model(device).unwrap_or_else(|| "unknown".into());
    let hopper = device_model.contains("H100") || device_model.contains("H200");
    let known = (on_cuda && hopper && dtype == Dtype::Bf16).then_some(HOPPER_TFLOPS);
    let peak_tflops = args.peak_tflops.or(known);
    let settings = BenchSettings {
        config,
        warmup: args.warmup,
        steps: args.steps,
        document_median: args.documents,
        peak_flops: peak_tflops.map(|tflops| tflops * 1e12),
    };
    let header = header(&settings, &label, &weights.config, device, &device_model);
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
    fn config(&self, dtype: Dtype) -> Result<Config> {
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
                duration: Duration::Steps((self.warmup + self.steps).max(1) as u64),
                grad_accum_steps: self.accumulate,
                ..TrainConfig::default()
            },
            optimizer: OptimizerConfig { max_grad_norm: Some(1.0), ..OptimizerConfig::default() },
            schedule: ScheduleConfig::default(),
            growth: None,
        })
    }

    fn check(&self, config: &Config) -> Result<()> {
        if self.steps == 0 {
            bail!("`--steps` must be at least 1, got 0");
        }
        if self.batch.contains(&0) {
            bail!("`--batch` must be at least 1, got 0");
        }
        for (flag, value) in [("--documents", self.documents), ("--peak-tflops", self.peak_tflops)]
        {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                bail!("`{flag}` must be a number above 0, got {value}");
            }
        }
        load::validate(config)
    }

    /// The base's name and weights, f32 on the CPU.
    fn weights(&self, config: &BaseConfig, shared: &Shared) -> Result<(String, Gpt2)> {
        let check_seq_len = |n_positions: i64| match self.seq_len as i64 > n_positions {
            false => Ok(()),
            true => Err(usage(anyhow!(
                "`--seq-len` must be at most the base's {n_positions} positions, got {}",
                self.seq_len
            ))),
        };
        if self.base.is_some() {
            let base = open_base(config, shared)?;
            check_seq_len(base.config.n_positions)?;
            return Ok((base.label.clone(), base.weights()?));
        }
        let size = self.size.unwrap_or(Size::ALL[0]);
        check_seq_len(size.config().n_positions)?;
        tch::manual_seed(self.seed as i64);
        Ok((format!("{} (random weights)", size.name), Gpt2::random(size.config())))
    }
}

/// What holds for all rows.
fn header(
    settings: &BenchSettings,
    label: &str,
    shape: &Gpt2Config,
    device: Device,
    device_model: &str,
) -> Value {
    let config = &settings.config;
    let mut train = json!(config.train);
    // each row has its own
    train.as_object_mut().expect("a struct is an object").shift_remove("micro_batch_size");
    json!({
        "kind": "header",
        "dylora_version": env!("CARGO_PKG_VERSION"),
        "libtorch_version": ffi::torch_version(),
        "device": device_name(device),
        "device_model": device_model,
        "threads": tch::get_num_threads(),
        "base": label,
        "shape": shape.to_json(match config.base.dtype {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
        }),
        "dtype": config.base.dtype,
        "seq_len": config.data.seq_len,
        "document_median": settings.document_median,
        "document_sigma": settings.document_median.map(|_| LENGTH_SIGMA),
        "warmup": settings.warmup,
        "steps": settings.steps,
        "seed": config.run.seed,
        "peak_tflops": settings.peak_flops.map(|flops| flops / 1e12),
        "mfu_formula": FORMULA,
        "lora": config.lora,
        "router": config.router,
        "train": train,
        "optimizer": config.optimizer,
    })
}

/// A row's line, which says what it is first.
fn row_line(report: &RowReport) -> Result<Value> {
    let mut line = json!({ "kind": "row" });
    let (Value::Object(line_map), Value::Object(report)) =
        (&mut line, serde_json::to_value(report)?)
    else {
        unreachable!("structs are objects")
    };
    line_map.extend(report);
    Ok(line)
}

fn print_line(value: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    // a row at a time, for whoever waits for it
    Ok(writeln!(out, "{value}").and_then(|()| out.flush())?)
}

/// What people read.
fn as_text(header: &Value, reports: &[RowReport]) -> String {
    let text = |key: &str| header[key].as_str().unwrap_or("").to_owned();
    let lora = &header["lora"];
    let modules: Vec<&str> =
        lora["target_modules"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let documents = match header["document_median"].as_f64() {
        None => "one document a block".into(),
        Some(median) => format!("packed documents of median {median} tokens"),
    };
    let mut out = format!(
        "dylora {}, libtorch {}, {} ({}), {} thread(s)\n{} in {}, {} tokens a block, {documents}, {} forward(s) a step\n\
         {} experts of rank {}, alpha {}, dropout {} on {}; routers: {}\n{} steps after {} to warm up\n\n",
        text("dylora_version"),
        text("libtorch_version"),
        text("device"),
        text("device_model"),
        header["threads"],
        text("base"),
        text("dtype"),
        header["seq_len"],
        header["train"]["grad_accum_steps"],
        lora["num_experts"],
        lora["rank"],
        lora["alpha"],
        lora["dropout"],
        modules.join(", "),
        header["router"]["scope"].as_str().unwrap_or(""),
        header["steps"],
        header["warmup"],
    );
    let columns = [
        "row",
        "batch",
        "tokens/s",
        "ms a step",
        "min",
        "max",
        "peak",
        "over base",
        "MFU %",
        "first step, ms",
        "first loss",
    ];
    let rows = reports.iter().map(|report| {
        let head = [report.row.to_owned(), report.micro_batch_size.to_string()];
        let figures = match &report.figures {
            Some(figures) => cells(figures),
            None => vec!["-".into(); columns.len() - head.len()],
        };
        head.into_iter().chain(figures).collect()
    });
    out += &table::table(&columns, rows.collect()).to_string();
    for report in reports {
        if let Some(error) = &report.error {
            out += &format!("\n{} at batch {}: {error}", report.row, report.micro_batch_size);
        }
    }
    for ratio in mixture_costs(reports) {
        out += &format!("\n{ratio}");
    }
    match header["peak_tflops"].as_f64() {
        Some(peak) => out + &format!("\n{FORMULA}; peak {peak} TFLOP/s"),
        None => out,
    }
}

fn cells(figures: &Figures) -> Vec<String> {
    let ms = |ms: f64| format!("{ms:.2}");
    let memory = |bytes: Option<u64>| bytes.map_or("-".into(), |n| table::bytes(n as i64));
    vec![
        table::count(figures.tokens_per_sec.round() as u64),
        ms(figures.step_ms),
        ms(figures.min_step_ms),
        ms(figures.max_step_ms),
        memory(figures.peak_memory_bytes),
        memory(figures.extra_memory_bytes),
        figures.mfu.map_or("-".into(), |mfu| format!("{:.1}", 100.0 * mfu)),
        format!("{:.0}", figures.first_step_ms),
        format!("{:.4}", figures.first_loss),
    ]
}

/// How much longer a step of the mixture takes than one of a single LoRA, at each batch size.
fn mixture_costs(reports: &[RowReport]) -> Vec<String> {
    let step_ms = |row: Row, batch: usize| {
        let report = reports.iter().find(|r| r.row == row.name() && r.micro_batch_size == batch)?;
        Some(report.figures.as_ref()?.step_ms)
    };
    let mut batches: Vec<usize> = reports.iter().map(|report| report.micro_batch_size).collect();
    batches.dedup();
    let cost = |batch| {
        let ratio = step_ms(Row::OnePass, batch)? / step_ms(Row::SingleLora, batch)?;
        Some(format!("at batch {batch}, one_pass takes {ratio:.3} times as long as single_lora"))
    };
    batches.into_iter().filter_map(cost).collect()
}
