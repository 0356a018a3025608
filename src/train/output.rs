//! What a step leaves on the device, for one transfer to the host.

use tch::Tensor;

use crate::eval::routing::SiteExperts;

/// What a step leaves on the device.
#[derive(Debug)]
pub(super) struct StepOutput {
    /// The gradients' norm, the domains' sums, then what `parts` names, f64.
    pub numbers: Tensor,
    pub parts: Parts,
}

/// What follows in a step's numbers.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    /// Whether the orthogonality loss does.
    pub has_orthogonality: bool,
    /// How many experts have a loss.
    pub expert_losses: usize,
    /// Where routers decided.
    pub sites: Vec<SiteExperts>,
}

impl StepOutput {
    pub fn shallow_clone(&self) -> Self {
        Self { numbers: self.numbers.shallow_clone(), parts: self.parts.clone() }
    }
}
