//! Whole jobs that change a mixture: [`add`] adds an expert, and [`shrink`] removes an expert or
//! merges it into another. Both make the run of the next stage. After [`add`] it is trained; after
//! [`shrink`] it only saves a checkpoint of step 0.

pub mod add;
pub mod shrink;

use crate::checkpoint::TrainState;
use crate::eval::EvalReport;
use crate::growth::skills::SkillLibrary;
use crate::train::MixtureHistory;

/// The history that a changed mixture takes over from its checkpoint. The losses of `before`, an
/// evaluation of the unchanged mixture, become those of its last stage.
fn history(
    state: TrainState,
    skills: Option<SkillLibrary>,
    before: Option<&EvalReport>,
) -> MixtureHistory {
    let mut stages = state.stages;
    if let (Some(last), Some(before)) = (stages.last_mut(), before) {
        last.losses = before.domain_losses();
    }
    let (tokens_seen, maturity) = (state.tokens_seen, state.routing.experts);
    MixtureHistory { stages, tokens_seen, maturity, skills }
}
