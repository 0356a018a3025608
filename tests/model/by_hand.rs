//! A mixture computed a second time, module by module and expert by expert:
//!
//! ```text
//! y = x W + b + sum_e g_e s_e x A_e^T B_e^T
//! ```
//!
//! The routing weights `g` are those that the caller computes from what a router may read.

use dylora::config::{ModulePath, RouterConfig};
use dylora::model::{Inputs, RoutedModel};
use tch::{Kind, Tensor};

/// A module with experts, in a forward pass.
#[derive(Debug)]
pub(super) struct Place<'a> {
    /// The module.
    pub path: ModulePath,
    /// The base's embeddings, `[b, t, d]`.
    pub embeddings: &'a Tensor,
    /// The layer's input after its first normalisation, `[b, t, d]`.
    pub layer_input: &'a Tensor,
    /// The module's own input, `[b, t, i]`.
    pub module_input: &'a Tensor,
}

/// The logits `[b, t, v]` of a model in f64 whose modules have the routing weights that `weights`
/// gives, `[b, t, _]`, one for each part in the order of its specs.
pub(super) fn logits_by_hand(
    model: &RoutedModel,
    inputs: &Inputs,
    weights: &mut dyn FnMut(&Place<'_>) -> Tensor,
) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let base = model.base();
    let embeddings = base.embed(&inputs.input_ids, &inputs.position_ids, Kind::Double);
    let context = base.context(&inputs.mask, &inputs.position_ids, Kind::Double);
    let mut x = embeddings.shallow_clone();
    for (layer, block) in base.blocks.iter().enumerate() {
        let layer_input = block.norm_1.forward(&x);
        x = block.forward(&x, &context, &mut |module, module_input| {
            let path = ModulePath { layer, module };
            let mut y = block.linears[&module].forward(module_input);
            if model.experts(path).is_none() {
                return y;
            }
            let (embeddings, layer_input) = (&embeddings, &layer_input);
            let g = weights(&Place { path, embeddings, layer_input, module_input });
            for (part, spec) in model.specs().iter().enumerate() {
                let Some(scaling) = spec.scaling(path) else { continue };
                let [a, b] = ["lora_a", "lora_b"].map(|key| {
                    model.expert_tensor(path, part, key).expect("the part is on the module")
                });
                let update = module_input.matmul(&a.tr()).matmul(&b.tr());
                y += update * g.narrow(-1, part as i64, 1) * scaling;
            }
            y
        });
    }
    model.logits(&base.final_norm.forward(&x))
}

/// The routing weights of a linear router by the formula: the softmax of its scores for `x`,
/// `[b, t, d]`, or the k largest values of it, divided by their sum.
///
/// - `name`: the prefix of the router's tensors
pub(super) fn routed(model: &RoutedModel, router: &RouterConfig, name: &str, x: &Tensor) -> Tensor {
    let tensors = model.router_tensors();
    let of = |key: &str| tensors[&format!("{name}.{key}")].shallow_clone();
    let root = (x.square().mean_dim(&[-1_i64][..], true, Kind::Double) + 1e-6).sqrt();
    let x = if router.normalize_input { x / root } else { x.shallow_clone() };
    let exp = ((x.matmul(&of("weight").tr()) + of("bias")) / router.temperature).exp();
    let probs = &exp / exp.sum_dim_intlist(-1, true, Kind::Double);
    let Some(k) = router.top_k else { return probs };
    let (sorted, _) = probs.sort(-1, true);
    let kept = &probs * probs.ge_tensor(&sorted.narrow(-1, k - 1, 1)).to_kind(Kind::Double);
    &kept / kept.sum_dim_intlist(-1, true, Kind::Double)
}
