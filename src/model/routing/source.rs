//! What decides the routing weights of a forward pass. The experts use the weights in the same way,
//! whatever decides them:
//!
//! ```text
//! source ------------------> weights [b, t, e] --x mask--> the experts of a layer or module
//!   router, which reads embeddings, the base's last hidden state, or a layer's own input
//!   given | uniform | one expert | all at weight 1 | the record's or domain's expert | none
//! mask: 0 before the last invocation of an expert that has invocation tokens (aLoRA,
//!       arXiv:2504.12397), found as by PEFT 0.21 (`calculate_alora_offsets`), in each
//!       document by itself
//! ```
//!
//! A router decides at one or more [sites](super::site): one for all layers, or one for each layer
//! or target module. Switching the source does not change the experts. Only the mask looks ahead:
//! if an expert's invocation tokens occur twice in a document, the first occurrence does not count.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `e` expert, `m` a layer's experts.

use tch::{Device, Kind, Tensor};

use crate::config::RoutingChoice;
use crate::model::batch::Inputs;
use crate::model::experts::spec::ExpertSpec;
use crate::model::experts::weights::RoutingWeights;

/// What decides the routing weights of a forward pass.
///
/// A rule of one's own computes weights and passes them as [`RoutingSource::Given`]:
///
/// ```
/// use dylora::model::RoutingSource;
/// use tch::Tensor;
///
/// // two experts; `is_code` is 1 for the tokens of code, `[b, t]`
/// let is_code = Tensor::from_slice2(&[[0.0_f32, 1.0, 1.0]]);
/// let weights = Tensor::stack(&[&is_code, &(1.0 - &is_code)], -1);
/// assert_eq!(weights.size(), [1, 3, 2]);
/// let source = RoutingSource::Given(weights);
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum RoutingSource {
    /// The learned router. A model with one expert has no router and gives it weight 1.
    Router,
    /// Weight 1 / E for each expert.
    Uniform,
    /// Weight 1 for each expert, as in PEFT's unweighted sum of several active adapters.
    All,
    /// Weight 1 for this expert and 0 for the others.
    Expert(i64),
    /// Weight 1 for the expert that [`Inputs::expert_ids`] names, as with PEFT's `adapter_names`.
    Record,
    /// Weight 1 for the expert of each row's domain, or even shares of it for several
    /// ([`Inputs::domain_experts`]).
    Domain,
    /// As `Record` where an expert is named, and as `Router` elsewhere. This is how a new expert is
    /// seeded.
    RecordOrRouter,
    /// Weight 0 for each expert, which is the base alone.
    Base,
    /// These weights, `[b, t, e]`, or `[e]` for every token. They need not sum to 1.
    Given(Tensor),
    /// Each row has a source of its own.
    Rows(RowSources),
}

/// The sources of the rows of a batch.
#[derive(Debug)]
pub struct RowSources {
    /// The weights of rows that no router decides, `[b, s]`; any weights in the other rows. `s` is
    /// the number of experts, and one more if a part is always on, which has its weight at the end.
    pub fixed: Tensor,
    /// True for the rows that the router decides, `[b]`; `None` if it decides none.
    pub by_router: Option<Tensor>,
}

impl From<RoutingChoice> for RoutingSource {
    fn from(choice: RoutingChoice) -> Self {
        match choice {
            RoutingChoice::Router => Self::Router,
            RoutingChoice::Uniform => Self::Uniform,
            RoutingChoice::All => Self::All,
            RoutingChoice::Expert(expert) => Self::Expert(expert),
            RoutingChoice::Record => Self::Record,
            RoutingChoice::Domain => Self::Domain,
            RoutingChoice::None => Self::Base,
        }
    }
}

impl RoutingSource {
    /// Whether the source uses the experts that records name.
    pub fn reads_records(&self) -> bool {
        matches!(self, Self::Record | Self::RecordOrRouter)
    }

    /// The weights of a source that does not ask a router, over `num_experts` experts. The router
    /// itself counts as such if the model has only one expert.
    ///
    /// - `kind`, `device`: dtype and device of the weights
    pub(crate) fn fixed_weights(
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
            // a model with one expert has no router
            Self::Router | Self::RecordOrRouter | Self::All => RoutingWeights::Ones,
            Self::Uniform => every(Tensor::full([e], 1.0 / e as f64, (kind, device))),
            Self::Expert(expert) => every(Tensor::arange(e, (Kind::Int64, device)).eq(*expert)),
            Self::Record => RoutingWeights::PerToken(one_hot(&named_experts(inputs), e, kind)),
            Self::Domain => {
                let experts = inputs.domain_experts.as_ref();
                let experts = experts.expect("the caller gave domains their experts");
                let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
                let shares = experts / experts.sum_dim_intlist(-1, true, None);
                let shares = shares.to_kind(kind).unsqueeze(1).expand([b, t, e], false);
                RoutingWeights::PerToken(shares.contiguous())
            }
            Self::Given(weights) => every(weights.shallow_clone()),
            Self::Rows(rows) => {
                let (b, t) = inputs.input_ids.size2().expect("token ids are [b, t]");
                let fixed = rows.fixed.to_kind(kind).unsqueeze(1);
                RoutingWeights::PerToken(fixed.expand([b, t, -1], false).contiguous())
            }
        }
    }
}

/// 1 where an expert is active and 0 before its invocation, `[b, t, e]`; `None` if every expert is
/// always active.
pub(crate) fn invocation_mask(specs: &[ExpertSpec], inputs: &Inputs, kind: Kind) -> Option<Tensor> {
    if specs.iter().all(|spec| spec.alora_invocation_tokens.is_empty()) {
        return None;
    }
    if let Some(active_from) = inputs.active_from() {
        let positions = inputs.position_ids.unsqueeze(-1);
        return Some(positions.greater_equal_tensor(&active_from.unsqueeze(1)).to_kind(kind));
    }
    let active = specs.iter().map(|spec| match &spec.alora_invocation_tokens[..] {
        [] => inputs.input_ids.ones_like().to_kind(kind),
        tokens => inputs.active_from_last(tokens, kind),
    });
    Some(Tensor::stack(&active.collect::<Vec<_>>(), -1))
}

/// The position from which each expert is active in a text that begins with `prompt`: that of the
/// last invocation in the prompt, and after all positions if there is none. Empty if every expert
/// is always active.
pub fn active_from(specs: &[ExpertSpec], prompt: &[i64]) -> Vec<i64> {
    let invocation = |spec: &ExpertSpec| match &spec.alora_invocation_tokens[..] {
        [] => 0,
        tokens => {
            let start = prompt.windows(tokens.len()).rposition(|window| window == tokens);
            start.map_or(i64::MAX, |start| start as i64)
        }
    };
    match specs.iter().all(|spec| spec.alora_invocation_tokens.is_empty()) {
        true => vec![],
        false => specs.iter().map(invocation).collect(),
    }
}

/// The expert that each position's record names, `[b, t]`; -1 for none.
pub(crate) fn named_experts(inputs: &Inputs) -> Tensor {
    inputs.expert_ids.as_ref().expect("the caller saw that records name one").shallow_clone()
}

/// 1 at the expert that `ids_bt` names, `[b, t, e]`; all zeros where it is -1.
pub fn one_hot(ids_bt: &Tensor, e: i64, kind: Kind) -> Tensor {
    let experts = Tensor::arange(e, (Kind::Int64, ids_bt.device()));
    ids_bt.unsqueeze(-1).eq_tensor(&experts).to_kind(kind)
}
