//! The config of a mixture's next stage, in which an expert is added for a new domain or one is
//! removed.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::config::{
    self, Config, DomainConfig, DomainExperts, Duration, EvalRule, ExpertConfig, GrowthConfig,
    Method, Mixing, OnExhausted, RoutingChoice,
};
use crate::model::experts::spec::ExpertSpec;

/// How an expert is added.
#[derive(Debug, Clone)]
pub struct Growth {
    /// The new domain. Its weight is ignored.
    pub domain: DomainConfig,
    /// Share of the blocks that come from the old domains, the same for each ([`divide_replay`]).
    pub replay: f64,
    /// Number of steps of the stage.
    pub steps: u64,
    /// Number of steps of the seeding phase.
    pub seed_steps: u64,
    /// Factor of the old experts' learning rate; 0 freezes them.
    pub old_experts_rate: f64,
    /// Factor of the learning rate of the old experts' router columns and of the router's hidden
    /// layers; 0 freezes them.
    pub old_columns_rate: f64,
    /// Factor of all learning rates after the seeding phase.
    pub consolidation_rate: f64,
    /// The stage's folder.
    pub run_dir: PathBuf,
}

/// The config of the stage in which the mixture of `config` gets one more expert.
///
/// - `temperature`: the present temperature of its routers
///
/// # Errors
/// Fails if the mixture cannot grow or already has the domain.
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
    let names_experts = old_domains.iter().any(|domain| domain.expert.is_some());
    // where domains have experts, one without was only evaluated, which it still is
    let is_replayed = |domain: &DomainConfig| !names_experts || domain.expert.is_some();
    let num_replayed = old_domains.iter().filter(|domain| is_replayed(domain)).count();
    for domain in old_domains.iter_mut() {
        let weight = growth.replay / num_replayed as f64;
        domain.weight = if is_replayed(domain) { weight } else { 0.0 };
    }
    let expert = names_experts.then_some(DomainExperts::One(num_old));
    let weight = 1.0 - growth.replay;
    old_domains.push(DomainConfig { weight, expert, ..growth.domain.clone() });
    grown.train.duration = Duration::Steps(growth.steps);
    grown.growth = Some(GrowthConfig {
        domain: growth.domain.name.clone(),
        old_experts_rate: growth.old_experts_rate,
        old_columns_rate: growth.old_columns_rate,
        seed_steps: growth.seed_steps,
        seed_router_coef: 1.0,
        column_learning_rate: GrowthConfig::COLUMN_LEARNING_RATE,
        consolidation_rate: growth.consolidation_rate,
    });
    Ok(grown)
}

/// Divides the replay in the config of a stage that adds an expert among the replayed domains, in
/// proportion to `1 + 4 max(c, 0)^2`, where c is the cosine of the domain's skill and that of the
/// new one. A domain like the new one shares tokens with it by which a router cannot tell them
/// apart, so it needs more of its own to keep its loss. If their weights differ already, because
/// the user has set them, they stay.
///
/// - `cosine`: the cosine of a domain's skill and that of the new one, by the domain's name
pub fn divide_replay(config: &mut Config, cosine: &dyn Fn(&str) -> f64) {
    let Some(growth) = &config.growth else { return };
    let is_replayed =
        |domain: &&mut DomainConfig| domain.name != growth.domain && domain.weight > 0.0;
    let mut domains: Vec<&mut DomainConfig> =
        config.data.domains.iter_mut().filter(is_replayed).collect();
    if domains.windows(2).any(|pair| pair[0].weight != pair[1].weight) {
        return;
    }
    let replay: f64 = domains.iter().map(|domain| domain.weight).sum();
    let needs: Vec<f64> =
        domains.iter().map(|domain| 1.0 + 4.0 * cosine(&domain.name).max(0.0).powi(2)).collect();
    let sum: f64 = needs.iter().sum();
    for (domain, need) in domains.iter_mut().zip(needs) {
        domain.weight = replay * need / sum;
    }
}

/// Sets which experts are trained in a stage of `config`, by [`is_trainable`].
pub(crate) fn set_trainable(specs: &mut [ExpertSpec], config: &Config) {
    for (expert, spec) in specs.iter_mut().enumerate() {
        spec.trainable = is_trainable(config, expert);
    }
}

/// Whether expert `expert` is trained in a stage of `config`: its own setting must allow it, and in
/// a growing mixture an old expert also needs a learning rate above 0.
pub fn is_trainable(config: &Config, expert: usize) -> bool {
    let own = config.lora.experts.get(expert).is_none_or(|expert| expert.trainable);
    let is_old = expert as i64 != config.lora.num_experts - 1;
    let frozen = config.growth.as_ref().is_some_and(|growth| growth.old_experts_rate == 0.0);
    own && !(is_old && frozen)
}

/// The config of the mixture after expert `expert` was removed or merged into another.
///
/// - `temperature`: the present temperature of its routers
/// - `merged_into`: the expert that replaces it, if it was merged
///
/// # Errors
/// Fails if the mixture cannot lose this expert.
pub fn shrunk_config(
    config: &Config,
    temperature: f64,
    expert: usize,
    merged_into: Option<usize>,
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
    for domain in &mut shrunk.data.domains {
        let experts =
            domain.expert.as_ref().map(|of| left(of.experts(), expert, merged_into, count));
        domain.expert = experts.map(DomainExperts::from);
    }
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
    // a single expert has no router, so it must be trainable for anything to train
    if count == 1 {
        shrunk.router.domain_supervision = Some(0.0);
        shrunk.router.trainable = true;
        shrunk.lora.experts.iter_mut().for_each(|expert| expert.trainable = true);
    }
    config::load::validate(&shrunk)?;
    Ok(shrunk)
}

/// The experts of a domain after expert `gone` was removed or merged: those that are left, by their
/// new numbers. A domain that has lost its only expert gets all `count` that are left, so that the
/// router is free to choose.
fn left(experts: &[i64], gone: usize, merged_into: Option<usize>, count: i64) -> Vec<i64> {
    let gone = gone as i64;
    let number = |expert: i64| match merged_into {
        _ if expert < gone => Some(expert),
        _ if expert > gone => Some(expert - 1),
        into => into.map(|into| into as i64),
    };
    let mut experts: Vec<i64> = experts.iter().filter_map(|&expert| number(expert)).collect();
    experts.sort_unstable();
    experts.dedup();
    if experts.is_empty() { (0..count).collect() } else { experts }
}

/// Checks that a mixture can gain or lose an expert at all.
///
/// # Errors
/// Fails if the base was trained in full, or if layers have different experts.
pub(crate) fn check_can_change(config: &Config) -> Result<()> {
    if config.method == Method::Full {
        bail!("a base that was trained in full has no experts");
    }
    if config.lora.experts_per_layer.is_some() {
        bail!("experts are not added to or taken from a mixture with `lora.experts_per_layer`");
    }
    Ok(())
}
