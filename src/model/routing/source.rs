//! What decides the routing weights of a forward pass, whatever it is: one mechanism.
//!
//! ```text
//! source ------------------> weights [b, t, e] --x mask--> the experts of a layer or module
//!   router: embeddings, last hidden state of the base, or a layer's own input
//!   given | uniform | one expert | all at weight 1 | the record's expert | none
//! mask: 0 before the last invocation of an expert that has invocation tokens (aLoRA,
//!       arXiv:2504.12397), found as PEFT 0.21 does (`calculate_alora_offsets`), document by document
//! ```
//!
//! A router decides at one or more [`Site`]s: once for all layers, or for each layer, or for each target
//! module. Switching the source changes neither the experts nor what of them is trained. The mask is the
//! one part that looks ahead: where an expert's tokens come twice, the first time does not count.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `e` expert, `m` a layer's experts.

use tch::{Device, Kind, Tensor};

use crate::config::RoutingChoice;
use crate::model::batch::Inputs;
use crate::model::experts::spec::ExpertSpec;
use crate::model::experts::weights::RoutingWeights;

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
    /// As `Record` where an expert is named, elsewhere the learned router: how a new expert is seeded.
    RecordOrRouter,
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

impl RoutingSource {
    /// Whether the experts that records name take part.
    pub fn reads_records(&self) -> bool {
        matches!(self, Self::Record | Self::RecordOrRouter)
    }

    /// The weights that a source that is no router decides on, over `num_experts` experts.
    ///
    /// - `kind`, `device`: of the weights
    pub fn fixed_weights(
        &self,
        inputs: &Inputs,
        num_experts: i64,
        kind: Kind,
        device: Device,
    ) -> RoutingWeights {
        let e = num_experts;
        if e == 0 {
            return RoutingWeights::Off;
        }
        let every = |weights_e: Tensor| {
            let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
            let weights = weights_e.to_kind(kind).to_device(device);
            RoutingWeights::PerToken(weights.expand([b, t, e], false).contiguous())
        };
        match self {
            Self::Base => RoutingWeights::Off,
            // with one expert, which has no router
            Self::Router | Self::RecordOrRouter | Self::All => RoutingWeights::Ones,
            Self::Uniform => every(Tensor::full([e], 1.0 / e as f64, (kind, device))),
            Self::Expert(expert) => every(Tensor::arange(e, (Kind::Int64, device)).eq(*expert)),
            Self::Record => RoutingWeights::PerToken(one_hot(&named_experts(inputs), e, kind)),
            Self::Given(weights) => every(weights.shallow_clone()),
        }
    }
}

/// 1 where an expert is active, 0 before its invocation, `[b, t, e]`; none if every expert always
/// is.
pub fn invocation_mask(specs: &[ExpertSpec], inputs: &Inputs, kind: Kind) -> Option<Tensor> {
    if specs.iter().all(|spec| spec.alora_invocation_tokens.is_empty()) {
        return None;
    }
    let active = specs.iter().map(|spec| match &spec.alora_invocation_tokens[..] {
        [] => inputs.input_ids.ones_like().to_kind(kind),
        tokens => inputs.active_from_last(tokens, kind),
    });
    Some(Tensor::stack(&active.collect::<Vec<_>>(), -1))
}

/// The expert that each position's record names, `[b, t]`.
pub fn named_experts(inputs: &Inputs) -> Tensor {
    inputs.expert_ids.as_ref().expect("the caller saw that records name one").shallow_clone()
}

/// 1 where an expert is named, `[b, t, e]`; zeros for -1.
pub fn one_hot(ids_bt: &Tensor, e: i64, kind: Kind) -> Tensor {
    let experts = Tensor::arange(e, (Kind::Int64, ids_bt.device()));
    ids_bt.unsqueeze(-1).eq_tensor(&experts).to_kind(kind)
}
