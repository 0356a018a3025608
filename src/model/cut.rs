//! A cut through the graph of a forward pass, below a layer. The part above it can be
//! differentiated first, and the part below it later:
//!
//! ```text
//! loss(above parameters, y),   y = f(below parameters)
//! d loss / d above parameters and dy = d loss / dy                        first
//! d loss / d below parameters = sum over y of <dy, dy / d below>          later
//! ```
//!
//! `y` is all that the upper part takes from the lower one: the residual stream, and what the
//! routers of lower layers have decided, which losses read and which layers may share.

use tch::Tensor;

use super::experts::weights::RoutingWeights;
use super::routing::pass::RoutingPass;

/// A cut through the graph of a forward pass; by default, there is none.
#[derive(Debug, Default)]
pub(crate) struct Cut {
    /// The lowest layer above the cut.
    layer: Option<usize>,
    /// The tensors that cross the cut, as the lower part has computed them.
    pub below: Vec<Tensor>,
    /// The same as leaves, from which the upper part begins.
    pub above: Vec<Tensor>,
}

impl Cut {
    /// A cut below `layer`; `None` for no cut.
    pub fn below(layer: Option<usize>) -> Self {
        Self { layer, ..Self::default() }
    }

    /// Cuts the tensors of the residual stream and what `pass` has decided so far if the cut is
    /// below `layer`, which is next.
    pub fn reach<'t>(
        &mut self,
        layer: usize,
        stream: impl IntoIterator<Item = &'t mut Tensor>,
        pass: &mut RoutingPass<'_>,
    ) {
        if self.layer != Some(layer) {
            return;
        }
        for tensor in stream {
            self.through(tensor);
        }
        for weights in &mut pass.used {
            if let RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) = weights
            {
                self.through(weights);
            }
        }
        for routing in &mut pass.routing {
            let tensors =
                [&mut routing.clean, &mut routing.logits, &mut routing.probs, &mut routing.weights];
            for tensor in tensors {
                self.through(tensor);
            }
        }
    }

    /// Replaces a tensor by a leaf with the same values, unless it has no gradient anyway.
    fn through(&mut self, tensor: &mut Tensor) {
        if !tensor.requires_grad() {
            return;
        }
        let leaf = tensor.detach().set_requires_grad(true);
        self.below.push(std::mem::replace(tensor, leaf.shallow_clone()));
        self.above.push(leaf);
    }
}
