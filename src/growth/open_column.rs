//! Opens the router column of a new expert: fits it to tell the tokens of the new domain from those
//! of the earlier ones.
//!
//! The column is [fitted](super::column_fit) to tokens of every domain, prompts and completions.
//! Each domain has the same share in the fit, however many tokens it has.
//!
//! Letters of shapes: `n` tokens, `w` width of the features, `b` batch, `t` position, `e` expert.

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::column_fit::ColumnFit;
use super::skills::spread_blocks;
use crate::data::{Batch, BlockId, TokenDataset};
use crate::model::batch::{Extent, HostInputs, Rows};
use crate::model::{ForwardMode, Inputs, RoutedModel, RoutingSource};

/// Largest number of blocks of the new domain, and of all earlier ones together, that are read.
const MAX_BLOCKS: usize = 32;
/// Largest number of tokens of the new domain, and of the earlier ones, at each router.
const MAX_TOKENS: i64 = 2048;
/// Sequences in one forward pass.
const BATCH_SIZE: usize = 4;

/// The smallest mean routing weight on held-out tokens of the new domain with which the column of a
/// new expert counts as open.
pub(crate) const OPEN_SHARE: f64 = 0.5;

/// The tokens of a router's sites by which its new column is fitted.
#[derive(Debug, Default)]
struct Tokens {
    /// `h`, `[n, w]`, of each batch.
    features: Vec<Tensor>,
    /// `logsumexp(l / T)`, `[n]`, of each batch.
    offsets: Vec<Tensor>,
    /// The domain of each token, `[n]`, i64, of each batch.
    domains: Vec<Tensor>,
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
    for (router, tokens) in model.routers().iter().zip(tokens_by_router(model, train, domain)?) {
        let cat = |parts: &[Tensor]| Tensor::cat(parts, 0);
        let domains = cat(&tokens.domains);
        let column = ColumnFit {
            features: &cat(&tokens.features).to_kind(Kind::Double),
            offsets: &cat(&tokens.offsets),
            is_new: &domains.eq(domain as i64).to_kind(Kind::Double),
            shares: &even_shares(&domains),
            temperature,
        };
        let column = column.column()?;
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

/// The tokens of each router. Those of the new domain are routed to the last expert alone, as in
/// the seeding phase.
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
    let last = model.num_experts() - 1;
    for (blocks, expert) in [(new, Some(last)), (old, None)] {
        let num_batches = blocks.len().div_ceil(BATCH_SIZE) as i64;
        for chunk in blocks.chunks(BATCH_SIZE) {
            add_tokens(model, &train.batch(chunk), expert, MAX_TOKENS / num_batches, &mut all);
        }
    }
    Ok(all)
}

/// Adds the tokens of a batch to those of each router, at most `max_tokens` at even distances.
///
/// - `expert`: the expert that the tokens are routed to; `None` if the routers decide
fn add_tokens(
    model: &RoutedModel,
    batch: &Batch,
    expert: Option<i64>,
    max_tokens: i64,
    all: &mut [Tokens],
) {
    let named = vec![expert.unwrap_or(-1); batch.input_ids.len()];
    let rows = Rows { expert_ids: Some(&named), ..Rows::of_batch(batch, false) };
    let host = HostInputs::new(rows, Extent::of(&rows), &batch.domains, None, model.device());
    let inputs = Inputs::of(&host, model.device());
    let mode = ForwardMode { keeps_features: true, ..ForwardMode::EVAL };
    let output = model.forward(&inputs, &RoutingSource::RecordOrRouter, mode, None);
    let real = inputs.real_tokens(Kind::Int64).view([-1]).nonzero().squeeze_dim(-1);
    let domains: Vec<i64> = batch.domains.iter().map(|&domain| i64::from(domain)).collect();
    let domains = Tensor::from_slice(&domains).to_device(model.device());
    let (temperature, num_old) = (model.router_spec().temperature, model.num_experts() - 1);
    let sites = model.sites();
    for ((site, routing), features) in sites.iter().zip(&output.routing).zip(output.features) {
        let sites_of_router = sites.iter().filter(|of| of.router == site.router).count() as i64;
        let max_tokens = (max_tokens / sites_of_router).max(1);
        let step = real.numel().div_ceil(max_tokens as usize).max(1) as i64;
        let chosen = real.slice(0, None, None, step);
        let rows = |x: &Tensor| {
            let width = *x.size().last().expect("features are [b, t, w]");
            x.reshape([-1, width]).index_select(0, &chosen)
        };
        let scores_ne = rows(&routing.clean).to_kind(Kind::Double).narrow(-1, 0, num_old);
        let row = chosen.divide_scalar_mode(batch.seq_len as i64, "floor");
        let tokens = &mut all[site.router];
        tokens.offsets.push((scores_ne / temperature).logsumexp(-1, false));
        tokens.features.push(rows(&features));
        tokens.domains.push(domains.index_select(0, &row));
    }
}

/// The shares of tokens by which each of their domains has the same share, `[n]`, f64.
///
/// - `domains`: the domain of each token, `[n]`
fn even_shares(domains: &Tensor) -> Tensor {
    let counts = domains.bincount::<Tensor>(None, 0).to_kind(Kind::Double);
    let num_domains = counts.gt(0.0).sum(Kind::Double);
    (counts * num_domains).reciprocal().index_select(0, domains)
}
