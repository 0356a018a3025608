//! The results of a step, which one transfer takes from the device to the host.

use anyhow::Result;
use tch::Tensor;

use crate::eval::routing::SiteExperts;
use crate::ffi::cuda::Fetch;

/// The results of a step on the device.
#[derive(Debug)]
pub(super) struct StepOutput {
    /// One f64 row: whether the update was skipped, the gradient norm, the requests to stop, the
    /// loss sum of each domain, then what `parts` lists.
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

/// The results of a step on their way to the host.
#[derive(Debug)]
pub(super) struct ResultsInFlight {
    pub numbers: Numbers,
    pub parts: Contents,
}

/// The row of [`StepOutput::numbers`] on its way to the host.
#[derive(Debug)]
pub(super) enum Numbers {
    /// The row of a step on the CPU.
    Here(Tensor),
    /// The row of a step on a GPU.
    Fetched(Fetch),
}

impl Numbers {
    /// Waits for the row.
    pub fn wait(self) -> Result<Vec<f64>> {
        let row = match self {
            Self::Here(row) => row,
            Self::Fetched(fetch) => fetch.wait()?,
        };
        Ok(Vec::<f64>::try_from(row)?)
    }
}

impl StepOutput {
    /// Starts to fetch the results. Steps that are launched later do not change what arrives.
    pub fn fetch(self) -> Result<ResultsInFlight> {
        let Self { numbers, parts } = self;
        let numbers = match numbers.device().is_cuda() {
            true => Numbers::Fetched(Fetch::new(&numbers)?),
            false => Numbers::Here(numbers),
        };
        Ok(ResultsInFlight { numbers, parts })
    }

    pub fn shallow_clone(&self) -> Self {
        Self { numbers: self.numbers.shallow_clone(), parts: self.parts.clone() }
    }
}
