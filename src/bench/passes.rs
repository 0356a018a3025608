//! N passes: one forward pass for each expert. The router's weights blend the logits of the passes,
//! and the loss is that of the blend. This is what a mixture costs that is blended after the model:
//!
//! ```text
//! z = sum_e g_e z_e          z_e: the logits with expert e alone, at weight 1
//! loss = -log softmax(z)_y
//! ```
//!
//! This is another function than the mixture in one pass, which weights the experts in each layer.
//! All passes and all their logits stay in memory until the backward pass. Each pass computes the
//! whole stack of experts, all but one of them at weight 0, but most of its cost is the base.
//!
//! Letters of shapes: `n` labelled positions, `d` width, `e` expert, `v` vocabulary.

use anyhow::{Result, bail};
use tch::Tensor;

use crate::data::IGNORED_LABEL;
use crate::model::decoder::precision::wide;
use crate::model::routing::totals::rows;
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};

/// The sum of the losses of a batch's labelled positions, in nats, 0-dim. Gradients flow from it
/// into the experts and the router.
///
/// # Errors
/// A model with more than one router, or without experts.
pub fn summed_loss(model: &RoutedModel, inputs: &Inputs, mode: ForwardMode) -> Result<Tensor> {
    let routing = model.routing(inputs, mode);
    let weights_ne = match &routing[..] {
        [] => None,
        [shared] => Some(rows(&shared.weights, &inputs.labelled)),
        _ => bail!("N passes need one router for all layers"),
    };
    let mut blended = None;
    for expert in 0..model.num_experts() {
        let source = RoutingSource::Expert(expert);
        let hidden = model.forward(inputs, &source, mode, None).hidden;
        let mut logits_nv = model.logits(&rows(&hidden, &inputs.labelled));
        if let Some(weights_ne) = &weights_ne {
            let weight_n1 = weights_ne.narrow(1, expert, 1).to_kind(logits_nv.kind());
            logits_nv = &logits_nv * weight_n1;
        }
        blended = Some(blended.map_or_else(|| logits_nv.shallow_clone(), |sum| sum + &logits_nv));
    }
    let Some(logits_nv) = blended else { bail!("a bare base has no experts to pass through") };
    let logits_nv = logits_nv.to_kind(wide(logits_nv.kind()));
    let none = None::<&Tensor>;
    Ok(logits_nv.cross_entropy_loss(&inputs.labels, none, tch::Reduction::Sum, IGNORED_LABEL, 0.0))
}
