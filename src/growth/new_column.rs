//! The router column of a new expert.
//!
//! The new expert starts with B = 0 and a router column of zeros whose bias keeps it out: with `l` the
//! scores of the old experts and T the temperature, the bias is
//!
//! ```text
//! T (ln 1e-8 + min_t logsumexp(l_t / T))       over the tokens of the old domains
//! ```
//!
//! so that it has a probability of at most 1e-8 on each of them, and no old expert's changes by more.
//! Adam would not bring such a column up again by the language model's loss, whose gradient is as
//! small; that is what the seeding phase is for ([`crate::train::losses`]).

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use crate::data::{Batch, TokenDataset};
use crate::model::{ForwardMode, Inputs, RoutedModel};

/// The largest probability of a new expert on an old domain's token.
const MAX_NEW_PROB: f64 = 1e-8;

/// The bias that keeps a new expert out of each router, by what precedes the router's name, from the
/// tokens, prompts too, of every domain of `dataset` but `except`; at most `max_blocks` of each.
///
/// # Errors
/// No such tokens.
pub fn initial_biases(
    model: &RoutedModel,
    dataset: &TokenDataset,
    except: &str,
    max_blocks: usize,
) -> Result<BTreeMap<String, f64>> {
    let _no_grad = tch::no_grad_guard();
    let temperature = model.router_spec().temperature;
    let names = model.router_names();
    let mut least: BTreeMap<String, f64> = BTreeMap::new();
    let prefix = |router: usize| names[router].trim_end_matches("router").to_owned();
    for batch in old_blocks(dataset, except, max_blocks) {
        let inputs = Inputs::of_batch(&batch, false, model.device());
        let rows = token_rows(&batch, model.device());
        let routing = model.routing(&inputs, ForwardMode::EVAL);
        for (site, routing) in model.sites().into_iter().zip(routing) {
            let lse: Tensor = (routing.logits / temperature).logsumexp(-1, false);
            let found = lse.view([-1]).index_select(0, &rows).min().double_value(&[]);
            let least = least.entry(prefix(site.router)).or_insert(f64::INFINITY);
            *least = least.min(found);
        }
    }
    if least.is_empty() && model.num_experts() > 1 {
        bail!("the earlier domains hold no token, by which the new router column is set");
    }
    Ok(least
        .into_iter()
        .map(|(name, least)| (name, temperature * (MAX_NEW_PROB.ln() + least)))
        .collect())
}

/// The bias that keeps a new expert out of a router that is new itself, and scores the old one 0.
pub fn bias_beside_one(temperature: f64) -> f64 {
    temperature * MAX_NEW_PROB.ln()
}

/// The largest probability that the routers of a grown mixture give its last expert on the tokens of the
/// old domains, in f64 from the scores: no old expert's probability has changed by more.
pub fn largest_new_prob(
    model: &RoutedModel,
    dataset: &TokenDataset,
    except: &str,
    max_blocks: usize,
) -> f64 {
    let _no_grad = tch::no_grad_guard();
    let (temperature, last) = (model.router_spec().temperature, model.num_experts() - 1);
    let mut largest = 0f64;
    for batch in old_blocks(dataset, except, max_blocks) {
        let inputs = Inputs::of_batch(&batch, false, model.device());
        let rows = token_rows(&batch, model.device());
        for routing in model.routing(&inputs, ForwardMode::EVAL) {
            let scores = routing.logits.to_kind(Kind::Double) / temperature;
            let probs = scores.softmax(-1, Kind::Double).select(-1, last);
            let of_tokens = probs.reshape([-1]).index_select(0, &rows);
            largest = largest.max(of_tokens.max().double_value(&[]));
        }
    }
    largest
}

/// The positions of a batch that hold a token, in the flattened `[b t]`.
fn token_rows(batch: &Batch, device: Device) -> Tensor {
    let ids = batch.document_ids.iter().zip(0i64..);
    let rows: Vec<i64> = ids.filter(|(id, _)| **id >= 0).map(|(_, row)| row).collect();
    Tensor::from_slice(&rows).to_device(device)
}

/// Blocks of the domains other than `except`, at even distances, one by one.
fn old_blocks(
    dataset: &TokenDataset,
    except: &str,
    max_blocks: usize,
) -> impl Iterator<Item = Batch> {
    let order = dataset.eval_order();
    let domains = dataset.domains.iter().enumerate().filter(move |(_, d)| d.name != except);
    domains.flat_map(move |(index, _)| {
        let blocks: Vec<_> = order.iter().filter(|id| id.domain as usize == index).collect();
        let count = blocks.len().min(max_blocks);
        let chosen: Vec<_> = (0..count).map(|i| *blocks[i * blocks.len() / count]).collect();
        chosen.into_iter().map(|block| dataset.batch(&[block])).collect::<Vec<_>>()
    })
}
