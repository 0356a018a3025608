//! `dylora bench`: measures how fast a mixture is on a device, and compares it with other ways to
//! compute it. Several processes can share the rows that train.

use anyhow::{Result, anyhow, bail};
use clap::{Args, ValueEnum};
use tch::{Device, Kind};

use super::bench_report::{Place, as_text, header, name, print_line};
use super::bench_shapes::{Preset, Size, modules};
use super::open::{base_source, open_base};
use super::progress::CountBar;
use super::{Shared, print_result, usage};
use crate::base::Base;
use crate::bench::{Bench, BenchSettings, Row};
use crate::config::{
    BaseConfig, BaseSource, Config, DataConfig, DeviceChoice, DomainConfig, Dtype, Duration,
    Family, GroupConfig, HubSource, LossOn, OptimizerConfig, RouterConfig, RouterInput,
    RouterScope, RunConfig, TargetModules, TrainConfig, load,
};
use crate::ffi;
use crate::model::decoder::Decoder;
use crate::model::decoder::spec::DecoderSpec;
use crate::model::experts::spec::ExpertSpec;
use crate::model::kind_of;

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
    /// Number of sequences in one forward pass of a process. With several numbers, each is
    /// measured.
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
    /// The rows to measure [default: all that compute whole blocks; with several processes, those
    /// of them that train].
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
    #[arg(long, value_name = "TFLOPS", allow_negative_numbers = true)]
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
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    alpha: Option<f64>,
    /// The linear layers that get experts, for example `q_proj,v_proj`, or `all` [default: the
    /// preset's].
    #[arg(long, value_name = "NAME,..|all", value_parser = modules)]
    modules: Option<TargetModules>,
    /// Dropout of the experts' inputs.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// How many routers there are.
    #[arg(long, default_value = "shared")]
    routers: RouterScope,
}

/// Runs the command.
pub fn run(args: &BenchArgs, shared: &Shared) -> Result<()> {
    let device = shared.device(args.device)?;
    args.check().map_err(usage)?;
    let rows = args.rows(shared)?;
    let device_model = ffi::device_model(device).unwrap_or_else(|| "unknown".into());
    let base = args.open(&args.base_config(device)?, shared)?;
    let settings = args.settings(device, &device_model, base.spec.family)?;
    // checked before the weights are read, which may take long
    ExpertSpec::all(&settings.config.lora, &base.spec).map_err(usage)?;
    let kind = kind_of(args.base_config(device)?.dtype);
    let weights = base.weights(args.seed, device, kind)?;
    let on = Place { device, device_model, num_processes: shared.world.size() };
    let header = header(&settings, base.label, &weights.spec, on);
    let bench = Bench::new(settings, &weights, device, &shared.world)?;
    drop(weights);
    let prints_lines = args.json && shared.is_first();
    if prints_lines {
        print_line(&header)?;
    }
    let num_reports = rows.len() * args.batch.len();
    let bar = CountBar::new(shared.show_progress, "measuring", num_reports as u64);
    let mut reports = vec![];
    for &batch in &args.batch {
        for &row in &rows {
            let report = bench.measure(row, batch)?;
            if prints_lines {
                print_line(&report)?;
            }
            reports.push(report);
            bar.set(reports.len() as u64);
        }
    }
    bar.finish();
    if !args.json && shared.is_first() {
        print_result(&as_text(&header, &reports))?;
    }
    Ok(())
}

impl BenchArgs {
    /// The rows to measure.
    ///
    /// # Errors
    /// A row that several processes cannot share.
    fn rows(&self, shared: &Shared) -> Result<Vec<Row>> {
        let is_alone = shared.world.is_single();
        if self.rows.is_empty() {
            let default = |row: &Row| !row.generates() && (is_alone || row.can_be_shared());
            return Ok(Row::value_variants().iter().copied().filter(default).collect());
        }
        match self.rows.iter().find(|row| !is_alone && !row.can_be_shared()) {
            Some(&row) => Err(usage(anyhow!(
                "`--rows {}` is measured by one process, and there are {}: several can share the \
                 rows that train",
                name(row),
                shared.world.size()
            ))),
            None => Ok(self.rows.clone()),
        }
    }

    /// The settings of the bench.
    ///
    /// - `device_model`: the device's name as its maker gives it, which says whether its peak is
    ///   known
    fn settings(
        &self,
        device: Device,
        device_model: &str,
        family: Family,
    ) -> Result<BenchSettings> {
        let on_cuda = matches!(device, Device::Cuda(_));
        let base = self.base_config(device)?;
        let dtype = base.dtype;
        let (warmup, steps) = if on_cuda { (10, 30) } else { (5, 10) };
        let (warmup, steps) = (self.warmup.unwrap_or(warmup), self.steps.unwrap_or(steps));
        let text = load::to_toml(&self.config(base, family, on_cuda, warmup + steps));
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

    /// The base of the mixture's config.
    fn base_config(&self, device: Device) -> Result<BaseConfig> {
        let on_cuda = matches!(device, Device::Cuda(_));
        let source = match &self.base {
            Some(text) => base_source(text)?,
            // nothing is read from there, because the weights are random
            None => BaseSource::Hub(HubSource { repo: name(self.size), revision: "main".into() }),
        };
        let dtype = self.dtype.unwrap_or(if on_cuda { Dtype::Bf16 } else { Dtype::F32 });
        Ok(BaseConfig { source, tokenizer: None, chat_template: None, dtype })
    }

    /// The mixture's config, with the settings of `scripts/peft_opponent.py` where it has such. The
    /// micro-batch size does not count, because each row sets its own.
    fn config(&self, base: BaseConfig, family: Family, on_cuda: bool, num_steps: usize) -> Config {
        let mixture = &self.mixture;
        let mut lora = mixture.preset.lora(family);
        lora.num_experts = mixture.experts.unwrap_or(lora.num_experts);
        lora.rank = mixture.rank.unwrap_or(lora.rank);
        lora.alpha = mixture.alpha.unwrap_or(lora.alpha);
        if let Some(modules) = &mixture.modules {
            lora.target_modules.clone_from(modules);
        }
        lora.dropout = mixture.dropout;
        let random = DomainConfig {
            name: "random".into(),
            train: vec!["random".into()],
            ..DomainConfig::default()
        };
        let data = DataConfig {
            seq_len: self.seq_len,
            loss_on: LossOn::All,
            domains: vec![random],
            ..DataConfig::default()
        };
        Config {
            run: RunConfig { seed: self.seed, device: self.device, ..RunConfig::default() },
            lora,
            router: plain_router(mixture.routers),
            train: TrainConfig {
                duration: Duration::Steps(num_steps as u64),
                grad_accum_steps: self.accumulate,
                // as in the configs for GPT-2: small chunks save memory but cost time on a GPU
                loss_chunk_tokens: if on_cuda { 4096 } else { 1024 },
                ..TrainConfig::default()
            },
            optimizer: OptimizerConfig {
                adapters: GroupConfig::at(1e-3),
                router: GroupConfig::at(1e-3),
                max_grad_norm: 1.0,
                ..OptimizerConfig::default()
            },
            ..Config::new(base, data)
        }
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

    /// Finds the base's shape, and its files if it has any.
    fn open(&self, config: &BaseConfig, shared: &Shared) -> Result<BenchBase> {
        let base = match self.base {
            Some(_) => {
                let base = open_base(config, shared)?;
                let (label, spec) = (base.label.clone(), base.spec.clone());
                BenchBase { label, spec, files: Some(base) }
            }
            None => BenchBase {
                label: format!("{} (random weights)", name(self.size)),
                spec: self.size.spec(),
                files: None,
            },
        };
        let max_positions = base.spec.max_positions;
        if self.seq_len as i64 > max_positions {
            return Err(usage(anyhow!(
                "`--seq-len` must be at most the base's {max_positions} positions, got {}",
                self.seq_len
            )));
        }
        Ok(base)
    }
}

/// Routers that read the embeddings as they are, which N passes and PEFT's mixtures can do as well.
fn plain_router(scope: RouterScope) -> RouterConfig {
    RouterConfig {
        input: RouterInput::Embeddings,
        scope,
        normalize_input: false,
        detach_input: false,
        ..RouterConfig::default()
    }
}

/// The base that is measured.
struct BenchBase {
    label: String,
    spec: DecoderSpec,
    /// Where its weights are read from; with `None`, they are random.
    files: Option<Base>,
}

impl BenchBase {
    /// The weights, on the CPU. Random ones are drawn on `device`, in dtype `kind` if it is a GPU.
    fn weights(&self, seed: u64, device: Device, kind: Kind) -> Result<Decoder> {
        if let Some(base) = &self.files {
            return base.weights();
        }
        tch::manual_seed(seed as i64);
        let kind = if device.is_cuda() { kind } else { Kind::Float };
        Ok(Decoder::random_from(self.spec.clone(), device, kind))
    }
}
