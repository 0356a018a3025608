//! How the routing weights of label tokens are distributed: for each expert, how many of the tokens
//! give it which weight, over all sites that have the expert.
//!
//! Letters of shapes: `s` site, `n` label tokens, `e` expert, `k` bucket.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::dist::World;
use crate::model::batch::Labelled;
use crate::model::routing::router::Routing;
use crate::model::routing::totals::rows;

/// Number of buckets, all equally wide, from 0 to 1.
pub const NUM_BUCKETS: i64 = 30;

/// The distribution of the weights of one expert.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightHistogram {
    /// The smallest weight and the largest one.
    pub range: [f64; 2],
    /// The sum of the weights.
    pub sum: f64,
    /// The sum of their squares.
    pub sum_squares: f64,
    /// How many weights lie in each of [`NUM_BUCKETS`] buckets from 0 to 1. Larger ones count in
    /// the last bucket.
    pub counts: Vec<f64>,
}

/// Sums over batches, on the device.
#[derive(Debug)]
pub(super) struct HistogramTotals {
    /// `[e, k]`, f64.
    counts: Tensor,
    /// Sums of the weights and of their squares, `[2, e]`, f64.
    sums: Tensor,
    /// Smallest and largest weights, `[e]` each, f64.
    ends: [Tensor; 2],
}

impl HistogramTotals {
    /// The totals of a batch; `None` without a router.
    fn new(routing: &[Routing], labelled: Labelled<'_>) -> Option<Self> {
        let weights: Vec<_> =
            routing.iter().map(|site| rows(&site.weights, labelled.rows)).collect();
        let first = weights.first()?;
        let (n, e) = first.size2().expect("rows are [n, e]");
        let options = (Kind::Double, first.device());
        let weights_sne = Tensor::stack(&weights, 0).to_kind(Kind::Double);
        let present: Vec<_> = routing.iter().map(|site| present(site, e)).collect();
        let counted_ne = labelled.only_counted(Tensor::ones([n, 1], options), 0);
        let mask_sne = (Tensor::stack(&present, 0).to_device(options.1).unsqueeze(1) * counted_ne)
            .expand_as(&weights_sne);
        let bucket = (&weights_sne * NUM_BUCKETS as f64).floor().clamp(0, NUM_BUCKETS - 1);
        let offset = Tensor::arange(e, (Kind::Int64, options.1)) * NUM_BUCKETS;
        let index = (bucket.to_kind(Kind::Int64) + offset).reshape([-1]);
        let counts = Tensor::zeros([e * NUM_BUCKETS], options)
            .index_add(0, &index, &mask_sne.reshape([-1]))
            .view([e, NUM_BUCKETS]);
        let sum = |x: Tensor| x.sum_dim_intlist([0_i64, 1].as_slice(), false, Kind::Double);
        let masked = &weights_sne * &mask_sne;
        let absent = mask_sne.eq(0.0);
        let end = |fill: f64| weights_sne.masked_fill(&absent, fill);
        Some(Self {
            counts,
            sums: Tensor::stack(&[sum(masked.shallow_clone()), sum(&masked * &weights_sne)], 0),
            ends: [
                end(f64::INFINITY).amin([0_i64, 1].as_slice(), false),
                end(f64::NEG_INFINITY).amax([0_i64, 1].as_slice(), false),
            ],
        })
    }

    /// Adds a batch to the totals, which are `None` before the first one and without a router.
    pub(super) fn add(totals: &mut Option<Self>, routing: &[Routing], labelled: Labelled<'_>) {
        let Some(new) = Self::new(routing, labelled) else { return };
        let Some(sum) = totals else {
            *totals = Some(new);
            return;
        };
        sum.counts = &sum.counts + new.counts;
        sum.sums = &sum.sums + new.sums;
        let [low, high] = &new.ends;
        sum.ends = [sum.ends[0].minimum(low), sum.ends[1].maximum(high)];
    }

    /// The histogram of each expert over all processes of `world`, each of which makes one
    /// transfer. An expert that no site has is `None`.
    ///
    /// - `totals`: those of this process, if it had a batch and there is a router
    pub(super) fn fetch(
        totals: Option<&Self>,
        world: &World,
    ) -> Result<Vec<Option<WeightHistogram>>> {
        let numbers = totals.map_or_else(|| Ok(vec![]), Self::numbers)?;
        let all = world.exchange(&serde_json::to_vec(&numbers)?)?;
        let mut histograms: Vec<Option<WeightHistogram>> = vec![];
        for numbers in &all {
            let numbers: Vec<Option<f64>> = serde_json::from_slice(numbers)?;
            for (expert, own) in of_numbers(&numbers).into_iter().enumerate() {
                match histograms.get_mut(expert) {
                    None => histograms.push(own),
                    Some(sum) => *sum = together(sum.take(), own),
                }
            }
        }
        Ok(histograms)
    }

    /// All numbers: counts, sums, sums of squares, and both ends. An end that is not finite is
    /// `None`: no site has the expert.
    fn numbers(&self) -> Result<Vec<Option<f64>>> {
        let [low, high] = &self.ends;
        let flat = [&self.counts, &self.sums, low, high].map(|x| x.reshape([-1]));
        let numbers = Vec::<f64>::try_from(Tensor::cat(&flat, 0))?;
        Ok(numbers.into_iter().map(|number| Some(number).filter(|x| x.is_finite())).collect())
    }
}

/// The histogram of each expert, from [`HistogramTotals::numbers`].
fn of_numbers(numbers: &[Option<f64>]) -> Vec<Option<WeightHistogram>> {
    let e = numbers.len() / (NUM_BUCKETS as usize + 4);
    let (counts, others) = numbers.split_at(e * NUM_BUCKETS as usize);
    let of = |expert: usize| {
        let number = |which: usize| others[which * e + expert];
        let counts = counts.chunks(NUM_BUCKETS as usize).nth(expert)?;
        Some(WeightHistogram {
            range: [number(2)?, number(3)?],
            sum: number(0)?,
            sum_squares: number(1)?,
            counts: counts.iter().copied().collect::<Option<_>>()?,
        })
    };
    (0..e).map(of).collect()
}

/// The histogram of the weights of both.
fn together(a: Option<WeightHistogram>, b: Option<WeightHistogram>) -> Option<WeightHistogram> {
    let (Some(a), Some(b)) = (&a, &b) else { return a.or(b) };
    Some(WeightHistogram {
        range: [a.range[0].min(b.range[0]), a.range[1].max(b.range[1])],
        sum: a.sum + b.sum,
        sum_squares: a.sum_squares + b.sum_squares,
        counts: a.counts.iter().zip(&b.counts).map(|(a, b)| a + b).collect(),
    })
}

/// 1 for each expert that a site has and 0 for the others, `[e]`.
fn present(site: &Routing, num_experts: i64) -> Tensor {
    let options = (Kind::Double, site.weights.device());
    match &site.present {
        None => Tensor::ones([num_experts], options),
        Some(experts) => Tensor::zeros([num_experts], options).index_fill(0, experts, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(weights: &[f64], present: Option<&[i64]>) -> Routing {
        let weights = Tensor::from_slice(weights).view([1, -1, 2]);
        Routing {
            clean: weights.shallow_clone(),
            logits: weights.shallow_clone(),
            probs: weights.shallow_clone(),
            weights,
            selected: None,
            present: present.map(Tensor::from_slice),
        }
    }

    /// Two sites, of which the second lacks expert 0, and three tokens, of which the second has no
    /// label.
    #[test]
    fn each_label_token_counts_once_at_each_site_that_has_the_expert() -> Result<()> {
        let routing = [
            site(&[0.25, 0.75, 0.5, 0.5, 1.0, 0.0], None),
            site(&[0.0, 1.0, 0.0, 1.0, 0.0, 1.0], Some(&[1])),
        ];
        let (rows, groups) = (Tensor::from_slice(&[0_i64, 2]), Tensor::from_slice(&[0_i64, 0]));
        let labelled = Labelled { rows: &rows, groups: &groups, num_groups: 1, counted: None };
        let mut totals = None;
        for _ in 0..2 {
            HistogramTotals::add(&mut totals, &routing, labelled);
        }
        let found = HistogramTotals::fetch(totals.as_ref(), &World::single())?;
        let [first, second] = [0, 1].map(|e| found[e].as_ref().expect("a site has it"));
        assert_eq!((first.range, first.sum, first.sum_squares), ([0.25, 1.0], 2.5, 2.125));
        assert_eq!((second.range, second.sum, second.sum_squares), ([0.0, 1.0], 5.5, 5.125));
        let filled = |histogram: &WeightHistogram| -> Vec<(usize, f64)> {
            let counts = histogram.counts.iter().copied().enumerate();
            counts.filter(|(_, count)| *count > 0.0).collect()
        };
        assert_eq!(filled(first), [(7, 2.0), (29, 2.0)]);
        assert_eq!(filled(second), [(0, 2.0), (22, 2.0), (29, 4.0)]);
        assert!(HistogramTotals::new(&[], labelled).is_none());
        Ok(())
    }

    #[test]
    fn histograms_of_two_processes_are_those_of_all_their_tokens() -> Result<()> {
        let (rows, groups) = (Tensor::from_slice(&[0_i64]), Tensor::from_slice(&[0_i64]));
        let labelled = Labelled { rows: &rows, groups: &groups, num_groups: 1, counted: None };
        let batches = [[site(&[0.25, 0.75], None)], [site(&[0.5, 0.5], Some(&[1]))]];
        let (mut all, mut apart) = (None, vec![]);
        for batch in &batches {
            HistogramTotals::add(&mut all, batch, labelled);
            let own = HistogramTotals::new(batch, labelled);
            apart.push(HistogramTotals::fetch(own.as_ref(), &World::single())?);
        }
        let [first, second] = [apart.remove(0), apart.remove(0)];
        let joined: Vec<_> = first.into_iter().zip(second).map(|(a, b)| together(a, b)).collect();
        assert_eq!(joined, HistogramTotals::fetch(all.as_ref(), &World::single())?);
        Ok(())
    }

    #[test]
    fn an_expert_that_no_site_has_has_no_histogram() -> Result<()> {
        let (rows, groups) = (Tensor::from_slice(&[0_i64]), Tensor::from_slice(&[0_i64]));
        let labelled = Labelled { rows: &rows, groups: &groups, num_groups: 1, counted: None };
        let totals = HistogramTotals::new(&[site(&[0.0, 1.0], Some(&[1]))], labelled);
        let found = HistogramTotals::fetch(totals.as_ref(), &World::single())?;
        assert!(found[0].is_none() && found[1].is_some());
        Ok(())
    }
}
