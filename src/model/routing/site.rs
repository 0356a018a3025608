//! The sites at which routers decide, and the routing weights of a block.

use std::fmt;

use tch::Tensor;

use crate::config::TargetModule;
use crate::model::experts::weights::RoutingWeights;

/// A site: one decision of a router in a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Index of the router in [`super::routers::Routers::all`].
    pub router: usize,
    /// The layer that it decides for; `None` for all layers.
    pub layer: Option<usize>,
    /// The module that it decides for; `None` for all modules of the layer.
    pub module: Option<TargetModule>,
    /// The name of the base's list of blocks, `h` or `layers`.
    pub block_list: &'static str,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = self.block_list;
        match (self.layer, self.module) {
            (Some(layer), Some(module)) => write!(f, "{list}.{layer}.{}", module.name()),
            (Some(layer), None) => write!(f, "{list}.{layer}"),
            _ => f.write_str("all layers"),
        }
    }
}

/// The routing weights of a block: the same for all of its modules, or one entry for each.
#[derive(Debug)]
pub(crate) struct BlockWeights(Vec<(Option<TargetModule>, RoutingWeights)>);

impl BlockWeights {
    /// The same weights for every module.
    pub fn of_all(weights: RoutingWeights) -> Self {
        Self(vec![(None, weights)])
    }

    /// Weights by module. `None` stands for every module.
    pub fn new(weights: Vec<(Option<TargetModule>, RoutingWeights)>) -> Self {
        Self(weights)
    }

    /// The weights of a module; [`RoutingWeights::Off`] if it has none.
    pub fn of(&self, module: TargetModule) -> &RoutingWeights {
        let weights = self.0.iter().find(|(of, _)| of.is_none_or(|of| of == module));
        weights.map_or(&RoutingWeights::Off, |(_, weights)| weights)
    }

    /// Another handle to the same weights.
    pub fn shallow_clone(&self) -> Self {
        Self(self.0.iter().map(|(module, g)| (*module, g.shallow_clone())).collect())
    }

    /// The same weights over flattened tokens, `[b t, e]`. Modules that share weights share the
    /// tensor.
    pub fn flat(&self, num_tokens: i64) -> Self {
        let tensors = self.tensors();
        let flat = tensors.iter().map(|g| g.reshape([num_tokens, -1]).contiguous());
        self.with_tensors(&flat.collect::<Vec<_>>())
    }

    /// The tensors of the weights, in order.
    pub fn tensors(&self) -> Vec<Tensor> {
        let tensors = self.0.iter().filter_map(|(_, weights)| match weights {
            RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) => {
                Some(weights.shallow_clone())
            }
            RoutingWeights::Off | RoutingWeights::Ones => None,
        });
        tensors.collect()
    }

    /// The same weights with `tensors` in place of those that [`BlockWeights::tensors`] returns.
    pub(crate) fn with_tensors(&self, tensors: &[Tensor]) -> Self {
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
