//! Chooses the next token of each text by its logits.
//!
//! The rules and their order are those of transformers 5.17 (`generation/logits_process.py`):
//!
//! ```text
//! repetition penalty -> divide by the temperature -> top-k -> top-p -> min-p -> draw
//! ```
//!
//! A random number depends on nothing but the seed, the text's key and the position, so that a text
//! does not depend on those it is computed with.
//!
//! Letters of shapes: `b` texts, `v` vocabulary.

use anyhow::{Result, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tch::{Device, Kind, Tensor};

/// How the tokens of a text are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits. 0 takes the most probable token, and no other setting but the repetition
    /// penalty matters then.
    pub temperature: f64,
    /// Only the k most probable tokens, and those as probable as the last of them; 0 for all.
    pub top_k: i64,
    /// Only the most probable tokens whose probabilities reach this sum.
    pub top_p: f64,
    /// Only tokens with at least this share of the largest probability.
    pub min_p: f64,
    /// The logits of tokens that the text contains are divided by this if they are positive, and
    /// else multiplied by it (arXiv:1909.05858). 1 has no effect.
    pub repetition_penalty: f64,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// The most probable token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
    };

    /// Checks the values.
    ///
    /// # Errors
    /// The first value that makes no sense, by its name.
    pub fn check(&self) -> Result<()> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, .. } = *self;
        let is_finite = |x: f64| x.is_finite() && x >= 0.0;
        if !is_finite(temperature) {
            bail!("`temperature` must be at least 0, got {temperature}");
        }
        if top_k < 0 {
            bail!("`top_k` must be at least 0, got {top_k}");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            bail!("`top_p` must be above 0 and at most 1, got {top_p}");
        }
        if !(0.0..=1.0).contains(&min_p) {
            bail!("`min_p` must be between 0 and 1, got {min_p}");
        }
        if !(is_finite(repetition_penalty) && repetition_penalty > 0.0) {
            bail!("`repetition_penalty` must be above 0, got {repetition_penalty}");
        }
        Ok(())
    }

    fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether the token with the largest logit is taken, whatever the text contains.
    pub(super) fn takes_most_probable(&self) -> bool {
        self.is_greedy() && self.repetition_penalty == 1.0
    }

    /// Whether the rule drops tokens, so that they must be sorted.
    fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// A text whose next token is to be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Chooser<'a> {
    /// Its settings.
    pub sampling: &'a Sampling,
    /// Distinguishes texts with the same seed.
    pub key: u64,
    /// Its tokens so far, prompt included.
    pub tokens: &'a [i64],
}

/// The texts of a step.
struct Texts<'a> {
    texts: &'a [Chooser<'a>],
    device: Device,
}

impl Texts<'_> {
    /// A number for each text, `[b, 1]`.
    fn column(&self, of: impl Fn(&Chooser<'_>) -> f64) -> Tensor {
        let values: Vec<f64> = self.texts.iter().map(of).collect();
        Tensor::from_slice(&values).to_device(self.device).unsqueeze(-1)
    }
}

/// The next token of each text, `[b]`, by its logits, `[b, v]`.
pub fn choose(logits: &Tensor, texts: &[Chooser<'_>]) -> Tensor {
    let logits = logits.to_kind(Kind::Float);
    let scores = penalised(&logits, texts);
    if texts.iter().all(|text| text.sampling.is_greedy()) {
        return scores.argmax(-1, false);
    }
    let texts = Texts { texts, device: logits.device() };
    // the draw of a greedy text is replaced below
    let temperature = texts.column(|text| match text.sampling.is_greedy() {
        true => 1.0,
        false => text.sampling.temperature,
    });
    let scaled = scores.to_kind(Kind::Double) / temperature;
    let uniform = texts.column(|text| uniform(text.sampling.seed, text.key, text.tokens.len()));
    let mut probs = scaled.softmax(-1, Kind::Double);
    if texts.texts.iter().any(|text| text.sampling.filters()) {
        let (sorted, order) = scaled.sort(-1, true);
        let kept = kept(&sorted, &texts);
        // back in the order of the vocabulary, in which texts without filters are drawn as well
        probs *= kept.scatter(-1, &order, &kept);
    }
    let drawn = draw(&probs, &uniform);
    if !texts.texts.iter().any(|text| text.sampling.is_greedy()) {
        return drawn;
    }
    let greedy: Vec<bool> = texts.texts.iter().map(|text| text.sampling.is_greedy()).collect();
    let greedy = Tensor::from_slice(&greedy).to_device(logits.device());
    scores.argmax(-1, false).where_self(&greedy, &drawn)
}

/// The logits after the repetition penalty.
fn penalised(logits: &Tensor, texts: &[Chooser<'_>]) -> Tensor {
    if texts.iter().all(|text| text.sampling.repetition_penalty == 1.0) {
        return logits.shallow_clone();
    }
    let scores = logits.copy();
    for (row, text) in (0..).zip(texts) {
        let penalty = text.sampling.repetition_penalty;
        if penalty != 1.0 {
            let tokens = Tensor::from_slice(text.tokens).to_device(logits.device());
            let score = logits.get(row).gather(0, &tokens, false);
            let score = (&score * penalty).where_self(&score.lt(0.0), &(&score / penalty));
            let _ = scores.get(row).scatter_(0, &tokens, &score);
        }
    }
    scores
}

/// 1 for the tokens that top-k, top-p and min-p keep and 0 for the others, `[b, v]`, in the order
/// of `sorted`, the scores from the largest to the smallest.
fn kept(sorted: &Tensor, texts: &Texts<'_>) -> Tensor {
    let v = sorted.size()[1];
    let last = texts.column(|text| match text.sampling.top_k {
        0 => (v - 1) as f64,
        k => (k.min(v) - 1) as f64,
    });
    let least = sorted.gather(-1, &last.to_kind(Kind::Int64), false);
    let kept = sorted.greater_equal_tensor(&least).to_kind(Kind::Double);
    let probs = sorted.softmax(-1, Kind::Double) * &kept;
    let probs = &probs / probs.sum_dim_intlist(-1, true, None);
    // a token is kept if those before it do not reach the sum
    let before = probs.cumsum(-1, Kind::Double) - &probs;
    let kept = kept * before.less_tensor(&texts.column(|text| text.sampling.top_p));
    let first = probs.narrow(-1, 0, 1);
    let share = texts.column(|text| text.sampling.min_p);
    kept * probs.greater_equal_tensor(&(first * share))
}

/// The index at which the running sum of `weights`, `[b, v]`, passes a share of their sum,
/// `[b, 1]`: `[b]`.
fn draw(weights: &Tensor, share: &Tensor) -> Tensor {
    let sums = weights.cumsum(-1, Kind::Double);
    let total = sums.narrow(-1, -1, 1);
    let passed = sums.less_equal_tensor(&(&total * share));
    let index = passed.sum_dim_intlist(-1, false, Kind::Int64);
    // rounding must not choose a token behind the last that has a weight
    let last = sums.less_tensor(&total).sum_dim_intlist(-1, false, Kind::Int64);
    index.minimum(&last)
}

/// The random number in [0, 1) of a position of a text.
fn uniform(seed: u64, key: u64, position: usize) -> f64 {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&key.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(bytes);
    random.set_word_pos(2 * position as u128);
    (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}
