//! The files of checkpoints, which hold everything that resuming, evaluating and exporting need.
//!
//! ```text
//! RUN/checkpoints/step-00000200/
//!     config.toml             the resolved config
//!     state.json              counters, data position, best loss, hashes, routing, stages
//!     experts.json            rank, alpha, modules and options of each expert
//!     skills.json             the skills that the mixture has, if they are known
//!     model.safetensors       experts and routers, frozen ones too, or the trained base
//!     optimizer.safetensors   moments and generator states
//!     checksums.json          BLAKE3 of each of these files, checked when it is opened
//! RUN/checkpoints/last, best  symbolic links to the newest and to the best step
//! RUN/rejected/               the checkpoints of a stage that failed to add an expert
//! ```
//!
//! A checkpoint is written into a temporary folder, forced to disk and renamed, and an old one is
//! renamed before it is deleted, so that a folder named `step-*` is always whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::routing_state::RoutingState;
use crate::base::BaseIdentity;
use crate::config::{Config, load};
use crate::durable::{
    self,
    folder::{REMOVED, REPLACED, WRITING},
    sums,
};
use crate::growth::skills::SkillLibrary;
use crate::growth::stages::Stage;
use crate::model::experts::spec::ExpertSpec;
use crate::tensor_file::{check_all_finite, read_numbers, write_tensors};

/// The version of the format.
pub const FORMAT: u32 = 4;
/// The version before, which has no checksums and is still read.
const FORMAT_WITHOUT_SUMS: u32 = 3;

const CONFIG: &str = "config.toml";
const STATE: &str = "state.json";
const EXPERTS: &str = "experts.json";
const SKILLS: &str = "skills.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// The names of the files of a checkpoint.
pub const FILES: [&str; 7] = [CONFIG, STATE, EXPERTS, SKILLS, MODEL, OPTIMIZER, sums::SUMS];

/// The counters of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// [`FORMAT`].
    pub format: u32,
    /// Number of steps so far.
    pub step: u64,
    /// Target tokens trained on so far.
    pub tokens_seen: u64,
    /// The position in the data.
    pub position: Position,
    /// The evaluation with the lowest loss so far.
    pub best: Option<Best>,
    /// Number of latest evaluations in a row that were no improvement, for early stopping.
    pub evals_without_improvement: u64,
    /// BLAKE3 of the frozen base's parameters in f32, as they were read; `None` if the base itself
    /// is trained.
    pub base_hash: Option<String>,
    /// What the base's `config.json` says: [`crate::model::families::settings`]. It is not known of
    /// older checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_settings: Option<Value>,
    /// BLAKE3 of the tokenizer's file, which is not known of older checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_hash: Option<String>,
    /// Fingerprint of the training data.
    pub data_fingerprint: String,
    /// Fingerprint of the validation data, which is not known of older checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_fingerprint: Option<String>,
    /// Whether the training data contains conversations, which a chat template has rendered. It is
    /// not known of older checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned_chats: Option<bool>,
    /// Number of blocks trained on for each domain, in the config's order.
    pub domain_blocks: Vec<u64>,
    /// The step after which the router column of a new expert was opened, which ended the seeding
    /// phase; `None` before that, and in a run that adds no expert.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column_opened_at: Option<u64>,
    /// The state of routing.
    pub routing: RoutingState,
    /// The stages of the mixture so far. The last one is this run.
    pub stages: Vec<Stage>,
}

impl TrainState {
    /// What tells the base from others.
    pub fn base_identity(&self) -> BaseIdentity {
        BaseIdentity {
            hash: self.base_hash.clone(),
            settings: self.base_settings.clone(),
            tokenizer: self.tokenizer_hash.clone(),
        }
    }
}

/// A position in the sequence of blocks, epoch after epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The epoch, from 0.
    pub epoch: u64,
    /// Number of the epoch's blocks that are done.
    pub offset: u64,
}

/// The evaluation with the lowest loss so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// The step after which it was done.
    pub step: u64,
    /// Mean of the domains' validation losses, nats.
    pub loss: f64,
}

/// A checkpoint in memory.
#[derive(Debug)]
pub struct Checkpoint {
    /// The run's resolved config.
    pub config: Config,
    /// The run's counters.
    pub state: TrainState,
    /// The experts' settings.
    pub experts: Vec<ExpertSpec>,
    /// The skills that the mixture has, if they are known.
    pub skills: Option<SkillLibrary>,
    /// The tensors of experts and routers, or of the trained base.
    pub model: BTreeMap<String, Tensor>,
    /// The optimizer's moments and the generator states.
    pub optimizer: BTreeMap<String, Tensor>,
}

/// Which checkpoint to take when a run's folder is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preferred {
    /// The best, or the last if there is no best: to evaluate and export.
    Best,
    /// The last: to resume.
    Last,
}

/// Finds the folder of a checkpoint. `dir` is that folder itself, or the folder of a run, of whose
/// checkpoints `preferred` chooses one.
///
/// `last` is missing or leads nowhere if a run was killed, or its disk was full, after a step was
/// in place and before `last` was set. The newest whole step is then taken, and `last` is mended.
/// The same is done if a run is to be resumed and the step that `last` leads to is damaged.
///
/// # Errors
/// Fails if there is no checkpoint, or none that is whole.
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
        if !path.join(STATE).is_file() {
            continue;
        }
        // to resume, all of it is needed, and an older step is better than none
        if preferred == Preferred::Last
            && let Err(fault) = check_whole(&path)
        {
            tracing::warn!("`{}` is damaged: {fault:#}", path.display());
            continue;
        }
        return Ok(path);
    }
    if !dir.exists() {
        bail!("there is no folder `{}`", dir.display());
    }
    newest_whole(dir)
}

/// The newest whole step of a run. Sets `last` to it.
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
    let rejected = rejected_folder(run_dir);
    match newest_fault {
        None if rejected.exists() => bail!(
            "`{}` holds no checkpoint: its stage failed to add an expert, and its checkpoints are \
             in `{}`\nhint: add the expert again, as the message at the end of the stage said",
            run_dir.display(),
            rejected.display()
        ),
        None => bail!("`{}` holds no checkpoint\n{hint}", run_dir.display()),
        Some(fault) => {
            bail!("`{}` holds no whole checkpoint: {fault:#}\n{hint}", run_dir.display())
        }
    }
}

/// Checks that the files of a checkpoint exist and can be read.
fn check_whole(dir: &Path) -> Result<()> {
    read_state(dir)?;
    read_config(dir)?;
    read_experts(dir)?;
    read_model(dir)?;
    read_optimizer(dir)?;
    if dir.join(SKILLS).exists() {
        serde_json::from_str::<Value>(&fs_err::read_to_string(checked(dir, SKILLS)?)?)
            .with_context(|| format!("`{}` is damaged", dir.join(SKILLS).display()))?;
    }
    Ok(())
}

/// The folder of a run's checkpoints.
pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// The folder of a run's checkpoints whose stage has failed.
pub fn rejected_folder(run_dir: &Path) -> PathBuf {
    run_dir.join("rejected")
}

/// The path of a file in a checkpoint, after its sum was checked.
fn checked(dir: &Path, name: &str) -> Result<PathBuf> {
    sums::check(dir, name).context("cannot read the checkpoint")?;
    Ok(dir.join(name))
}

/// Reads the run's config from a checkpoint.
pub fn read_config(dir: &Path) -> Result<Config> {
    load::load(&checked(dir, CONFIG)?, &[])
}

/// Reads the counters from a checkpoint.
pub fn read_state(dir: &Path) -> Result<TrainState> {
    let path = checked(dir, STATE)?;
    let text = fs_err::read_to_string(&path).context("cannot read the checkpoint")?;
    let state: TrainState = serde_json::from_str(&text)
        .with_context(|| format!("`{}` is no state of this version", path.display()))?;
    match state.format {
        FORMAT if !dir.join(sums::SUMS).exists() => {
            bail!("`{}` lacks `{}`, by which it is checked", dir.display(), sums::SUMS)
        }
        // what is written next has the present format
        FORMAT | FORMAT_WITHOUT_SUMS => Ok(TrainState { format: FORMAT, ..state }),
        other => bail!("`{}` has format {other}, this version reads {FORMAT}", path.display()),
    }
}

/// Reads the experts' settings from a checkpoint. There are none for a trained base.
pub fn read_experts(dir: &Path) -> Result<Vec<ExpertSpec>> {
    let path = checked(dir, EXPERTS)?;
    let text = fs_err::read_to_string(&path).context("cannot read the checkpoint")?;
    serde_json::from_str(&text)
        .with_context(|| format!("`{}` holds no experts of this version", path.display()))
}

/// Reads the skills of a checkpoint's mixture on a base of width `d`; `None` if they are not known.
pub fn read_skills(dir: &Path, d: i64) -> Result<Option<SkillLibrary>> {
    let read = || SkillLibrary::read(&checked(dir, SKILLS)?, d);
    dir.join(SKILLS).exists().then(read).transpose()
}

/// Whether a checkpoint's mixture has a skill of this name; `None` if its skills are not known.
pub fn has_skill(dir: &Path, name: &str) -> Result<Option<bool>> {
    let has = || {
        let library = SkillLibrary::read_any(&checked(dir, SKILLS)?)?;
        anyhow::Ok(library.skills.iter().any(|skill| skill.name == name))
    };
    dir.join(SKILLS).exists().then(has).transpose()
}

/// Reads the tensors of experts and routers, or of the trained base, from a checkpoint.
pub fn read_model(dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    read_numbers(&checked(dir, MODEL)?).context("cannot read the checkpoint")
}

/// Reads the moments and generator states from a checkpoint.
pub fn read_optimizer(dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    read_numbers(&checked(dir, OPTIMIZER)?).context("cannot read the checkpoint")
}

/// Writes a checkpoint into `run_dir` and returns its folder. Sets `last` to it and `best` to the
/// best checkpoint so far, and removes earlier checkpoints except the last `keep_last` and the
/// best.
pub fn write(run_dir: &Path, checkpoint: &Checkpoint, keep_last: usize) -> Result<PathBuf> {
    let parent = folder(run_dir);
    let name = step_name(checkpoint.state.step);
    let target = parent.join(&name);
    let write = || -> Result<()> {
        // a resumed run may reach a step whose checkpoint exists already
        durable::folder::write(&target, |dir| write_files(dir, checkpoint), |_| Ok(()))?;
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
        check_all_finite(tensors).with_context(|| format!("in `{file}`"))?;
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
    durable::write(&dir.join(STATE), state.as_bytes())?;
    sums::write(dir)
}

/// Atomically replaces the symbolic link `name` by one to `target`.
fn point(parent: &Path, name: &str, target: &str) -> Result<()> {
    let temporary = parent.join(format!(".{name}-{}", std::process::id()));
    if temporary.symlink_metadata().is_ok() {
        fs_err::remove_file(&temporary)?;
    }
    fs_err::os::unix::fs::symlink(target, &temporary)?;
    Ok(fs_err::rename(&temporary, parent.join(name))?)
}

/// The steps of a run's checkpoints, in ascending order.
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

/// Removes old checkpoints. Checkpoints of later steps are neither counted nor removed: a run that
/// was resumed from an earlier step will reach these steps again.
fn prune(run_dir: &Path, state: &TrainState, keep_last: usize) -> Result<()> {
    let mut steps = steps(run_dir)?;
    steps.retain(|&step| step <= state.step);
    let old = &steps[..steps.len().saturating_sub(keep_last)];
    for &step in old.iter().filter(|&&step| Some(step) != state.best.map(|best| best.step)) {
        durable::folder::remove(&folder(run_dir).join(step_name(step)))
            .context("cannot remove an old checkpoint")?;
    }
    Ok(())
}

/// Restores the checkpoints that a killed process was about to replace.
fn restore(run_dir: &Path) -> Result<()> {
    let parent = folder(run_dir);
    for name in hidden(&parent)? {
        if let Some(name) = name.strip_prefix(REPLACED) {
            durable::folder::restore(&parent.join(name))?;
        }
    }
    Ok(())
}

/// Restores the checkpoints that an interrupted write was replacing, and removes what dead
/// processes left: unfinished checkpoints, replaced ones, old ones and links. The caller has locked
/// the run's folder.
pub fn clean(run_dir: &Path) -> Result<()> {
    restore(run_dir)?;
    let parent = folder(run_dir);
    for name in hidden(&parent)? {
        let path = parent.join(&name);
        let is_folder = [WRITING, REMOVED, REPLACED].iter().any(|start| name.starts_with(start));
        let is_link = name.starts_with(".last-") || name.starts_with(".best-");
        if is_folder && path.is_dir() {
            fs_err::remove_dir_all(path)?;
        } else if is_link && path.is_symlink() {
            fs_err::remove_file(path)?;
        }
    }
    Ok(())
}

/// The names in a folder that begin with a dot. A missing folder has none.
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
