//! The arms of a study: what is compared, each as a change of the mixture's config.
//!
//! With E experts of rank r, a part of rank s that is always on, and `k = router.top_k`:
//!
//! ```text
//! single         one LoRA of rank E r + s, as many adapter parameters as the mixture has
//! single_active  one LoRA of rank r + s, or k r + s: what a token uses
//! uniform        weight 1 / E for each expert
//! random         a router that keeps its first weights
//! learned        the router learns from the loss of the language model
//! supervised     the router also learns which expert is for which domain
//! oracle         weight 1 on the expert of the token's domain
//! per_domain     one LoRA of rank r for each domain, trained on that domain alone
//! full           all parameters of the base
//! ```
//!
//! A single LoRA has the scaling of `[lora]`. All arms have the config's data, steps and batches.

use std::fmt;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::config::load::validate;
use crate::config::{
    Capacity, Config, DOMAIN_SUPERVISION, Duration, LoraConfig, Method, Mixing, OnCollapse,
    RouterConfig, RouterInit, RoutingChoice,
};

/// What a study compares.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Arm {
    /// One LoRA with as many adapter parameters as the whole mixture.
    Single,
    /// One LoRA with the rank that a token of the mixture uses.
    SingleActive,
    /// The same weight for each expert.
    Uniform,
    /// A random router that is not trained.
    Random,
    /// A learned router without domain supervision.
    Learned,
    /// A learned router with domain supervision.
    Supervised,
    /// Perfect routing by domain: weight 1 on the expert of each token's domain.
    Oracle,
    /// One LoRA for each domain, each trained on its domain alone.
    PerDomain,
    /// The full fine-tune.
    Full,
}

impl Arm {
    /// The arms of a study that names none.
    pub const DEFAULT: [Self; 7] = [
        Self::Single,
        Self::SingleActive,
        Self::Uniform,
        Self::Random,
        Self::Learned,
        Self::Supervised,
        Self::Oracle,
    ];

    /// The name, such as `single_active`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::SingleActive => "single_active",
            Self::Uniform => "uniform",
            Self::Random => "random",
            Self::Learned => "learned",
            Self::Supervised => "supervised",
            Self::Oracle => "oracle",
            Self::PerDomain => "per_domain",
            Self::Full => "full",
        }
    }

    /// The arm's config, made of the mixture's. That of [`Arm::PerDomain`] has all domains.
    pub fn config(self, mixture: &Config) -> Config {
        let mut config = mixture.clone();
        // a run goes to its end whatever its routing does, and only its best checkpoint is needed
        config.router.on_collapse = OnCollapse::Warn;
        config.train.keep_last = 1;
        match self {
            Self::Single => set_single(&mut config, total_rank(&mixture.lora)),
            Self::SingleActive => set_single(&mut config, active_rank(mixture)),
            Self::PerDomain => set_single(&mut config, mixture.lora.rank),
            Self::Full => {
                set_single(&mut config, mixture.lora.rank);
                config.method = Method::Full;
            }
            Self::Uniform => {
                set_fixed(&mut config, RoutingChoice::Uniform);
                leave_domains(&mut config);
            }
            Self::Random => {
                leave_domains(&mut config);
                remove_losses(&mut config.router);
                config.router.trainable = false;
                config.router.init = RouterInit::Normal;
            }
            Self::Learned => leave_domains(&mut config),
            Self::Supervised => {
                let own = config.router.domain_supervision.filter(|coef| *coef > 0.0);
                config.router.domain_supervision = Some(own.unwrap_or(DOMAIN_SUPERVISION));
            }
            Self::Oracle => set_fixed(&mut config, RoutingChoice::Domain),
        }
        config
    }

    /// Multiplies the learning rate of what the arm trains: of the experts, or of the base.
    pub fn scale_rate(self, config: &mut Config, factor: f64) {
        *self.rate_mut(config) *= factor;
    }

    /// The learning rate that [`Arm::scale_rate`] changes.
    pub fn rate(self, config: &Config) -> f64 {
        *self.rate_mut(&mut config.clone())
    }

    fn rate_mut(self, config: &mut Config) -> &mut f64 {
        match self {
            Self::Full => &mut config.optimizer.base.learning_rate,
            _ => &mut config.optimizer.adapters.learning_rate,
        }
    }

    /// Whether a run of the arm trains on one domain alone, so that there is one for each domain.
    pub(crate) fn splits_domains(self) -> bool {
        self == Self::PerDomain
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The sum of the ranks of all experts and of the part that is always on.
pub(crate) fn total_rank(lora: &LoraConfig) -> i64 {
    lora.num_experts * lora.rank + lora.shared_rank
}

/// The rank that a token uses: that of one expert, or of `router.top_k` experts, and of the part
/// that is always on.
pub fn active_rank(config: &Config) -> i64 {
    config.router.top_k.unwrap_or(1) * config.lora.rank + config.lora.shared_rank
}

/// Makes `config` that of one LoRA of rank `rank` with the same scaling.
fn set_single(config: &mut Config, rank: i64) {
    let lora = &mut config.lora;
    let ratio = rank as f64 / lora.rank as f64;
    lora.alpha *= if lora.use_rslora { ratio.sqrt() } else { ratio };
    (lora.rank, lora.num_experts, lora.shared_rank) = (rank, 1, 0);
    lora.orthogonality = None;
    leave_domains(config);
    let RouterConfig { window_steps, on_collapse, .. } = config.router;
    config.router = RouterConfig {
        window_steps,
        on_collapse,
        domain_supervision: Some(0.0),
        ..RouterConfig::default()
    };
}

/// Takes the experts from the domains. The ranks then do not follow the domains' sizes either, but
/// their sum stays the same.
fn leave_domains(config: &mut Config) {
    config.router.domain_supervision = Some(0.0);
    config.lora.capacity = Capacity::Even;
    config.data.domains.iter_mut().for_each(|domain| domain.expert = None);
}

/// Lets `routing` decide the weights instead of a router.
fn set_fixed(config: &mut Config, routing: RoutingChoice) {
    config.train.routing = routing;
    let router = &mut config.router;
    remove_losses(router);
    (router.top_k, router.hybrid, router.eval) = (None, None, None);
    router.balance_bias_rate = 0.0;
}

/// Removes what would train a router.
fn remove_losses(router: &mut RouterConfig) {
    router.domain_supervision = Some(0.0);
    (router.load_balancing_coef, router.uniform_mse_coef) = (0.0, 0.0);
    (router.z_loss_coef, router.entropy_coef) = (0.0, 0.0);
}

/// Restricts the config of [`Arm::PerDomain`] to one of its domains.
///
/// - `steps`: number of steps of the run on all domains
/// - `share`: the domain's share of the blocks
pub fn on_one_domain(config: &mut Config, domain: usize, steps: u64, share: f64) {
    config.data.domains = vec![config.data.domains[domain].clone()];
    config.data.domains[0].weight = 1.0;
    config.data.mixing = Mixing::Proportional;
    let part = |steps: u64| ((steps as f64 * share).round() as u64).max(1);
    config.train.duration = Duration::Steps(part(steps));
    let groups = &mut config.optimizer;
    let warmups = [&mut groups.adapters, &mut groups.router, &mut groups.base];
    let warmups = warmups.map(|group| &mut group.warmup_steps);
    for warmup in warmups.into_iter().chain([&mut config.schedule.warmup_steps]) {
        *warmup = warmup.map(part);
    }
    for every in [&mut config.train.eval_every_steps, &mut config.train.checkpoint_every_steps] {
        *every = every.map(part);
    }
}

/// Checks that a study can be made of a mixture's config.
///
/// # Errors
/// The error lists all faults, each with the dotted path of its key.
pub fn check(config: &Config) -> Result<()> {
    let mut faults = vec![];
    let mut add = |key: &str, fault: &str| faults.push(format!("`{key}` {fault}"));
    let (lora, router) = (&config.lora, &config.router);
    if config.method != Method::RoutedLora {
        add("method", "must be `routed_lora`: the arm `full` is the full fine-tune");
    }
    if config.growth.is_some() {
        add("growth", "does not go with a study, whose arms all start anew");
    }
    if lora.num_experts < 2 {
        let fault = format!("must be at least 2 for a study, got {}", lora.num_experts);
        add("lora.num_experts", &fault);
    }
    for (key, is_set) in [
        ("lora.experts", !lora.experts.is_empty()),
        ("lora.experts_per_layer", lora.experts_per_layer.is_some()),
        ("lora.rank_pattern", !lora.rank_pattern.is_empty()),
        ("lora.alpha_pattern", !lora.alpha_pattern.is_empty()),
    ] {
        if is_set {
            let fault = "does not go with a study, whose single LoRAs have one rank and one alpha";
            add(key, fault);
        }
    }
    if router.source.is_some() {
        add("router.source", "does not go with a study, whose arms all start anew");
    }
    if !router.trainable {
        add("router.trainable", "must be true for a study: the arm `random` has a frozen router");
    }
    if config.train.routing != RoutingChoice::Router {
        let routing = config.train.routing;
        let fault = format!("must be `router` for a study, whose arms set it, got `{routing}`");
        add("train.routing", &fault);
    }
    let domains = &config.data.domains;
    if domains.len() < 2 {
        let fault = format!("must have at least 2 domains for a study, got {}", domains.len());
        add("data.domains", &fault);
    }
    for (i, domain) in domains.iter().enumerate() {
        if domain.validation.is_none() {
            let key = format!("data.domains[{i}].validation");
            add(
                &key,
                "is needed for a study: rates are chosen on one half of it, and losses are \
                       reported on the other",
            );
        }
        if domain.weight == 0.0 {
            let key = format!("data.domains[{i}].weight");
            let fault =
                "must be above 0 for a study, whose arms are compared where they are trained";
            add(&key, fault);
        }
    }
    if faults.is_empty() { Ok(()) } else { bail!(faults.join("\n")) }
}

/// Checks that each arm has a valid config.
///
/// # Errors
/// The error names the first arm whose config is not valid, and its faults.
pub fn check_arms(config: &Config, arms: &[Arm]) -> Result<()> {
    for &arm in arms {
        validate(&arm.config(config)).with_context(|| format!("in the arm `{arm}`"))?;
    }
    Ok(())
}
