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
use crate::dist::World;
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

    /// The sums on the host, over all processes of `world`.
    pub fn fetch(self, num_domains: usize, world: &World) -> Result<Supervision> {
        let len = self.domains.values().next().map_or(0, Tensor::numel);
        let mut numbers = vec![0.0; num_domains * len];
        for (domain, sums) in self.domains {
            let sums = Vec::<f64>::try_from(sums)?;
            numbers[domain * len..(domain + 1) * len].copy_from_slice(&sums);
        }
        world.sum(&mut numbers)?;
        let rows = numbers.chunks((numbers.len() / num_domains).max(1)).map(<[f64]>::to_vec);
        let known = rows.enumerate().filter(|(_, sums)| sums[0] > 0.0);
        Ok(Supervision { domains: known.collect() })
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
