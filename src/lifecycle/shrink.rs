//! Removes an expert of a mixture, or merges it into another.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use tch::Device;

use crate::base::Base;
use crate::checkpoint::{self, TrainState, checkpoint_base, load_mixture};
use crate::config::{Config, DomainConfig};
use crate::data::Datasets;
use crate::eval::EvalReport;
use crate::growth::skills::SkillLibrary;
use crate::growth::stages::Stage;
use crate::growth::{self, merge, stage_config};
use crate::mixture::Mixture;
use crate::model::decoder::Decoder;
use crate::model::{RoutedModel, kind_of};
use crate::train::Trainer;

/// The change to make.
#[derive(Debug, Clone, Copy)]
pub enum Change {
    /// Remove this expert.
    Remove(usize),
    /// Merge these two experts, or the two most similar ones.
    Merge(Option<(usize, usize)>),
}

/// A mixture that is to lose an expert.
#[derive(Debug)]
pub struct ShrinkingMixture {
    dir: PathBuf,
    state: TrainState,
    config: Config,
    mixture: Mixture,
}

/// A mixture with one expert fewer, and the config with which it is trained further.
#[derive(Debug)]
pub struct Shrunk {
    changed: Changed,
    config: Config,
}

#[derive(Debug)]
struct Changed {
    mixture: Mixture,
    /// The old index of the expert that was removed or merged into another.
    gone: usize,
    /// The expert that the merged one has replaced; `None` if an expert was removed.
    merged_into: Option<usize>,
    name: String,
    message: String,
}

impl Shrunk {
    /// The name of the stage, such as `remove expert_2`.
    pub fn name(&self) -> &str {
        &self.changed.name
    }

    /// A message for the user about what was changed.
    pub fn message(&self) -> &str {
        &self.changed.message
    }

    /// The config with which it is trained further.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The two experts that were merged; `None` if an expert was removed.
    pub fn merged(&self) -> Option<[usize; 2]> {
        Some([self.changed.merged_into?, self.changed.gone])
    }

    /// The model of the smaller mixture.
    pub fn model(&self, weights: &Decoder, device: Device) -> Result<RoutedModel> {
        self.changed.mixture.put_on(weights, device, kind_of(self.config.base.dtype))
    }
}

impl ShrinkingMixture {
    /// The mixture of the checkpoint in `dir`, to which `change` is to be made.
    ///
    /// # Errors
    /// Fails if the mixture cannot lose an expert or lacks one that `change` names.
    pub fn new(dir: &Path, change: &Change) -> Result<Self> {
        let (config, state) = (checkpoint::read_config(dir)?, checkpoint::read_state(dir)?);
        stage_config::check_can_change(&config)?;
        let mixture = load_mixture(dir, &config, &state)?;
        check(change, &mixture)?;
        Ok(Self { dir: dir.to_owned(), state, config, mixture })
    }

    /// The config of the mixture's run.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights of the base that the mixture was trained on.
    ///
    /// # Errors
    /// Fails if `base` is another base.
    pub fn weights(&self, base: &Base) -> Result<Decoder> {
        checkpoint_base(base, &self.state)
    }

    /// The model of the mixture before the change.
    pub fn model(&self, weights: &Decoder, device: Device) -> Result<RoutedModel> {
        self.mixture.put_on(weights, device, kind_of(self.config.base.dtype))
    }

    /// Makes the change. The run of the smaller mixture will be in `run_dir`.
    ///
    /// - `before`: an evaluation of `model`, from which the weights of merged experts follow
    pub fn change(
        &self,
        change: &Change,
        model: &RoutedModel,
        before: Option<&EvalReport>,
        run_dir: PathBuf,
    ) -> Result<Shrunk> {
        let mut changed = changed(change, &self.mixture, model, before)?;
        if changed.merged_into.is_none() {
            changed.message += &self.left_alone(changed.gone);
        }
        let temperature = self.mixture.router.temperature;
        let (gone, into) = (changed.gone, changed.merged_into);
        let config = stage_config::shrunk_config(&self.config, temperature, gone, into, run_dir)?;
        stage_config::set_trainable(&mut changed.mixture.specs, &config);
        Ok(Shrunk { changed, config })
    }

    /// Names the domains that have lost their only expert.
    fn left_alone(&self, gone: usize) -> String {
        let has_lost = |domain: &&DomainConfig| {
            domain.expert.as_ref().is_some_and(|of| of.experts() == [gone as i64])
        };
        let lost = self.config.data.domains.iter().filter(has_lost);
        let names: Vec<String> = lost.map(|domain| format!("`{}`", domain.name)).collect();
        if names.is_empty() {
            return String::new();
        }
        format!("; all that are left now serve {}, which had no other", names.join(" and "))
    }

    /// The model of the mixture from which an expert is removed instead of a merge.
    pub fn without(&self, expert: usize, weights: &Decoder, device: Device) -> Result<RoutedModel> {
        let mixture = growth::without_expert(&self.mixture, expert)?;
        mixture.put_on(weights, device, kind_of(self.config.base.dtype))
    }

    /// The run of the stage that begins with the smaller mixture.
    ///
    /// - `before`, `after`: evaluations of the mixture before and after the change
    pub fn stage(
        self,
        shrunk: Shrunk,
        base: &Base,
        data: Datasets,
        device: Device,
        before: Option<&EvalReport>,
        after: Option<&EvalReport>,
    ) -> Result<Trainer> {
        let (state, Shrunk { changed, config }) = (self.state, shrunk);
        let skills = checkpoint::read_skills(&self.dir, base.spec.width)?;
        let skills = skills.map(|skills| renumber(skills, &changed));
        let mut history = super::history(state, skills, before);
        if changed.gone < history.maturity.len() {
            history.maturity.remove(changed.gone);
        }
        let mut stage = Stage::new(&changed.name, vec![], config.lora.num_experts);
        stage.losses = after.map(EvalReport::domain_losses).unwrap_or_default();
        Trainer::next_stage(config, base, &changed.mixture, data, device, history, stage)
    }
}

/// The share of its loss by which a removal must be better than a merge to be told.
const MIN_GAIN: f64 = 0.01;

/// A message for the user if a merge brings nothing, because the loss is lower where one of the two
/// experts is removed instead.
///
/// - `after`: the mean loss after the merge, nats
/// - `without`: the mean loss without each of the two experts instead
pub fn without_use(merged: [usize; 2], after: f64, without: [f64; 2]) -> Option<String> {
    let [a, b] = merged;
    let (expert, least) = if without[0] < without[1] { (a, without[0]) } else { (b, without[1]) };
    (least < after * (1.0 - MIN_GAIN)).then(|| {
        format!(
            "merging expert_{a} and expert_{b} brings nothing: the mean loss would be {after:.4}, \
             and without expert_{expert} instead it is {least:.4}\nhint: name experts that are \
             more alike with `--experts A,B`, or use `remove-expert --expert {expert}`"
        )
    })
}

/// Checks that the experts of `change` exist and that an expert will be left.
fn check(change: &Change, mixture: &Mixture) -> Result<()> {
    let experts = match *change {
        Change::Remove(expert) => vec![expert],
        Change::Merge(Some((a, b))) => vec![a, b],
        Change::Merge(None) if mixture.num_experts() == 1 => {
            bail!("a single expert has none to merge with")
        }
        Change::Merge(None) => vec![],
    };
    experts.into_iter().try_for_each(|expert| growth::check_expert(mixture, expert))?;
    if mixture.num_experts() == 1 {
        bail!("the only expert cannot be removed");
    }
    Ok(())
}

/// The mixture with one expert fewer.
fn changed(
    change: &Change,
    mixture: &Mixture,
    model: &RoutedModel,
    before: Option<&EvalReport>,
) -> Result<Changed> {
    match *change {
        Change::Remove(expert) => Ok(Changed {
            mixture: growth::without_expert(mixture, expert)?,
            gone: expert,
            merged_into: None,
            name: format!("remove expert_{expert}"),
            message: format!(
                "expert_{expert} is removed; the numbers of those after it fall by one"
            ),
        }),
        Change::Merge(pair) => {
            let similarity = merge::similarity(model)?;
            let (a, b) = match pair {
                Some(pair) => pair,
                None => {
                    let most = merge::most_similar(&similarity);
                    let (a, b, _) = most.expect("it was checked that there are two");
                    (a, b)
                }
            };
            let shares = shares(before, a, b);
            let merged = merge::merged(mixture, a, b, shares)?;
            let cosine = similarity.get(a).and_then(|row| row.get(b)).copied().unwrap_or(0.0);
            Ok(Changed {
                mixture: merged.mixture,
                gone: b,
                merged_into: Some(a),
                name: format!("merge expert_{a} expert_{b}"),
                message: format!(
                    "expert_{b} is merged into expert_{a} with weights {:.3} and {:.3}; the cosine \
                     of their updates is {cosine:.3}, and the merged one is {:.2} % off for its \
                     rank",
                    shares[0],
                    shares[1],
                    100.0 * merged.relative_error
                ),
            })
        }
    }
}

/// The shares of two experts in the sum of their mean routing weights on the validation data; even
/// shares if there is no evaluation or no weight.
fn shares(before: Option<&EvalReport>, a: usize, b: usize) -> [f64; 2] {
    let weights = before.and_then(|report| report.routing.as_ref());
    let of = |expert: usize| {
        weights.and_then(|routing| routing.mean_routing_weights.get(expert)).copied().unwrap_or(0.0)
    };
    let sum = of(a) + of(b);
    if sum > 0.0 { [of(a) / sum, of(b) / sum] } else { [0.5, 0.5] }
}

fn renumber(mut skills: SkillLibrary, shrunk: &Changed) -> SkillLibrary {
    let is_lost = |expert| expert == Some(shrunk.gone) && shrunk.merged_into.is_none();
    skills.skills.retain(|skill| !is_lost(skill.expert));
    for skill in &mut skills.skills {
        skill.expert = match skill.expert {
            Some(expert) if expert == shrunk.gone => shrunk.merged_into,
            Some(expert) if expert > shrunk.gone => Some(expert - 1),
            expert => expert,
        };
    }
    skills
}
