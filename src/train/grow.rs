//! A mixture's next stage: one expert more for one new domain, or one fewer.
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
//! small; that is what the seeding phase is for ([`super::losses`]).

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use crate::config::{
    self, Config, DomainConfig, Duration, EvalRule, ExpertConfig, GrowthConfig, Method, Mixing,
    OnExhausted, RoutingChoice,
};
use crate::data::{Batch, TokenDataset};
use crate::eval;
use crate::model::{ForwardMode, RoutedModel, RoutingSource};

/// The largest probability of a new expert on an old domain's token.
const MAX_NEW_PROB: f64 = 1e-8;

/// How an expert is added.
#[derive(Debug, Clone)]
pub struct Growth {
    /// The new domain; its weight does not count.
    pub domain: DomainConfig,
    /// Share of the blocks that come from the earlier domains.
    pub replay: f64,
    /// Steps of the stage.
    pub steps: u64,
    /// Steps of its seeding phase.
    pub seed_steps: u64,
    /// Factor of the old experts' learning rate; 0 freezes them.
    pub old_experts_rate: f64,
    /// Factor of the learning rate of the old experts' router columns; 0 freezes them.
    pub old_columns_rate: f64,
    /// Factor of all learning rates after the seeding phase.
    pub consolidation_rate: f64,
    /// The stage's folder.
    pub run_dir: PathBuf,
}

/// The config of the stage in which `config`'s mixture, whose routers have `temperature` now, gets one
/// expert more.
///
/// # Errors
/// A mixture that cannot grow, and a domain that it has already.
pub fn grown_config(config: &Config, temperature: f64, growth: &Growth) -> Result<Config> {
    check_can_change(config)?;
    if config.train.routing != RoutingChoice::Router {
        bail!(
            "the mixture was trained with weights by `{}`, not by a router",
            config.train.routing
        );
    }
    if config.data.domains.iter().any(|domain| domain.name == growth.domain.name) {
        bail!("the mixture has a domain `{}` already", growth.domain.name);
    }
    let mut grown = config.clone();
    grown.run.dir.clone_from(&growth.run_dir);
    let num_old = config.lora.num_experts;
    grown.lora.num_experts = num_old + 1;
    grown.lora.experts.resize(num_old as usize, ExpertConfig::default());
    grown.router.temperature = temperature;
    grown.router.temperature_schedule = None;
    grown.router.source = None;
    grown.data.mixing = Mixing::Weights;
    grown.data.on_exhausted = OnExhausted::Repeat;
    let old_domains = &mut grown.data.domains;
    let weight = growth.replay / old_domains.len() as f64;
    old_domains.iter_mut().for_each(|domain| domain.weight = weight);
    old_domains.push(DomainConfig { weight: 1.0 - growth.replay, ..growth.domain.clone() });
    grown.train.duration = Duration::Steps(growth.steps);
    grown.growth = Some(GrowthConfig {
        domain: growth.domain.name.clone(),
        old_experts_rate: growth.old_experts_rate,
        old_columns_rate: growth.old_columns_rate,
        seed_steps: growth.seed_steps,
        seed_router_coef: 1.0,
        consolidation_rate: growth.consolidation_rate,
    });
    Ok(grown)
}

/// Whether expert `expert` is trained in a stage of `config`: as its own setting says, and in a growing
/// mixture not where the old experts' rate is 0.
pub fn is_trainable(config: &Config, expert: usize) -> bool {
    let own = config.lora.experts.get(expert).is_none_or(|expert| expert.trainable);
    let is_old = (expert as i64) < config.lora.num_experts - 1;
    let frozen = config.growth.as_ref().is_some_and(|growth| growth.old_experts_rate == 0.0);
    own && !(is_old && frozen)
}

/// The config of the mixture without expert `expert`, or with it merged into another.
///
/// # Errors
/// A mixture that cannot lose an expert.
pub fn shrunk_config(
    config: &Config,
    temperature: f64,
    expert: usize,
    run_dir: PathBuf,
) -> Result<Config> {
    check_can_change(config)?;
    let mut shrunk = config.clone();
    shrunk.run.dir = run_dir;
    shrunk.lora.num_experts -= 1;
    if expert < shrunk.lora.experts.len() {
        shrunk.lora.experts.remove(expert);
    }
    let count = shrunk.lora.num_experts;
    let router = &mut shrunk.router;
    router.top_k = router.top_k.map(|k| k.min(count));
    router.temperature = temperature;
    router.temperature_schedule = None;
    router.source = None;
    if let Some(EvalRule::TopK(k)) = &mut router.eval {
        *k = (*k).min(count);
    }
    shrunk.train.routing = match config.train.routing {
        RoutingChoice::Record => {
            bail!("the mixture is routed by `record`, and records name experts by number")
        }
        RoutingChoice::Expert(only) if only as usize == expert => {
            bail!("the mixture is routed to `expert:{only}` alone, which is to go")
        }
        RoutingChoice::Expert(only) if only as usize > expert => RoutingChoice::Expert(only - 1),
        routing => routing,
    };
    shrunk.growth = None;
    // a single expert has no router beside it: something must be left to train
    if count == 1 {
        shrunk.lora.experts.iter_mut().for_each(|expert| expert.trainable = true);
    }
    config::load::validate(&shrunk)?;
    Ok(shrunk)
}

/// Checks that a mixture may get or lose an expert at all.
///
/// # Errors
/// A base that was trained in full, and layers with different experts.
pub fn check_can_change(config: &Config) -> Result<()> {
    if config.method == Method::Full {
        bail!("a base that was trained in full has no experts");
    }
    if config.lora.experts_per_layer.is_some() {
        bail!("experts are not added to or taken from a mixture with `lora.experts_per_layer`");
    }
    Ok(())
}

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
        let inputs = eval::inputs(&batch, &RoutingSource::Router, model.device());
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
        let inputs = eval::inputs(&batch, &RoutingSource::Router, model.device());
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
