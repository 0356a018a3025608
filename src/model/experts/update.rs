//! The update of an expert, `D = s (B A - B0 A0)`, as factors in f64.
//!
//! `B0` and `A0` are the initial values with PiSSA and OLoRA, and zero otherwise. No update is
//! formed as a full matrix for its norm or for products, since
//! `<B A, B' A'> = tr((B^T B') (A' A^T))` (Frobenius).
//!
//! Letters of shapes: `r` rank, `i` in, `o` out.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::delta::Delta;
use super::spec::{ExpertSpec, part_name};
use crate::config::ModulePath;

/// An expert's update of a module, `b a`, in f64.
#[derive(Debug)]
pub struct Update {
    /// `[o, r]`, with the scaling in it.
    pub b: Tensor,
    /// `[r, i]`.
    pub a: Tensor,
}

impl Update {
    /// The squared Frobenius norm. It is exactly 0 if the expert is as it was at its start.
    pub fn norm2(&self) -> f64 {
        let products_rr = self.b.tr().matmul(&self.b) * self.a.matmul(&self.a.tr());
        products_rr.sum(Kind::Double).double_value(&[]).max(0.0)
    }

    /// The full matrix, `[o, i]`.
    pub fn product(&self) -> Tensor {
        self.b.matmul(&self.a)
    }
}

/// The update of each of an expert's modules, without the magnitude of a DoRA expert.
///
/// - `tensors`: the tensors of all experts, with the names of
///   [`RoutedModel::tensors`](crate::model::RoutedModel::tensors)
///
/// # Errors
/// Fails if a tensor of the expert is missing.
pub fn updates(
    specs: &[ExpertSpec],
    tensors: &BTreeMap<String, Tensor>,
    expert: usize,
) -> Result<BTreeMap<ModulePath, Update>> {
    let spec = &specs[expert];
    let mut updates = BTreeMap::new();
    for &path in spec.modules.keys() {
        let tensor = |key: &str| {
            let name = format!("{path}.{}.{key}", part_name(specs, expert));
            let Some(tensor) = tensors.get(&name) else { bail!("tensor `{name}` is missing") };
            Ok(tensor.to_kind(Kind::Double))
        };
        let start = match spec.starts_from_base() {
            true => Some((tensor("initial_a")?, tensor("initial_b")?.tr())),
            false => None,
        };
        let delta = Delta { a: tensor("lora_a")?, b: tensor("lora_b")?.tr(), start };
        let (a, b) = delta.precise();
        let scaling = spec.scaling(path).expect("it is one of the spec's modules");
        updates.insert(path, Update { b: b.tr() * scaling, a });
    }
    Ok(updates)
}
