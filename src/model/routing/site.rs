//! Where routing is decided, and the weights that a block gets.

use std::fmt;

use tch::Tensor;

use crate::config::TargetModule;
use crate::model::experts::weights::RoutingWeights;

/// One decision of the routers in a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Which of [`super::routers::Routers::all`] decides.
    pub router: usize,
    /// The layer it decides for; none = all.
    pub layer: Option<usize>,
    /// The module it decides for; none = all of the layer.
    pub module: Option<TargetModule>,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.layer, self.module) {
            (Some(layer), Some(module)) => write!(f, "h.{layer}.{}", module.name()),
            (Some(layer), None) => write!(f, "h.{layer}"),
            _ => f.write_str("all layers"),
        }
    }
}

/// The routing weights of a block: one for all of its modules, or one for each.
#[derive(Debug)]
pub struct BlockWeights(Vec<(Option<TargetModule>, RoutingWeights)>);

impl BlockWeights {
    /// These weights for every module.
    pub fn of_all(weights: RoutingWeights) -> Self {
        Self(vec![(None, weights)])
    }

    /// Weights by module, or for every module.
    pub fn new(weights: Vec<(Option<TargetModule>, RoutingWeights)>) -> Self {
        Self(weights)
    }

    /// A module's weights.
    pub fn of(&self, module: TargetModule) -> &RoutingWeights {
        let weights = self.0.iter().find(|(of, _)| of.is_none_or(|of| of == module));
        weights.map_or(&RoutingWeights::Off, |(_, weights)| weights)
    }

    /// Another handle to the same weights.
    pub fn shallow_clone(&self) -> Self {
        Self(self.0.iter().map(|(module, g)| (*module, g.shallow_clone())).collect())
    }

    /// The same with tensors over flattened tokens, `[b t, e]`; modules that share weights share a tensor.
    pub fn flat(&self, num_tokens: i64) -> Self {
        let tensors = self.tensors();
        let flat = tensors.iter().map(|g| g.reshape([num_tokens, -1]).contiguous());
        self.with_tensors(&flat.collect::<Vec<_>>())
    }

    /// The tensors in it.
    pub fn tensors(&self) -> Vec<Tensor> {
        let tensors = self.0.iter().filter_map(|(_, weights)| match weights {
            RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) => {
                Some(weights.shallow_clone())
            }
            RoutingWeights::Off | RoutingWeights::Ones => None,
        });
        tensors.collect()
    }

    /// The same with other tensors in the places of [`BlockWeights::tensors`].
    pub fn with_tensors(&self, tensors: &[Tensor]) -> Self {
        let mut tensors = tensors.iter();
        let replaced = self.0.iter().map(|(module, weights)| {
            let mut next = || {
                let tensor = tensors.next().expect("there are as many as there were");
                tensor.shallow_clone()
            };
            let weights = match weights {
                RoutingWeights::PerToken(_) => RoutingWeights::PerToken(next()),
                RoutingWeights::Chosen(_, assignments) => {
                    RoutingWeights::Chosen(next(), assignments.shallow_clone())
                }
                other => other.shallow_clone(),
            };
            (*module, weights)
        });
        Self(replaced.collect())
    }
}
