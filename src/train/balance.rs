//! Loss-free balancing, which adapts each router's selection bias to the load of its experts.

use tch::{Kind, Tensor};

use crate::model::RoutedModel;
use crate::model::routing::totals::RoutingTotals;

/// In each router, moves the selection bias of every expert by `rate`: up if the expert had less
/// than its share of the step's assignments, down if it had more (arXiv:2408.15664, algorithm 1:
/// `b_i + u sign(mean load - load_i)`). With `old_rate`, the biases of all experts but the last
/// move by `rate * old_rate`. If `is_skipped`, 0-dim, is true, no bias moves.
pub fn balance_biases(
    model: &RoutedModel,
    totals: &[RoutingTotals],
    rate: f64,
    old_rate: Option<f64>,
    is_skipped: &Tensor,
) {
    let _no_grad = tch::no_grad_guard();
    let biases = model.routers().iter().map(|router| router.selection_bias.as_ref());
    let mut surplus: Vec<Option<Tensor>> =
        biases.map(|bias| bias.map(|bias| bias.to_kind(Kind::Double).zeros_like())).collect();
    for (site, totals) in model.sites().into_iter().zip(totals) {
        // with dense routing, as before all experts are mature, no expert has more than its share
        let Some(sum) = surplus[site.router].as_mut().filter(|_| !totals.is_dense()) else {
            continue;
        };
        let share = totals.expert_load() - 1.0 / totals.num_experts() as f64;
        *sum = match model.present_at(site) {
            None => &*sum + share,
            Some(experts) => sum.index_add(0, experts, &share),
        };
    }
    for (router, surplus) in model.routers().iter().zip(surplus) {
        let (Some(bias), Some(surplus)) = (&router.selection_bias, surplus) else { continue };
        // loads are quotients of whole numbers; a surplus that is only rounding moves nothing
        let direction = surplus.sign() * surplus.abs().ge(1e-12).to_kind(Kind::Double);
        if let Some(old_rate) = old_rate {
            let _ = direction.narrow(0, 0, model.num_experts() - 1).multiply_scalar_(old_rate);
        }
        let moved = bias - (direction * rate).to_kind(bias.kind());
        bias.shallow_clone().copy_(&bias.where_self(is_skipped, &moved));
    }
}
