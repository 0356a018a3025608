//! The losses that are added to the language model's, as computed for one micro-batch.
//!
//! `load_balancing_loss` and `uniform_mse` depend on the mean routing_probs of the whole step. In
//! their place, a micro-batch gets the sum of its routing_probs times the gradient of the loss with
//! respect to them, which follows from the step's totals ([`crate::model::routing::totals`]). This
//! product has the right gradient, but not the loss's value. The z-loss, the entropy and the
//! seeding loss are sums over tokens. The gradients do not depend on how a step is split into
//! micro-batches, and each loss is averaged over the sites.
//!
//! While a new expert is seeded, its router column learns by a logistic loss which tokens belong to
//! it. The new domain and the others have the same weight; with `p` the probability of the new
//! expert, the loss is
//!
//! ```text
//! -mean over the new domain's tokens of ln p - mean over the other tokens of ln(1 - p)
//! ```
//!
//! Letters of shapes: `s` site, `n` labelled positions of the micro-batch, `m` experts of the site.

use tch::{Kind, Tensor};

use crate::config::RouterConfig;
use crate::model::batch::Labelled;
use crate::model::routing::router::Routing;
use crate::model::routing::totals::{RoutingTotals, alike, entropies, rows, stacked_rows};

/// Whether one of the losses depends on means over all micro-batches of a step.
pub(crate) fn needs_totals(config: &RouterConfig) -> bool {
    config.load_balancing_coef > 0.0 || config.uniform_mse_coef > 0.0
}

/// A scalar with the gradient of the routers' losses, times their factors, for one micro-batch;
/// `None` without routers or if every factor is 0.
///
/// - `totals`: the totals of each site, over the whole step if [`needs_totals`]
/// - `labelled`: the micro-batch's labelled positions
/// - `per_token`: 1 / label tokens of the whole step, 0-dim, f64
pub(crate) fn router_losses(
    config: &RouterConfig,
    routing: &[Routing],
    totals: &[RoutingTotals],
    labelled: Labelled<'_>,
    per_token: &Tensor,
) -> Option<Tensor> {
    if routing.is_empty() || config.loss_coefs().iter().all(|(_, coef, _)| *coef == 0.0) {
        return None;
    }
    let mut totals = totals.iter();
    let terms = alike(routing, labelled.rows.size()[0]).into_iter().map(|sites| {
        let of_sites: Vec<&RoutingTotals> = totals.by_ref().take(sites.len()).collect();
        stacked_losses(config, sites, &RoutingTotals::of_all(&of_sites), labelled, per_token)
    });
    Some(terms.sum::<Tensor>() / routing.len() as f64)
}

/// The sum of the losses of sites that are [`alike`], times their factors.
fn stacked_losses(
    config: &RouterConfig,
    sites: &[Routing],
    totals: &RoutingTotals,
    labelled: Labelled<'_>,
    per_token: &Tensor,
) -> Tensor {
    let probs_snm = stacked_rows(sites, |site| &site.probs, labelled.rows);
    let probs_snm = labelled.only_counted(probs_snm, 1);
    let kind = probs_snm.kind();
    let with_gradient =
        |gradient_sm: Tensor| (&probs_snm * gradient_sm.to_kind(kind).unsqueeze(1)).sum(kind);
    let mut loss = Tensor::zeros([0i64; 0], (kind, probs_snm.device()));
    if config.load_balancing_coef > 0.0 {
        let of_loss = with_gradient(totals.balance_gradient());
        loss = &loss + of_loss * config.load_balancing_coef;
    }
    if config.uniform_mse_coef > 0.0 {
        loss = &loss + with_gradient(totals.uniform_gradient()) * config.uniform_mse_coef;
    }
    if config.z_loss_coef > 0.0 {
        let logits_snm = stacked_rows(sites, |site| &site.logits, labelled.rows);
        let squares_sn = labelled.only_counted(logits_snm.logsumexp(-1, false).square(), 1);
        loss = &loss + squares_sn.sum(kind) * (per_token * config.z_loss_coef).to_kind(kind);
    }
    if config.entropy_coef != 0.0 {
        let coef = (per_token * config.entropy_coef).to_kind(kind);
        loss = &loss + entropies(&probs_snm).sum(kind) * coef;
    }
    loss
}

/// The tokens that a new expert is seeded with.
#[derive(Debug, Clone, Copy)]
pub struct Seeding<'a> {
    /// The new expert.
    pub expert: i64,
    /// The group of tokens that is the new domain.
    pub group: i64,
    /// Label tokens of the step in the new domain and in the others, each 0-dim, f64.
    pub tokens: [&'a Tensor; 2],
}

/// The seeding loss of one micro-batch, averaged over the sites.
pub fn seeding_loss(
    routing: &[Routing],
    temperature: &Tensor,
    labelled: Labelled<'_>,
    seeding: Seeding<'_>,
) -> Tensor {
    let terms = routing.iter().map(|routing| {
        let scores_nm = rows(&routing.logits, labelled.rows) / temperature;
        let kind = scores_nm.kind();
        // `[growth]` does not go with `lora.experts_per_layer`
        assert!(routing.present.is_none(), "a layer of a growing mixture has all experts");
        let at = seeding.expert;
        // with x = s_new - logsumexp(others), ln p is the log-sigmoid of x and ln(1 - p) that of
        // -x, which have a gradient even where p is rounded to 1
        let m = *scores_nm.size().last().expect("scores are [n, m]");
        let is_new_m = Tensor::arange(m, (Kind::Int64, scores_nm.device())).eq(at);
        let others_nm = scores_nm.masked_fill(&is_new_m, f64::NEG_INFINITY);
        let x_n = scores_nm.select(-1, at) - others_nm.logsumexp(-1, false);
        let is_new = labelled.groups.eq(seeding.group).to_kind(kind);
        let is_old = labelled.only_counted(-&is_new + 1.0, 0);
        let is_new = labelled.only_counted(is_new, 0);
        let mean = |values: Tensor, tokens: &Tensor| {
            values.sum(kind) / tokens.clamp_min(1.0).to_kind(kind)
        };
        -mean(x_n.log_sigmoid() * is_new, seeding.tokens[0])
            - mean((-x_n).log_sigmoid() * is_old, seeding.tokens[1])
    });
    terms.sum::<Tensor>() / routing.len() as f64
}
