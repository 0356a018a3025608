//! Choosing tokens: the distribution is the one that its definition says.

use dylora::generate::Sampling;
use dylora::generate::sampling::{Chooser, choose};
use tch::{Kind, Tensor};

use crate::common::{DOUBLE, seed};

/// Number of draws.
const DRAWS: usize = 10_000;

/// The probabilities of the next token by definition, token by token, in f64.
fn distribution(logits: &[f64], sampling: &Sampling, tokens: &[i64]) -> Vec<f64> {
    let mut scores = logits.to_vec();
    for (id, score) in scores.iter_mut().enumerate() {
        if tokens.contains(&(id as i64)) {
            let penalty = sampling.repetition_penalty;
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
        *score /= sampling.temperature;
    }
    let softmax = |scores: &[f64]| -> Vec<f64> {
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exp: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.iter().map(|x| x / sum).collect()
    };
    if sampling.top_k > 0 {
        let mut sorted = scores.clone();
        sorted.sort_by(f64::total_cmp);
        let least = sorted[sorted.len() - (sampling.top_k as usize).min(sorted.len())];
        for score in scores.iter_mut().filter(|score| **score < least) {
            *score = f64::NEG_INFINITY;
        }
    }
    // top-p as transformers has it: drop from the smallest while the sum is at most 1 - p
    if sampling.top_p < 1.0 {
        let probs = softmax(&scores);
        let mut order: Vec<usize> = (0..probs.len()).collect();
        order.sort_by(|a, b| probs[*a].total_cmp(&probs[*b]));
        let mut sum = 0.0;
        for &id in &order[..order.len() - 1] {
            sum += probs[id];
            if sum <= 1.0 - sampling.top_p {
                scores[id] = f64::NEG_INFINITY;
            }
        }
    }
    let probs = softmax(&scores);
    let most = probs.iter().copied().fold(0.0, f64::max);
    for (score, prob) in scores.iter_mut().zip(probs) {
        if prob < sampling.min_p * most {
            *score = f64::NEG_INFINITY;
        }
    }
    softmax(&scores)
}

fn settings() -> Vec<Sampling> {
    let plain = Sampling { temperature: 1.0, ..Sampling::GREEDY };
    vec![
        plain,
        Sampling { temperature: 0.6, seed: 1, ..plain },
        Sampling { top_k: 5, seed: 2, ..plain },
        Sampling { top_p: 0.7, seed: 3, ..plain },
        Sampling { min_p: 0.2, seed: 4, ..plain },
        Sampling { repetition_penalty: 1.8, seed: 5, ..plain },
        Sampling {
            temperature: 1.4,
            top_k: 12,
            top_p: 0.8,
            min_p: 0.05,
            repetition_penalty: 1.3,
            seed: 6,
        },
    ]
}

#[test]
fn draws_follow_the_distribution_of_the_settings() {
    let _guard = seed(11);
    let logits = Tensor::randn([24], DOUBLE) * 1.5;
    let host = Vec::<f64>::try_from(&logits).expect("a vector");
    let tokens = [2_i64, 7, 7, 19];
    for sampling in settings() {
        let expected = distribution(&host, &sampling, &tokens);
        let texts: Vec<Chooser<'_>> = (0..DRAWS as u64)
            .map(|key| Chooser { sampling: &sampling, key, tokens: &tokens })
            .collect();
        let all = logits.unsqueeze(0).expand([DRAWS as i64, 24], false);
        let drawn = Vec::<i64>::try_from(choose(&all, &texts)).expect("ids");
        let mut counts = [0_u32; 24];
        for id in drawn {
            counts[id as usize] += 1;
        }
        let (mut chi_squared, mut cells) = (0.0, 0.0);
        for (count, prob) in counts.iter().zip(&expected) {
            if *prob == 0.0 {
                assert_eq!(*count, 0, "{sampling:?}: a dropped token was drawn");
                continue;
            }
            let mean = prob * DRAWS as f64;
            chi_squared += (f64::from(*count) - mean).powi(2) / mean;
            cells += 1.0;
        }
        // the mean of chi-squared is its number of degrees of freedom f, its variance is 2 f
        let freedom: f64 = cells - 1.0;
        let bound = freedom + 4.0 * (2.0 * freedom).sqrt();
        assert!(chi_squared < bound, "{sampling:?}: {chi_squared} of at most {bound}");
    }
}

#[test]
fn settings_of_one_text_do_not_touch_another() {
    let _guard = seed(12);
    let logits = Tensor::randn([8, 24], DOUBLE) * 1.5;
    let mut all = settings();
    all.push(Sampling::GREEDY);
    let tokens: Vec<[i64; 3]> = (0..8).map(|row| [row, row + 1, 3]).collect();
    let texts: Vec<Chooser<'_>> = all
        .iter()
        .zip(&tokens)
        .map(|(sampling, tokens)| Chooser { sampling, key: 5, tokens })
        .collect();
    let together = choose(&logits, &texts);
    for (row, text) in (0..8).zip(&texts) {
        let alone = choose(&logits.narrow(0, row, 1), &[*text]);
        assert_eq!(alone.int64_value(&[0]), together.int64_value(&[row]), "text {row}");
    }
    assert_eq!(together.int64_value(&[7]), logits.get(7).argmax(0, false).int64_value(&[]));
}

#[test]
fn tokens_as_probable_as_the_last_of_the_k_best_are_kept() {
    let logits = Tensor::from_slice(&[1.0, 2.0, 2.0, 2.0, 0.0]).view([1, 5]);
    let sampling = Sampling { temperature: 1.0, top_k: 2, ..Sampling::GREEDY };
    let mut seen = [false; 5];
    for key in 0..200 {
        let text = Chooser { sampling: &sampling, key, tokens: &[0] };
        seen[choose(&logits, &[text]).int64_value(&[0]) as usize] = true;
    }
    assert_eq!(seen, [false, true, true, true, false]);
}

#[test]
fn the_repetition_penalty_changes_the_greedy_choice() {
    let logits = Tensor::from_slice(&[1.0, 1.5, -0.1, -3.0]).view([1, 4]).to_kind(Kind::Float);
    let choice = |penalty: f64, tokens: &[i64]| {
        let sampling = Sampling { repetition_penalty: penalty, ..Sampling::GREEDY };
        choose(&logits, &[Chooser { sampling: &sampling, key: 0, tokens }]).int64_value(&[0])
    };
    assert_eq!(choice(1.0, &[1]), 1);
    assert_eq!(choice(1.4, &[1]), 1);
    assert_eq!(choice(1.6, &[1]), 0);
}
