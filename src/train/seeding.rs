//! The seeding phase, with which a stage that adds an expert begins: the tokens of the new domain
//! go to the new expert alone. After `growth.seed_steps` steps, the expert's router column is
//! [opened](open_column), and the phase ends if held-out tokens of the new domain then get the
//! expert. If they do not, the phase goes on for as many steps again, as long as half of the stage
//! is left.

use std::fmt;

use anyhow::Result;

use super::Trainer;
use super::step::SeedingPhase;
use crate::growth::open_column::{self, OPEN_SHARE};

/// The error of a stage whose new expert gets no tokens, with a message for the user.
#[derive(Debug)]
pub struct ColumnStaysClosed(String);

impl fmt::Display for ColumnStaysClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(message) = self;
        write!(
            f,
            "{message}\nhint: routers that read more tell domains apart better: train the mixture \
             with `router.input = \"layer_input\"` and `router.scope = \"layer\"`, or with \
             `router.level = \"sequence\"`; or is the new data like the old?"
        )
    }
}

impl std::error::Error for ColumnStaysClosed {}

impl Trainer {
    /// The seeding phase, if step `step` belongs to it.
    pub(super) fn seeding_phase(&self, step: u64) -> Option<SeedingPhase> {
        self.config.growth.as_ref()?;
        if self.state.column_opened_at.is_some_and(|at| step > at) {
            return None;
        }
        Some(SeedingPhase {
            expert: self.model.num_experts() - 1,
            domain: self.new_domain() as u32,
        })
    }

    /// The new domain's index in the training data.
    fn new_domain(&self) -> usize {
        let growth = self.config.growth.as_ref().expect("the caller saw that an expert is added");
        let mut domains = self.data.train.domains.iter();
        let domain = domains.position(|domain| domain.name == growth.domain);
        domain.expect("the config was checked")
    }

    /// Whether the new expert's router column is to be opened after step `step`.
    pub(super) fn opens_column_after(&self, step: u64) -> bool {
        let is_closed = self.state.column_opened_at.is_none();
        let growth = self.config.growth.as_ref().filter(|_| is_closed);
        growth.is_some_and(|of| step.is_multiple_of(of.seed_steps) || step == self.num_steps)
    }

    /// Opens the new expert's router column after step `step`, and ends the seeding phase if
    /// held-out tokens of the new domain get the expert.
    ///
    /// # Errors
    /// Fails if they do not, and too few steps are left to go on.
    pub(super) fn open_column(&mut self, step: u64) -> Result<()> {
        let growth = self.config.growth.as_ref().expect("the caller asked `opens_column_after`");
        open_column::open(&self.model, &self.data.train, self.new_domain())?;
        // the same numbers by another machine's processor may differ by rounding
        let parameters = self.trained.parameters.iter();
        let of_routers = parameters.filter(|p| p.name.contains("router"));
        let of_routers: Vec<_> = of_routers.map(|p| p.tensor.shallow_clone()).collect();
        self.world.spread(&of_routers)?;
        let held_out = &self.data.validation;
        let of_name = |domain: &crate::data::Domain| domain.name == growth.domain;
        let share = match held_out.domains.iter().position(of_name) {
            Some(domain) => open_column::share(&self.model, held_out, domain),
            None => open_column::share(&self.model, &self.data.train, self.new_domain()),
        };
        let share = self.world.first(share)?;
        if share >= OPEN_SHARE {
            tracing::info!(
                "the new expert gets {share:.3} of the routing weight on held-out `{}`, after \
                 {step} steps of seeding",
                growth.domain
            );
            self.state.column_opened_at = Some(step);
            return Ok(());
        }
        let message = format!(
            "the router cannot tell `{}` from the earlier domains: on held-out tokens, the new \
             expert gets {share:.3} of the weight, less than {OPEN_SHARE}",
            growth.domain
        );
        if 2 * (step + growth.seed_steps) > self.num_steps {
            return Err(ColumnStaysClosed(message).into());
        }
        tracing::warn!("{message}; seeding goes on");
        Ok(())
    }
}
