//! The results of a step, which stay on the device until one transfer takes them to the host.

use tch::Tensor;

use crate::eval::routing::SiteExperts;

/// The results of a step on the device.
#[derive(Debug)]
pub(super) struct StepOutput {
    /// One f64 row: the gradient norm, the requests to stop, the loss sum of each domain, then what
    /// `parts` lists.
    pub numbers: Tensor,
    pub parts: Contents,
}

/// What follows the domains' loss sums in [`StepOutput::numbers`], in the order of the fields.
#[derive(Debug, Clone)]
pub(super) struct Contents {
    /// Whether the orthogonality loss is included.
    pub has_orthogonality: bool,
    /// Number of experts whose losses are included; 0 if they were not measured.
    pub expert_losses: usize,
    /// Number of sites whose sums of the domain supervision are included.
    pub supervised_sites: usize,
    /// The sites whose routing totals are included.
    pub sites: Vec<SiteExperts>,
}

impl StepOutput {
    pub fn shallow_clone(&self) -> Self {
        Self { numbers: self.numbers.shallow_clone(), parts: self.parts.clone() }
    }
}
