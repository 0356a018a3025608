//! Measures how similar experts are, and merges two of them into one.
//!
//! ```text
//! update        D_e = s_e (B_e A_e - B0_e A0_e)         of a module; 0 if the expert lacks it
//! similarity    <D_e, D_f> / (|D_e| |D_f|)              over all modules, Frobenius
//! merged        D  ~  w_a D_a + w_b D_b                 of rank max(r_a, r_b), for each module
//! router        R = w_a R_a + w_b R_b,   c = w_a c_a + w_b c_b + T H(w),   H(w) = - sum w ln w
//! ```
//!
//! `B0` and `A0` are the initial values with PiSSA and OLoRA, and zero otherwise. `R` and `c` are
//! the rows of the router's weight and bias, `T` is its temperature, and `w` are shares with
//! `w_a + w_b = 1`.
//!
//! No update is computed as a full matrix ([`update`]). The singular value decomposition is that of
//! a small product of two triangular matrices: with `B = Q R` and `A^T = Q' R'`, it is
//! `R R'^T = U S V^T`. Its first r components are the best approximation of rank r in the Frobenius
//! norm (Eckart and Young, 1936).
//!
//! The merged expert should get the probability that both experts had, `p_a + p_b`. With their
//! logits `l_a` and `l_b`, its logit would have to be `T ln(e^(l_a / T) + e^(l_b / T))`, which no
//! linear router gives for every token. By Jensen's inequality, any shares w give a lower bound:
//!
//! ```text
//! T ln(e^(l_a / T) + e^(l_b / T)) >= w_a l_a + w_b l_b + T H(w)
//! ```
//!
//! Equality holds where `w = softmax(l / T)`, so the right side is a tangent of the left side. It
//! is also the logit that the merged row gives. With the experts' shares of routing weight as w,
//! this logit is exact for a token that divides its weight between the two in the same shares.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::{BIAS, check_expert, copy, expert_of, row_tensor, without_expert};
use crate::config::{LoraInit, ModulePath, RoutingChoice};
use crate::mixture::Mixture;
use crate::model::RoutedModel;
use crate::model::experts::spec::{ExpertSpec, RankAlpha, num_routed};
use crate::model::experts::update::{self, Update};
use crate::model::parameters::expert_name;

/// A mixture in which one expert has replaced two.
#[derive(Debug)]
pub struct Merged {
    /// The mixture.
    pub mixture: Mixture,
    /// The norm of the part that the rank cut off, divided by the norm of `w_a D_a + w_b D_b`, over
    /// all modules; 0 if the latter is 0.
    pub relative_error: f64,
}

/// The cosine between the updates of every two experts over all modules, `[e][e]`. It is 0 if an
/// update is 0, as that of a fresh expert is.
///
/// # Errors
/// Fails for a DoRA expert, which scales the base's own weight.
pub fn similarity(model: &RoutedModel) -> Result<Vec<Vec<f64>>> {
    let (specs, tensors) = (model.specs(), model.tensors());
    let e = num_routed(specs);
    let mut modules: BTreeMap<ModulePath, Vec<(usize, Update)>> = BTreeMap::new();
    for expert in 0..e {
        for (path, update) in updates(specs, &tensors, expert)? {
            modules.entry(path).or_default().push((expert, update));
        }
    }
    let mut products_ee = Tensor::zeros([e as i64, e as i64], (Kind::Double, model.device()));
    for updates in modules.values() {
        let b: Vec<&Tensor> = updates.iter().map(|(_, update)| &update.b).collect();
        let a: Vec<&Tensor> = updates.iter().map(|(_, update)| &update.a).collect();
        let (b, a) = (Tensor::cat(&b, 1), Tensor::cat(&a, 0));
        let members = members(updates, e).to_device(model.device());
        let products_rr = b.tr().matmul(&b) * a.matmul(&a.tr());
        products_ee += members.matmul(&products_rr).matmul(&members.tr());
    }
    let norms_e = products_ee.diagonal(0, 0, 1).sqrt();
    let norms_ee = norms_e.outer(&norms_e);
    let cosines = (products_ee / &norms_ee).where_scalarother(&norms_ee.gt(0.0), 0.0);
    Ok(Vec::<Vec<f64>>::try_from(cosines)?)
}

/// 1 where a rank of the stacked updates belongs to the expert and 0 elsewhere, `[e, R]`.
fn members(updates: &[(usize, Update)], num_experts: usize) -> Tensor {
    let rows: Vec<i64> = updates
        .iter()
        .flat_map(|(expert, update)| vec![*expert as i64; update.a.size()[0] as usize])
        .collect();
    Tensor::from_slice(&rows).one_hot(num_experts as i64).tr().to_kind(Kind::Double)
}

/// The two most similar experts `a < b` of a matrix from [`similarity`], and their cosine; `None`
/// with fewer than two experts.
pub fn most_similar(similarity: &[Vec<f64>]) -> Option<(usize, usize, f64)> {
    let pairs = similarity
        .iter()
        .enumerate()
        .flat_map(|(b, row)| row[..b].iter().enumerate().map(move |(a, &cosine)| (a, b, cosine)));
    pairs.max_by(|x, y| x.2.total_cmp(&y.2).then((y.0, y.1).cmp(&(x.0, x.1))))
}

/// The mixture in which expert `a` is replaced by the merger of `a` and `b`, for `a < b`, and `b`
/// is removed.
///
/// The merged expert is plain LoRA on every module that `a` or `b` has, with the larger of their
/// ranks. Its scaling is that of `a`, or that of `b` on modules that `a` lacks. The rows of A are
/// orthonormal, and B is zero in directions without weight, so that these can be trained as in a
/// fresh expert. The expert is trainable if `a` or `b` is.
///
/// - `weights`: `[w_a, w_b]`, the experts' shares of routing weight, which sum to 1
///
/// # Errors
/// Fails if `a` or `b` does not exist, if they are not in this order, if one of them is a DoRA
/// expert or has invocation tokens, if a tensor is missing, or if `weights` are no shares.
pub fn merged(mixture: &Mixture, a: usize, b: usize, weights: [f64; 2]) -> Result<Merged> {
    check(mixture, a, b, weights)?;
    let _no_grad = tch::no_grad_guard();
    let (specs, router) = (&mixture.specs, &mixture.router);
    let parts = [updates(specs, &mixture.tensors, a)?, updates(specs, &mixture.tensors, b)?];
    let mut spec = ExpertSpec {
        modules: BTreeMap::new(),
        init: LoraInit::Default,
        trainable: specs[a].trainable || specs[b].trainable,
        ..specs[a].clone()
    };
    let mut result = copy(mixture);
    result.tensors.retain(|name, _| expert_of(name) != Some(a));
    let (mut all2, mut lost2) = (0.0, 0.0);
    let paths: BTreeSet<ModulePath> = parts.iter().flat_map(BTreeMap::keys).copied().collect();
    for path in paths {
        let both = parts.iter().zip(weights).filter_map(|(part, w)| Some((part.get(&path)?, w)));
        let (up, down): (Vec<Tensor>, Vec<&Tensor>) =
            both.map(|(update, w)| (&update.b * w, &update.a)).unzip();
        let (u, s, v) = svd(&Tensor::cat(&up, 1), &Tensor::cat(&down, 0));
        let owners = [a, b].into_iter().filter(|&expert| specs[expert].modules.contains_key(&path));
        let owner = owners.clone().next().expect("one of them has the module");
        let rank = owners.map(|expert| specs[expert].modules[&path].rank).max();
        let rank = rank.expect("one of them has the module").min(s.size()[0]);
        let alpha = alpha(&specs[owner], path, rank, spec.use_rslora);
        spec.modules.insert(path, RankAlpha { rank, alpha });
        let scaling = spec.scaling(path).expect("it was just set");
        let of = |x: &Tensor| x.narrow(-1, 0, rank);
        let like = &mixture.tensors[&tensor_name(path, owner, "lora_a")];
        let mut add = |key, tensor: Tensor| {
            let tensor = tensor.to_kind(like.kind()).to_device(like.device()).contiguous();
            result.tensors.insert(tensor_name(path, a, key), tensor);
        };
        add("lora_a", of(&v).tr());
        add("lora_b", of(&u) * of(&s) / scaling);
        let square = |x: Tensor| x.square().sum(Kind::Double).double_value(&[]);
        lost2 += square(s.narrow(0, rank, s.size()[0] - rank));
        all2 += square(s);
    }
    result.specs[a] = spec;
    for (name, tensor) in &mut result.tensors {
        let Some((_, key)) = row_tensor(name) else { continue };
        *tensor = merge_rows(tensor, key == BIAS, [a, b], weights, router.temperature);
    }
    if result.routing == RoutingChoice::Expert(b as i64) {
        result.routing = RoutingChoice::Expert(a as i64);
    }
    let relative_error = if all2 > 0.0 { (lost2 / all2).sqrt() } else { 0.0 };
    Ok(Merged { mixture: without_expert(&result, b)?, relative_error })
}

fn check(mixture: &Mixture, a: usize, b: usize, weights: [f64; 2]) -> Result<()> {
    check_expert(mixture, a)?;
    check_expert(mixture, b)?;
    if a >= b {
        bail!("two experts are merged in order, got {a} and {b}");
    }
    let [w_a, w_b] = weights;
    if !(w_a >= 0.0 && w_b >= 0.0 && (w_a + w_b - 1.0).abs() < 1e-6) {
        bail!("the shares of two experts must be at least 0 and sum to 1, got {weights:?}");
    }
    if let Some(expert) =
        [a, b].into_iter().find(|&e| !mixture.specs[e].alora_invocation_tokens.is_empty())
    {
        bail!("expert {expert} has invocation tokens and is off before them, which no other is");
    }
    Ok(())
}

fn tensor_name(path: ModulePath, expert: usize, key: &str) -> String {
    format!("{path}.{}.{key}", expert_name(expert))
}

/// The update of each of an expert's modules.
///
/// # Errors
/// Fails for a DoRA expert, or if a tensor is missing.
fn updates(
    specs: &[ExpertSpec],
    tensors: &BTreeMap<String, Tensor>,
    expert: usize,
) -> Result<BTreeMap<ModulePath, Update>> {
    if specs[expert].use_dora {
        bail!("expert {expert} is a DoRA expert: it scales the base's own weight, at full rank");
    }
    update::updates(specs, tensors, expert)
}

/// The alpha that gives an expert of rank `rank` the scaling that `spec` has on a module.
fn alpha(spec: &ExpertSpec, path: ModulePath, rank: i64, use_rslora: bool) -> f64 {
    let RankAlpha { rank: old, alpha } = spec.modules[&path];
    if (old, spec.use_rslora) == (rank, use_rslora) {
        return alpha;
    }
    let scaling = spec.scaling(path).expect("it is one of the spec's modules");
    let rank = rank as f64;
    scaling * if use_rslora { rank.sqrt() } else { rank }
}

/// The singular value decomposition of `B A`, f64 on the CPU: `U`, `[o, k]`, `S`, `[k]`, in
/// descending order, and `V`, `[i, k]`, where k is the smallest of o, i and r.
///
/// - `b`: `[o, r]`
/// - `a`: `[r, i]`
fn svd(b: &Tensor, a: &Tensor) -> (Tensor, Tensor, Tensor) {
    let qr = |x: Tensor| Tensor::linalg_qr(&x.to_device(Device::Cpu), "reduced");
    let (q_b, r_b) = qr(b.shallow_clone());
    let (q_a, r_a) = qr(a.tr());
    let (u, s, v) = r_b.matmul(&r_a.tr()).svd(true, true);
    (q_b.matmul(&u), s, q_a.matmul(&v))
}

/// A router's tensor with the merged expert's row in place of row `a`. Row `b` is left as it is.
fn merge_rows(
    tensor: &Tensor,
    is_bias: bool,
    [a, b]: [usize; 2],
    weights: [f64; 2],
    temperature: f64,
) -> Tensor {
    let row = |expert: usize| tensor.get(expert as i64).to_kind(Kind::Double);
    let mut merged = row(a) * weights[0] + row(b) * weights[1];
    if is_bias {
        let entropy = weights.iter().filter(|w| **w > 0.0).map(|w| -w * w.ln()).sum::<f64>();
        merged += temperature * entropy;
    }
    let result = tensor.detach().copy();
    result.get(a as i64).copy_(&merged);
    result
}
