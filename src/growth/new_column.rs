//! The router column of a new expert.
//!
//! A new expert starts with B = 0 and a router column of zeros, with a bias that keeps the expert
//! out of use: with the scores `l_t` that the old experts have for token t, and the temperature T,
//! the bias is
//!
//! ```text
//! T (ln 1e-8 + min_t logsumexp(l_t / T))       over the tokens t of the old domains
//! ```
//!
//! The new expert then has a probability of at most 1e-8 for each of these tokens, and no old
//! expert's probability changes by more. The gradient that the language model's loss gives to such
//! a column is equally small, and Adam would not raise the column again with it. The seeding phase
//! does so ([`crate::train::losses`]).

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use crate::data::{Batch, TokenDataset};
use crate::model::{ForwardMode, Inputs, RoutedModel};

/// The largest probability of a new expert for a token of an old domain.
const MAX_NEW_PROB: f64 = 1e-8;

/// The bias that keeps a new expert out of use, for each router by the prefix of its name. It
/// follows from the tokens, prompts included, of every domain of `dataset` except `except`, of
/// which at most `max_blocks` blocks are read. A single expert has no router and gets no bias here.
///
/// # Errors
/// Fails if the model has routers, but the old domains have no tokens.
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

/// The bias that keeps a new expert out of use beside a single old expert, whose score is 0.
pub fn bias_beside_one(temperature: f64) -> f64 {
    temperature * MAX_NEW_PROB.ln()
}

/// The largest probability that the routers of a grown mixture give its last expert for a token of
/// the old domains, computed in f64 from the scores. No old expert's probability has changed by
/// more.
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

/// The positions of a batch that are not padding, as indices in the flattened `[b t]`.
fn token_rows(batch: &Batch, device: Device) -> Tensor {
    let ids = batch.document_ids.iter().zip(0i64..);
    let rows: Vec<i64> = ids.filter(|(id, _)| **id >= 0).map(|(_, row)| row).collect();
    Tensor::from_slice(&rows).to_device(device)
}

/// At most `max_blocks` blocks of each domain other than `except`, at even distances, each as a
/// batch of its own.
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
