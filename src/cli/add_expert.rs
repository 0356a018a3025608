//! `dylora add-expert`: adds an expert for a skill that the mixture does not have yet, and trains
//! it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use super::eval::validate;
use super::open::open_base;
use super::record_args::RecordArgs;
use super::results::Schema;
use super::signals::Interrupt;
use super::stage::run_stage;
use super::start::load_data;
use super::train::{conclude, summary_text};
use super::{Shared, device, print_result, table, usage};
use crate::checkpoint::{self, Preferred};
use crate::config::{Config, DeviceChoice, DomainConfig, Validation};
use crate::growth::skills::{Similarity, SkillComparison, SkillRule};
use crate::growth::stage_config::Growth;
use crate::growth::stages::forgetting;
use crate::lifecycle::add::{self, GrowingMixture};
use crate::train::check_new_run;

/// Arguments of `dylora add-expert`.
#[derive(Debug, Args)]
pub struct AddExpertArgs {
    /// A checkpoint's folder (`RUN/checkpoints/step-*`) or a run's folder. For a run, the best
    /// checkpoint is used, or the last one if there is no best.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// A file or glob with the new domain's training data. The option can be repeated.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// A file with the new domain's validation data. The option can be repeated. Without it, 0.1 of
    /// the training documents are held out.
    #[arg(long, value_name = "FILE")]
    validation: Vec<String>,
    #[command(flatten)]
    records: RecordArgs,
    /// The new domain's name [default: the name of the first training file up to its first dot].
    #[arg(long)]
    domain: Option<String>,
    /// The new run's folder.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the training blocks that come from the earlier domains. A domain that is like the
    /// new one gets a larger part of it than one that is not.
    #[arg(long, value_name = "SHARE", default_value_t = 0.4, allow_negative_numbers = true)]
    replay: f64,
    /// Number of training steps.
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: u64,
    /// Number of steps in the seeding phase, in which the new domain's tokens go to the new expert
    /// alone. At its end, the expert's router column is fitted to recognise these tokens. If it
    /// does not recognise held-out ones, the phase goes on for as many steps again [default: 0.2 of
    /// the steps].
    #[arg(long, value_name = "N")]
    seed_steps: Option<u64>,
    /// Factor of all learning rates after the seeding phase.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, allow_negative_numbers = true)]
    consolidation_rate: f64,
    /// Factor of the learning rate of the old experts and of the part that is always on; 0 freezes
    /// them.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.3, allow_negative_numbers = true)]
    old_experts_rate: f64,
    /// Factor of the learning rate of the old experts' router columns and of the router's hidden
    /// layers; 0 freezes them.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.0, allow_negative_numbers = true)]
    old_columns_rate: f64,
    /// Treat the new data as already known at or above this cosine similarity of skill embeddings.
    #[arg(long, value_name = "COSINE", default_value_t = SkillRule::default().threshold,
        allow_negative_numbers = true)]
    threshold: f64,
    /// Which of the cosine similarities to the known skills is compared with `--threshold`: the
    /// largest or the median.
    #[arg(long, default_value = "max")]
    compare: SkillComparison,
    /// Add an expert even if the skill is already known.
    #[arg(long)]
    force: bool,
    /// Override a key of the new run's config, for example `optimizer.router.learning_rate=1e-2`.
    /// The option can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The device to train on: `auto`, `cpu` or `cuda[:N]`. It overrides `run.device`.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: AddExpertArgs, shared: &Shared) -> Result<()> {
    check(&args).map_err(usage)?;
    let dir = checkpoint::find(&args.checkpoint, Preferred::Best)?;
    let growth = growth_of(&args).map_err(usage)?;
    let config = add::stage_config(&dir, &growth, &args.set).map_err(usage)?;
    check_new_run(&config.run.dir)?;
    let device = device(args.device.unwrap_or(config.run.device))?;
    let base = open_base(&config.base, shared)?;
    let data = load_data(&config, &base, shared)?;
    let growing = GrowingMixture::new(&dir, config.clone(), base, data, device)?;

    let model = growing.model()?;
    let before = validate(&model, &growing.data().validation, &config, shared)?;
    let rule = SkillRule { threshold: args.threshold, by: args.compare };
    let compared = growing.compare(&model, before.as_ref(), rule)?;
    if let Some(known) = &compared.known {
        match args.force {
            true => tracing::warn!("{known}; an expert is added all the same"),
            false => bail!("{known}\nhint: `--force` adds an expert all the same"),
        }
    }
    let grown = growing.grow(&model)?;
    drop(model);
    let (domain, num_old) = (growing.domain().to_owned(), growing.num_old());
    let (similar, new_prob) = (compared.similar.clone(), grown.largest_new_prob);
    log_growth(&config, &domain, num_old, &similar, new_prob);

    let mut trainer = growing.stage(&grown, compared, before.as_ref())?;
    let interrupt = Interrupt::listen()?;
    let summary = run_stage(&mut trainer, &config.run.dir, interrupt.flag(), shared)?;
    let stages = trainer.state().stages.clone();
    drop(trainer);
    let text = if args.json {
        let json = json!({
            "domain": domain,
            "expert": num_old,
            "similar": similar,
            "largest_new_prob": new_prob,
            "ending": summary.ending.name(),
            "checkpoint": summary.checkpoint,
            "stages": stages,
            "forgetting": forgetting(&stages),
        });
        Schema::AddExpert.text(json)
    } else {
        format!(
            "{}\n\nloss of each domain after each stage (forgetting matrix)\n{}",
            summary_text(&config, &summary, None, false)?,
            table::forgetting(&stages)
        )
    };
    conclude(&config, summary.ending, &interrupt).and(print_result(&text))
}

fn log_growth(
    config: &Config,
    domain: &str,
    num_old: usize,
    similar: &[Similarity],
    new_prob: f64,
) {
    let (name, cosine) = similar.first().map_or(("nothing", 0.0), |s| (s.name.as_str(), s.cosine));
    tracing::info!(
        "`{domain}` is new (most like `{name}`, cosine {cosine:.3}): expert_{num_old} is added, at \
         first with at most {new_prob:.1e} of the weight of a token of the earlier domains",
    );
    if config.router.hybrid.is_some() {
        tracing::info!("by `router.hybrid`, routing is dense until expert_{num_old} is mature too");
    }
}

fn check(args: &AddExpertArgs) -> Result<()> {
    if !(0.0..1.0).contains(&args.replay) {
        bail!("`--replay` must be at least 0 and below 1, got {}", args.replay);
    }
    if args.steps == 0 {
        bail!("`--steps` must be at least 1, got 0");
    }
    if let Some(seed_steps) = args.seed_steps.filter(|n| !(1..=args.steps).contains(n)) {
        bail!("`--seed-steps` must be from 1 to `--steps` {}, got {seed_steps}", args.steps);
    }
    if !(-1.0..=1.0).contains(&args.threshold) {
        bail!("`--threshold` must be from -1 to 1, got {}", args.threshold);
    }
    Ok(())
}

/// How the mixture is to grow.
fn growth_of(args: &AddExpertArgs) -> Result<Growth> {
    let name = match &args.domain {
        Some(name) => name.clone(),
        None => {
            let file = Path::new(&args.data[0]).file_name().and_then(|name| name.to_str());
            let name = file.and_then(|file| file.split('.').next());
            let name = name.filter(|name| !name.is_empty() && !name.contains(['*', '?', '[', '{']));
            let say =
                || format!("`{}` gives the domain no name\nhint: `--domain NAME`", args.data[0]);
            name.with_context(say)?.to_owned()
        }
    };
    let absolute = |files: &[String]| -> Result<Vec<String>> {
        let absolute = |file: &String| {
            let path = std::path::absolute(file)?.into_os_string().into_string();
            path.map_err(|path| anyhow!("`{}` is not valid UTF-8", path.display()))
        };
        files.iter().map(absolute).collect()
    };
    let validation = match args.validation.is_empty() {
        true => Validation::Fraction(0.1),
        false => Validation::Files(absolute(&args.validation)?),
    };
    let domain = DomainConfig {
        name,
        train: absolute(&args.data)?,
        validation: Some(validation),
        ..args.records.domain()
    };
    Ok(Growth {
        domain,
        replay: args.replay,
        steps: args.steps,
        seed_steps: args.seed_steps.unwrap_or((0.2 * args.steps as f64).ceil() as u64),
        old_experts_rate: args.old_experts_rate,
        old_columns_rate: args.old_columns_rate,
        consolidation_rate: args.consolidation_rate,
        run_dir: std::path::absolute(&args.out)?,
    })
}
