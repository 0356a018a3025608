//! Settings that follow from others, and the values that configs had before a setting existed.

use super::{Config, DomainConfig, DomainExperts, LoraScale, Method, RouterConfig, RoutingChoice};

/// The factor of the domain supervision where it is on by default, as measured in
/// `benchmarks/2026-11-26-recipe.md`.
pub const DOMAIN_SUPERVISION: f64 = 0.1;

impl Config {
    /// Whether `router.domain_supervision` may be above 0. If not, the reason.
    pub(super) fn why_unsupervised(&self) -> Option<&'static str> {
        if self.method == Method::Full || self.lora.num_experts < 2 {
            return Some("there is no router");
        }
        if self.train.routing != RoutingChoice::Router {
            return Some("the router does not decide");
        }
        if !self.router.trainable {
            return Some("the router is not trained, by `router.trainable`");
        }
        if self.lora.experts_per_layer.is_some() {
            return Some("layers have experts of their own, by `lora.experts_per_layer`");
        }
        None
    }

    /// Sets the keys whose default depends on other keys.
    pub(super) fn fill_defaults(&mut self) {
        if self.router.domain_supervision.is_none() {
            let is_on = self.why_unsupervised().is_none()
                && self.trained_domains().count() > 1
                && self.knows_experts();
            self.router.domain_supervision = Some(if is_on { DOMAIN_SUPERVISION } else { 0.0 });
        }
    }

    /// Whether it is known which experts are for which domain: experts that start from adapters
    /// have learned something already, so that domains must name them.
    fn knows_experts(&self) -> bool {
        let has_source = self.lora.experts.iter().any(|expert| expert.source.is_some());
        !has_source || self.data.domains.iter().any(|domain| domain.expert.is_some())
    }

    /// The domains whose weight is above 0, with their positions.
    pub fn trained_domains(&self) -> impl Iterator<Item = (usize, &DomainConfig)> {
        self.data.domains.iter().enumerate().filter(|(_, domain)| domain.weight > 0.0)
    }

    /// Whether the router is supervised by the domain of each token.
    pub fn supervises(&self) -> bool {
        self.router.supervision() > 0.0
    }

    /// Whether domains have experts: they supervise the router, decide the routing weights or, with
    /// `expert`, are named.
    pub fn assigns_experts(&self) -> bool {
        let names = self.data.domains.iter().any(|domain| domain.expert.is_some());
        self.method == Method::RoutedLora
            && (names || self.supervises() || self.train.routing == RoutingChoice::Domain)
    }

    /// Whether a step needs to know the experts of each token's domain.
    pub fn reads_domains(&self) -> bool {
        self.supervises() || self.train.routing == RoutingChoice::Domain
    }

    /// The factor by which `lora.scale` multiplies the alpha of an expert.
    pub fn scale_factor(&self, expert: usize) -> f64 {
        let (lora, e) = (&self.lora, self.lora.num_experts);
        let is_added = self.growth.is_some() && expert as i64 == e - 1;
        let has_source = lora.experts.get(expert).is_some_and(|own| own.source.is_some());
        let is_one = lora.scale == LoraScale::PerExpert || is_added || has_source;
        let factor = match self.train.routing {
            _ if is_one || expert as i64 >= e => 1,
            RoutingChoice::Router if self.supervises() => self.group_size(expert as i64),
            RoutingChoice::Router => self.router.top_k.unwrap_or(e),
            RoutingChoice::Domain => self.group_size(expert as i64),
            RoutingChoice::Uniform => e,
            _ => 1,
        };
        factor as f64
    }
}

impl Config {
    /// The number of experts among which a domain of this expert divides its weight: those of the
    /// smallest group that contains it, or 1 if it belongs to no domain.
    fn group_size(&self, expert: i64) -> i64 {
        let domains = self.data.domains.iter();
        let groups = domains.filter_map(|domain| domain.expert.as_ref());
        let groups = groups.map(DomainExperts::experts).filter(|group| group.contains(&expert));
        groups.map(|group| group.len() as i64).min().unwrap_or(1)
    }
}

impl RouterConfig {
    /// The factor of the domain supervision; 0 if it is off.
    pub fn supervision(&self) -> f64 {
        self.domain_supervision.unwrap_or(0.0)
    }
}

/// Adds to a config that a run has saved the keys that did not exist yet, with the values that say
/// what dylora did then. A config is such a one if it contains keys that only a saved config
/// contains all of. Other configs are left as they are.
pub(super) fn add_former_values(config: &mut toml::Table) {
    let section = |name: &str| config.get(name).and_then(toml::Value::as_table);
    let has = |name: &str, keys: &[&str]| {
        section(name).is_some_and(|table| keys.iter().all(|key| table.contains_key(*key)))
    };
    let is_saved = has("run", &["dir", "seed", "device", "tensorboard"])
        && has("lora", &["num_experts", "init", "use_dora", "use_rslora", "dropout_masks"]);
    if !is_saved || has("lora", &["scale"]) {
        return;
    }
    let former = [
        ("lora", "scale", toml::Value::from("per_expert")),
        ("router", "normalize_input", toml::Value::from(false)),
        ("router", "detach_input", toml::Value::from(false)),
        ("router", "domain_supervision", toml::Value::from(0.0)),
        ("optimizer", "max_grad_norm", toml::Value::from(0.0)),
    ];
    for (name, key, value) in former {
        let table = config.entry(name).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        if let Some(table) = table.as_table_mut() {
            table.entry(key).or_insert(value);
        }
    }
}
