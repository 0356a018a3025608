//! Runs a stage to its end. A stage that adds an expert has failed if the expert gets no tokens or
//! brings its domain nothing. Its checkpoints are then set aside ([`rejected`]).

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Error, Result, anyhow};

use super::Shared;
use super::train_bar::TrainBar;
use crate::checkpoint::rejected;
use crate::train::{ColumnStaysClosed, Ending, Event, Summary, Trainer};

/// Runs the trainer with a progress bar.
///
/// - `run_dir`: the run's folder
///
/// # Errors
/// As [`Trainer::run`], and if the stage was to add an expert and has failed.
pub fn run_stage(
    trainer: &mut Trainer,
    run_dir: &Path,
    interrupt: &AtomicBool,
    shared: &Shared,
) -> Result<Summary> {
    let bar = TrainBar::new(shared.show_progress, trainer.num_steps(), trainer.state().step);
    let result = trainer.run(interrupt, &mut |event| observe(&bar, &event));
    bar.finish();
    let failure = match result {
        Ok(summary) => {
            let is_over = matches!(summary.ending, Ending::Completed | Ending::StoppedEarly);
            match is_over.then(|| trainer.without_gain()).flatten() {
                Some(message) => anyhow!(message),
                None => return Ok(summary),
            }
        }
        Err(error) if error.is::<ColumnStaysClosed>() => error,
        // other errors leave a run that can be resumed
        Err(error) => return Err(error),
    };
    Err(reject(run_dir, &failure))
}

/// Sets the checkpoints of a stage aside, and adds to the error where they are.
fn reject(run_dir: &Path, failure: &Error) -> Error {
    match rejected::reject(run_dir) {
        Ok(None) => anyhow!("{failure:#}\nno checkpoint was written"),
        Ok(Some(to)) => anyhow!("{failure:#}\nthe stage's checkpoints are in `{}`", to.display()),
        Err(fault) => {
            anyhow!("{failure:#}\nthe stage's checkpoints cannot be moved away: {fault:#}")
        }
    }
}

/// Shows an event of a run.
fn observe(bar: &TrainBar, event: &Event<'_>) {
    match event {
        Event::Step(metrics) => bar.step(metrics.step, metrics.loss, metrics.tokens_per_sec),
        Event::Evaluating(done, all) => bar.validating(*done, *all),
        Event::Saving => bar.saving(),
        Event::Window(_) => {}
        Event::Validation(metrics) => {
            let domains: Vec<String> = metrics
                .domain_losses
                .iter()
                .map(|(name, loss)| format!("{name} {loss:.4}"))
                .collect();
            let (step, loss) = (metrics.step, metrics.loss);
            bar.line(format!("step {step}: validation loss {loss:.4} ({})", domains.join(", ")));
            bar.training();
        }
        Event::Checkpoint(path) => {
            bar.training();
            tracing::debug!("wrote `{}`", path.display());
        }
    }
}
