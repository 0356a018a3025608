//! Random tokens as a [`TokenDataset`]: one document in each block, or short documents packed.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::config::LossOn;
use crate::data::{MemoryDocument, MemoryDomain, TokenDataset};

/// The standard deviation of the logarithm of the lengths of short documents.
pub const LENGTH_SIGMA: f64 = 0.6;

/// The domain's name.
const DOMAIN: &str = "random";

/// At least `num_blocks` blocks of random tokens. The same seed gives the same tokens.
///
/// - `median`: the median of the documents' lengths, in positions. The lengths are lognormal with
///   [`LENGTH_SIGMA`], and are clamped to `1..=seq_len`. With `None` each block is one document.
pub fn random_tokens(
    seq_len: usize,
    num_blocks: usize,
    vocab_size: i64,
    median: Option<f64>,
    seed: u64,
) -> TokenDataset {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut documents = vec![];
    let mut positions = 0;
    while positions < seq_len * num_blocks {
        let len = match median {
            None => seq_len,
            Some(median) => {
                let len = median * (LENGTH_SIGMA * normal(&mut rng)).exp();
                (len.round() as usize).clamp(1, seq_len)
            }
        };
        positions += len;
        // n positions read n tokens, and the last target is one token more
        let token = |_| (u64::from(rng.next_u32()) % vocab_size as u64) as u32;
        let tokens = (0..=len).map(token).collect();
        documents.push(MemoryDocument { tokens, prompt_len: 0, expert: None });
    }
    let domain = MemoryDomain { name: DOMAIN.into(), weight: 1.0, documents };
    TokenDataset::in_memory(seq_len, LossOn::All, vec![domain])
}

/// A number from N(0, 1), by the method of Box and Muller.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let mut uniform = || (f64::from(rng.next_u32()) + 1.0) / (f64::from(u32::MAX) + 1.0);
    let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
    radius * angle.cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_one_document_or_packed_short_ones() {
        let whole = random_tokens(64, 10, 61, None, 1);
        assert_eq!((whole.num_blocks(), whole.domains[0].counts.documents), (10, 10));
        assert_eq!(whole.domains[0].counts.label_tokens, 640);
        let packed = random_tokens(64, 400, 61, Some(12.0), 1);
        let counts = packed.domains[0].counts;
        assert!(counts.padding_share(64) < 0.01, "{counts:?}");
        // the mean of a lognormal is its median times exp(sigma^2 / 2), here 14.4
        let mean = counts.positions as f64 / counts.documents as f64;
        assert!((13.8..15.0).contains(&mean), "{mean}");
        assert_eq!(random_tokens(64, 400, 61, Some(12.0), 1).fingerprint(), packed.fingerprint());
        let batch = packed.batch(&packed.eval_order());
        assert!(batch.input_ids.iter().all(|id| (0..61).contains(id)));
    }
}
