//! Changes of a mixture's experts: one is removed, added, or [merged](merge) with another. Each
//! change makes a new mixture and leaves the old one as it was.
//!
//! ```text
//! without_expert e    E - 1   the softmax loses a logit: another expert f gets p_f / (1 - p_e)
//! with_expert         E + 1   a fresh expert, whose row in a router is zero but for a bias
//! merged a, b         E - 1   one expert for two, with a routing weight of about p_a + p_b
//! ```
//!
//! The number of each expert after a removed one falls by one, in the routers and in the names of
//! tensors.
//! Other places that name experts by number, such as records, are for the caller to renumber.
//!
//! Each router has a row for each expert in `router.weight`, `router.bias` and
//! `router.selection_bias`. If there are several routers, these names begin with the layer, such as
//! `layers.0.`, or with the module. Other tensors of a router do not change.

pub mod assign;
pub mod column_fit;
pub mod merge;
pub mod new_column;
pub mod open_column;
pub mod skills;
pub mod stage_config;
pub mod stages;

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use tch::{Device, Tensor};

use crate::config::{LoraInit, RoutingChoice};
use crate::mixture::Mixture;
use crate::model::RoutedModel;
use crate::model::decoder::Decoder;
use crate::model::decoder::precision::wide;
use crate::model::experts::spec::ExpertSpec;
use crate::model::parameters::expert_name;

/// The tensors of a router that have a row for each expert.
const ROW_TENSORS: [&str; 3] = [WEIGHT, BIAS, SELECTION_BIAS];
/// `[e, d]`.
const WEIGHT: &str = "router.weight";
/// `[e]`.
const BIAS: &str = "router.bias";
/// `[e]`; not every router has one.
const SELECTION_BIAS: &str = "router.selection_bias";

/// The mixture without an expert. If a single expert is left, it has no router. The `top_k` of the
/// router becomes at most the number of experts.
///
/// # Errors
/// Fails if there is no such expert, if it is the only one, or if [`Mixture::routing`] names it.
pub fn without_expert(mixture: &Mixture, expert: usize) -> Result<Mixture> {
    check_expert(mixture, expert)?;
    if mixture.num_experts() == 1 {
        bail!("the only expert cannot be removed");
    }
    let number = |old: usize| (old != expert).then(|| old - usize::from(old > expert));
    let mut smaller = copy(mixture);
    if let RoutingChoice::Expert(only) = mixture.routing {
        let new = number(only as usize);
        let new = new.with_context(|| format!("`routing` is by expert {expert} alone"))?;
        smaller.routing = RoutingChoice::Expert(new as i64);
    }
    smaller.specs.remove(expert);
    let count = smaller.num_experts();
    smaller.router.top_k = mixture.router.top_k.map(|k| k.min(count as i64));
    let kept: Vec<i64> = (0..=count as i64).filter(|&row| row != expert as i64).collect();
    smaller.tensors = BTreeMap::new();
    for (name, tensor) in &mixture.tensors {
        let (name, tensor) = match (expert_of(name), row_tensor(name)) {
            (Some(old), _) => match number(old) {
                Some(new) => (renamed(name, old, new), tensor.shallow_clone()),
                None => continue,
            },
            _ if count == 1 && is_router(name) => continue,
            (None, Some(_)) => {
                let kept = Tensor::from_slice(&kept).to_device(tensor.device());
                (name.clone(), tensor.index_select(0, &kept))
            }
            (None, None) => (name.clone(), tensor.shallow_clone()),
        };
        smaller.tensors.insert(name, tensor);
    }
    Ok(smaller)
}

/// The mixture with one more expert, the last. In each router, the row of the new expert is zero
/// but for a bias. Its selection bias is the smallest of the others', so that only its score can
/// get it chosen. The expert's own tensors are left to [`Mixture::put_on`], which draws them as for
/// a fresh model (with the default init, B is zero).
///
/// A single expert has no router, so it gets one that does not read its input yet: the weights are
/// zero, and the bias is 0 for the old expert and `initial_bias` for the new one. To find the
/// router's shape, a model is drawn from libtorch's default CPU generator.
///
/// - `base`: the base for which the mixture is made
/// - `initial_bias`: the new expert's bias in the router whose tensors' names have this prefix,
///   which is empty if there is one router, and otherwise for example `h.0.`
///
/// # Errors
/// Fails if the mixture has several experts but no router tensors yet.
pub fn with_expert(
    mixture: &Mixture,
    base: &Decoder,
    spec: ExpertSpec,
    initial_bias: &dyn Fn(&str) -> f64,
) -> Result<Mixture> {
    let mut larger = copy(mixture);
    // the part that is always on stays the last
    larger.specs.insert(mixture.num_experts(), spec);
    larger.is_whole = false;
    if mixture.num_experts() == 1 {
        let router = new_router(&larger, base).into_iter();
        larger.tensors.extend(router.map(|(name, tensor)| (name, tensor.narrow(0, 0, 1))));
    }
    let mut has_router = false;
    for (name, tensor) in &mut larger.tensors {
        let Some((prefix, key)) = row_tensor(name) else { continue };
        has_router = true;
        let row = tensor.narrow(0, 0, 1);
        let row = match key {
            BIAS => row.full_like(initial_bias(prefix)),
            SELECTION_BIAS => tensor.amin(0, true),
            _ => row.zeros_like(),
        };
        *tensor = Tensor::cat(&[&*tensor, &row], 0);
    }
    if !has_router {
        bail!("the mixture of {} experts has no router yet", mixture.num_experts());
    }
    Ok(larger)
}

/// Router tensors with a row for each expert of a mixture, all zero. The router's hidden layers are
/// left out, so that they are drawn later.
fn new_router(mixture: &Mixture, base: &Decoder) -> BTreeMap<String, Tensor> {
    // a fresh model has the right routers, whatever the init of its experts
    let plain = |spec: &ExpertSpec| ExpertSpec { init: LoraInit::Default, ..spec.clone() };
    let specs: Vec<ExpertSpec> = mixture.specs.iter().map(plain).collect();
    let kind = wide(base.embedding.kind());
    let model = RoutedModel::with_experts(base, &specs, &mixture.router, Device::Cpu, kind);
    let rows = model.tensors().into_iter().filter(|(name, _)| row_tensor(name).is_some());
    rows.map(|(name, tensor)| (name, tensor.zeros_like())).collect()
}

/// Checks that a mixture has an expert.
///
/// # Errors
/// Fails if there is no such expert, and says how many there are.
pub(crate) fn check_expert(mixture: &Mixture, expert: usize) -> Result<()> {
    let count = mixture.num_experts();
    if expert >= count {
        bail!("there is no expert {expert}, the mixture has {count} from 0");
    }
    Ok(())
}

/// A copy of a mixture that shares its tensors.
fn copy(mixture: &Mixture) -> Mixture {
    let tensors = mixture.tensors.iter();
    Mixture {
        specs: mixture.specs.clone(),
        router: mixture.router.clone(),
        tensors: tensors.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect(),
        is_whole: mixture.is_whole,
        routing: mixture.routing,
        base: mixture.base.clone(),
    }
}

/// The prefix and the key of a router tensor with a row for each expert; `None` for other tensors.
fn row_tensor(name: &str) -> Option<(&str, &'static str)> {
    let split = |key: &'static str| Some((name.strip_suffix(key)?, key));
    let found = ROW_TENSORS.into_iter().find_map(split);
    found.filter(|(prefix, _)| prefix.is_empty() || prefix.ends_with('.'))
}

fn is_router(name: &str) -> bool {
    name.split('.').any(|part| part == "router")
}

/// The expert that a tensor belongs to; `None` if it belongs to none.
fn expert_of(name: &str) -> Option<usize> {
    let (expert, _) = name.rsplit_once('.')?;
    expert.rsplit_once('.')?.1.strip_prefix("expert_")?.parse().ok()
}

/// The name of an expert's tensor after the expert got another number.
fn renamed(name: &str, old: usize, new: usize) -> String {
    let part = |expert| format!(".{}.", expert_name(expert));
    name.replace(&part(old), &part(new))
}
