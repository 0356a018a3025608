//! `dylora train`: starts a run from its config, or resumes one.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;
use tch::Device;

use super::dry_run::dry_run;
use super::inputs::check_inputs;
use super::open::device_name;
use super::results::Schema;
use super::signals::Interrupt;
use super::stage::run_stage;
use super::start::{ReadyRun, load_data};
use super::{Shared, print_result, table, usage};
use crate::base::Base;
use crate::checkpoint::{self, Preferred, load_model};
use crate::config::{self, Config, DeviceChoice, Method, inputs};
use crate::data::Datasets;
use crate::durable::{lock, output::Output};
use crate::export::card::{self, Form, Origin};
use crate::export::training::Training;
use crate::export::{self, hugging_face};
use crate::model::experts::spec::{ExpertSpec, num_routed};
use crate::train::earlier::EarlierRun;
use crate::train::plan::{ParameterCounts, num_steps};
use crate::train::schedule::warmup_steps;
use crate::train::{Ending, Summary, check_new_run};

/// Arguments of `dylora train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The TOML file of the run's config. It may be left out if `--resume` names a folder.
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
    config: Option<PathBuf>,
    /// Override a key of the config, for example `lora.rank=16` or `data.domains.0.weight=2`. The
    /// option can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The device to train on: `auto`, `cpu` or `cuda[:N]`. It overrides `run.device`.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Resume from the last checkpoint of the config's run, or of the run in DIR. DIR can also be a
    /// checkpoint's folder.
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    resume: Option<Option<PathBuf>>,
    /// Replace the earlier run in the folder `run.dir`. Its files are deleted when the new run
    /// begins, after its config, base and data were found to be sound. A folder that holds anything
    /// else is not replaced.
    #[arg(long, conflicts_with_all = ["resume", "dry_run"])]
    overwrite: bool,
    /// Print the resolved config, which linear layers each name of `[lora]` matches, the number of
    /// parameters, the estimated memory and the data, but do not train.
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: TrainArgs, shared: &Shared) -> Result<()> {
    let (mut config, resume_from) = configure(&args)?;
    check_config_stays(&args, &config).map_err(usage)?;
    // a run that is resumed without `--device` goes on where it was
    config.run.device = args.device.unwrap_or(config.run.device);
    let earlier = if args.dry_run { None } else { check_run_dir(&args, &config)? };
    let ready = ReadyRun::open(config, resume_from, shared, |config, base| {
        load_data(config, base, shared)
    })?;
    if args.dry_run {
        return dry_run(&ready, args.json);
    }
    let interrupt = Interrupt::listen()?;
    let Trained { config, summary, model_dir } = train(ready, earlier, &interrupt, shared)?;
    let text = summary_text(&config, &summary, model_dir.as_deref(), args.json)?;
    // how the run ended matters more than whether somebody could be told of it
    conclude(&config, summary.ending, &interrupt).and(print_result(&text))
}

/// A run that has ended.
pub struct Trained {
    /// The run's config.
    pub config: Config,
    /// How it ended.
    pub summary: Summary,
    /// Where the model of a full training lies.
    model_dir: Option<PathBuf>,
}

/// Trains a run that is ready.
///
/// - `earlier`: the run in the same folder that it replaces
pub fn train(
    ready: ReadyRun,
    earlier: Option<EarlierRun>,
    interrupt: &Interrupt,
    shared: &Shared,
) -> Result<Trained> {
    let ReadyRun { config, device, base, data, specs, .. } = &ready;
    if config.method == Method::Full {
        // checked before the run, because the model is written at its end
        model_output(config, base)?.check_folder(export::is_unmarked_output)?;
    }
    log_start(config, specs, base, data, *device);
    let config = config.clone();
    if let Some(earlier) = earlier {
        tracing::info!("deleting the earlier run: {}", earlier.describe()?);
        earlier.remove()?;
    }
    let (mut trainer, base) = ready.trainer()?;
    if trainer.state().step > 0 {
        tracing::info!("going on after step {} of {}", trainer.state().step, trainer.num_steps());
    }
    tracing::debug!("training in `{}`", config.run.dir.display());
    let summary = run_stage(&mut trainer, &config.run.dir, interrupt.flag(), shared)?;
    drop(trainer);
    let model_dir = match (config.method, summary.ending) {
        (Method::Full, Ending::Completed | Ending::StoppedEarly) => {
            Some(save_base(&config, &base)?)
        }
        _ => None,
    };
    Ok(Trained { config, summary, model_dir })
}

/// Checks that the run may write to its folder, and returns the earlier run that it replaces.
///
/// # Errors
/// A folder that another process uses or that holds an earlier run, unless that is resumed or
/// replaced.
fn check_run_dir(args: &TrainArgs, config: &Config) -> Result<Option<EarlierRun>> {
    let dir = &config.run.dir;
    lock::check_free(dir)?;
    if args.resume.is_some() {
        return Ok(None);
    }
    if !args.overwrite {
        check_new_run(dir)?;
        return Ok(None);
    }
    let mut read: Vec<PathBuf> = inputs::of_config(config).into_iter().map(|i| i.path).collect();
    read.extend(args.config.clone());
    let here = std::env::current_dir()?;
    EarlierRun::find(dir, read, here, export::is_unmarked_output)
}

/// Checks that the run does not write its resolved config over the config that the user wrote.
fn check_config_stays(args: &TrainArgs, config: &Config) -> Result<()> {
    let Some(file) = &args.config else { return Ok(()) };
    let real = |path: &Path| fs_err::canonicalize(path).ok();
    let written = real(&config.run.dir.join("config.toml"));
    if written.is_some() && written == real(file) && args.resume.is_none() {
        bail!(
            "`run.dir` is the folder of `{}`, over which the run would write its resolved config\n\
             hint: name another folder for `run.dir`",
            file.display()
        );
    }
    Ok(())
}

/// The result of the command for a run that has ended.
///
/// # Errors
/// An interrupted run, with the command that resumes it, and a run whose routing has collapsed,
/// with hints.
pub fn conclude(config: &Config, ending: Ending, interrupt: &Interrupt) -> Result<()> {
    let dir = config.run.dir.display();
    match ending {
        Ending::Interrupted => Err(interrupt.error(&config.run.dir).into()),
        Ending::Collapsed => bail!(
            "the routing has collapsed, and `router.on_collapse` is `stop`\nhint: try \
             `router.load_balancing_coef`, `router.balance_bias_rate`, a smaller \
             `optimizer.router.learning_rate`, or other bounds; `metrics.jsonl` in `{dir}` tells \
             how it came"
        ),
        Ending::Completed | Ending::StoppedEarly => Ok(()),
    }
}

/// The resolved config and, for a run that is resumed, the folder of its checkpoint.
fn configure(args: &TrainArgs) -> Result<(Config, Option<PathBuf>)> {
    let last = |dir: &Path| checkpoint::find(dir, Preferred::Last);
    let sets_dir =
        args.set.iter().any(|set| set.split('=').next().map(str::trim) == Some("run.dir"));
    if let (Some(Some(dir)), true) = (&args.resume, sets_dir) {
        return Err(usage(anyhow!(
            "`--set run.dir` does not go with `--resume {}`: a run stays in its folder\nhint: copy \
             the folder, and resume the copy",
            dir.display()
        )));
    }
    let named = args.resume.as_ref().and_then(Option::as_ref).map(|dir| last(dir)).transpose()?;
    if let Some(file) = &args.config {
        let config = config::load::load(file, &args.set).map_err(usage)?;
        check_inputs(&config, Some(file)).map_err(usage)?;
        let resume_from = match (&args.resume, named) {
            (None, _) => None,
            (Some(_), Some(dir)) => Some(dir),
            (Some(_), None) => Some(last(&config.run.dir)?),
        };
        return Ok((config, resume_from));
    }
    let Some(dir) = named else {
        return Err(usage(anyhow!("`--resume` needs a run's folder or `--config FILE`")));
    };
    let mut config = config::load::load(&dir.join("config.toml"), &args.set).map_err(usage)?;
    check_inputs(&config, None).map_err(usage)?;
    // the run's folder may have moved since its config was written
    let real = fs_err::canonicalize(&dir)?;
    let run_dir = real.parent().and_then(Path::parent);
    config.run.dir = run_dir.context("a checkpoint lies in `RUN/checkpoints`")?.to_owned();
    Ok((config, Some(dir)))
}

/// Logs what is about to be trained, and on which data.
fn log_start(config: &Config, specs: &[ExpertSpec], base: &Base, data: &Datasets, device: Device) {
    let counts = ParameterCounts::new(config, specs, &base.spec);
    tracing::info!(
        "base `{}`, {} parameters; {} trained ({:.2} %) on {}",
        base.label,
        table::count(counts.base),
        table::count(counts.trained),
        100.0 * counts.trainable_share(),
        device_name(device),
    );
    let router = &config.router;
    if router.top_k == Some(1) && router.renormalize && num_routed(specs) > 1 {
        tracing::warn!(
            "`router.top_k = 1` with `router.renormalize = true` always gives weight 1: the router \
             learns from its own losses only\nhint: `router.renormalize = false` is Switch's rule"
        );
    }
    warn_of_few_steps(config, data);
    for (split, dataset) in [("training", &data.train), ("validation", &data.validation)] {
        for domain in &dataset.domains {
            let c = &domain.counts;
            let mut notes = String::new();
            for (count, what) in [
                (c.split_documents, "documents split"),
                (c.skipped_bad, "bad records skipped"),
                (c.skipped_empty, "without a label skipped"),
                (c.skipped_held_out, "held out, as they are in validation"),
            ] {
                if count > 0 {
                    notes += &format!("; {} {what}", table::count(count));
                }
            }
            tracing::info!(
                "{split} `{}`: {} documents, {} label tokens, {} blocks{notes}",
                domain.name,
                table::count(c.documents),
                table::count(c.label_tokens),
                table::count(c.blocks),
            );
        }
    }
}

/// The smallest number of steps in which a mixture learns much.
const FEW_STEPS: u64 = 50;

/// Warns of a run that is over before its experts and routers can have learned much.
fn warn_of_few_steps(config: &Config, data: &Datasets) {
    let Ok(steps) = num_steps(config, &data.train) else { return };
    if steps < FEW_STEPS {
        let blocks = data.train.num_blocks();
        tracing::warn!(
            "the run has only {steps} steps, in which little is learned: {blocks} blocks of {} \
             tokens, {} in a step\nhint: set `train.duration = {{ steps = 300 }}` or a smaller \
             `train.micro_batch_size`",
            config.data.seq_len,
            config.train.micro_batch_size * config.train.grad_accum_steps,
        );
    }
    let warmup = warmup_steps(config.schedule, steps);
    if warmup * 2 > steps {
        tracing::warn!(
            "`schedule.warmup_steps` {warmup} is more than half of the run's {steps} steps\nhint: \
             leave it out for a tenth of the steps"
        );
    }
}

/// Writes the best checkpoint of a full training as a Hugging Face folder, and returns the folder.
fn save_base(config: &Config, base: &Base) -> Result<PathBuf> {
    let dir = checkpoint::find(&config.run.dir, Preferred::Best)?;
    let model = load_model(&dir, config, base, Device::Cpu)?;
    let output = model_output(config, base)?;
    let (tokenizer, beside) = (base.tokenizer_file.as_deref(), &base.beside);
    let dtype = config.train.save_dtype;
    let training = Training::of_checkpoint(config, &checkpoint::read_state(&dir)?, &dir)?;
    let card = card::of_base(&Origin::new(base, Some(training)), Form::HuggingFace);
    hugging_face::export(&output, model.base(), dtype, tokenizer, beside, &card)?;
    Ok(output.path)
}

/// The folder that a full training writes its model to.
fn model_output(config: &Config, base: &Base) -> Result<Output> {
    Ok(Output {
        path: config.run.dir.join("model"),
        overwrite: true,
        inputs: base.input_files(),
        working_folder: std::env::current_dir()?,
    })
}

/// The summary of a run, as text or as JSON.
pub fn summary_text(
    config: &Config,
    summary: &Summary,
    model_dir: Option<&Path>,
    json: bool,
) -> Result<String> {
    let state = &summary.state;
    let ending = summary.ending.name();
    if json {
        let json = json!({
            "ending": ending,
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "best": state.best,
            "run_dir": config.run.dir,
            "checkpoint": summary.checkpoint,
            "model_dir": model_dir,
            "frozen_blake3": summary.frozen_hash,
        });
        return Ok(Schema::Train.text(json));
    }
    let tokens = table::count(state.tokens_seen);
    let mut lines = vec![format!("{ending} after step {}, {tokens} target tokens", state.step)];
    lines.extend(
        state
            .best
            .map(|best| format!("best validation loss {:.4} at step {}", best.loss, best.step)),
    );
    lines.extend(summary.frozen_hash.as_ref().map(|hash| {
        format!("what is frozen is unchanged: BLAKE3 {}.. before and after", &hash[..16])
    }));
    lines.push(format!("checkpoint: {}", summary.checkpoint.display()));
    lines.extend(model_dir.map(|dir| format!("Hugging Face folder: {}", dir.display())));
    Ok(lines.join("\n"))
}
