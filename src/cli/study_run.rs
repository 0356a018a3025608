//! `dylora study-run`: one run of a study. `dylora study` starts a process for each run, because
//! libtorch has one random number generator and one set of threads for a process.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::process::{Signal, set_parent_process_death_signal};

use super::Shared;
use super::eval::validate;
use super::signals::Interrupt;
use super::start::{ReadyRun, load_halved_data};
use crate::checkpoint::{self, Preferred, load_model};
use crate::config::EvalRule;
use crate::data::Datasets;
use crate::study::run::{Losses, Measured, Outcome, RunSpec, active_rank, train_secs};
use crate::train::Ending;
use crate::train::plan::ParameterCounts;
use crate::train::step::NotFinite;

/// Arguments of `dylora study-run`.
#[derive(Debug, Args)]
pub struct StudyRunArgs {
    /// The file that says what to train. The result is written beside it.
    #[arg(long, value_name = "FILE")]
    spec: PathBuf,
}

/// Runs the command.
pub fn run(args: &StudyRunArgs, shared: &Shared) -> Result<()> {
    // a run does not outlive its study
    set_parent_process_death_signal(Some(Signal::TERM)).context("cannot watch the study")?;
    let spec = RunSpec::read(&args.spec)?;
    if spec.result().is_none() {
        let outcome = match measure(&spec, shared) {
            Ok(measured) => outcome(measured),
            Err(error) => match error.downcast_ref::<NotFinite>() {
                Some(NotFinite { loss, grad_norm }) => {
                    Outcome::Diverged(format!("loss {loss}, gradient norm {grad_norm}"))
                }
                None => return Err(error),
            },
        };
        spec.finish(outcome)?;
    }
    let checkpoints = checkpoint::folder(spec.dir());
    if !spec.keep && checkpoints.exists() {
        fs_err::remove_dir_all(checkpoints)?;
    }
    Ok(())
}

fn outcome(measured: Measured) -> Outcome {
    let losses = [&measured.selection, &measured.report];
    match losses.iter().all(|losses| losses.are_finite()) {
        true => Outcome::Trained(measured),
        false => Outcome::Diverged("a validation loss is not finite".into()),
    }
}

/// Trains the run, or goes on with it, and evaluates its best checkpoint on both halves.
fn measure(spec: &RunSpec, shared: &Shared) -> Result<Measured> {
    let interrupt = Interrupt::listen()?;
    let mut report = None;
    let load = |config: &_, base: &_| {
        let halves = load_halved_data(config, base, spec.split_seed, shared)?;
        if halves.fingerprint() != spec.data {
            bail!("the data has changed since the study began\nhint: run the study again");
        }
        report = Some(halves.report);
        Ok(Datasets { train: halves.train, validation: halves.selection })
    };
    let ready = ReadyRun::open(spec.config.clone(), resume_from(spec)?, shared, load)?;
    let (device, specs) = (ready.device, ready.specs.clone());
    let counts = ParameterCounts::new(&ready.config, &specs, &ready.base.spec);
    let (mut trainer, base) = ready.trainer(shared)?;
    let summary = trainer.run(interrupt.flag(), &mut |_| ())?;
    if summary.ending == Ending::Interrupted {
        return Err(interrupt.error_with("its study goes on with it".into()).into());
    }
    let selection = trainer.into_data().validation;
    let report = report.expect("the data was loaded");

    let best = checkpoint::find(spec.dir(), Preferred::Best)?;
    // unlike the spec's config, it says which experts the domains have
    let config = checkpoint::read_config(&best)?;
    let model = load_model(&best, &config, &base, device)?;
    let evaluate = |dataset| {
        let report = validate(&model, dataset, &config, shared)?;
        report.context("the halves of the validation data are not empty")
    };
    let (selection, report) = (evaluate(&selection)?, evaluate(&report)?);
    let routing_entropy = report.routing.as_ref().map(|routing| routing.routing_entropy);
    let router = model.router_spec();
    let top_k = router.eval.map_or(router.top_k, EvalRule::top_k);
    Ok(Measured {
        selection: Losses::of(&selection),
        report: Losses::of(&report),
        steps: summary.state.step,
        best_step: checkpoint::read_state(&best)?.step,
        train_secs: train_secs(spec.dir())?,
        parameters: counts.trained,
        active_rank: active_rank(&config, &specs, top_k, routing_entropy),
        routing_entropy,
    })
}

/// The checkpoint from which an interrupted run goes on. If there is none that is whole, the run
/// begins anew.
fn resume_from(spec: &RunSpec) -> Result<Option<PathBuf>> {
    checkpoint::clean(spec.dir())?;
    if checkpoint::steps(spec.dir())?.is_empty() {
        return Ok(None);
    }
    match checkpoint::find(spec.dir(), Preferred::Last) {
        Ok(dir) => Ok(Some(dir)),
        Err(error) => {
            tracing::warn!("the run begins anew: {error:#}");
            fs_err::remove_dir_all(checkpoint::folder(spec.dir()))?;
            Ok(None)
        }
    }
}
