//! How far each expert has moved from its start.
//!
//! ```text
//! update          D = s (B A - B0 A0), or c (W + D) - W with DoRA, where c = m / |W + D|
//! update_norm     sqrt(sum |D|^2)                        over the expert's modules, Frobenius
//! relative_norm   sqrt(sum |D|^2) / sqrt(sum |W|^2)      over the same modules
//! ```
//!
//! `W` is the base's weight and `m` the magnitude of each output. All of it is computed in f64.
//!
//! Letters of shapes: `i` in, `o` out.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::config::ModulePath;
use crate::model::RoutedModel;
use crate::model::experts::spec::part_name;
use crate::model::experts::update::{Update, updates};

/// The relative error of a DoRA expert's magnitude, which is kept in f32, at its start. It is a
/// norm of up to some thousands of numbers, which another device may add up in another order.
const MAGNITUDE_ERROR: f64 = 1e-5;

/// How far an expert, or the part that is always on, has moved from its start.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExpertReport {
    /// Its name in files: `expert_0`, or `shared` for the part that is always on.
    pub name: String,
    /// Frobenius norm of its update over all of its modules; 0 if it is as it was at its start.
    pub update_norm: f64,
    /// The same, divided by the norm of the base's weights on these modules.
    pub relative_norm: f64,
}

/// The reports of all experts of a model, with that of the part that is always on at the end.
/// There are none for a base.
pub fn expert_reports(model: &RoutedModel) -> Result<Vec<ExpertReport>> {
    let _no_grad = tch::no_grad_guard();
    let tensors = model.tensors();
    let base2: BTreeMap<ModulePath, f64> =
        model.modules().map(|(path, _)| (path, norm2(&weight(model, path)))).collect();
    let report = |expert: usize| {
        let (mut moved2, mut all2) = (0.0, 0.0);
        for (path, update) in updates(model.specs(), &tensors, expert)? {
            moved2 += match model.expert_tensor(path, expert, "magnitude") {
                None => update.norm2(),
                Some(magnitude_o) => dora_norm2(&update, &weight(model, path), &magnitude_o),
            };
            all2 += base2[&path];
        }
        let (update_norm, base_norm): (f64, f64) = (f64::sqrt(moved2), f64::sqrt(all2));
        let relative_norm = if update_norm > 0.0 { update_norm / base_norm } else { 0.0 };
        Ok(ExpertReport { name: part_name(model.specs(), expert), update_norm, relative_norm })
    };
    (0..model.specs().len()).map(report).collect()
}

/// The base's weight of a module, `[i, o]`.
fn weight(model: &RoutedModel, path: ModulePath) -> Tensor {
    model.base().blocks[path.layer].linears[&path.module].weight()
}

fn norm2(x: &Tensor) -> f64 {
    x.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[])
}

/// The squared norm of `c (W + D) - W` from the full matrices. Where `D` is 0, factors `c` that
/// differ from 1 by a rounding error alone count as 1.
///
/// - `update`: `D` as factors
/// - `weight_io`: `W`
/// - `magnitude_o`: `m`
fn dora_norm2(update: &Update, weight_io: &Tensor, magnitude_o: &Tensor) -> f64 {
    let weight_io = weight_io.to_kind(Kind::Double);
    let updated_io = &weight_io + update.product().tr();
    let norm_o = updated_io.square().sum_dim_intlist(0, false, Kind::Double).sqrt();
    // an output whose weights are all 0 stays 0
    let mut factor_o = magnitude_o.to_kind(Kind::Double) / norm_o.clamp_min(f64::MIN_POSITIVE);
    if update.norm2() == 0.0 {
        let is_start = (&factor_o - 1.0).abs().le(MAGNITUDE_ERROR);
        factor_o = factor_o.masked_fill(&is_start, 1.0);
    }
    norm2(&(updated_io * factor_o - weight_io))
}
