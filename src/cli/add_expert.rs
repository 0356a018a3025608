//! `dylora add-expert`: one expert more, for a skill that the mixture does not have yet.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;
use tch::Device;

use super::eval::validate;
use super::open::open_base;
use super::signals::Interrupt;
use super::train::{conclude, load_data, run_trainer, summary_text};
use super::{Shared, device, print_result, table, usage};
use crate::base::Base;
use crate::config::{
    self, Config, DeviceChoice, DomainConfig, GrowthConfig, RouterConfig, Validation,
};
use crate::data::{Datasets, TokenDataset};
use crate::eval::EvalReport;
use crate::growth;
use crate::mixture::Mixture;
use crate::model::decoder::Decoder;
use crate::model::experts::spec::ExpertSpec;
use crate::model::routing::router::RouterSpec;
use crate::model::{RoutedModel, kind_of};
use crate::skills::{
    Embedding, Similarity, Skill, SkillCenter, SkillComparison, SkillLibrary, SkillRule, embed,
};
use crate::train::checkpoint::{self, Preferred, TrainState};
use crate::train::grow::{self, Growth};
use crate::train::stages::{Stage, forgetting};
use crate::train::{Past, Trainer, check_new_run, checkpoint_base, load_mixture, routing_state};

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

/// A mixture that is to grow, and what it is to learn.
struct Start {
    dir: PathBuf,
    state: TrainState,
    old_config: Config,
    config: Config,
    growth: GrowthConfig,
    mixture: Mixture,
    base: Base,
    weights: Decoder,
    data: Datasets,
    device: Device,
}

/// What the new data is, beside the skills that are known.
struct Compared {
    skills: SkillLibrary,
    new: Embedding,
    /// The known skills, the most similar first.
    similar: Vec<Similarity>,
}

/// Runs the command.
pub fn run(args: AddExpertArgs, shared: &Shared) -> Result<()> {
    check(&args).map_err(usage)?;
    let start = Start::open(&args, shared)?;
    let Start { config, growth, .. } = &start;
    let model = start.put_on(&start.mixture)?;
    let before = validate(&model, &start.data.validation, config, shared)?;
    let compared = compare(&args, &start, &model, before.as_ref())?;
    let (grown, new_prob) = grow(&start, &model)?;
    drop(model);
    let num_old = start.mixture.specs.len();
    let (name, cosine) =
        compared.similar.first().map_or(("nothing", 0.0), |s| (s.name.as_str(), s.cosine));
    tracing::info!(
        "`{}` is new (most like `{name}`, cosine {cosine:.3}): expert_{num_old} is added, at first with \
         at most {new_prob:.1e} of the weight of a token of the earlier domains",
        growth.domain,
    );
    if config.router.hybrid.is_some() {
        tracing::info!("by `router.hybrid`, routing is dense until expert_{num_old} is mature too");
    }
    let (config, similar) = (start.config.clone(), compared.similar.clone());
    let domain = growth.domain.clone();
    let mut trainer = start.train(&grown, compared, before.as_ref())?;
    let interrupt = Interrupt::listen()?;
    let summary = run_trainer(&mut trainer, interrupt.flag(), shared)?;
    let stages = trainer.state().stages.clone();
    drop(trainer);
    if args.json {
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
        print_result(&serde_json::to_string_pretty(&json)?)?;
    } else {
        print_result(&summary_text(&config, &summary, None, false)?)?;
        print_result("\nloss of each domain after each stage (forgetting matrix)")?;
        print_result(&table::forgetting(&stages).to_string())?;
    }
    conclude(&config, summary.ending, &interrupt)
}

impl Start {
    fn open(args: &AddExpertArgs, shared: &Shared) -> Result<Self> {
        let dir = checkpoint::find(&args.checkpoint, Preferred::Best)?;
        let (old_config, state) = (checkpoint::read_config(&dir)?, checkpoint::read_state(&dir)?);
        let temperature = routing_state::temperature(&old_config.router, state.step.max(1));
        let config = configure(args, &old_config, temperature).map_err(usage)?;
        check_new_run(&config.run.dir)?;
        let mut mixture = load_mixture(&dir, &old_config, &state)?;
        mixture.router = RouterSpec {
            temperature: routing_state::temperature(&config.router, 1),
            top_k: state.routing.top_k(&config.router),
            ..RouterSpec::of_config(&config)
        };
        let device = device(args.device.unwrap_or(config.run.device))?;
        let base = open_base(&config.base, shared)?;
        let weights = checkpoint_base(&base, &state)?;
        let data = load_data(&config, &base, shared)?;
        let growth = config.growth.clone().expect("it was just set");
        Ok(Self { dir, state, old_config, config, growth, mixture, base, weights, data, device })
    }

    fn put_on(&self, mixture: &Mixture) -> Result<RoutedModel> {
        mixture.put_on(&self.weights, self.device, kind_of(self.config.base.dtype))
    }

    /// The stage that begins with the grown mixture.
    fn train(
        self,
        grown: &Mixture,
        compared: Compared,
        before: Option<&EvalReport>,
    ) -> Result<Trainer> {
        let Compared { mut skills, new, .. } = compared;
        let (domain, num_old) = (self.growth.domain, self.mixture.specs.len());
        skills.skills.push(Skill {
            name: domain.clone(),
            embedding: new.mean,
            label_tokens: new.label_tokens,
            expert: Some(num_old),
        });
        let mut past = Past {
            stages: self.state.stages,
            tokens_seen: self.state.tokens_seen,
            maturity: self.state.routing.experts,
            skills: Some(skills),
        };
        if let (Some(last), Some(before)) = (past.stages.last_mut(), before) {
            last.losses = before.domain_losses();
        }
        let stage = Stage::new(&format!("add {domain}"), vec![domain], num_old as i64 + 1);
        let Self { config, base, data, device, .. } = self;
        Trainer::next_stage(config, &base, grown, data, device, past, stage)
    }
}

/// Compares the new data with the known skills.
///
/// # Errors
/// A skill that is known, unless an expert is added all the same.
fn compare(
    args: &AddExpertArgs,
    start: &Start,
    model: &RoutedModel,
    before: Option<&EvalReport>,
) -> Result<Compared> {
    let (train, domain) = (&start.data.train, &start.growth.domain);
    let skills = library(&start.dir, model, &start.old_config, &start.data, before)?;
    let new = embed(model, train, domain_index(train, domain)?, 8, Some(SKILL_BLOCKS))?;
    let similar = skills.compare(&new.mean);
    let rule = SkillRule { threshold: args.threshold, by: args.compare };
    if let Some(known) = skills.known(&new.mean, rule) {
        let covers = known.expert.or_else(|| covering_expert(before?, domain));
        let told = known_message(domain, known, covers, &similar, args);
        match args.force {
            true => tracing::warn!("{told}; an expert is added all the same"),
            false => bail!("{told}\nhint: `--force` adds an expert all the same"),
        }
    }
    Ok(Compared { skills, new, similar })
}

/// The mixture with one expert more, and the largest probability that it has on a token of the earlier
/// domains.
fn grow(start: &Start, model: &RoutedModel) -> Result<(Mixture, f64)> {
    let Start { config, mixture, data, growth, .. } = start;
    let biases = grow::initial_biases(model, &data.train, &growth.domain, SKILL_BLOCKS)?;
    let beside_one = grow::bias_beside_one(mixture.router.temperature);
    let bias = |prefix: &str| biases.get(prefix).copied().unwrap_or(beside_one);
    tch::manual_seed(config.run.seed as i64);
    let spec = ExpertSpec::new(&config.lora, mixture.specs.len(), &start.base.spec)?;
    let mut grown = growth::with_expert(mixture, &start.weights, spec, &bias)?;
    for (expert, spec) in grown.specs.iter_mut().enumerate() {
        spec.trainable = grow::is_trainable(config, expert);
    }
    let after = start.put_on(&grown)?;
    let new_prob = grow::largest_new_prob(&after, &data.train, &growth.domain, SKILL_BLOCKS);
    Ok((grown, new_prob))
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
    let config = config::load::resolve(&config::load::to_toml(&grown), &args.set)?;
    check_same_shape(&config, &grown)?;
    Ok(config)
}

/// Checks that `--set` leaves what the mixture's tensors depend on.
fn check_same_shape(config: &Config, grown: &Config) -> Result<()> {
    let parts = |config: &Config| {
        let RouterConfig { input, scope, level, hidden_layers, hidden_width, .. } = config.router;
        [
            ("method", json!(config.method)),
            ("lora.num_experts", json!(config.lora.num_experts)),
            ("lora.experts_per_layer", json!(config.lora.experts_per_layer)),
            ("growth.domain", json!(config.growth.as_ref().map(|growth| &growth.domain))),
            ("router.input", json!(input)),
            ("router.scope", json!(scope)),
            ("router.level", json!(level)),
            ("router.hidden_layers", json!(hidden_layers)),
            ("router.hidden_width", json!(hidden_width)),
        ]
    };
    // beside a single expert, the router is new
    let is_free = |key: &str| key.starts_with("router.") && grown.lora.num_experts == 2;
    for ((key, now), (_, was)) in parts(config).into_iter().zip(parts(grown)) {
        if now != was && !is_free(key) {
            bail!("`{key}` must stay {was} where an expert is added, got {now}");
        }
    }
    let has_bias = |config: &Config| config.router.balance_bias_rate > 0.0;
    if has_bias(config) != has_bias(grown) && !is_free("router.balance_bias_rate") {
        let what = if has_bias(grown) { "above 0" } else { "0" };
        bail!("`router.balance_bias_rate` must stay {what} where an expert is added");
    }
    Ok(())
}

/// The skills of the checkpoint; of one that has no library yet, those of the domains it was trained on.
fn library(
    dir: &Path,
    model: &RoutedModel,
    config: &Config,
    data: &Datasets,
    before: Option<&EvalReport>,
) -> Result<SkillLibrary> {
    if let Some(known) = checkpoint::read_skills(dir, model.base().spec.n_embd)? {
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
            expert: before.and_then(|before| covering_expert(before, &domain.name)),
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
    args: &AddExpertArgs,
) -> String {
    let cosine = similar.first().map_or(0.0, |similar| similar.cosine);
    let rule = match args.compare {
        SkillComparison::Max => format!("known from {} on", args.threshold),
        SkillComparison::Median => format!("known from a median of {} on", args.threshold),
    };
    let expert = covers.map_or("expert_0".to_owned(), |expert| format!("expert_{expert}"));
    format!(
        "`{domain}` is no new skill: it is like `{}` (cosine {cosine:.3}, {rule}), which \
         {expert} covers",
        known.name
    )
}
