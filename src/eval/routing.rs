//! How tokens were routed: sums on the host, and the statistics that follow from them.
//!
//! Let `w[g][e]` be the sum of the routing weights that the tokens of domain g gave to expert e,
//! and `p(g, e) = w[g][e] / sum w`. The mutual information of expert and domain is
//!
//! ```text
//! I = sum_g sum_e p(g, e) ln(p(g, e) / (p(g) p(e)))     nats, from 0 to min(H(domain), ln E)
//! ```
//!
//! It is 0 if every domain is routed alike, and H(domain) if the expert determines the domain.
//!
//! Letters of shapes: `g` domain, `e` expert, `m` expert of a site.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::RouterConfig;
use crate::dist::World;
use crate::model::routing::totals::RoutingTotals;
use crate::model::{RoutedModel, Site};

/// Sums over label tokens at one site, on the host. Sums over different tokens can be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteTotals {
    /// The site's name.
    pub site: String,
    /// The experts that the site routes over, `[m]`.
    pub experts: Vec<usize>,
    /// Number of label tokens by domain, `[g]`.
    pub tokens: Vec<f64>,
    /// Sum of routing_probs, `[m]`.
    pub probs: Vec<f64>,
    /// Sum of routing weights, `[g][m]`.
    pub weights: Vec<Vec<f64>>,
    /// Number of assignments, `[g][m]`; without top-k, the sum of routing_probs.
    pub assignments: Vec<Vec<f64>>,
    /// Sum of the entropy of routing_probs, `[g]`, nats.
    pub entropy: Vec<f64>,
    /// Sum of the squared logsumexp of the scores.
    pub squared_lse: f64,
}

/// Fetches the totals of all sites in one transfer, and adds up those of all processes of `world`.
pub fn fetch(
    sites: Vec<SiteExperts>,
    totals: &[RoutingTotals],
    num_groups: usize,
    world: &World,
) -> Result<Vec<SiteTotals>> {
    let flat: Vec<Tensor> = totals.iter().map(RoutingTotals::flat).collect();
    let mut numbers = match flat.is_empty() {
        true => vec![],
        false => Vec::<f64>::try_from(Tensor::cat(&flat, 0))?,
    };
    world.sum(&mut numbers)?;
    if numbers.is_empty() {
        return Ok(vec![]);
    }
    Ok(of_numbers(sites, num_groups, &mut numbers.into_iter()))
}

/// The totals of `sites`, from the numbers of each site's [`RoutingTotals::flat`] in order.
pub(crate) fn of_numbers(
    sites: Vec<SiteExperts>,
    groups: usize,
    numbers: &mut dyn Iterator<Item = f64>,
) -> Vec<SiteTotals> {
    let mut take = |n: usize| -> Vec<f64> { numbers.take(n).collect() };
    let fetched = sites.into_iter().map(|SiteExperts { site, experts }| {
        let m = experts.len();
        let (tokens, probs) = (take(groups), take(m));
        let rows = |flat: Vec<f64>| flat.chunks(m).map(<[f64]>::to_vec).collect();
        let (weights, assignments) = (rows(take(groups * m)), rows(take(groups * m)));
        let entropy = take(groups);
        let squared_lse = take(1)[0];
        SiteTotals { site, experts, tokens, probs, weights, assignments, entropy, squared_lse }
    });
    fetched.collect()
}

/// A site's name and its experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteExperts {
    /// The name, as [`crate::model::Site`] displays it.
    pub site: String,
    /// The experts that the site routes over.
    pub experts: Vec<usize>,
}

impl SiteExperts {
    /// The sites of a model, in the order of a forward pass.
    pub fn of(model: &RoutedModel) -> Vec<Self> {
        let of = |site: Site| Self { site: site.to_string(), experts: model.experts_at(site) };
        model.sites().into_iter().map(of).collect()
    }
}

/// Adds the totals of each site to `sums`, which is empty at first.
pub fn add(sums: &mut Vec<SiteTotals>, new: &[SiteTotals]) {
    if sums.is_empty() {
        sums.extend_from_slice(new);
        return;
    }
    let add = |a: &mut [f64], b: &[f64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    for (sum, new) in sums.iter_mut().zip(new) {
        add(&mut sum.tokens, &new.tokens);
        add(&mut sum.probs, &new.probs);
        add(&mut sum.entropy, &new.entropy);
        for (sum, new) in sum.weights.iter_mut().zip(&new.weights) {
            add(sum, new);
        }
        for (sum, new) in sum.assignments.iter_mut().zip(&new.assignments) {
            add(sum, new);
        }
        sum.squared_lse += new.squared_lse;
    }
}

/// How well the router of a site knows the domains.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SiteSupervision {
    /// The domain supervision, nats.
    pub loss: f64,
    /// Share of the tokens whose most probable expert is one of their domain's.
    pub accuracy: f64,
}

impl SiteSupervision {
    /// The means of sites whose sums over `num_tokens` tokens are `sums`, `[sites * 2]`.
    pub(crate) fn of_sums(sums: &[f64], num_tokens: u64) -> Vec<Self> {
        let tokens = num_tokens as f64;
        let of = |sums: &[f64]| Self { loss: sums[0] / tokens, accuracy: sums[1] / tokens };
        sums.chunks(2).map(of).collect()
    }

    /// The mean over the sites; `None` if there are none.
    pub fn mean(sites: &[Self]) -> Option<Self> {
        let count = sites.len() as f64;
        let mean = |of: fn(&Self) -> f64| sites.iter().map(of).sum::<f64>() / count;
        let means = || Self { loss: mean(|site| site.loss), accuracy: mean(|site| site.accuracy) };
        (!sites.is_empty()).then(means)
    }
}

/// The routers' losses, without their factors, as means over the sites.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RouterLosses {
    /// Load-balancing loss: 1 when even, m when collapsed.
    pub load_balancing_loss: f64,
    /// Mean squared distance of the mean routing_probs from 1 / m: 0 when even, (m - 1) / m^2 when
    /// collapsed.
    pub uniform_mse: f64,
    /// Mean squared logsumexp of the scores.
    pub router_z_loss: f64,
    /// Mean entropy of routing_probs, nats.
    pub routing_entropy: f64,
}

impl RouterLosses {
    /// The losses over the tokens of `totals`; `None` without a router.
    pub fn new(totals: &[SiteTotals]) -> Option<Self> {
        let mean = |of: &dyn Fn(&SiteTotals) -> f64| {
            totals.iter().map(of).sum::<f64>() / totals.len() as f64
        };
        let means = || Self {
            load_balancing_loss: mean(&|site| {
                let pairs = site.load(None).into_iter().zip(site.mean_probs());
                site.probs.len() as f64 * pairs.map(|(f, p)| f * p).sum::<f64>()
            }),
            uniform_mse: mean(&|site| {
                let m = site.probs.len() as f64;
                site.mean_probs().iter().map(|p| (p - 1.0 / m).powi(2)).sum::<f64>() / m
            }),
            router_z_loss: mean(&|site| site.squared_lse / site.num_tokens()),
            routing_entropy: mean(&|site| site.entropy.iter().sum::<f64>() / site.num_tokens()),
        };
        (!totals.is_empty()).then(means)
    }
}

impl SiteTotals {
    fn num_tokens(&self) -> f64 {
        self.tokens.iter().sum()
    }

    fn mean_probs(&self) -> Vec<f64> {
        self.probs.iter().map(|sum| sum / self.num_tokens()).collect()
    }

    /// The sum of all rows, or the row of one domain.
    fn sum(rows: &[Vec<f64>], domain: Option<usize>) -> Vec<f64> {
        match domain {
            Some(domain) => rows[domain].clone(),
            None => {
                let m = rows.first().map_or(0, Vec::len);
                (0..m).map(|e| rows.iter().map(|row| row[e]).sum()).collect()
            }
        }
    }

    /// Share of assignments per expert, `[m]`.
    fn load(&self, domain: Option<usize>) -> Vec<f64> {
        let sums = Self::sum(&self.assignments, domain);
        let total: f64 = sums.iter().sum();
        sums.into_iter().map(|sum| sum / total).collect()
    }

    /// Mean routing weight per expert, `[m]`.
    fn mean_weights(&self, domain: Option<usize>) -> Vec<f64> {
        let tokens = domain.map_or(self.num_tokens(), |domain| self.tokens[domain]);
        Self::sum(&self.weights, domain).into_iter().map(|sum| sum / tokens).collect()
    }

    /// Mutual information of expert and domain, nats.
    pub fn mutual_information(&self) -> f64 {
        let total: f64 = self.weights.iter().flatten().sum();
        let by_expert = Self::sum(&self.weights, None);
        let mut information = 0.0;
        for row in &self.weights {
            let of_domain: f64 = row.iter().sum();
            for (&joint, of_expert) in row.iter().zip(&by_expert) {
                if joint > 0.0 {
                    let ratio = joint * total / (of_domain * of_expert);
                    information += joint / total * ratio.ln();
                }
            }
        }
        information.max(0.0)
    }

    fn report(&self, domain: Option<usize>, dead_share: f64) -> SiteReport {
        let tokens = domain.map_or(self.num_tokens(), |domain| self.tokens[domain]);
        let entropy = domain.map_or(self.entropy.iter().sum(), |domain| self.entropy[domain]);
        let expert_load = self.load(domain);
        let least = dead_share / self.experts.len() as f64;
        let mean_routing_weights = self.mean_weights(domain);
        let weights = self.experts.iter().zip(&mean_routing_weights);
        let dead = weights.filter(|(_, weight)| **weight < least);
        SiteReport {
            site: self.site.clone(),
            experts: self.experts.clone(),
            routing_entropy: entropy / tokens,
            mutual_information: domain.is_none().then(|| self.mutual_information()),
            dead_experts: dead.map(|(expert, _)| *expert).collect(),
            mean_routing_weights,
            expert_load,
            domain_supervision: None,
            domain_accuracy: None,
        }
    }
}

/// How tokens were routed at one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    /// The site's name.
    pub site: String,
    /// The experts that the site routes over, `[m]`.
    pub experts: Vec<usize>,
    /// Mean routing weight of each expert, `[m]`.
    pub mean_routing_weights: Vec<f64>,
    /// Share of assignments of each expert, sums to 1, `[m]`.
    pub expert_load: Vec<f64>,
    /// Mean entropy of routing_probs, nats.
    pub routing_entropy: f64,
    /// Mutual information of expert and domain, nats; absent in the report of one domain's tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mutual_information: Option<f64>,
    /// The experts whose mean routing weight is less than `dead_share` of an even weight, 1 / m.
    pub dead_experts: Vec<usize>,
    /// The domain supervision, nats; absent in a window's report and if domains have no experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_supervision: Option<f64>,
    /// Share of the tokens whose most probable expert is one of their domain's; absent likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_accuracy: Option<f64>,
}

impl SiteReport {
    /// Share of the site's experts that are dead.
    pub fn dead_share(&self) -> f64 {
        self.dead_experts.len() as f64 / self.experts.len() as f64
    }

    /// The expert with the largest mean routing weight, and that weight.
    pub fn largest(&self) -> (usize, f64) {
        let weights = self.experts.iter().copied().zip(self.mean_routing_weights.iter().copied());
        weights.max_by(|a, b| a.1.total_cmp(&b.1)).expect("a site has experts")
    }
}

/// How tokens were routed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoutingReport {
    /// Mean routing weight of each expert over the sites, `[e]`. A site that lacks the expert
    /// counts as 0.
    pub mean_routing_weights: Vec<f64>,
    /// Share of assignments of each expert, in the same way, `[e]`; sums to 1.
    pub expert_load: Vec<f64>,
    /// Mean entropy of routing_probs over the sites, nats.
    pub routing_entropy: f64,
    /// Mutual information of expert and domain, nats, as a mean over the sites; absent in the
    /// report of one domain's tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mutual_information: Option<f64>,
    /// Share of dead experts, as a mean over the sites.
    pub dead_share: f64,
    /// The report of each site.
    pub sites: Vec<SiteReport>,
}

impl RoutingReport {
    /// The routing of all tokens of `totals`, or of one domain's tokens; `None` without a router or
    /// tokens. An expert is dead if its mean routing weight is less than `dead_share` of an even
    /// weight.
    pub fn new(totals: &[SiteTotals], domain: Option<usize>, dead_share: f64) -> Option<Self> {
        let has_tokens = |site: &SiteTotals| match domain {
            Some(domain) => site.tokens[domain] > 0.0,
            None => site.num_tokens() > 0.0,
        };
        if !totals.first().is_some_and(has_tokens) {
            return None;
        }
        let sites: Vec<SiteReport> =
            totals.iter().map(|site| site.report(domain, dead_share)).collect();
        let num_experts = sites.iter().flat_map(|site| &site.experts).max().map_or(0, |e| e + 1);
        let count = sites.len() as f64;
        let mean = |of: &dyn Fn(&SiteReport) -> f64| sites.iter().map(of).sum::<f64>() / count;
        let mean_by_expert = |of: &dyn Fn(&SiteReport) -> &Vec<f64>| -> Vec<f64> {
            let mut sums = vec![0.0; num_experts];
            for site in &sites {
                for (expert, value) in site.experts.iter().zip(of(site)) {
                    sums[*expert] += value / count;
                }
            }
            sums
        };
        let information = mean(&|site| site.mutual_information.unwrap_or(0.0));
        Some(Self {
            mean_routing_weights: mean_by_expert(&|site| &site.mean_routing_weights),
            expert_load: mean_by_expert(&|site| &site.expert_load),
            routing_entropy: mean(&|site| site.routing_entropy),
            mutual_information: domain.is_none().then_some(information),
            dead_share: mean(&SiteReport::dead_share),
            sites,
        })
    }

    /// The same report with what is known of how well each site knows the domains.
    pub(super) fn with_supervision(mut self, sites: Option<&[SiteSupervision]>) -> Self {
        for (report, site) in self.sites.iter_mut().zip(sites.unwrap_or_default()) {
            report.domain_supervision = Some(site.loss);
            report.domain_accuracy = Some(site.accuracy);
        }
        self
    }

    /// Messages about how the routing has collapsed by a config's bounds: at most one about experts
    /// with too large a share and one about dead experts. Empty if the routing has not collapsed.
    pub fn collapse(&self, config: &RouterConfig) -> Vec<String> {
        let several = self.sites.iter().filter(|site| site.experts.len() > 1);
        let mut faults = vec![];
        let of = self.sites.len();
        let share = config.collapse_share;
        let over: Vec<_> = several.clone().filter(|site| site.largest().1 > share).collect();
        if let Some(worst) = over.iter().max_by(|a, b| a.largest().1.total_cmp(&b.largest().1)) {
            let (expert, weight) = worst.largest();
            faults.push(format!(
                "expert_{expert} takes {weight:.3} of the routing weight at `{}`, more than \
                 {share} ({} of {of} sites)",
                worst.site,
                over.len()
            ));
        }
        let dead: Vec<_> = several.filter(|site| !site.dead_experts.is_empty()).collect();
        if let Some(worst) = dead.iter().max_by(|a, b| a.dead_share().total_cmp(&b.dead_share())) {
            let names: Vec<String> =
                worst.dead_experts.iter().map(|expert| format!("expert_{expert}")).collect();
            faults.push(format!(
                "{} of {} experts are dead at `{}` ({}), with less than {} of an even weight \
                 ({} of {of} sites)",
                worst.dead_experts.len(),
                worst.experts.len(),
                worst.site,
                names.join(", "),
                config.dead_share,
                dead.len(),
            ));
        }
        faults
    }
}
