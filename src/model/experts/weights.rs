//! Routing weights in the form that the experts of a module take.

use tch::Tensor;

use super::assignments::Assignments;

/// The weight of each expert's update.
#[derive(Debug)]
pub enum RoutingWeights {
    /// Nothing is added: the base alone.
    Off,
    /// Weight 1 for every expert, as for a single expert, which has no router.
    Ones,
    /// A weight for each token and expert, `[b, t, e]`.
    PerToken(Tensor),
    /// The same with zeros for the experts that a token did not choose, and which experts it chose.
    Chosen(Tensor, Assignments),
}

impl RoutingWeights {
    /// Another handle to the same weights.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::Off => Self::Off,
            Self::Ones => Self::Ones,
            Self::PerToken(weights) => Self::PerToken(weights.shallow_clone()),
            Self::Chosen(weights, assignments) => {
                Self::Chosen(weights.shallow_clone(), assignments.shallow_clone())
            }
        }
    }
}
