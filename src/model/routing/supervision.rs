//! The domain supervision, which teaches a router which experts are for which domain.
//!
//! Let `D` be the experts of a token's domain and `p` its routing_probs, without noise and before
//! top-k and selection bias. At each site, the loss of a token is
//!
//! ```text
//! -ln sum_{e in D} p_e = logsumexp_e(s_e / T) - logsumexp_{e in D}(s_e / T)
//! ```
//!
//! with the scores `s` and the temperature `T`. It is taken over all tokens, prompts too, but not
//! over padding.
//!
//! Letters of shapes: `b` batch, `t` position, `e` expert.

use tch::{Kind, Tensor};

use super::router::Routing;
use crate::model::batch::Inputs;

/// Sums over the tokens of a batch at one site. Tokens of domains without experts do not count.
#[derive(Debug)]
pub struct SupervisionSums {
    /// The sum of the losses, nats, 0-dim and differentiable.
    pub loss: Tensor,
    /// The sums by row, without gradient, f64, `[b, 2]`: the losses, and the number of tokens whose
    /// most probable expert is one of their domain's.
    pub by_row: Tensor,
}

impl SupervisionSums {
    /// The sums of a batch whose domains have experts; `None` if they have none.
    pub fn new(routing: &Routing, temperature: &Tensor, inputs: &Inputs) -> Option<Self> {
        let experts_be = inputs.domain_experts.as_ref()?;
        let kind = routing.clean.kind();
        let has_experts_b1 = experts_be.amax(-1, true);
        // a row without experts gets all of them, by which its loss is 0
        let missing_b1: Tensor = 1.0 - &has_experts_b1;
        let allowed_b1e = (experts_be + missing_b1).gt(0.0).unsqueeze(1);
        let scores_bte = &routing.clean / temperature.to_kind(kind);
        let own_bte = scores_bte.masked_fill(&allowed_b1e.logical_not(), f64::NEG_INFINITY);
        let counts_bt = inputs.real_tokens(kind) * has_experts_b1.to_kind(kind);
        let losses_bt = scores_bte.logsumexp(-1, false) - own_bte.logsumexp(-1, false);
        let losses_bt = losses_bt * &counts_bt;
        let by_row = tch::no_grad(|| {
            let (b, e) = experts_be.size2().expect("the marks are [b, e]");
            let t = losses_bt.size()[1];
            let best_bt1 = routing.clean.argmax(-1, true);
            let marks_bte = experts_be.unsqueeze(1).expand([b, t, e], false);
            let correct_bt = marks_bte.gather(-1, &best_bt1, false).squeeze_dim(-1) * &counts_bt;
            let sums = [losses_bt.detach(), correct_bt]
                .map(|x_bt| x_bt.sum_dim_intlist(-1, false, Kind::Double));
            Tensor::stack(&sums, -1)
        });
        Some(Self { loss: losses_bt.sum(kind), by_row })
    }
}
