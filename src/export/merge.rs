//! Merging a static mixture, whose weights are the same for every token, into the base or into one
//! adapter.
//!
//! ```text
//! base      W' = W + sum_e g_e (c_e * (W + D_e) - W)
//!           D_e = s_e (B_e A_e)^T, or s_e (B_e A_e - B0_e A0_e)^T with PiSSA and OLoRA
//!           c_e = magnitude_e / |W + D_e| for each output with DoRA, else 1
//! adapter   A' = [A_1; ..; A_E]                        rank'  = sum_e r_e
//!           B' = [g_1 s_1 B_1, .., g_E s_E B_E]        alpha' = rank'
//! ```
//!
//! Both merges are exact, up to rounding, for given weights `g`, `[e]`. A router's weights differ
//! from token to token, so no merge equals a routed mixture. The caller measures what fixing them
//! costs.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use tch::{Device, Kind, Tensor};

use super::card::{self, Form, Provenance};
use crate::config::LoraInit;
use crate::model::RoutedModel;
use crate::model::decoder::Decoder;
use crate::model::experts::delta::Delta;
use crate::model::experts::spec::{ExpertSpec, RankAlpha};
use crate::peft::adapter::Adapter;
use crate::tensor_file::check_finite;

/// What the experts are merged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MergeInto {
    /// The base.
    Base,
    /// One adapter of rank `sum_e r_e`.
    Adapter,
}

/// The weights of all parts of a model: `weights`, `[e]`, and weight 1 for the part that is always
/// on, if there is one.
fn of_parts(model: &RoutedModel, weights: &[f64]) -> Vec<f64> {
    let shared = model.specs().iter().filter(|spec| spec.shared);
    weights.iter().copied().chain(shared.map(|_| 1.0)).collect()
}

/// Checks that a model's experts can be merged under `weights`, `[e]`.
///
/// # Errors
/// A model without experts; weights that are not one finite number for each expert; an expert with
/// invocation tokens whose weight is not 0. For an adapter also a DoRA expert whose weight is not
/// 0, because magnitudes are no low-rank update, and weights that are all 0.
pub fn check(model: &RoutedModel, weights: &[f64], into: MergeInto) -> Result<()> {
    if model.specs().is_empty() {
        bail!("a base alone has nothing to merge");
    }
    if weights.len() as i64 != model.num_experts() {
        bail!("there are {} experts, but {} weights", model.num_experts(), weights.len());
    }
    if weights.iter().any(|weight| !weight.is_finite()) {
        bail!("weights must be finite numbers, got {weights:?}");
    }
    let weights = of_parts(model, weights);
    let used = || model.specs().iter().zip(&weights).filter(|(_, weight)| **weight != 0.0);
    if used().any(|(spec, _)| !spec.alora_invocation_tokens.is_empty()) {
        bail!("an expert with invocation tokens is off before them, which no merged weight can be");
    }
    if into == MergeInto::Base {
        return Ok(());
    }
    if used().next().is_none() {
        bail!("with every weight 0, the adapter would be empty");
    }
    if used().any(|(spec, _)| spec.use_dora) {
        bail!(
            "a DoRA expert scales the base's own weight, which no LoRA adapter can hold\nhint: \
             merge into the base instead"
        );
    }
    Ok(())
}

/// Merges the experts under `weights`, `[e]`, into the base. The result is in f32 on the CPU.
///
/// - `base`: the base as it was read, on the CPU
///
/// # Errors
/// Those of [`check`], and a merged weight that is not finite, by its tensor's name.
pub fn into_base(model: &RoutedModel, base: &Decoder, weights: &[f64]) -> Result<Decoder> {
    check(model, weights, MergeInto::Base)?;
    let weights = of_parts(model, weights);
    let _no_grad = tch::no_grad_guard();
    let mut merged = base.to(Device::Cpu, Kind::Float);
    for (path, experts) in model.modules() {
        let linear = merged.blocks[path.layer].linears.get_mut(&path.module);
        let linear = linear.expect("a block has every linear layer");
        // computed in f64 and rounded once, at the end
        let weight_io = linear.weight().to_kind(Kind::Double);
        let mut change_io = weight_io.zeros_like();
        for (expert, &g) in weights.iter().enumerate() {
            let tensor = |key: &str| {
                let tensor = experts.tensor(expert, key)?;
                Some(tensor.to_device(Device::Cpu).to_kind(Kind::Double))
            };
            let (Some(a), Some(b)) = (tensor("lora_a"), tensor("lora_b")) else { continue };
            let Some(scaling) = experts.scaling(expert) else { continue };
            let start = tensor("initial_a").zip(tensor("initial_b").map(|b0| b0.tr()));
            let delta_oi = Delta { a, b: b.tr(), start }.product();
            let mut updated_io = &weight_io + delta_oi.tr() * scaling;
            if let Some(magnitude) = tensor("magnitude") {
                let norm = updated_io.square().sum_dim_intlist(0, false, Kind::Double).sqrt();
                updated_io *= magnitude / norm;
            }
            change_io += (updated_io - &weight_io) * g;
        }
        let merged_io = (weight_io + change_io).to_kind(Kind::Float);
        check_merged(&format!("{path}.weight"), &merged_io)?;
        linear.set_weight(merged_io);
    }
    Ok(merged)
}

/// Checks that the weights of a merge have left a tensor finite.
fn check_merged(name: &str, tensor: &Tensor) -> Result<()> {
    check_finite(name, tensor).context("the merge cannot be written\nhint: use smaller `--weights`")
}

/// The model card of a base into which `model` was merged under `weights`, `[e]`.
pub(crate) fn base_card(
    model: &RoutedModel,
    provenance: &Provenance,
    weights: &[f64],
    form: Form,
) -> String {
    if model.specs().is_empty() {
        return card::of_base(&provenance.origin, form);
    }
    card::of_merged(model, None, provenance, &of_parts(model, weights), form)
}

/// The model card of an adapter into which `model` was merged under `weights`, `[e]`.
pub fn adapter_card(
    model: &RoutedModel,
    adapter: &Adapter,
    provenance: &Provenance,
    weights: &[f64],
    form: Form,
) -> String {
    card::of_merged(model, Some(adapter), provenance, &of_parts(model, weights), form)
}

/// Merges the experts under `weights`, `[e]`, into one plain adapter of rank `sum_e r_e`. Experts
/// with weight 0 are left out.
///
/// # Errors
/// Those of [`check`], and a merged weight that is not finite, by its tensor's name.
pub fn into_adapter(model: &RoutedModel, weights: &[f64]) -> Result<Adapter> {
    check(model, weights, MergeInto::Adapter)?;
    let weights = of_parts(model, weights);
    let _no_grad = tch::no_grad_guard();
    let used: Vec<usize> = (0..weights.len()).filter(|&expert| weights[expert] != 0.0).collect();
    let parts: Vec<Adapter> = used.iter().map(|&expert| Adapter::of_model(model, expert)).collect();
    let (mut modules, mut tensors) = (BTreeMap::new(), BTreeMap::new());
    for (path, _) in model.modules() {
        let (mut down, mut up) = (vec![], vec![]);
        for (&expert, part) in used.iter().zip(&parts) {
            let Some(scaling) = part.spec.scaling(path) else { continue };
            down.push(part.tensors[&(path, "lora_a")].shallow_clone());
            let b = part.tensors[&(path, "lora_b")].to_kind(Kind::Double);
            up.push((b * (scaling * weights[expert])).to_kind(Kind::Float));
        }
        if down.is_empty() {
            continue;
        }
        let (a, b) = (Tensor::cat(&down, 0), Tensor::cat(&up, 1));
        check_merged(&format!("{path}.lora_b"), &b)?;
        let rank = a.size()[0];
        modules.insert(path, RankAlpha { rank, alpha: rank as f64 });
        tensors.insert((path, "lora_a"), a);
        tensors.insert((path, "lora_b"), b);
    }
    let spec = ExpertSpec {
        modules,
        use_rslora: false,
        use_dora: false,
        init: LoraInit::Default,
        trainable: true,
        alora_invocation_tokens: vec![],
        shared: false,
    };
    Ok(Adapter { spec, tensors })
}
