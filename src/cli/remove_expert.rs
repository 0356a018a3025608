//! `dylora remove-expert` and `dylora merge-experts`: a mixture with one expert less, and what that
//! costs.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use super::eval::validate;
use super::open::{device_name, open_base};
use super::train::load_data;
use super::{Shared, device, table, usage};
use crate::config::DeviceChoice;
use crate::eval::EvalReport;
use crate::growth::{self, merge};
use crate::mixture::Mixture;
use crate::model::{RoutedModel, kind_of};
use crate::skills::SkillLibrary;
use crate::train::checkpoint::{self, Preferred};
use crate::train::stages::Stage;
use crate::train::{Past, Trainer, check_new_run, checkpoint_base, grow, load_mixture};

/// What both commands are given.
#[derive(Debug, Args)]
pub struct ShrinkArgs {
    /// A run's folder (its best checkpoint, else its last) or one of its `checkpoints/step-*`.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// The folder of the new run, which begins with a checkpoint of step 0.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// `auto`, `cpu` or `cuda[:N]`.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `dylora remove-expert`.
#[derive(Debug, Args)]
pub struct RemoveExpertArgs {
    #[command(flatten)]
    shrink: ShrinkArgs,
    /// Which expert, from 0.
    #[arg(long, value_name = "N")]
    expert: usize,
}

/// Arguments of `dylora merge-experts`.
#[derive(Debug, Args)]
pub struct MergeExpertsArgs {
    #[command(flatten)]
    shrink: ShrinkArgs,
    /// Which two, as `0,2` [default: those whose updates are most alike].
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    experts: Option<Vec<usize>>,
}

/// What is to be done.
enum Change {
    Remove(usize),
    /// Two experts, or the two that are most alike.
    Merge(Option<(usize, usize)>),
}

/// Runs `remove-expert`.
pub fn remove(args: RemoveExpertArgs, shared: &Shared) -> Result<()> {
    shrink(&args.shrink, &Change::Remove(args.expert), shared)
}

/// Runs `merge-experts`.
pub fn merge(args: MergeExpertsArgs, shared: &Shared) -> Result<()> {
    let pair = match args.experts.as_deref() {
        None => None,
        Some(&[a, b]) if a != b => Some((a.min(b), a.max(b))),
        Some(found) => {
            return Err(usage(anyhow!("`--experts` must name two experts, got {found:?}")));
        }
    };
    shrink(&args.shrink, &Change::Merge(pair), shared)
}

/// A mixture with one expert less.
struct Shrunk {
    mixture: Mixture,
    /// The expert whose number is free now.
    gone: usize,
    /// The expert in whose place a merged one is.
    merged_into: Option<usize>,
    name: String,
    told: String,
}

fn shrink(args: &ShrinkArgs, change: &Change, shared: &Shared) -> Result<()> {
    let dir = checkpoint::find(&args.checkpoint, Preferred::Best)?;
    let (config, state) = (checkpoint::read_config(&dir)?, checkpoint::read_state(&dir)?);
    grow::check_can_change(&config).map_err(usage)?;
    let run_dir = std::path::absolute(&args.out)?;
    check_new_run(&run_dir)?;
    let mixture = load_mixture(&dir, &config, &state)?;
    check(change, &mixture).map_err(usage)?;
    let device = device(args.device.unwrap_or(config.run.device))?;
    let base = open_base(&config.base, shared)?;
    let weights = checkpoint_base(&base, &state)?;
    let data = load_data(&config, &base, shared)?;
    let kind = kind_of(config.base.dtype);
    let model = mixture.put_on(&weights, device, kind)?;
    let before = validate(&model, &data.validation, &config, shared)?;
    let mut shrunk = apply(change, &mixture, &model, before.as_ref()).map_err(usage)?;
    drop(model);
    let temperature = mixture.router.temperature;
    let new_config =
        grow::shrunk_config(&config, temperature, shrunk.gone, run_dir).map_err(usage)?;
    for (expert, spec) in shrunk.mixture.specs.iter_mut().enumerate() {
        spec.trainable = grow::is_trainable(&new_config, expert);
    }
    let smaller = shrunk.mixture.put_on(&weights, device, kind)?;
    let after = validate(&smaller, &data.validation, &new_config, shared)?;
    drop(smaller);

    let mut past = Past { stages: state.stages, tokens_seen: state.tokens_seen, ..Past::default() };
    if let (Some(last), Some(before)) = (past.stages.last_mut(), &before) {
        last.losses = before.domain_losses();
    }
    past.maturity = state.routing.experts;
    if shrunk.gone < past.maturity.len() {
        past.maturity.remove(shrunk.gone);
    }
    let skills = checkpoint::read_skills(&dir, base.spec.n_embd)?;
    past.skills = skills.map(|skills| renumber(skills, &shrunk));
    let mut stage = Stage::new(&shrunk.name, vec![], new_config.lora.num_experts);
    stage.losses = after.as_ref().map(EvalReport::domain_losses).unwrap_or_default();
    let trainer =
        Trainer::next_stage(new_config, &base, &shrunk.mixture, data, device, past, stage)?;
    let written = trainer.save()?;
    if args.json {
        let json = json!({
            "change": shrunk.name,
            "told": shrunk.told,
            "before": before,
            "after": after,
            "checkpoint": written,
            "device": device_name(device),
        });
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    println!("{}", shrunk.told);
    if let (Some(before), Some(after)) = (&before, &after) {
        let names = ["before".to_owned(), "after".to_owned()];
        println!("{}", table::rules(&names, before, after));
    }
    println!("checkpoint: {}", written.display());
    Ok(())
}

/// Checks what can be said before anything is measured.
fn check(change: &Change, mixture: &Mixture) -> Result<()> {
    let experts = match *change {
        Change::Remove(expert) => vec![expert],
        Change::Merge(Some((a, b))) => vec![a, b],
        Change::Merge(None) if mixture.specs.len() == 1 => {
            bail!("a single expert has none to merge with")
        }
        Change::Merge(None) => vec![],
    };
    experts.into_iter().try_for_each(|expert| growth::check_expert(mixture, expert))?;
    if mixture.specs.len() == 1 {
        bail!("the only expert cannot be removed");
    }
    Ok(())
}

fn apply(
    change: &Change,
    mixture: &Mixture,
    model: &RoutedModel,
    before: Option<&EvalReport>,
) -> Result<Shrunk> {
    match *change {
        Change::Remove(expert) => Ok(Shrunk {
            mixture: growth::without_expert(mixture, expert)?,
            gone: expert,
            merged_into: None,
            name: format!("remove expert_{expert}"),
            told: format!("expert_{expert} is removed; those after it move up by one"),
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
            Ok(Shrunk {
                mixture: merged.mixture,
                gone: b,
                merged_into: Some(a),
                name: format!("merge expert_{a} expert_{b}"),
                told: format!(
                    "expert_{b} is merged into expert_{a} with weights {:.3} and {:.3}; the cosine of their \
                     updates is {cosine:.3}, and the merged one is {:.2} % off for its rank",
                    shares[0],
                    shares[1],
                    100.0 * merged.relative_error
                ),
            })
        }
    }
}

/// The shares of two experts in the routing weight that both have on the validation data; even
/// without any.
fn shares(before: Option<&EvalReport>, a: usize, b: usize) -> [f64; 2] {
    let weights = before.and_then(|report| report.routing.as_ref());
    let of = |expert: usize| {
        weights.and_then(|routing| routing.mean_routing_weights.get(expert)).copied().unwrap_or(0.0)
    };
    let sum = of(a) + of(b);
    if sum > 0.0 { [of(a) / sum, of(b) / sum] } else { [0.5, 0.5] }
}

fn renumber(mut skills: SkillLibrary, shrunk: &Shrunk) -> SkillLibrary {
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
