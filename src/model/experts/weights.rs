//! Routing weights as the experts of a module take them.

use tch::Tensor;

use super::assignments::Assignments;

/// What multiplies each expert's part.
#[derive(Debug)]
pub enum RoutingWeights {
    /// Nothing is added: the base alone.
    Off,
    /// 1 for every expert; what a single expert, which has no router, has.
    Ones,
    /// `[b, t, e]`.
    PerToken(Tensor),
    /// The same with zeros but for the experts that a token chose, and which those are.
    Chosen(Tensor, Assignments),
}

impl RoutingWeights {
    /// Another handle to the same weights.
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
