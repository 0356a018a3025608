//! Whether a stage that adds an expert has brought the new domain anything.

use super::Trainer;
use crate::eval::{EvalSettings, domain_loss};
use crate::growth::stages::without_gain;
use crate::model::RoutingSource;

impl Trainer {
    /// A message for the user if the stage adds an expert that has brought its domain nothing, by
    /// the last evaluation. `None` also if the domain has no validation data.
    pub fn without_gain(&self) -> Option<String> {
        let growth = self.config.growth.as_ref()?;
        let dataset = &self.data.validation;
        let domain = dataset.domains.iter().position(|domain| domain.name == growth.domain)?;
        let settings = EvalSettings::of_run(&self.config, &self.model, dataset);
        let by_base = domain_loss(&self.model, dataset, domain, &RoutingSource::Base, &settings)?;
        without_gain(&self.state.stages, &growth.domain, by_base)
    }
}
