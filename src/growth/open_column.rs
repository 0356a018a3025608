//! Opens the router column of a new expert: fits it to tell the tokens of the new domain from those
//! of the earlier ones.
//!
//! At a site, let `h_t` be the input of the router's layer that scores the experts, `l_t` the scores
//! of the old experts and `T` the temperature. With the column `(w, b)`, the probability of the new
//! expert is the logistic function of
//!
//! ```text
//! z_t = (w h_t + b) / T - logsumexp(l_t / T)
//! ```
//!
//! so the column is a logistic regression with an offset, whose loss is convex:
//!
//! ```text
//! q mean over new tokens of softplus(-z) + (1 - q) mean over old tokens of softplus(z)
//!     + RIDGE |v|^2 / 2,                     q = 1 / domains
//! ```
//!
//! where `v` are the weights for features of mean 0 and standard deviation 1. It is minimised by
//! FISTA (Beck and Teboulle, 2009, with a constant step) from zero. The result depends neither on a
//! learning rate nor on the scale of the features. Prompts count like completions, and every domain
//! has the same weight, however many tokens it has.
//!
//! Letters of shapes: `n` tokens, `w` width of the features, `b` batch, `t` position, `e` expert.

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::skills::spread_blocks;
use crate::data::{BlockId, TokenDataset};
use crate::model::batch::{Extent, HostInputs, Rows};
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};

/// Factor of the squared norm of the weights.
const RIDGE: f64 = 1e-3;
/// Number of iterations of the fit.
const ITERATIONS: usize = 300;
/// Number of iterations that estimate the largest eigenvalue.
const POWER_ITERATIONS: usize = 30;
/// Largest number of blocks of the new domain, and of all earlier ones together, that are read.
const MAX_BLOCKS: usize = 32;
/// Largest number of tokens of the new domain, and of the earlier ones, at each router.
const MAX_TOKENS: i64 = 2048;
/// Sequences in one forward pass.
const BATCH_SIZE: usize = 4;

/// The smallest mean routing weight on held-out tokens of the new domain with which the column of a
/// new expert counts as open.
pub const OPEN_SHARE: f64 = 0.5;

/// The tokens of a router's sites by which its new column is fitted.
#[derive(Debug, Default)]
struct Tokens {
    /// `h`, `[n, w]`, of each batch.
    features: Vec<Tensor>,
    /// `logsumexp(l / T)`, `[n]`, of each batch.
    offsets: Vec<Tensor>,
    /// 1 for tokens of the new domain, otherwise 0, `[n]`, of each batch.
    is_new: Vec<Tensor>,
}

/// A column of a router.
#[derive(Debug)]
pub struct Column {
    /// The row of the router's weight, `[w]`, f64.
    pub weight: Tensor,
    /// The bias.
    pub bias: f64,
}

/// Fits the column of the last expert in each router of a model that has grown, and sets it.
///
/// - `domain`: the new domain's index in `train`
///
/// # Errors
/// Fails if the new domain or the earlier ones have no tokens, or if features are not finite.
pub fn open(model: &RoutedModel, train: &TokenDataset, domain: usize) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let temperature = model.router_spec().temperature;
    let last = model.num_experts() - 1;
    let domains = train.domains.iter().filter(|domain| domain.num_blocks() > 0);
    let share = 1.0 / domains.count().max(2) as f64;
    for (router, tokens) in model.routers().iter().zip(tokens_by_router(model, train, domain)?) {
        let cat = |parts: &[Tensor]| Tensor::cat(parts, 0).to_kind(Kind::Double);
        if tokens.features.is_empty() {
            bail!("a router has no tokens by which its new column could be fitted");
        }
        let (features, offsets) = (cat(&tokens.features), cat(&tokens.offsets));
        let settings = Fit { share, temperature };
        let column = fit(&features, &offsets, &cat(&tokens.is_new), settings)?;
        router.weight.get(last).copy_(&column.weight.to_kind(router.weight.kind()));
        let _ = router.bias.get(last).fill_(column.bias);
    }
    Ok(())
}

/// The mean routing weight that the last expert of a model gets on the tokens of a domain, over
/// tokens and sites. At most 32 blocks are read.
pub fn share(model: &RoutedModel, dataset: &TokenDataset, domain: usize) -> f64 {
    let _no_grad = tch::no_grad_guard();
    let last = model.num_experts() - 1;
    let (mut sum, mut count) = (0.0, 0.0);
    for chunk in spread_blocks(dataset, domain, Some(MAX_BLOCKS)).chunks(BATCH_SIZE) {
        let inputs = Inputs::of_batch(&dataset.batch(chunk), false, model.device());
        let real_bt = inputs.real_tokens(Kind::Double);
        for routing in model.routing(&inputs, ForwardMode::EVAL) {
            let weights_bt = routing.weights.select(-1, last).to_kind(Kind::Double);
            sum += (weights_bt * &real_bt).sum(Kind::Double).double_value(&[]);
            count += real_bt.sum(Kind::Double).double_value(&[]);
        }
    }
    if count > 0.0 { sum / count } else { 0.0 }
}

/// The tokens of each router. Those of the new domain are routed to the last expert alone, as in the
/// seeding phase.
fn tokens_by_router(
    model: &RoutedModel,
    train: &TokenDataset,
    domain: usize,
) -> Result<Vec<Tokens>> {
    let mut all: Vec<Tokens> = model.routers().iter().map(|_| Tokens::default()).collect();
    let others: Vec<usize> = (0..train.domains.len())
        .filter(|&other| other != domain && train.domains[other].num_blocks() > 0)
        .collect();
    let of_others = others
        .iter()
        .flat_map(|&other| spread_blocks(train, other, Some(MAX_BLOCKS.div_ceil(others.len()))));
    let old: Vec<BlockId> = of_others.collect();
    let new = spread_blocks(train, domain, Some(MAX_BLOCKS));
    if old.is_empty() || new.is_empty() {
        bail!("a domain has no tokens by which the new router column could be fitted");
    }
    for (blocks, is_new) in [(new, true), (old, false)] {
        add_tokens(model, train, &blocks, is_new, &mut all);
    }
    Ok(all)
}

fn add_tokens(
    model: &RoutedModel,
    train: &TokenDataset,
    blocks: &[BlockId],
    is_new: bool,
    all: &mut [Tokens],
) {
    let temperature = model.router_spec().temperature;
    let (last, sites) = (model.num_experts() - 1, model.sites());
    let mode = ForwardMode { keeps_features: true, ..ForwardMode::EVAL };
    let num_batches = blocks.len().div_ceil(BATCH_SIZE) as i64;
    for chunk in blocks.chunks(BATCH_SIZE) {
        let batch = train.batch(chunk);
        let named = vec![if is_new { last } else { -1 }; batch.input_ids.len()];
        let rows = Rows { expert_ids: Some(&named), ..Rows::of_batch(&batch, false) };
        let host = HostInputs::new(rows, Extent::of(&rows), &batch.domains, None, model.device());
        let inputs = Inputs::of(&host, model.device());
        let output = model.forward(&inputs, &RoutingSource::RecordOrRouter, mode, None);
        let real = inputs.real_tokens(Kind::Int64).view([-1]).nonzero().squeeze_dim(-1);
        for ((site, routing), features) in sites.iter().zip(&output.routing).zip(output.features) {
            let sites_of_router = sites.iter().filter(|of| of.router == site.router).count() as i64;
            let most = (MAX_TOKENS / (num_batches * sites_of_router)).max(1);
            let step = (real.size()[0] / most).max(1);
            let chosen = real.slice(0, None, None, step);
            let rows = |x: &Tensor| {
                let width = *x.size().last().expect("features are [b, t, w]");
                x.reshape([-1, width]).index_select(0, &chosen)
            };
            let scores_ne = rows(&routing.clean).to_kind(Kind::Double).narrow(-1, 0, last);
            let offsets_n = (scores_ne / temperature).logsumexp(-1, false);
            let tokens = &mut all[site.router];
            tokens.is_new.push(offsets_n.full_like(i64::from(is_new)));
            tokens.offsets.push(offsets_n);
            tokens.features.push(rows(&features));
        }
    }
}

/// Settings of a fit.
#[derive(Debug, Clone, Copy)]
pub struct Fit {
    /// The weight `q` of the new domain's tokens, between 0 and 1.
    pub share: f64,
    /// The temperature of the softmax.
    pub temperature: f64,
}

/// The column that minimises the loss.
///
/// - `features`: `[n, w]`, f64
/// - `offsets`: `logsumexp(l / T)`, `[n]`, f64
/// - `is_new`: 1 for tokens of the new domain and 0 for the others, `[n]`, f64; both occur
///
/// # Errors
/// Fails if the features are not finite.
pub fn fit(features: &Tensor, offsets: &Tensor, is_new: &Tensor, settings: Fit) -> Result<Column> {
    let Fit { share, temperature } = settings;
    let kind = Kind::Double;
    let (n, width) = features.size2()?;
    let mean_w = features.mean_dim(&[0_i64][..], false, kind);
    let std_w = (features - &mean_w).square().mean_dim(&[0_i64][..], false, kind).sqrt() + 1e-12;
    let ones = Tensor::ones([n, 1], (kind, features.device()));
    let x = Tensor::cat(&[(features - &mean_w) / &std_w, ones], -1);
    let num_new = is_new.sum(kind);
    let num_old = n as f64 - &num_new;
    let share_n = is_new * share / num_new + (1.0 - is_new) * (1.0 - share) / num_old;
    let ridge =
        Tensor::cat(&[std_w.full_like(RIDGE), Tensor::zeros([1], (kind, features.device()))], 0);
    let step = 1.0 / (0.25 * largest_eigenvalue(&x, &share_n) + RIDGE);
    let gradient = |v: &Tensor| {
        let residual_n = (x.mv(v) - offsets).sigmoid() - is_new;
        x.tr().mv(&(residual_n * &share_n)) + &ridge * v
    };
    let mut v = Tensor::zeros([width + 1], (kind, features.device()));
    // the bias starts where the new expert has about the probability of all old ones together
    let _ = v.get(width).copy_(&offsets.mean(kind));
    let (mut ahead, mut t) = (v.copy(), 1.0_f64);
    for _ in 0..ITERATIONS {
        let next = &ahead - gradient(&ahead) * step;
        let t_next = (1.0 + (1.0 + 4.0 * t * t).sqrt()) / 2.0;
        ahead = &next + (&next - &v) * ((t - 1.0) / t_next);
        (v, t) = (next, t_next);
    }
    if !bool::try_from(v.isfinite().all())? {
        bail!("the router's features are not finite, so that its new column cannot be fitted");
    }
    let weight = v.narrow(0, 0, width) / std_w;
    let bias = v.get(width).double_value(&[]) - weight.dot(&mean_w).double_value(&[]);
    Ok(Column { weight: weight * temperature, bias: bias * temperature })
}

/// The largest eigenvalue of `sum_n share_n x_n x_n^T`, by power iteration, rounded up a little.
fn largest_eigenvalue(x: &Tensor, share_n: &Tensor) -> f64 {
    let mut v = Tensor::ones([x.size()[1]], (Kind::Double, x.device()));
    let mut value = 0.0;
    for _ in 0..POWER_ITERATIONS {
        let next = x.tr().mv(&(x.mv(&v) * share_n));
        value = next.norm().double_value(&[]);
        v = next / value.max(f64::MIN_POSITIVE);
    }
    1.1 * value
}
