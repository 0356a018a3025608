//! The order of an epoch: a function of the seed, the epoch and the numbers of blocks alone.
//!
//! Each domain has a fixed permutation of its blocks, repeated without end. With n blocks and weight
//! w, epoch e takes the places from `ceil(e w n)` up to `ceil((e + 1) w n)`: all blocks once for
//! w = 1, a half and then the other half for w = 0.5. So however long the run is, no block of a
//! domain is used more than once more than another. The blocks that an epoch takes from all domains
//! are then shuffled together.
//!
//! The shuffles are written out here (Fisher-Yates over ChaCha8) rather than taken from `rand`,
//! whose algorithms may change: a run resumes in the same order under any version.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

/// A block of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockId {
    /// Index of its domain in the dataset.
    pub domain: u32,
    /// Index of the block in its domain.
    pub block: u32,
}

/// What a shuffle is for; each use has random numbers of its own.
enum Stream {
    /// The permutation of a domain's blocks.
    Domain(u32),
    /// The shuffle of an epoch.
    Epoch(u64),
}

/// The blocks of an epoch in order; `domains` are the numbers of blocks and the weights.
pub(super) fn epoch_order(domains: &[(usize, f64)], seed: u64, epoch: u64) -> Vec<BlockId> {
    let mut order = Vec::new();
    for (domain, (num_blocks, weight)) in (0..).zip(domains) {
        let mut permutation: Vec<u32> = (0..*num_blocks as u32).collect();
        shuffle(&mut permutation, seed, Stream::Domain(domain));
        let places = places(*num_blocks, *weight, epoch);
        order.extend(places.map(|place| BlockId {
            domain,
            block: permutation[(place % *num_blocks as u64) as usize],
        }));
    }
    shuffle(&mut order, seed, Stream::Epoch(epoch));
    order
}

/// The places that epoch `epoch` takes of a domain's repeated permutation.
pub(super) fn places(num_blocks: usize, weight: f64, epoch: u64) -> std::ops::Range<u64> {
    // the margin keeps rounding from turning 7 into 8: 0.07 * 100 = 7.000000000000001
    let place = |epoch: u64| (epoch as f64 * weight * num_blocks as f64 - 1e-6).ceil() as u64;
    place(epoch)..place(epoch + 1)
}

/// Fisher-Yates from the back. The index below `n` is the upper half of a 64-bit draw times `n`,
/// whose bias is below n / 2^64.
fn shuffle<T>(items: &mut [T], seed: u64, stream: Stream) {
    let (tag, number) = match stream {
        Stream::Domain(domain) => (0_u64, u64::from(domain)),
        Stream::Epoch(epoch) => (1, epoch),
    };
    let mut key = [0; 32];
    for (part, value) in key.chunks_exact_mut(8).zip([seed, tag, number]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(key);
    for last in (1..items.len()).rev() {
        let draw = u128::from(rng.next_u64()) * (last as u128 + 1);
        items.swap(last, (draw >> 64) as usize);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reference: ChaCha8 and the shuffle of this file's docs, written again in Python.
    #[test]
    fn the_order_never_changes() {
        let order = |seed, epoch| -> Vec<u32> {
            epoch_order(&[(10, 1.0)], seed, epoch).iter().map(|id| id.block).collect()
        };
        assert_eq!(order(0, 0), [9, 4, 1, 0, 7, 2, 6, 5, 8, 3]);
        assert_eq!(order(0, 1), [2, 4, 5, 8, 7, 3, 9, 6, 1, 0]);
        assert_eq!(order(1, 0), [2, 4, 7, 0, 1, 5, 3, 8, 6, 9]);
    }

    #[test]
    fn half_a_weight_takes_the_two_halves_in_turn() {
        let half = |epoch| {
            let mut blocks = epoch_order(&[(8, 0.5)], 3, epoch);
            blocks.sort();
            blocks
        };
        assert_eq!((half(0).len(), half(1).len()), (4, 4));
        assert_eq!((half(2), half(3)), (half(0), half(1)));
        assert!(half(0).iter().all(|block| !half(1).contains(block)));
    }

    proptest! {
        #[test]
        fn each_block_is_used_as_often_as_its_weight_says(
            domains in prop::collection::vec((0..20_usize, 0.05..3.0_f64), 1..4),
            seed in any::<u64>(),
            num_epochs in 1..12_u64,
        ) {
            let mut used: Vec<_> = domains.iter().map(|(n, _)| vec![0_u64; *n]).collect();
            for epoch in 0..num_epochs {
                let order = epoch_order(&domains, seed, epoch);
                let expected: u64 = domains
                    .iter()
                    .map(|(n, weight)| places(*n, *weight, epoch))
                    .map(|places| places.end - places.start)
                    .sum();
                prop_assert_eq!(order.len() as u64, expected);
                for id in order {
                    used[id.domain as usize][id.block as usize] += 1;
                }
            }
            for (used, (num_blocks, weight)) in used.iter().zip(&domains) {
                let total = num_epochs as f64 * weight * *num_blocks as f64;
                prop_assert!((used.iter().sum::<u64>() as f64 - total).abs() < 1.0);
                let most = used.iter().max().unwrap_or(&0);
                prop_assert!(used.iter().all(|count| count + 1 >= *most));
            }
        }

        #[test]
        fn a_weight_of_one_is_a_permutation(n in 0..50_usize, epoch in 0..1_000_u64) {
            let mut order = epoch_order(&[(n, 1.0)], 5, epoch);
            order.sort();
            prop_assert_eq!(order.len(), n);
            prop_assert!(order.iter().enumerate().all(|(i, id)| id.block as usize == i));
        }
    }
}
