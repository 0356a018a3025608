//! Training. [`Trainer`] holds a run's model, optimizer, data and counters, and [`Trainer::run`] is
//! the loop. [`step`] and [`gradients`] compute one step, [`graph`] replays steps as CUDA graphs,
//! and [`metrics`] defines what is reported.
//!
//! ```text
//! blocks -> step (forwards, gradients, clip, AdamW) -> metrics -> evaluation -> checkpoint
//! ```
//!
//! While the device runs a step, the host prepares the next one, and launches it if nothing comes
//! in between (`advance.rs`).

mod advance;
pub mod balance;
pub mod earlier;
mod exchange;
pub mod files;
mod frozen;
pub mod gradients;
pub mod graph;
mod heat_image;
mod history;
pub mod losses;
pub mod machine;
pub mod metrics;
pub mod optim;
mod outcome;
mod output;
pub mod plan;
pub mod prepared;
mod same_run;
mod scalars;
pub mod schedule;
mod seeding;
pub mod step;
mod summaries;
pub mod tensorboard;
mod watch;
mod world;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Tensor};

use crate::base::Base;
use crate::checkpoint::routing_state::{ExpertMaturity, RoutingState};
use crate::checkpoint::{self, Checkpoint, Position, TrainState, build_model, load_model};
use crate::config::{BaseProducts, Config, Method};
use crate::data::Datasets;
use crate::dist::World;
use crate::durable::lock::FolderLock;
use crate::eval::{check_domains, check_records, domain_targets};
use crate::growth::assign::assign_experts;
use crate::growth::skills::SkillLibrary;
use crate::growth::stages::Stage;
use crate::mixture::Mixture;
use crate::model::families;
use crate::model::parameters::OldParts;
use crate::model::{RoutedModel, Trained, kind_of};
use crate::{config, durable};
pub(crate) use earlier::check_new_run;
use files::MetricsWriter;
use frozen::{BaseHashes, frozen_hash};
use graph::Capture;
use machine::Machine;
use metrics::{Metrics, StepMetrics, ValidationMetrics, WindowMetrics};
use optim::Optimizer;
use plan::BlockStream;
use same_run::{check_data, check_same_run, take_experts};
pub use seeding::ColumnStaysClosed;
use step::Stepper;

/// What the loop reports while it runs.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step is done.
    Step(&'a StepMetrics),
    /// A window of steps is done.
    Window(&'a WindowMetrics),
    /// An evaluation is running; the numbers are the blocks scored so far and all of its blocks.
    Evaluating(u64, u64),
    /// An evaluation is done.
    Validation(&'a ValidationMetrics),
    /// A checkpoint is being written.
    Saving,
    /// A checkpoint is on disk.
    Checkpoint(&'a Path),
}

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// The run has lasted for its whole duration.
    Completed,
    /// The validation loss has stopped falling (`train.early_stopping`).
    StoppedEarly,
    /// The caller interrupted the run; `train --resume` continues it.
    Interrupted,
    /// The routing has collapsed, and `router.on_collapse` is `stop`.
    Collapsed,
}

impl Ending {
    /// The name in results, such as `completed`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::StoppedEarly => "stopped_early",
            Self::Interrupted => "interrupted",
            Self::Collapsed => "collapsed",
        }
    }
}

/// The result of a run.
#[derive(Debug)]
#[non_exhaustive]
pub struct Summary {
    /// Why the run ended.
    pub ending: Ending,
    /// The counters at the end.
    pub state: TrainState,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// BLAKE3 of everything frozen: the base, in the dtype that it computed in, and the frozen
    /// experts and routers. It is the same before and after the run. `None` if the base itself was
    /// trained.
    pub frozen_hash: Option<String>,
}

/// A training run. The [crate's own page](crate#use) shows how one is made.
#[derive(Debug)]
pub struct Trainer {
    config: Config,
    model: RoutedModel,
    trained: Trained,
    stepper: Stepper,
    data: Datasets,
    state: TrainState,
    /// The training blocks after those of `ready` and `in_flight`.
    stream: BlockStream,
    /// The data of the next step, if it is already prepared.
    ready: Option<advance::PreparedStep>,
    /// The next step, if it was launched before the results of the last one were known.
    in_flight: Option<Result<advance::Launched>>,
    /// Whether it had been decided before the end of the last step that the run goes on.
    goes_on: bool,
    /// The end of the last step; `None` before the first one and after an evaluation or checkpoint.
    last_end: Option<advance::StepEnd>,
    num_steps: u64,
    /// BLAKE3 of everything frozen before the run, as in [`Summary::frozen_hash`].
    frozen_hash: Option<String>,
    skills: Option<SkillLibrary>,
    /// Whether this run has not begun yet.
    is_new: bool,
    world: Arc<World>,
    /// Whether a process of the world was asked to stop before the last step.
    stops: bool,
    /// The generator states of a run that is resumed, until it enters its world.
    saved_generators: Option<BTreeMap<String, Tensor>>,
}

/// The history of a mixture before a run.
#[derive(Debug, Default)]
pub struct MixtureHistory {
    /// The earlier stages.
    pub stages: Vec<Stage>,
    /// Label tokens that the mixture was trained on.
    pub tokens_seen: u64,
    /// Each expert's progress towards maturity; empty unless `router.hybrid` is set.
    pub maturity: Vec<ExpertMaturity>,
    /// The skills that the mixture has, if they are known.
    pub skills: Option<SkillLibrary>,
}

impl Trainer {
    /// Starts a new run from a mixture. The run's folder must not hold checkpoints.
    pub fn new(
        config: Config,
        base: &Base,
        mixture: &Mixture,
        data: Datasets,
        device: Device,
    ) -> Result<Self> {
        let domains = data.train.domains.iter().map(|domain| domain.name.clone()).collect();
        let stage = Stage::new("train", domains, mixture.num_experts() as i64);
        Self::next_stage(config, base, mixture, data, device, MixtureHistory::default(), stage)
    }

    /// Starts a new run from a mixture that has a history. `stage` is the stage that begins with
    /// this run. The run's folder must not hold checkpoints.
    pub fn next_stage(
        mut config: Config,
        base: &Base,
        mixture: &Mixture,
        data: Datasets,
        device: Device,
        history: MixtureHistory,
        stage: Stage,
    ) -> Result<Self> {
        check_new_run(&config.run.dir)?;
        assign_experts(&mut config, &data.train, base, device)?;
        tch::manual_seed(config.run.seed as i64);
        let weights = base.weights()?;
        let is_routed = config.method == Method::RoutedLora;
        let hashes = is_routed.then(|| BaseHashes::start(&weights, kind_of(config.base.dtype)));
        let model = build_model(&config, &weights, mixture, device)?;
        let (base_hash, known) = hashes.map(BaseHashes::wait).transpose()?.unzip();
        let mut routing = RoutingState::new(&config.router, model.num_experts());
        for (expert, before) in routing.experts.iter_mut().zip(history.maturity) {
            *expert = before;
        }
        let mut stages = history.stages;
        stages.push(stage);
        let state = TrainState {
            format: checkpoint::FORMAT,
            step: 0,
            tokens_seen: history.tokens_seen,
            position: Position::default(),
            blocks_per_step: None,
            best: None,
            evals_without_improvement: 0,
            base_hash,
            base_settings: Some(families::settings(&base.spec)),
            tokenizer_hash: base.tokenizer_hash(),
            data_fingerprint: data.train.fingerprint(),
            validation_fingerprint: Some(data.validation.content_fingerprint()),
            learned_chats: Some(data.train.has_conversations()),
            domain_blocks: vec![0; data.train.domains.len()],
            column_opened_at: None,
            routing,
            stages,
        };
        let mut trainer = Self::assemble(config, model, data, state, known)?;
        (trainer.skills, trainer.is_new) = (history.skills, true);
        Ok(trainer)
    }

    /// Continues from the checkpoint in `dir` with its parameters, moments, schedule, generators,
    /// data position, best loss and early-stopping counter. On the CPU, a resumed run equals an
    /// unbroken one to the bit.
    ///
    /// # Errors
    /// Fails if the config, the base or the training data does not match the checkpoint.
    pub fn resume(
        mut config: Config,
        base: &Base,
        data: Datasets,
        device: Device,
        dir: &Path,
    ) -> Result<Self> {
        let saved = checkpoint::read_config(dir)?;
        check_same_run(&config, &saved)?;
        take_experts(&mut config, &saved);
        let state = checkpoint::read_state(dir)?;
        check_data(&data, &state, dir)?;
        let model = load_model(dir, &config, base, device)?;
        let mut trainer = Self::assemble(config, model, data, state, None)?;
        let saved = checkpoint::read_optimizer(dir)?;
        let in_dir = || format!("cannot resume from `{}`", dir.display());
        trainer.stepper.optimizer.load_state(&saved, trainer.state.step).with_context(in_dir)?;
        optim::load_rng_states(&saved, device, 0)?;
        trainer.saved_generators = Some(saved);
        trainer.skills = checkpoint::read_skills(dir, base.spec.width)?;
        Ok(trainer)
    }

    /// A trainer at `state`. `known_hash` is the hash of the base in the dtype that the model
    /// computes in, if it is known.
    fn assemble(
        config: Config,
        mut model: RoutedModel,
        data: Datasets,
        state: TrainState,
        known_hash: Option<String>,
    ) -> Result<Self> {
        if data.train.num_blocks() == 0 {
            bail!("there is nothing to train on: the training files hold no label token");
        }
        let is_routed = config.method == Method::RoutedLora;
        for dataset in [&data.train, &data.validation].into_iter().filter(|_| is_routed) {
            check_records(dataset, config.train.routing, model.num_experts())?;
            let experts = domain_targets(&config, &model, dataset);
            check_domains(dataset, config.train.routing, experts.as_ref())?;
        }
        let old = config.growth.as_ref().map(|growth| OldParts {
            new_column_learning_rate: growth.column_learning_rate,
            num_experts: model.num_experts() as usize - 1,
            experts_rate: growth.old_experts_rate,
            // a single expert has no router, so the router of two experts is all new
            columns_rate: if model.num_experts() > 2 { growth.old_columns_rate } else { 1.0 },
        });
        if config.train.base_products == BaseProducts::Fp8 {
            model.quantise_base()?;
        }
        let trained = model.trained(config.train.routing, old);
        let optimizer = Optimizer::new(&config.optimizer, &trained.parameters);
        let stepper = Stepper::new(optimizer, Capture::of(model.device()), model.device());
        let per_step = state.blocks_per_step.unwrap_or(plan::blocks_per_step(&config));
        let num_steps = plan::num_steps_of(&config, &data.train, per_step)?;
        let stream = BlockStream::new(&data.train, &config, state.position);
        let frozen_hash = match config.method {
            Method::RoutedLora => Some(match known_hash {
                Some(hash) => model.frozen_hash_beside(hash)?,
                None => frozen_hash(&model, state.base_hash.clone())?,
            }),
            Method::Full => None,
        };
        let skills = None;
        Ok(Self {
            config,
            model,
            trained,
            stepper,
            data,
            state,
            stream,
            ready: None,
            in_flight: None,
            goes_on: false,
            last_end: None,
            num_steps,
            frozen_hash,
            skills,
            is_new: false,
            world: Arc::new(World::single()),
            stops: false,
            saved_generators: None,
        })
    }

    /// Chooses whether steps are captured as CUDA graphs, before the first step. The default is
    /// [`Capture::of`] the device.
    pub fn set_capture(&mut self, capture: Capture) {
        self.stepper.set_capture(capture);
    }

    /// Number of steps of the whole run.
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// The counters so far.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The model in its present state.
    pub fn model(&self) -> &RoutedModel {
        &self.model
    }

    /// The run's data, after which it cannot be trained on.
    pub(crate) fn into_data(self) -> Datasets {
        self.data
    }

    /// Trains to the end, or until `interrupt` is set. `observe` receives every event.
    ///
    /// # Errors
    /// Fails if another process trains in the run's folder, if a loss or gradient is NaN or
    /// infinite ([`step::NotFinite`]), if a frozen tensor has changed, or if a file cannot be
    /// written. The last checkpoint then stays whole and in place, and another trainer can resume
    /// from it; this one cannot go on.
    pub fn run(
        &mut self,
        interrupt: &AtomicBool,
        observe: &mut dyn FnMut(Event<'_>),
    ) -> Result<Summary> {
        let (lock, mut writer) = match self.world.is_first() {
            true => self.begin_files()?,
            false => (None, MetricsWriter::absent()),
        };
        self.is_new = false;
        let mut saved: Option<PathBuf> = None;
        while self.state.step < self.num_steps && !self.stops_early() {
            let metrics = self.step(interrupt).with_context(|| {
                format!(
                    "training stopped in step {}; the last checkpoint stays",
                    self.state.step + 1
                )
            })?;
            observe(Event::Step(&metrics));
            writer.write(&Metrics::Train(metrics))?;
            lock.as_ref().map_or(Ok(()), FolderLock::check)?;
            if self.opens_column_after(self.state.step) {
                self.open_column(self.state.step)?;
            }
            let collapsed = self.close_window(&mut writer, observe)?;
            if self.evaluates_after(self.state.step) {
                self.validate(&mut writer, observe)?;
                self.last_end = None;
            }
            let stop = self.must_stop(interrupt)?;
            if stop || collapsed || self.saves_after(self.state.step) {
                writer.settle(self.state.step)?;
                observe(Event::Saving);
                let path = self.save()?;
                warn_of_lost(saved.as_deref().filter(|_| self.world.is_first()));
                observe(Event::Checkpoint(&path));
                saved = Some(path);
                self.last_end = None;
            }
            if collapsed {
                return self.finish(Ending::Collapsed, saved);
            }
            if stop && self.state.step < self.num_steps {
                return self.finish(Ending::Interrupted, saved);
            }
        }
        let ending = if self.stops_early() { Ending::StoppedEarly } else { Ending::Completed };
        self.finish(ending, saved)
    }

    /// Begins the files of the run, which the first process of a world writes.
    fn begin_files(&self) -> Result<(Option<FolderLock>, MetricsWriter)> {
        let run_dir = &self.config.run.dir;
        fs_err::create_dir_all(run_dir)?;
        let lock = FolderLock::take(run_dir)?;
        if self.is_new {
            // another process may have begun a run since the first look
            check_new_run(run_dir)?;
        }
        checkpoint::clean(run_dir)?;
        let resolved = config::load::to_toml(&self.config);
        durable::replace(&run_dir.join("config.toml"), resolved.as_bytes())?;
        Machine::present(self.model.device()).write(run_dir)?;
        let tensorboard = self.config.run.tensorboard;
        let mut writer = MetricsWriter::open(run_dir, tensorboard, self.state.step)?;
        writer.write_config(&self.config)?;
        Ok((Some(lock), writer))
    }

    fn finish(&self, ending: Ending, saved: Option<PathBuf>) -> Result<Summary> {
        if let Some(before) = &self.frozen_hash {
            let after = self.model.frozen_hash()?;
            if after != *before {
                bail!("what is frozen has changed: BLAKE3 `{before}` before, `{after}` after");
            }
        }
        let checkpoint = match saved {
            Some(path) => path,
            None if !self.world.is_first() => {
                checkpoint::step_folder(&self.config.run.dir, self.state.step)
            }
            None => checkpoint::find(&self.config.run.dir, checkpoint::Preferred::Last)?,
        };
        let frozen_hash = self.frozen_hash.clone();
        Ok(Summary { ending, state: self.state.clone(), checkpoint, frozen_hash })
    }

    /// Whether a checkpoint follows step `step`, whatever its results are. One follows each
    /// evaluation.
    fn saves_after(&self, step: u64) -> bool {
        let every = self.config.train.checkpoint_every_steps;
        let due = every.is_some_and(|n| step.is_multiple_of(n));
        due || self.evaluates_after(step) || step == self.num_steps
    }

    /// Writes a checkpoint and returns its folder. In a world, all processes call this, and the
    /// first one writes.
    ///
    /// # Errors
    /// Fails if an error has ended the run while a step was in flight, or if a file cannot be
    /// written.
    pub fn save(&self) -> Result<PathBuf> {
        ensure!(self.in_flight.is_none(), "the model has changed after step {}", self.state.step);
        let generators = self.all_generators()?;
        if !self.world.is_first() {
            return Ok(checkpoint::step_folder(&self.config.run.dir, self.state.step));
        }
        let model = self.model.tensors();
        let experts = self.model.specs().to_vec();
        let mut optimizer = self.stepper.optimizer.state();
        optimizer.extend(generators);
        let (config, state) = (self.config.clone(), self.state.clone());
        let skills = self.skills.clone();
        let checkpoint = Checkpoint { config, state, experts, skills, model, optimizer };
        let train = &self.config.train;
        checkpoint::write(&self.config.run.dir, &checkpoint, train.keep_last)
    }
}

/// Warns if a checkpoint of this run, the latest one before the one just saved, has vanished.
fn warn_of_lost(before: Option<&Path>) {
    if let Some(lost) = before.filter(|path| !path.is_dir()) {
        tracing::warn!(
            "`{}` has vanished: somebody has deleted or moved it; a new checkpoint is saved",
            lost.display()
        );
    }
}
