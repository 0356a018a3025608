//! Adds an expert to a mixture for a skill that it does not have yet.
//!
//! ```text
//! checkpoint -> compare the new data with the known skills -> grow the mixture -> train the stage
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tch::Device;

use crate::base::Base;
use crate::checkpoint::{self, TrainState, checkpoint_base, load_mixture};
use crate::config::{self, Config, GrowthConfig, RouterConfig};
use crate::data::{Datasets, TokenDataset};
use crate::eval::EvalReport;
use crate::growth;
use crate::growth::new_column;
use crate::growth::skills::{
    Embedding, Similarity, Skill, SkillCenter, SkillComparison, SkillLibrary, SkillRule, embed,
};
use crate::growth::stage_config::{self, Growth};
use crate::growth::stages::Stage;
use crate::mixture::Mixture;
use crate::model::decoder::Decoder;
use crate::model::experts::spec::ExpertSpec;
use crate::model::{RoutedModel, kind_of};
use crate::train::Trainer;

/// Largest number of a domain's blocks that are read for its embedding and for the new router
/// column.
const SKILL_BLOCKS: usize = 32;

/// A mixture that is to grow, with the data of its old domains and the new one.
#[derive(Debug)]
pub struct GrowingMixture {
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

/// The new data compared with the known skills.
#[derive(Debug)]
pub struct Compared {
    skills: SkillLibrary,
    new: Embedding,
    /// The known skills, the most similar first.
    pub similar: Vec<Similarity>,
    /// A message for the user if the new data counts as known.
    pub known: Option<String>,
}

/// A mixture with one expert more.
#[derive(Debug)]
pub struct Grown {
    mixture: Mixture,
    /// The largest probability that the new expert has for a token of the old domains.
    pub largest_new_prob: f64,
}

/// The config of the stage in which the mixture of the checkpoint in `dir` grows.
///
/// - `sets`: overrides of single keys, as `optimizer.router.learning_rate=1e-2`
///
/// # Errors
/// Fails if the mixture cannot grow, if it already has the domain, or if an override changes a key
/// that the mixture's tensors depend on.
pub fn stage_config(dir: &Path, growth: &Growth, sets: &[String]) -> Result<Config> {
    let (mut old, state) = (checkpoint::read_config(dir)?, checkpoint::read_state(dir)?);
    // a domain whose expert was removed can be learned again, from the files that are named now
    if checkpoint::has_skill(dir, &growth.domain.name)? == Some(false) {
        old.data.domains.retain(|domain| domain.name != growth.domain.name);
    }
    let rule = state.routing.rule(&old.router, state.step.max(1));
    let grown = stage_config::grown_config(&old, rule.temperature, growth)?;
    let config = config::load::resolve(&config::load::to_toml(&grown), sets)?;
    check_same_shape(&config, &grown)?;
    Ok(config)
}

impl GrowingMixture {
    /// The mixture of the checkpoint in `dir`, which is to grow with `config`, made by
    /// [`stage_config()`].
    ///
    /// # Errors
    /// Fails if the checkpoint was trained on another base.
    pub fn new(
        dir: &Path,
        config: Config,
        base: Base,
        data: Datasets,
        device: Device,
    ) -> Result<Self> {
        let (old_config, state) = (checkpoint::read_config(dir)?, checkpoint::read_state(dir)?);
        let mut mixture = load_mixture(dir, &old_config, &state)?;
        mixture.router = state.routing.rule(&config.router, 1).router_spec(&config);
        let weights = checkpoint_base(&base, &state)?;
        let growth = config.growth.clone().context("a growing mixture has `[growth]`")?;
        let dir = dir.to_owned();
        Ok(Self { dir, state, old_config, config, growth, mixture, base, weights, data, device })
    }

    /// The name of the new domain.
    pub fn domain(&self) -> &str {
        &self.growth.domain
    }

    /// The data of all domains.
    pub fn data(&self) -> &Datasets {
        &self.data
    }

    /// Number of experts before one is added, which is also the index of the new one.
    pub fn num_old(&self) -> usize {
        self.mixture.num_experts()
    }

    /// The model of the mixture before it grows.
    pub fn model(&self) -> Result<RoutedModel> {
        self.put_on(&self.mixture)
    }

    fn put_on(&self, mixture: &Mixture) -> Result<RoutedModel> {
        mixture.put_on(&self.weights, self.device, kind_of(self.config.base.dtype))
    }

    /// Compares the new data with the known skills.
    ///
    /// - `before`: an evaluation of [`GrowingMixture::model`], which shows which expert covers
    ///   which domain
    pub fn compare(
        &self,
        model: &RoutedModel,
        before: Option<&EvalReport>,
        rule: SkillRule,
    ) -> Result<Compared> {
        let (train, domain) = (&self.data.train, &self.growth.domain);
        let skills = library(&self.dir, model, &self.old_config, &self.data, before)?;
        let new = embed(model, train, domain_index(train, domain)?, 8, Some(SKILL_BLOCKS))?;
        let similar = skills.compare(&new.mean);
        let known = skills.known(&new.mean, rule).map(|known| {
            let covers = known.expert.or_else(|| covering_expert(before?, domain));
            known_message(domain, known, covers, &similar, rule)
        });
        Ok(Compared { skills, new, similar, known })
    }

    /// Adds the expert, which has almost no routing weight on the old domains' tokens at first.
    pub fn grow(&self, model: &RoutedModel) -> Result<Grown> {
        let Self { config, mixture, data, growth, .. } = self;
        let biases = new_column::initial_biases(model, &data.train, &growth.domain, SKILL_BLOCKS)?;
        let beside_one = new_column::bias_beside_one(mixture.router.temperature);
        let bias = |prefix: &str| biases.get(prefix).copied().unwrap_or(beside_one);
        tch::manual_seed(config.run.seed as i64);
        let spec = ExpertSpec::of_config(config, mixture.num_experts(), &self.base.spec)?;
        let mut grown = growth::with_expert(mixture, &self.weights, spec, &bias)?;
        stage_config::set_trainable(&mut grown.specs, config);
        let after = self.put_on(&grown)?;
        let (train, domain) = (&data.train, &growth.domain);
        let largest_new_prob = new_column::largest_new_prob(&after, train, domain, SKILL_BLOCKS);
        Ok(Grown { mixture: grown, largest_new_prob })
    }

    /// The run of the stage that begins with the grown mixture.
    ///
    /// - `before`: as in [`GrowingMixture::compare`]
    pub fn stage(
        self,
        grown: &Grown,
        compared: Compared,
        before: Option<&EvalReport>,
    ) -> Result<Trainer> {
        let Compared { mut skills, new, similar, .. } = compared;
        let (domain, num_old) = (self.growth.domain, self.mixture.num_experts());
        let Self { mut config, base, mut data, device, .. } = self;
        let of_skill = |name: &str| similar.iter().find(|similar| similar.name == name);
        let cosine = |name: &str| of_skill(name).map_or(0.0, |similar| similar.cosine);
        stage_config::divide_replay(&mut config, &cosine);
        for (of_data, of_config) in data.train.domains.iter_mut().zip(&config.data.domains) {
            of_data.weight = of_config.weight;
        }
        skills.skills.push(Skill {
            name: domain.clone(),
            embedding: new.mean,
            label_tokens: new.label_tokens,
            expert: Some(num_old),
        });
        let history = super::history(self.state, Some(skills), before);
        let stage = Stage::new(&format!("add {domain}"), vec![domain], num_old as i64 + 1);
        Trainer::next_stage(config, &base, &grown.mixture, data, device, history, stage)
    }
}

/// Checks that overrides have not changed a key that the mixture's tensors depend on.
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
    // a single old expert has no router, so the new router may have any form
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

/// The skills of the checkpoint in `dir`. If it has no library yet, the domains that it was trained
/// on are embedded.
fn library(
    dir: &Path,
    model: &RoutedModel,
    config: &Config,
    data: &Datasets,
    before: Option<&EvalReport>,
) -> Result<SkillLibrary> {
    if let Some(known) = checkpoint::read_skills(dir, model.base().spec.width)? {
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

/// The expert with the largest mean routing weight on a domain.
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
    rule: SkillRule,
) -> String {
    let cosine = similar.first().map_or(0.0, |similar| similar.cosine);
    let rule = match rule.by {
        SkillComparison::Max => format!("known from {} on", rule.threshold),
        SkillComparison::Median => format!("known from a median of {} on", rule.threshold),
    };
    let expert = covers.map_or("expert_0".to_owned(), |expert| format!("expert_{expert}"));
    format!(
        "`{domain}` is no new skill: it is like `{}` (cosine {cosine:.3}, {rule}), which \
         {expert} covers",
        known.name
    )
}
