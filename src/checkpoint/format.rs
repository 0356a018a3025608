//! Checkpoints: all that resuming, evaluating and exporting need.
//!
//! ```text
//! RUN/checkpoints/step-00000200/   config.toml            the resolved config
//!                                  state.json             counters, data position, best metric, hashes
//!                                  experts.json           rank, alpha, modules, options of each expert
//!                                  skills.json            what it is known to have learned, if that is known
//!                                  model.safetensors      experts and router, frozen ones too
//!                                  optimizer.safetensors  moments and generator states
//! RUN/checkpoints/last, best       symbolic links
//! ```
//!
//! A checkpoint is written into a temporary folder, forced to disk and renamed, so that a folder named
//! `step-*` is always whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::routing_state::RoutingState;
use crate::config::{Config, load};
use crate::durable;
use crate::growth::skills::SkillLibrary;
use crate::growth::stages::Stage;
use crate::model::experts::spec::ExpertSpec;
use crate::tensor_file::{read_tensors, write_tensors};

/// The version of the format, raised when old checkpoints can no longer be read.
pub const FORMAT: u32 = 3;

const CONFIG: &str = "config.toml";
const STATE: &str = "state.json";
const EXPERTS: &str = "experts.json";
const SKILLS: &str = "skills.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// The counters of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Version of the format.
    pub format: u32,
    /// Updates so far.
    pub step: u64,
    /// Target tokens trained on.
    pub tokens_seen: u64,
    /// Where the data goes on.
    pub position: Position,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then, for early stopping.
    pub evals_without_improvement: u64,
    /// BLAKE3 of the frozen base's parameters in f32, as they were read; none if the base itself is
    /// trained.
    pub base_hash: Option<String>,
    /// Fingerprint of the training data.
    pub data_fingerprint: String,
    /// Blocks trained on, by domain in the config's order.
    pub domain_blocks: Vec<u64>,
    /// Windows, maturity, alarms.
    pub routing: RoutingState,
    /// What the mixture has been through; this run is the last.
    pub stages: Vec<Stage>,
}

/// A place in the endless sequence of epochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// From 0.
    pub epoch: u64,
    /// Blocks of the epoch that are done.
    pub offset: u64,
}

/// The best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Mean of the domains' validation losses, nats.
    pub loss: f64,
}

/// A checkpoint in memory.
#[derive(Debug)]
pub struct Checkpoint {
    /// The run's resolved config.
    pub config: Config,
    /// Counters.
    pub state: TrainState,
    /// The experts' settings.
    pub experts: Vec<ExpertSpec>,
    /// The skills that the mixture is known to have.
    pub skills: Option<SkillLibrary>,
    /// Experts and router, or the trained base.
    pub model: BTreeMap<String, Tensor>,
    /// Moments and generator states.
    pub optimizer: BTreeMap<String, Tensor>,
}

/// Which of a run's checkpoints is meant when a run folder is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preferred {
    /// The best, else the last: to evaluate and export.
    Best,
    /// The last: to resume.
    Last,
}

/// The checkpoint folder that `dir` names: itself, or one of the run's whose folder it is. A run that was
/// killed, or found no space, after a step was in place and before `last` led to it has no `last`, or one
/// that leads nowhere: the newest whole step is taken, and `last` is mended.
///
/// # Errors
/// A folder without a checkpoint, or with none that is whole.
pub fn find(dir: &Path, preferred: Preferred) -> Result<PathBuf> {
    if dir.join(STATE).is_file() {
        return Ok(dir.to_owned());
    }
    let names: &[&str] = match preferred {
        Preferred::Best => &["best", "last"],
        Preferred::Last => &["last"],
    };
    for name in names {
        let path = folder(dir).join(name);
        if path.join(STATE).is_file() {
            return Ok(path);
        }
    }
    if !dir.exists() {
        bail!("there is no folder `{}`", dir.display());
    }
    newest_whole(dir)
}

/// The newest step of a run that is whole, to which `last` leads from now on.
fn newest_whole(run_dir: &Path) -> Result<PathBuf> {
    restore(run_dir)?;
    let (parent, mut newest_fault) = (folder(run_dir), None);
    for step in steps(run_dir)?.into_iter().rev() {
        let name = step_name(step);
        let path = parent.join(&name);
        if let Err(fault) = check_whole(&path) {
            tracing::warn!("`{}` is not whole: {fault:#}", path.display());
            newest_fault.get_or_insert(fault);
            continue;
        }
        let mended = match point(&parent, "last", &name) {
            Ok(()) => "which leads there now".to_owned(),
            Err(error) => format!("which cannot be mended: {error:#}"),
        };
        tracing::warn!(
            "taking `{name}`, the newest whole step: no checkpoint is behind `last`, {mended}"
        );
        return Ok(path);
    }
    let hint = "hint: name a run's folder or one of its `checkpoints/step-*`";
    match newest_fault {
        None => bail!("`{}` holds no checkpoint\n{hint}", run_dir.display()),
        Some(fault) => {
            bail!("`{}` holds no whole checkpoint: {fault:#}\n{hint}", run_dir.display())
        }
    }
}

/// Checks that a checkpoint's files are there and can be read.
fn check_whole(dir: &Path) -> Result<()> {
    read_state(dir)?;
    read_config(dir)?;
    read_experts(dir)?;
    read_model(dir)?;
    read_optimizer(dir)?;
    Ok(())
}

/// Where a run's checkpoints are.
pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// The run's config as a checkpoint holds it, without its tensors.
pub fn read_config(dir: &Path) -> Result<Config> {
    load::load(&dir.join(CONFIG), &[])
}

/// The counters as a checkpoint holds them.
pub fn read_state(dir: &Path) -> Result<TrainState> {
    let path = dir.join(STATE);
    let text = fs_err::read_to_string(&path).context("cannot read the checkpoint")?;
    let state: TrainState = serde_json::from_str(&text)
        .with_context(|| format!("`{}` is no state of this version", path.display()))?;
    if state.format != FORMAT {
        bail!("`{}` has format {}, this version reads {FORMAT}", path.display(), state.format);
    }
    Ok(state)
}

/// The experts' settings as a checkpoint holds them; none of a trained base.
pub fn read_experts(dir: &Path) -> Result<Vec<ExpertSpec>> {
    let path = dir.join(EXPERTS);
    let text = fs_err::read_to_string(&path).context("cannot read the checkpoint")?;
    serde_json::from_str(&text)
        .with_context(|| format!("`{}` holds no experts of this version", path.display()))
}

/// The skills that a checkpoint's mixture is known to have, on a base of width `d`.
pub fn read_skills(dir: &Path, d: i64) -> Result<Option<SkillLibrary>> {
    let path = dir.join(SKILLS);
    path.exists().then(|| SkillLibrary::read(&path, d)).transpose()
}

/// The experts and the router, or the trained base, that a checkpoint holds.
pub fn read_model(dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    read_tensors(&dir.join(MODEL)).context("cannot read the checkpoint")
}

/// The moments and generator states that a checkpoint holds.
pub fn read_optimizer(dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    read_tensors(&dir.join(OPTIMIZER)).context("cannot read the checkpoint")
}

/// Writes a checkpoint of `run_dir`, points `last` at it and `best` at the best so far, and removes
/// the earlier ones but for the last `keep_last` and the best. Returns its folder.
pub fn write(run_dir: &Path, checkpoint: &Checkpoint, keep_last: usize) -> Result<PathBuf> {
    let parent = folder(run_dir);
    let name = step_name(checkpoint.state.step);
    let target = parent.join(&name);
    let write = || -> Result<()> {
        // a resumed run comes to the same step again
        durable::folder::write(&target, |dir| write_files(dir, checkpoint))?;
        point(&parent, "last", &name)?;
        if let Some(best) = checkpoint.state.best
            && parent.join(step_name(best.step)).exists()
        {
            point(&parent, "best", &step_name(best.step))?;
        }
        durable::sync_folder(&parent)
    };
    write().with_context(|| format!("cannot write checkpoint `{name}`"))?;
    prune(run_dir, &checkpoint.state, keep_last)?;
    Ok(target)
}

fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

fn write_files(dir: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let named = |tensors: &BTreeMap<String, Tensor>, file: &str| {
        write_tensors(&dir.join(file), tensors.iter().map(|(name, t)| (name.as_str(), t)))
    };
    named(&checkpoint.model, MODEL)?;
    named(&checkpoint.optimizer, OPTIMIZER)?;
    let experts = serde_json::to_string_pretty(&checkpoint.experts)? + "\n";
    durable::write(&dir.join(EXPERTS), experts.as_bytes())?;
    if let Some(skills) = &checkpoint.skills {
        skills.write(&dir.join(SKILLS))?;
    }
    durable::write(&dir.join(CONFIG), load::to_toml(&checkpoint.config).as_bytes())?;
    let state = serde_json::to_string_pretty(&checkpoint.state)? + "\n";
    durable::write(&dir.join(STATE), state.as_bytes())
}

/// Replaces the symbolic link `name` in one step.
fn point(parent: &Path, name: &str, target: &str) -> Result<()> {
    let temporary = parent.join(format!(".{name}-{}", std::process::id()));
    if temporary.symlink_metadata().is_ok() {
        fs_err::remove_file(&temporary)?;
    }
    fs_err::os::unix::fs::symlink(target, &temporary)?;
    Ok(fs_err::rename(&temporary, parent.join(name))?)
}

/// The steps of a run's checkpoints, ascending.
pub fn steps(run_dir: &Path) -> Result<Vec<u64>> {
    let parent = folder(run_dir);
    if !parent.exists() {
        return Ok(vec![]);
    }
    let mut steps = vec![];
    for entry in fs_err::read_dir(&parent)? {
        let name = entry?.file_name();
        steps
            .extend(name.to_str().and_then(|name| name.strip_prefix("step-")?.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Removes old checkpoints. Those of later steps, which a run that was resumed from further back will
/// come to again, do not count.
fn prune(run_dir: &Path, state: &TrainState, keep_last: usize) -> Result<()> {
    let mut steps = steps(run_dir)?;
    steps.retain(|&step| step <= state.step);
    let old = &steps[..steps.len().saturating_sub(keep_last)];
    for &step in old.iter().filter(|&&step| Some(step) != state.best.map(|best| best.step)) {
        fs_err::remove_dir_all(folder(run_dir).join(step_name(step)))
            .context("cannot remove an old checkpoint")?;
    }
    Ok(())
}

/// Brings back steps that a killed process was about to replace.
fn restore(run_dir: &Path) -> Result<()> {
    let parent = folder(run_dir);
    for name in hidden(&parent)? {
        if let Some(name) = name.strip_prefix(durable::folder::REPLACED) {
            durable::folder::restore(&parent.join(name))?;
        }
    }
    Ok(())
}

/// Removes what an interrupted write left behind.
pub fn clean(run_dir: &Path) -> Result<()> {
    restore(run_dir)?;
    let parent = folder(run_dir);
    for name in hidden(&parent)? {
        if name.starts_with(durable::folder::WRITING) {
            fs_err::remove_dir_all(parent.join(name))?;
        }
    }
    Ok(())
}

/// The names in a folder that begin with a dot; none if there is no such folder.
fn hidden(dir: &Path) -> Result<Vec<String>> {
    if !dir.exists() {
        return Ok(vec![]);
    }
    let mut names = vec![];
    for entry in fs_err::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.starts_with('.').then_some(name));
    }
    Ok(names)
}
