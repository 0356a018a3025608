//! `dylora add-expert`: one expert more, for a skill that the mixture does not have yet.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use super::eval::{losses, validate};
use super::open::open_base;
use super::train::{conclude, interrupt_flag, load_data, print_summary, run_trainer};
use super::{Shared, device, table, usage};
use crate::config::{self, Config, DeviceChoice, DomainConfig, Validation};
use crate::data::{Datasets, TokenDataset};
use crate::eval::EvalReport;
use crate::growth;
use crate::model::RoutedGpt2;
use crate::model::expert::ExpertSpec;
use crate::skills::{
    Similarity, Skill, SkillCenter, SkillComparison, SkillLibrary, SkillRule, embed,
};
use crate::train::checkpoint::{self, Preferred};
use crate::train::grow::{self, Growth};
use crate::train::stages::Stage;
use crate::train::{Past, Trainer, load_mixture};

/// Blocks by which a skill is told, and by which the new router column is kept out of old data.
const SKILL_BLOCKS: usize = 32;

/// Arguments of `dylora add-expert`.
#[derive(Debug, Args)]
pub struct AddExpertArgs {
    /// A run's folder (its best checkpoint, else its last) or one of its `checkpoints/step-*`.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// The new domain's training files or globs, repeatable.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// The new domain's validation files; without them 0.1 of the training documents are held out.
    #[arg(long, value_name = "FILE")]
    validation: Vec<String>,
    /// The new domain's name [default: the first file's, up to its first dot].
    #[arg(long)]
    domain: Option<String>,
    /// The new run's folder.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the blocks that come from the earlier domains.
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    replay: f64,
    /// Steps of training.
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: u64,
    /// Steps at the start in which the new domain goes to the new expert alone, and its router column
    /// learns to tell the domain [default: 0.4 of the steps].
    #[arg(long, value_name = "N")]
    seed_steps: Option<u64>,
    /// Factor of all learning rates after that.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.2)]
    consolidation_rate: f64,
    /// Factor of the old experts' learning rate; 0 freezes them.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.0)]
    old_experts_rate: f64,
    /// Factor of the learning rate of the old experts' router columns; 0 freezes them.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.0)]
    old_columns_rate: f64,
    /// Cosine of skill embeddings from which on the new data counts as known.
    #[arg(long, value_name = "COSINE", default_value_t = SkillRule::default().threshold)]
    threshold: f64,
    /// Which of the cosines to the known skills is compared with it: the largest or the median.
    #[arg(long, value_name = "max|median", default_value = "max", value_parser = parse_comparison)]
    compare: SkillComparison,
    /// Add an expert though the skill is known.
    #[arg(long)]
    force: bool,
    /// Override a key of the new run's config, as `optimizer.router.learning_rate=1e-2`; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// `auto`, `cpu` or `cuda[:N]`.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn parse_comparison(text: &str) -> Result<SkillComparison> {
    match text {
        "max" => Ok(SkillComparison::Max),
        "median" => Ok(SkillComparison::Median),
        _ => bail!("must be `max` or `median`"),
    }
}

/// Runs the command.
pub fn run(args: AddExpertArgs, shared: &Shared) -> Result<()> {
    check(&args).map_err(usage)?;
    let dir = checkpoint::find(&args.checkpoint, Preferred::Best)?;
    let (old_config, state) = (checkpoint::read_config(&dir)?, checkpoint::read_state(&dir)?);
    let mixture = load_mixture(&dir, &old_config, &state)?;
    let config = configure(&args, &old_config, mixture.router.temperature).map_err(usage)?;
    let device = device(args.device.unwrap_or(config.run.device))?;
    let base = open_base(&config.base, shared)?;
    let weights = base.weights()?;
    if let Some(expected) = &state.base_hash {
        base.check_hash(&weights, expected, "the checkpoint was trained on")?;
    }
    let data = load_data(&config, &base, shared)?;
    let kind = crate::model::kind_of(config.base.dtype);
    let model = mixture.put_on(&weights, device, kind)?;
    let growth = config.growth.as_ref().expect("it was just set");

    let before = validate(&model, &data.validation, &config, shared)?;
    let before = before.context("the new domain has validation data")?;
    let mut skills = library(&dir, &model, &old_config, &data, &before)?;
    let new = embed(
        &model,
        &data.train,
        domain_index(&data.train, &growth.domain)?,
        8,
        Some(SKILL_BLOCKS),
    )?;
    let similar = skills.compare(&new.mean);
    let rule = SkillRule { threshold: args.threshold, by: args.compare };
    if let Some(known) = skills.known(&new.mean, rule) {
        let covers = known.expert.or_else(|| covering_expert(&before, &growth.domain));
        let told = known_message(&growth.domain, known, covers, &similar, args.threshold);
        match args.force {
            true => tracing::warn!("{told}; an expert is added all the same"),
            false => bail!("{told}\nhint: `--force` adds an expert all the same"),
        }
    }

    let biases = grow::initial_biases(&model, &data.train, &growth.domain, SKILL_BLOCKS)?;
    let temperature = mixture.router.temperature;
    let bias =
        |prefix: &str| biases.get(prefix).copied().unwrap_or(grow::bias_beside_one(temperature));
    let num_old = mixture.specs.len();
    tch::manual_seed(config.run.seed as i64);
    let spec = ExpertSpec::new(&config.lora, num_old, &base.config)?;
    let mut grown = growth::with_expert(&mixture, &weights, spec, &bias)?;
    for (expert, spec) in grown.specs.iter_mut().enumerate() {
        spec.trainable = grow::is_trainable(&config, expert);
    }
    let after = grown.put_on(&weights, device, kind)?;
    let new_prob = grow::largest_new_prob(&after, &data.train, &growth.domain, SKILL_BLOCKS);
    drop(after);
    tracing::info!(
        "`{}` is new (most like `{}`, cosine {:.3}): expert_{num_old} is added, at first with at most \
         {new_prob:.1e} of the weight of a token of the earlier domains",
        growth.domain,
        similar.first().map_or("nothing", |similar| similar.name.as_str()),
        similar.first().map_or(0.0, |similar| similar.cosine),
    );
    if config.router.hybrid.is_some() {
        tracing::info!("by `router.hybrid`, routing is dense until expert_{num_old} is mature too");
    }
    drop(model);

    let mut past =
        Past { stages: state.stages.clone(), tokens_seen: state.tokens_seen, ..Past::default() };
    if let Some(last) = past.stages.last_mut() {
        last.losses = losses(&before);
    }
    past.maturity = state.routing.experts.clone();
    skills.skills.push(Skill {
        name: growth.domain.clone(),
        embedding: new.mean,
        label_tokens: new.label_tokens,
        expert: Some(num_old),
    });
    past.skills = Some(skills);
    let name = format!("add {}", growth.domain);
    let stage = Stage::new(&name, vec![growth.domain.clone()], num_old as i64 + 1);
    let mut trainer =
        Trainer::next_stage(config.clone(), &base, &grown, data, device, past, stage)?;
    let summary = run_trainer(&mut trainer, &*interrupt_flag()?, shared)?;
    let stages = trainer.state().stages.clone();
    drop(trainer);
    if args.json {
        let json = json!({
            "domain": growth.domain,
            "expert": num_old,
            "similar": similar,
            "largest_new_prob": new_prob,
            "ending": summary.ending.name(),
            "checkpoint": summary.checkpoint,
            "stages": stages,
            "forgetting": crate::train::stages::forgetting(&stages),
        });
        println!("{}", serde_json::to_string_pretty(&json)?);
    } else {
        print_summary(&config, &summary, None, false)?;
        println!("\nloss of each domain after each stage (forgetting matrix)");
        println!("{}", table::forgetting(&stages));
    }
    conclude(&config, summary.ending)
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

/// The new run's config.
fn configure(args: &AddExpertArgs, config: &Config, temperature: f64) -> Result<Config> {
    let name = match &args.domain {
        Some(name) => name.clone(),
        None => {
            let file = Path::new(&args.data[0]).file_name().and_then(|name| name.to_str());
            let file = file.with_context(|| format!("`{}` names no file", args.data[0]))?;
            file.split('.').next().unwrap_or(file).to_owned()
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
        weight: 1.0,
        record_domain: None,
    };
    let growth = Growth {
        domain,
        replay: args.replay,
        steps: args.steps,
        seed_steps: args.seed_steps.unwrap_or((0.4 * args.steps as f64).ceil() as u64),
        old_experts_rate: args.old_experts_rate,
        old_columns_rate: args.old_columns_rate,
        consolidation_rate: args.consolidation_rate,
        run_dir: std::path::absolute(&args.out)?,
    };
    let grown = grow::grown_config(config, temperature, &growth)?;
    let config = config::load::parse(&config::load::to_toml(&grown), &args.set)?;
    config::load::validate(&config)?;
    Ok(config)
}

/// The skills of the checkpoint; of one that has no library yet, those of the domains it was trained on.
fn library(
    dir: &Path,
    model: &RoutedGpt2,
    config: &Config,
    data: &Datasets,
    before: &EvalReport,
) -> Result<SkillLibrary> {
    if let Some(known) = checkpoint::read_skills(dir, model.base().config.n_embd)? {
        return Ok(known);
    }
    let mut library = SkillLibrary::new(SkillCenter::default().of(model)?);
    for domain in config.data.domains.iter().filter(|domain| domain.weight > 0.0) {
        let index = domain_index(&data.train, &domain.name)?;
        let embedding = embed(model, &data.train, index, 8, Some(SKILL_BLOCKS))?;
        library.skills.push(Skill {
            name: domain.name.clone(),
            embedding: embedding.mean,
            label_tokens: embedding.label_tokens,
            expert: covering_expert(before, &domain.name),
        });
    }
    Ok(library)
}

fn domain_index(dataset: &TokenDataset, name: &str) -> Result<usize> {
    let index = dataset.domains.iter().position(|domain| domain.name == name);
    index.with_context(|| format!("there is no training data of domain `{name}`"))
}

/// The expert that the router gives most of a domain's weight to.
fn covering_expert(report: &EvalReport, domain: &str) -> Option<usize> {
    let of = report.domains.iter().find(|of| of.name == domain)?;
    let weights = of.routing.as_ref()?.mean_routing_weights.iter().enumerate();
    weights.max_by(|a, b| a.1.total_cmp(b.1)).map(|(expert, _)| expert)
}

fn known_message(
    domain: &str,
    known: &Skill,
    covers: Option<usize>,
    similar: &[Similarity],
    threshold: f64,
) -> String {
    let cosine = similar.first().map_or(0.0, |similar| similar.cosine);
    let expert = covers.map_or("expert_0".to_owned(), |expert| format!("expert_{expert}"));
    format!(
        "`{domain}` is no new skill: it is like `{}` (cosine {cosine:.3}, known from {threshold} on), which \
         {expert} covers",
        known.name
    )
}
