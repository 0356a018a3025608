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
//! Letters of shapes: `s` site, `b` batch, `t` position, `e` expert.

use tch::{Kind, Tensor};

use super::router::Routing;
use crate::model::batch::Inputs;

/// Sums over the tokens of a batch at each site. Tokens of domains without experts do not count.
#[derive(Debug)]
pub struct SupervisionSums {
    /// The sum of the losses at all sites, nats, 0-dim and differentiable.
    pub loss: Tensor,
    /// The sums of each site, without gradient, f64, `[s, 2]`: the losses, and the number of tokens
    /// whose most probable expert is one of their domain's.
    pub by_site: Tensor,
}

impl SupervisionSums {
    /// The sums of a batch. `None` if its domains have no experts, no router decided, or layers
    /// route over experts of their own.
    ///
    /// - `routing`: what the routers did at each site
    pub fn new(routing: &[Routing], temperature: &Tensor, inputs: &Inputs) -> Option<Self> {
        let experts_be = inputs.domain_experts.as_ref()?;
        if routing.is_empty() || routing.iter().any(|site| site.present.is_some()) {
            return None;
        }
        let clean: Vec<&Tensor> = routing.iter().map(|site| &site.clean).collect();
        let clean_sbte = Tensor::stack(&clean, 0);
        let kind = clean_sbte.kind();
        let has_experts_b1 = experts_be.amax(-1, true);
        // a row without experts gets all of them, by which its loss is 0
        let missing_b1: Tensor = 1.0 - &has_experts_b1;
        let others_b1e = (experts_be + missing_b1).le(0.0).unsqueeze(1);
        let scores_sbte = &clean_sbte / temperature.to_kind(kind);
        let own_sbte = scores_sbte.masked_fill(&others_b1e, f64::NEG_INFINITY);
        let counts_bt = inputs.real_tokens(kind) * has_experts_b1.to_kind(kind);
        let losses_sbt = scores_sbte.logsumexp(-1, false) - own_sbte.logsumexp(-1, false);
        let losses_sbt = losses_sbt * &counts_bt;
        let by_site = tch::no_grad(|| {
            let best_sbt1 = clean_sbte.argmax(-1, true);
            let marks_sbte = experts_be.unsqueeze(1).expand(clean_sbte.size(), false);
            let correct_sbt = marks_sbte.gather(-1, &best_sbt1, false).squeeze_dim(-1) * counts_bt;
            let sums = [losses_sbt.detach(), correct_sbt]
                .map(|x_sbt| x_sbt.sum_dim_intlist(&[1_i64, 2][..], false, Kind::Double));
            Tensor::stack(&sums, -1)
        });
        Some(Self { loss: losses_sbt.sum(kind), by_site })
    }
}
