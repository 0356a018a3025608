//! The experts of each domain.

use crate::config::{Config, DomainExperts};

/// The experts of each domain of a dataset, by which its tokens are routed or routers supervised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainTargets {
    /// Number of routed experts `E`.
    pub num_experts: usize,
    /// The experts of each domain, by its index in the dataset; empty for a domain without experts.
    experts: Vec<Vec<usize>>,
}

impl DomainTargets {
    /// The experts that `config` gives the domains with these names; `None` if it gives none.
    pub fn of_config<'a>(
        config: &Config,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Option<Self> {
        let of_name = |name: &str| {
            let domain = config.data.domains.iter().find(|domain| domain.name == name)?;
            let experts = domain.expert.as_ref().map(DomainExperts::experts)?;
            Some(experts.iter().map(|&expert| expert as usize).collect())
        };
        let experts = names.into_iter().map(|name| of_name(name).unwrap_or_default());
        let experts: Vec<Vec<usize>> = experts.collect();
        let num_experts = config.lora.num_experts as usize;
        experts.iter().any(|experts| !experts.is_empty()).then_some(Self { num_experts, experts })
    }

    /// The experts of a domain.
    pub fn of(&self, domain: usize) -> &[usize] {
        self.experts.get(domain).map_or(&[], Vec::as_slice)
    }

    /// 1 for each expert of a domain and 0 for the others, `[e]`.
    pub(super) fn marks(&self, domain: usize) -> impl Iterator<Item = i64> {
        let experts = self.of(domain);
        (0..self.num_experts).map(move |expert| i64::from(experts.contains(&expert)))
    }
}
