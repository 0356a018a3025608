//! What decides the routing weights of a forward pass, whatever it is: one mechanism.
//!
//! ```text
//! source ------------------> weights [b, t, e] --x mask--> every layer's experts
//!   router: embeddings, last hidden state of the base, or a layer's own input
//!   given | uniform | one expert | all at weight 1 | the record's expert | none
//! mask: 0 before the last invocation of an expert that has invocation tokens (aLoRA,
//!       arXiv:2504.12397), found as PEFT 0.21 does (`calculate_alora_offsets`), document by document
//! ```
//!
//! Switching the source changes neither the experts nor what of them is trained. The mask is the one
//! part that looks ahead: where an expert's tokens come twice, the first time does not count.
//!
//! Letters of shapes: `b` batch, `t` position, `e` expert.

use tch::{Device, Kind, Tensor};

use super::inputs::Inputs;
use super::lora::RoutingWeights;
use super::router::{Router, Routing};
use super::{RoutedGpt2, wide};
use crate::config::{RouterInput, RoutingChoice};

/// What decides the routing weights of a forward pass.
#[derive(Debug)]
pub enum RoutingSource {
    /// The learned router; with one expert, which has none, weight 1.
    Router,
    /// 1 / E for each expert.
    Uniform,
    /// 1 for each expert: PEFT's unweighted sum of several active adapters.
    All,
    /// 1 for this expert, 0 for the others.
    Expert(i64),
    /// 1 for the expert that [`Inputs::expert_ids`] names: PEFT's `adapter_names`.
    Record,
    /// The base alone.
    Base,
    /// These weights, `[b, t, e]`, or `[e]` for every token; they need not sum to 1.
    Given(Tensor),
}

impl From<RoutingChoice> for RoutingSource {
    fn from(choice: RoutingChoice) -> Self {
        match choice {
            RoutingChoice::Router => Self::Router,
            RoutingChoice::Uniform => Self::Uniform,
            RoutingChoice::All => Self::All,
            RoutingChoice::Expert(expert) => Self::Expert(expert),
            RoutingChoice::Record => Self::Record,
            RoutingChoice::None => Self::Base,
        }
    }
}

/// The weights of a forward pass before its blocks are run.
pub(super) enum LayerWeights<'a> {
    /// The same in every layer.
    Shared(RoutingWeights),
    /// Each layer's router decides when its input is there.
    PerLayer(&'a [Router]),
}

impl RoutedGpt2 {
    /// The weights that `source` decides on for a batch whose embeddings are `x`, `[b, t, d]`, and the
    /// router's part in it as far as it is known before the blocks are run.
    pub(super) fn layer_weights(
        &self,
        inputs: &Inputs,
        x: &Tensor,
        source: &RoutingSource,
    ) -> (LayerWeights<'_>, Option<Routing>) {
        let e = self.num_experts();
        let shared = |weights| (LayerWeights::Shared(weights), None);
        if e == 0 || matches!(source, RoutingSource::Base) {
            return shared(RoutingWeights::Off);
        }
        let mask = || self.invocation_mask(inputs);
        let fixed = |weights_e: Tensor| {
            let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
            let weights = weights_e.to_device(x.device()).expand([b, t, e], false).contiguous();
            shared(masked(RoutingWeights::PerToken(weights), mask()))
        };
        let options = (wide(self.kind), Device::Cpu);
        match source {
            RoutingSource::Base => unreachable!("handled above"),
            RoutingSource::Uniform => fixed(Tensor::full([e], 1.0 / e as f64, options)),
            RoutingSource::Expert(expert) => {
                fixed(Tensor::from(*expert).one_hot(e).to_kind(options.0))
            }
            RoutingSource::All => shared(masked(RoutingWeights::Ones, mask())),
            RoutingSource::Record => {
                let ids = inputs.expert_ids.as_ref().expect("the caller saw that records name one");
                let experts = Tensor::arange(e, (Kind::Int64, ids.device()));
                let weights = ids.unsqueeze(-1).eq_tensor(&experts).to_kind(options.0);
                shared(masked(RoutingWeights::PerToken(weights), mask()))
            }
            RoutingSource::Given(weights) => fixed(weights.to_kind(options.0)),
            RoutingSource::Router => match (self.routers.as_slice(), self.router_input) {
                ([], _) => shared(masked(RoutingWeights::Ones, mask())),
                (routers, RouterInput::LayerInput) => (LayerWeights::PerLayer(routers), None),
                ([router], RouterInput::Embeddings) => self.by_router(router, x, mask()),
                ([router], RouterInput::BaseHidden) => {
                    let hidden = tch::no_grad(|| self.base_hidden(inputs, x));
                    self.by_router(router, &hidden, mask())
                }
                _ => unreachable!("only layer inputs have several routers"),
            },
        }
    }

    fn by_router(
        &self,
        router: &Router,
        features: &Tensor,
        mask: Option<Tensor>,
    ) -> (LayerWeights<'_>, Option<Routing>) {
        let routing = route(router, features, mask);
        let weights = RoutingWeights::PerToken(routing.weights.shallow_clone());
        (LayerWeights::Shared(weights), Some(routing))
    }

    /// 1 where an expert is active, 0 before its invocation, `[b, t, e]`; none if every expert always
    /// is.
    pub(super) fn invocation_mask(&self, inputs: &Inputs) -> Option<Tensor> {
        if self.specs.iter().all(|spec| spec.alora_invocation_tokens.is_empty()) {
            return None;
        }
        let mut mask = vec![1f32; inputs.host.input_ids.len() * self.specs.len()];
        for (expert, spec) in self.specs.iter().enumerate() {
            if spec.alora_invocation_tokens.is_empty() {
                continue;
            }
            for document in inputs.host.documents() {
                let tokens = &inputs.host.input_ids[document.clone()];
                let inactive =
                    last_start(tokens, &spec.alora_invocation_tokens).unwrap_or(tokens.len());
                for position in document.start..document.start + inactive {
                    mask[position * self.specs.len() + expert] = 0.0;
                }
            }
        }
        let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
        let mask = Tensor::from_slice(&mask).view([b, t, self.specs.len() as i64]);
        Some(mask.to_kind(wide(self.kind)).to_device(inputs.input_ids.device()))
    }
}

/// Routes by `features`, `[b, t, d]`, and zeroes the weights outside of `mask`, `[b, t, e]`.
pub(super) fn route(router: &Router, features: &Tensor, mask: Option<Tensor>) -> Routing {
    let routing = router.forward(features);
    match mask {
        None => routing,
        Some(mask) => Routing { weights: &routing.weights * mask, ..routing },
    }
}

fn masked(weights: RoutingWeights, mask: Option<Tensor>) -> RoutingWeights {
    match (weights, mask) {
        (weights, None) => weights,
        (RoutingWeights::Off, _) => RoutingWeights::Off,
        (RoutingWeights::Ones, Some(mask)) => RoutingWeights::PerToken(mask),
        (RoutingWeights::PerToken(weights), Some(mask)) => RoutingWeights::PerToken(weights * mask),
    }
}

/// Where `wanted`, which is not empty, occurs last in `tokens`.
fn last_start(tokens: &[i64], wanted: &[i64]) -> Option<usize> {
    tokens.windows(wanted.len()).rposition(|window| window == wanted)
}
