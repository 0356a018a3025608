//! How well the routers know the domains of a dataset: the domain supervision, and the share of
//! tokens whose most probable expert is one of their domain's.
//!
//! Both are taken as in training ([`crate::model::routing::supervision`]): over all tokens of
//! domains that have experts, prompts included and padding excluded. Nothing is known if no router
//! decides, or if layers route over experts of their own.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Kind, Tensor};

use super::routing::SiteSupervision;
use crate::model::Inputs;
use crate::model::routing::router::Routing;
use crate::model::routing::supervision::SupervisionSums;

/// Sums over the tokens of each domain that has experts.
#[derive(Debug, Default)]
pub(super) struct SupervisionTotals {
    /// For a domain's index in the dataset, the number of tokens and then, for each site, the sums
    /// of the losses and of the tokens that are routed to their domain: `[1 + 2 sites]`, f64.
    domains: BTreeMap<usize, Tensor>,
}

impl SupervisionTotals {
    /// Adds a batch whose rows are all of the domain with index `domain`.
    ///
    /// - `routing`: what the routers did at each site
    pub fn add(
        &mut self,
        domain: usize,
        routing: &[Routing],
        temperature: &Tensor,
        inputs: &Inputs,
    ) {
        let Some(experts_be) = &inputs.domain_experts else { return };
        let Some(sums) = SupervisionSums::new(routing, temperature, inputs) else { return };
        let has_experts_b1 = experts_be.amax(-1, true).to_kind(Kind::Double);
        let tokens = (inputs.real_tokens(Kind::Double) * has_experts_b1).sum(Kind::Double);
        let new = Tensor::cat(&[tokens.reshape([1]), sums.by_site.reshape([-1])], 0);
        let sum = match self.domains.remove(&domain) {
            Some(sum) => sum + new,
            None => new,
        };
        self.domains.insert(domain, sum);
    }

    /// The sums on the host.
    pub fn fetch(self) -> Result<Supervision> {
        let domains = self.domains.into_iter();
        let domains = domains.map(|(domain, sums)| Ok((domain, Vec::try_from(sums)?)));
        Ok(Supervision { domains: domains.collect::<Result<_>>()? })
    }
}

/// [`SupervisionTotals`] on the host.
#[derive(Debug, Default)]
pub(super) struct Supervision {
    domains: BTreeMap<usize, Vec<f64>>,
}

impl Supervision {
    /// The means at each site over the tokens of a domain, or over those of all domains; `None` if
    /// nothing is known.
    pub fn of(&self, domain: Option<usize>) -> Option<Vec<SiteSupervision>> {
        let is_asked = |&(of, _): &(&usize, &Vec<f64>)| domain.is_none_or(|asked| asked == *of);
        let rows = self.domains.iter().filter(is_asked).map(|(_, sums)| sums.clone());
        let add = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let sums = rows.reduce(add)?;
        let (tokens, sums) = sums.split_first()?;
        (*tokens > 0.0).then(|| SiteSupervision::of_sums(sums, *tokens as u64))
    }
}
