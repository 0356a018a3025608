//! The order of the blocks in an epoch. It depends only on the seed, the epoch, each domain's
//! number of blocks and weight, `data.mixing` and `data.on_exhausted`.
//!
//! There are D domains with N blocks in total. Domain d has n_d blocks and weight w_d. Its share
//! s_d of the blocks is
//!
//! - `proportional`: `w_d n_d / sum_j w_j n_j`;
//! - `temperature` T: `(w_d n_d)^(1/T) / sum_j (w_j n_j)^(1/T)`. This is T5's temperature-scaled
//!   mixing (arXiv:1910.10683, section 3.5.2), and mT5's `p ~ |L|^alpha` with `alpha = 1 / T`
//!   (arXiv:2010.11934). T = 1 gives the shares of `proportional`, and a large T makes the shares
//!   nearly equal. Unlike T5, we do not draw samples and set no limit to n_d;
//! - `weights`: `w_d / sum_j w_j`;
//! - `interleaved`: `1 / D`.
//!
//! A domain without blocks has share 0 and does not count in D.
//!
//! **Which blocks an epoch takes.** The blocks of each domain are permuted once, and this
//! permutation is repeated without end. With `repeat`, an epoch takes q_d blocks from domain d:
//! `w_d n_d` (that is, w_d passes) with `proportional`, and `s_d N` with every other mixing. This
//! quota need not be a whole number: epoch e takes the positions from `ceil(e q_d)` up to, but not
//! including, `ceil((e + 1) q_d)` of the repeated permutation. With q_d = n_d, each epoch takes
//! every block once; with q_d = n_d / 2, the epochs take the first and the second half of the
//! permutation in turn. However long the run is, two blocks of a domain are therefore used equally
//! often, or one of them once more than the other. With `end`, an epoch takes each block once.
//!
//! **In which order.** The blocks that an epoch takes from a domain are shuffled. The i-th of them,
//! counted from 0, gets the key `(i + u_i) / s_d` with u_i uniform in [0, 1). The blocks of all
//! domains are then sorted by key, and equal keys by domain. With `interleaved`, `u_i = 0`, so that
//! the domains strictly take turns: d0, d1, .., d0, d1, ..
//!
//! **How close each prefix is to the shares.** Among the blocks with keys up to x, domain d has
//! `floor(x s_d)` blocks or one more, that is `x s_d + e_d` with `-1 < e_d <= 1`. There are
//! `m = x + sum_j e_j` such blocks in total, so domain d has
//! `m s_d + (1 - s_d) e_d - s_d sum_(j != d) e_j` of them. This differs from `m s_d` by at most
//! `(1 - s_d) + s_d (D - 1) = 1 + s_d (D - 2)` blocks: by at most 1 with two domains, and by 0 with
//! one. With `repeat`, the bound holds throughout an epoch, since the number of blocks that an
//! epoch takes from a domain differs from q_d by less than 1. With `end`, it holds until the first
//! domain has no blocks left; after that, the other domains continue in the ratio of their shares.
//!
//! The shuffle is implemented here (Fisher-Yates over ChaCha8) because the algorithms of `rand` may
//! change between versions, and a run must resume in the same order.

use std::ops::Range;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::config::{Mixing, OnExhausted};

/// A block of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockId {
    /// Index of its domain in the dataset.
    pub domain: u32,
    /// Index of the block in its domain.
    pub block: u32,
}

/// The independent streams of random numbers, one for each use.
enum Stream {
    /// The permutation of a domain's blocks.
    Permutation { domain: u32 },
    /// The shuffle of the blocks that an epoch takes from a domain.
    Epoch { epoch: u64, domain: u32 },
    /// The numbers `u_i` in the keys of these blocks.
    Keys { epoch: u64, domain: u32 },
}

impl Stream {
    fn rng(self, seed: u64) -> ChaCha8Rng {
        let (tag, epoch_or_domain, domain): (u64, u64, u32) = match self {
            Self::Permutation { domain } => (0, domain.into(), 0),
            Self::Epoch { epoch, domain } => (1, epoch, domain),
            Self::Keys { epoch, domain } => (2, epoch, domain),
        };
        let mut key = [0; 32];
        let values = [seed, tag, epoch_or_domain, domain.into()];
        for (part, value) in key.chunks_exact_mut(8).zip(values) {
            part.copy_from_slice(&value.to_le_bytes());
        }
        ChaCha8Rng::from_seed(key)
    }
}

/// What the order depends on besides the seed and the epoch.
#[derive(Debug)]
pub(super) struct Mix {
    /// Each domain's number of blocks and its weight.
    pub domains: Vec<(usize, f64)>,
    pub mixing: Mixing,
    pub on_exhausted: OnExhausted,
}

impl Mix {
    /// Each domain's share of the blocks; 0 for a domain without blocks.
    pub fn shares(&self) -> Vec<f64> {
        let raw = |&(num_blocks, weight): &(usize, f64)| match self.mixing {
            _ if num_blocks == 0 => 0.0,
            Mixing::Proportional | Mixing::Temperature(_) => weight * num_blocks as f64,
            Mixing::Weights => weight,
            Mixing::Interleaved => 1.0,
        };
        let mut shares: Vec<f64> = self.domains.iter().map(raw).collect();
        if let Mixing::Temperature(temperature) = self.mixing {
            // relative to the largest: powers of numbers from 0 to 1 stay in the range of f64
            let largest = shares.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
            shares.iter_mut().for_each(|share| *share = (*share / largest).powf(1.0 / temperature));
        }
        let sum: f64 = shares.iter().sum();
        if sum > 0.0 {
            shares.iter_mut().for_each(|share| *share /= sum);
        }
        shares
    }

    /// The range of positions that epoch `epoch` takes from each domain's repeated permutation.
    pub fn places(&self, epoch: u64) -> Vec<Range<u64>> {
        let num_blocks: usize = self.domains.iter().map(|(num_blocks, _)| num_blocks).sum();
        let quota = |&(of_domain, weight): &(usize, f64), share: f64| match self.mixing {
            Mixing::Proportional => weight * of_domain as f64,
            _ => share * num_blocks as f64,
        };
        let place = |epoch: u64, quota: f64| {
            // the margin absorbs rounding: 0.07 * 100 = 7.000000000000001, whose `ceil` is 8
            (epoch as f64 * quota - 1e-6).ceil() as u64
        };
        let places = |(domain, share): (&(usize, f64), f64)| match self.on_exhausted {
            OnExhausted::Repeat => {
                let quota = quota(domain, share);
                place(epoch, quota)..place(epoch + 1, quota)
            }
            OnExhausted::End if share > 0.0 => 0..domain.0 as u64,
            OnExhausted::End => 0..0,
        };
        self.domains.iter().zip(self.shares()).map(places).collect()
    }

    /// The blocks of epoch `epoch`, in order.
    pub fn order(&self, seed: u64, epoch: u64) -> Vec<BlockId> {
        let mut keyed: Vec<(f64, BlockId)> = Vec::new();
        let places = self.places(epoch).into_iter().zip(self.shares());
        for (domain, (places, share)) in (0..).zip(places) {
            let num_blocks = self.domains[domain as usize].0;
            let mut permutation: Vec<u32> = (0..num_blocks as u32).collect();
            shuffle(&mut permutation, Stream::Permutation { domain }.rng(seed));
            let mut blocks: Vec<u32> =
                places.map(|place| permutation[(place % num_blocks as u64) as usize]).collect();
            shuffle(&mut blocks, Stream::Epoch { epoch, domain }.rng(seed));
            let mut rng = Stream::Keys { epoch, domain }.rng(seed);
            keyed.extend(blocks.into_iter().enumerate().map(|(i, block)| {
                let jitter = match self.mixing {
                    Mixing::Interleaved => 0.0,
                    _ => uniform(&mut rng),
                };
                ((i as f64 + jitter) / share, BlockId { domain, block })
            }));
        }
        // the sort is stable, so that equal keys stay in the order of the domains
        keyed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        keyed.into_iter().map(|(_, id)| id).collect()
    }
}

/// A uniform number in [0, 1): the upper 53 bits of a 64-bit draw.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    const UNIT: f64 = 1.0 / (1_u64 << 53) as f64;
    (rng.next_u64() >> 11) as f64 * UNIT
}

/// Shuffles by Fisher-Yates, beginning with the last item. A random index below `n` is the upper
/// half of the 128-bit product of `n` and a 64-bit draw; its bias is below n / 2^64.
fn shuffle<T>(items: &mut [T], mut rng: ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        let draw = u128::from(rng.next_u64()) * (last as u128 + 1);
        items.swap(last, (draw >> 64) as usize);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mix(domains: &[(usize, f64)], mixing: Mixing, on_exhausted: OnExhausted) -> Mix {
        Mix { domains: domains.to_vec(), mixing, on_exhausted }
    }

    fn proportional(domains: &[(usize, f64)]) -> Mix {
        mix(domains, Mixing::Proportional, OnExhausted::Repeat)
    }

    /// By how many blocks a domain with `share` may differ from its share, by this file's docs.
    fn bound(share: f64, num_domains: usize) -> f64 {
        // the last term allows for the rounding of f64
        1.0 + share * (num_domains as f64 - 2.0) + 1e-6
    }

    /// The largest difference of a domain from its share of a prefix of `order`, relative to its
    /// bound.
    fn worst(order: &[BlockId], shares: &[f64]) -> f64 {
        let num_domains = shares.iter().filter(|share| **share > 0.0).count();
        let mut counts = vec![0_u64; shares.len()];
        let mut worst: f64 = 0.0;
        for (n, id) in (1..).zip(order) {
            counts[id.domain as usize] += 1;
            for (count, share) in counts.iter().zip(shares) {
                let distance = (*count as f64 - f64::from(n) * share).abs();
                worst = worst.max(distance / bound(*share, num_domains));
            }
        }
        worst
    }

    /// The prefix of `order` that ends just before the first domain uses its last block.
    fn before_any_ends<'a>(order: &'a [BlockId], domains: &[(usize, f64)]) -> &'a [BlockId] {
        let mut left: Vec<usize> = domains.iter().map(|(num_blocks, _)| *num_blocks).collect();
        let end = order.iter().position(|id| {
            left[id.domain as usize] -= 1;
            left[id.domain as usize] == 0
        });
        &order[..end.unwrap_or(order.len())]
    }

    fn any_mixing() -> impl Strategy<Value = Mixing> {
        prop_oneof![
            Just(Mixing::Proportional),
            (0.5..20.0_f64).prop_map(Mixing::Temperature),
            Just(Mixing::Weights),
            Just(Mixing::Interleaved),
        ]
    }

    fn any_domains() -> impl Strategy<Value = Vec<(usize, f64)>> {
        prop::collection::vec((0..40_usize, 0.05..3.0_f64), 1..6)
    }

    /// Reference: ChaCha8 and the rules in this file's docs, reimplemented in Python.
    #[test]
    fn the_order_never_changes() {
        let order = |seed, epoch| -> Vec<u32> {
            let order = proportional(&[(10, 1.0)]).order(seed, epoch);
            order.iter().map(|id| id.block).collect()
        };
        assert_eq!(order(0, 0), [9, 4, 1, 0, 7, 2, 6, 5, 8, 3]);
        assert_eq!(order(0, 1), [2, 4, 5, 8, 7, 3, 9, 6, 1, 0]);
        assert_eq!(order(1, 0), [2, 4, 7, 0, 1, 5, 3, 8, 6, 9]);
    }

    /// Reference: the same reimplementation in Python.
    #[test]
    fn the_order_of_several_domains_never_changes() {
        use Mixing::{Interleaved, Proportional, Temperature, Weights};
        use OnExhausted::{End, Repeat};
        let order = |domains: &[(usize, f64)], mixing, on_exhausted| -> Vec<(u32, u32)> {
            let order = mix(domains, mixing, on_exhausted).order(7, 1);
            order.iter().map(|id| (id.domain, id.block)).collect()
        };
        assert_eq!(
            order(&[(5, 1.0), (3, 2.0)], Proportional, Repeat),
            [
                (1, 2),
                (0, 4),
                (0, 0),
                (1, 1),
                (1, 0),
                (0, 2),
                (1, 2),
                (0, 3),
                (1, 1),
                (1, 0),
                (0, 1)
            ]
        );
        assert_eq!(
            order(&[(8, 1.0), (2, 1.0)], Temperature(2.0), Repeat),
            [(0, 4), (1, 1), (0, 2), (0, 6), (1, 0), (0, 7), (0, 5), (0, 0), (1, 0), (0, 1)]
        );
        assert_eq!(
            order(&[(6, 1.0), (4, 3.0)], Weights, Repeat),
            [(1, 3), (0, 0), (1, 1), (1, 1), (0, 2), (1, 0), (1, 2), (1, 3), (1, 0)]
        );
        assert_eq!(
            order(&[(6, 1.0), (3, 3.0)], Weights, End),
            [(1, 2), (0, 5), (1, 1), (1, 0), (0, 1), (0, 0), (0, 3), (0, 4), (0, 2)]
        );
        assert_eq!(
            order(&[(5, 1.0), (3, 1.0)], Interleaved, Repeat),
            [(0, 3), (1, 2), (0, 4), (1, 0), (0, 0), (1, 1), (0, 2), (1, 2)]
        );
        assert_eq!(
            order(&[(5, 1.0), (2, 1.0)], Interleaved, End),
            [(0, 4), (1, 1), (0, 0), (1, 0), (0, 2), (0, 3), (0, 1)]
        );
    }

    #[test]
    fn shares_follow_their_formulas() {
        for (mixing, expected) in [
            (Mixing::Proportional, [0.9, 0.0, 0.1]),
            (Mixing::Temperature(1.0), [0.9, 0.0, 0.1]),
            (Mixing::Temperature(2.0), [0.75, 0.0, 0.25]),
            (Mixing::Temperature(1e-9), [1.0, 0.0, 0.0]),
            (Mixing::Temperature(1e300), [0.5, 0.0, 0.5]),
            (Mixing::Weights, [1.0 / 3.0, 0.0, 2.0 / 3.0]),
            (Mixing::Interleaved, [0.5, 0.0, 0.5]),
        ] {
            let domains = [(90, 1.0), (0, 5.0), (5, 2.0)];
            let shares = mix(&domains, mixing, OnExhausted::Repeat).shares();
            let differences = shares.iter().zip(expected).map(|(a, b)| (a - b).abs());
            assert!(differences.fold(0.0, f64::max) < 1e-15, "{mixing:?}: {shares:?}");
        }
        for mixing in [Mixing::Proportional, Mixing::Temperature(2.0), Mixing::Weights] {
            assert_eq!(mix(&[(0, 1.0)], mixing, OnExhausted::Repeat).shares(), [0.0]);
        }
    }

    #[test]
    fn half_a_weight_takes_the_two_halves_in_turn() {
        let half = |epoch| {
            let mut blocks = proportional(&[(8, 0.5)]).order(3, epoch);
            blocks.sort();
            blocks
        };
        assert_eq!((half(0).len(), half(1).len()), (4, 4));
        assert_eq!((half(2), half(3)), (half(0), half(1)));
        assert!(half(0).iter().all(|block| !half(1).contains(block)));
    }

    #[test]
    fn a_domain_that_is_through_leaves_the_epoch_to_the_others() {
        let domains = [(300, 1.0), (20, 2.0), (300, 3.0)];
        let order = mix(&domains, Mixing::Weights, OnExhausted::End).order(1, 0);
        let last = order.iter().rposition(|id| id.domain == 1).expect("it has blocks");
        // the domain has 20 blocks and a third of the mix
        assert!((57..=63).contains(&last), "{last}");
        let rest = &order[last + 1..last + 201];
        let others = rest.iter().filter(|id| id.domain == 2).count();
        assert!((148..=152).contains(&others), "{others} of 200 at 3 to 1");
        let alone = order.iter().rposition(|id| id.domain == 2).expect("it has blocks");
        assert!(order[alone + 1..].iter().all(|id| id.domain == 0));
    }

    proptest! {
        #[test]
        fn every_prefix_keeps_the_mix(
            domains in any_domains(),
            mixing in any_mixing(),
            seed in any::<u64>(),
            epoch in 0..1_000_u64,
        ) {
            let repeat = mix(&domains, mixing, OnExhausted::Repeat);
            prop_assert!(worst(&repeat.order(seed, epoch), &repeat.shares()) <= 1.0);
            let end = mix(&domains, mixing, OnExhausted::End);
            let order = end.order(seed, epoch);
            prop_assert!(worst(before_any_ends(&order, &domains), &end.shares()) <= 1.0);
        }

        #[test]
        fn some_hundred_blocks_are_within_a_percent_of_the_mix(
            domains in prop::collection::vec((10..2_000_usize, 0.2..3.0_f64), 2..5),
            mixing in any_mixing(),
            seed in any::<u64>(),
        ) {
            let mix = mix(&domains, mixing, OnExhausted::Repeat);
            let epochs = (0..200).flat_map(|epoch| mix.order(seed, epoch));
            let order: Vec<BlockId> = epochs.take(900).collect();
            for (domain, share) in (0..).zip(mix.shares()) {
                let count = order.iter().filter(|id| id.domain == domain).count();
                let realised = count as f64 / 900.0;
                prop_assert!((realised - share).abs() <= 0.01, "{realised} is not {share}");
            }
        }

        #[test]
        fn interleaved_domains_are_strictly_in_turn(
            sizes in prop::collection::vec(1..30_usize, 1..6),
            seed in any::<u64>(),
        ) {
            let domains: Vec<_> = sizes.iter().map(|size| (*size, 1.0)).collect();
            let repeat = mix(&domains, Mixing::Interleaved, OnExhausted::Repeat);
            // the turns also continue from one epoch to the next
            let orders = (0..5).flat_map(|epoch| repeat.order(seed, epoch));
            for (n, id) in orders.enumerate() {
                prop_assert_eq!(id.domain as usize, n % sizes.len());
            }
            let end = mix(&domains, Mixing::Interleaved, OnExhausted::End);
            let rounds = (0..30).flat_map(|round| {
                let sizes = (0..).zip(&sizes);
                sizes.filter(move |(_, size)| round < **size).map(|(domain, _)| domain)
            });
            let order = end.order(seed, 3).into_iter().map(|id| id.domain);
            prop_assert_eq!(order.collect::<Vec<u32>>(), rounds.collect::<Vec<u32>>());
        }

        #[test]
        fn each_block_is_used_as_often_as_its_share_says(
            domains in any_domains(),
            mixing in any_mixing(),
            seed in any::<u64>(),
            num_epochs in 1..12_u64,
        ) {
            let mix = mix(&domains, mixing, OnExhausted::Repeat);
            let mut used: Vec<_> = domains.iter().map(|(n, _)| vec![0_u64; *n]).collect();
            for epoch in 0..num_epochs {
                let order = mix.order(seed, epoch);
                let expected: u64 = mix.places(epoch).iter().map(|of| of.end - of.start).sum();
                prop_assert_eq!(order.len() as u64, expected);
                for id in order {
                    used[id.domain as usize][id.block as usize] += 1;
                }
            }
            let num_blocks: usize = domains.iter().map(|(num_blocks, _)| num_blocks).sum();
            let per_domain = used.iter().zip(&domains).zip(mix.shares());
            for ((used, (of_domain, weight)), share) in per_domain {
                let quota = match mixing {
                    Mixing::Proportional => weight * *of_domain as f64,
                    _ => share * num_blocks as f64,
                };
                let total = num_epochs as f64 * quota;
                prop_assert!((used.iter().sum::<u64>() as f64 - total).abs() < 1.0);
                let most = used.iter().max().unwrap_or(&0);
                prop_assert!(used.iter().all(|count| count + 1 >= *most));
            }
        }

        #[test]
        fn with_end_an_epoch_is_a_permutation(
            domains in any_domains(),
            mixing in any_mixing(),
            epoch in 0..1_000_u64,
        ) {
            let mut order = mix(&domains, mixing, OnExhausted::End).order(5, epoch);
            order.sort();
            let blocks = (0..).zip(&domains).flat_map(|(domain, (num_blocks, _))| {
                (0..*num_blocks as u32).map(move |block| BlockId { domain, block })
            });
            prop_assert_eq!(order, blocks.collect::<Vec<_>>());
        }

        #[test]
        fn a_weight_of_one_is_a_permutation(n in 0..50_usize, epoch in 0..1_000_u64) {
            let mut order = proportional(&[(n, 1.0)]).order(5, epoch);
            order.sort();
            prop_assert_eq!(order.len(), n);
            prop_assert!(order.iter().enumerate().all(|(i, id)| id.block as usize == i));
        }
    }
}
