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
use crate::train::plan::{ParameterCounts, blocks_per_step, num_steps_of};
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
pub fn run(args: &TrainArgs, shared: &Shared) -> Result<()> {
    let (mut config, resume_from) = configure_all(args, shared)?;
    check_config_stays(args, &config).map_err(usage)?;
    // a run that is resumed without `--device` goes on where it was
    config.run.device = args.device.unwrap_or(config.run.device);
    let earlier = match args.dry_run || !shared.is_first() {
        true => None,
        false => check_run_dir(args, &config, resume_from.is_some())?,
    };
    let ready = ReadyRun::open(config, resume_from, shared, |config, base| {
        load_data(config, base, shared)
    })?;
    if args.dry_run {
        return match shared.is_first() {
            true => dry_run(&ready, shared.world.size(), args.json),
            false => Ok(()),
        };
    }
    if let Some(earlier) = earlier {
        tracing::info!("deleting the earlier run: {}", earlier.describe()?);
        earlier.remove()?;
    }
    // no process looks into the folder before the first one has emptied it
    shared.world.meet()?;
    let interrupt = Interrupt::listen()?;
    let Trained { config, summary, model_dir } = train(ready, &interrupt, shared)?;
    if !shared.is_first() {
        return conclude(&config, summary.ending, &interrupt);
    }
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
pub fn train(ready: ReadyRun, interrupt: &Interrupt, shared: &Shared) -> Result<Trained> {
    let ReadyRun { config, device, base, data, specs, .. } = &ready;
    if config.method == Method::Full && shared.is_first() {
        // checked before the run, because the model is written at its end
        model_output(config, base)?.check_folder(export::is_unmarked_output)?;
    }
    if shared.is_first() {
        log_start(config, specs, base, data, *device, shared);
    }
    let config = config.clone();
    let (mut trainer, base) = ready.trainer(shared)?;
    if trainer.state().step > 0 && shared.is_first() {
        tracing::info!("going on after step {} of {}", trainer.state().step, trainer.num_steps());
    }
    tracing::debug!("training in `{}`", config.run.dir.display());
    let summary = run_stage(&mut trainer, &config.run.dir, interrupt.flag(), shared)?;
    drop(trainer);
    let model_dir = match (config.method, summary.ending) {
        (Method::Full, Ending::Completed | Ending::StoppedEarly) if shared.is_first() => {
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
///
/// - `resumes`: whether the run goes on from a checkpoint
fn check_run_dir(args: &TrainArgs, config: &Config, resumes: bool) -> Result<Option<EarlierRun>> {
    let dir = &config.run.dir;
    lock::check_free(dir)?;
    if resumes || args.resume.is_some() {
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

/// As [`configure`], in all processes alike: the first one finds the checkpoint, and the others
/// take the same.
fn configure_all(args: &TrainArgs, shared: &Shared) -> Result<(Config, Option<PathBuf>)> {
    let resumes = args.resume.is_some() || shared.attempt > 0;
    if !resumes || shared.world.is_single() {
        return configure(args, &|dir| checkpoint::find(dir, Preferred::Last), shared);
    }
    if shared.is_first() {
        let found = configure(args, &|dir| checkpoint::find(dir, Preferred::Last), shared)?;
        let name = found.1.as_deref().map(fs_err::canonicalize).transpose()?;
        let name = name.as_deref().and_then(Path::file_name).unwrap_or_default();
        shared.world.exchange(name.as_encoded_bytes())?;
        return Ok(found);
    }
    let names = shared.world.exchange(b"")?;
    let name = String::from_utf8(names[0].clone()).context("a checkpoint's name is UTF-8")?;
    let same = |dir: &Path| match dir.join("state.json").is_file() {
        true => Ok(dir.to_owned()),
        false if name.is_empty() => bail!("rank 0 found no checkpoint"),
        false => Ok(checkpoint::folder(dir).join(&name)),
    };
    configure(args, &same, shared)
}

/// The resolved config and, for a run that is resumed, the folder of its checkpoint.
///
/// - `last`: finds the last checkpoint in a run's folder
fn configure(
    args: &TrainArgs,
    last: &dyn Fn(&Path) -> Result<PathBuf>,
    shared: &Shared,
) -> Result<(Config, Option<PathBuf>)> {
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
            // after a failure, the run goes on, unless it had not got to its first checkpoint
            (None, _) if shared.attempt > 0 => last(&config.run.dir).ok(),
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
fn log_start(
    config: &Config,
    specs: &[ExpertSpec],
    base: &Base,
    data: &Datasets,
    device: Device,
    shared: &Shared,
) {
    let counts = ParameterCounts::new(config, specs, &base.spec);
    tracing::info!(
        "base `{}`, {} parameters; {} trained ({:.2} %) on {}",
        base.label,
        table::count(counts.base),
        table::count(counts.trained),
        100.0 * counts.trainable_share(),
        device_name(device),
    );
    if !shared.world.is_single() {
        tracing::info!("{} processes share each step", shared.world.size());
    }
    let router = &config.router;
    if router.top_k == Some(1) && router.renormalize && num_routed(specs) > 1 {
        tracing::warn!(
            "`router.top_k = 1` with `router.renormalize = true` always gives weight 1: the router \
             learns from its own losses only\nhint: `router.renormalize = false` is Switch's rule"
        );
    }
    warn_of_few_steps(config, data, shared.world.size());
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
fn warn_of_few_steps(config: &Config, data: &Datasets, world_size: usize) {
    let per_step = blocks_per_step(config) * world_size;
    let Ok(steps) = num_steps_of(config, &data.train, per_step) else { return };
    if steps < FEW_STEPS {
        let blocks = data.train.num_blocks();
        tracing::warn!(
            "the run has only {steps} steps, in which little is learned: {blocks} blocks of {} \
             tokens, {} in a step\nhint: set `train.duration = {{ steps = 300 }}` or a smaller \
             `train.micro_batch_size`",
            config.data.seq_len,
            per_step,
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
