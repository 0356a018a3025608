//! The largest values of the numbers of a config. They are far above those of any run; what is
//! beyond them is a mistake that would otherwise end in a hang or without memory.

use super::faults::Faults;
use super::{Config, Duration, ExpertConfig, Maturity, Mixing};

/// Most experts of a mixture.
const MAX_EXPERTS: i64 = 4096;
/// Largest rank of an expert.
const MAX_RANK: i64 = 1 << 16;
/// Most blocks of a micro-batch, or micro-batches of a step.
const MAX_BATCH: i64 = 1 << 20;
/// Longest block, in tokens.
const MAX_SEQ_LEN: i64 = 1 << 24;
/// Most tokens of a chunk of the loss.
const MAX_CHUNK: i64 = 1 << 30;
/// Most steps of a run or of a part of it.
const MAX_STEPS: i64 = 1 << 40;
/// Most passes over the data.
const MAX_EPOCHS: i64 = 1 << 20;
/// Most tokens that are counted.
const MAX_TOKENS: i64 = 1 << 50;
/// The smallest and the largest weight of a domain above 0, and temperature.
const WEIGHTS: [f64; 2] = [1e-6, 1e6];

/// Checks that the numbers of a config are not absurdly large or small.
pub(super) fn check_bounds(config: &Config, faults: &mut Faults) {
    for (key, value, most) in counts(config) {
        faults.at_most(&key, value, most);
    }
    let domains = config.data.domains.iter().enumerate();
    let weights = domains.map(|(i, domain)| (format!("data.domains[{i}].weight"), domain.weight));
    let mixing = match config.data.mixing {
        Mixing::Temperature(temperature) => Some(temperature),
        _ => None,
    };
    let temperatures = [
        ("data.mixing.temperature", mixing),
        ("router.temperature", Some(config.router.temperature)),
        (
            "router.temperature_schedule.start",
            config.router.temperature_schedule.map(|schedule| schedule.start),
        ),
    ];
    let temperatures = temperatures.into_iter().filter_map(|(k, t)| Some((k.to_owned(), t?)));
    let [least, most] = WEIGHTS;
    // other checks are about what is not above 0
    for (key, value) in weights.chain(temperatures).filter(|(_, value)| *value > 0.0) {
        let what = format!("from {least} to {most}");
        faults.in_range(&key, value, (least..=most).contains(&value), &what);
    }
}

/// The counts of a config by their keys, each with the largest value.
fn counts(config: &Config) -> Vec<(String, i64, i64)> {
    let Config { data, lora, train, router, schedule, growth, .. } = config;
    let steps = |steps: Option<u64>| steps.map(|steps| steps as i64);
    let duration = match train.duration {
        Duration::Steps(steps) => Some(("train.duration.steps", steps, MAX_STEPS)),
        Duration::Epochs(epochs) => Some(("train.duration.epochs", epochs, MAX_EPOCHS)),
        Duration::Tokens(tokens) => Some(("train.duration.tokens", tokens, MAX_TOKENS)),
        Duration::Auto => None,
    };
    let maturity = match router.hybrid {
        Some(Maturity::Tokens(tokens)) => Some(tokens as i64),
        _ => None,
    };
    let known = [
        ("data.seq_len", Some(data.seq_len as i64), MAX_SEQ_LEN),
        ("lora.num_experts", Some(lora.num_experts), MAX_EXPERTS),
        ("lora.rank", Some(lora.rank), MAX_RANK),
        ("lora.shared_rank", Some(lora.shared_rank), MAX_RANK),
        ("train.micro_batch_size", Some(train.micro_batch_size as i64), MAX_BATCH),
        ("train.grad_accum_steps", Some(train.grad_accum_steps as i64), MAX_BATCH),
        ("train.loss_chunk_tokens", Some(train.loss_chunk_tokens), MAX_CHUNK),
        ("train.keep_last", Some(train.keep_last as i64), MAX_STEPS),
        ("train.eval_every_steps", steps(train.eval_every_steps), MAX_STEPS),
        ("train.checkpoint_every_steps", steps(train.checkpoint_every_steps), MAX_STEPS),
        ("schedule.warmup_steps", steps(schedule.warmup_steps), MAX_STEPS),
        ("router.window_steps", Some(router.window_steps as i64), MAX_STEPS),
        ("router.hybrid.tokens", maturity, MAX_TOKENS),
        (
            "router.temperature_schedule.steps",
            steps(router.temperature_schedule.map(|schedule| schedule.steps)),
            MAX_STEPS,
        ),
        ("growth.seed_steps", steps(growth.as_ref().map(|growth| growth.seed_steps)), MAX_STEPS),
    ];
    let duration = duration.map(|(key, value, most)| (key.to_owned(), value as i64, most));
    let known = known.into_iter().filter_map(|(key, value, most)| {
        let value = value?;
        Some((key.to_owned(), value, most))
    });
    let rank = |(i, expert): (usize, &ExpertConfig)| {
        Some((format!("lora.experts[{i}].rank"), expert.rank?, MAX_RANK))
    };
    let own = lora.experts.iter().enumerate().filter_map(rank);
    let patterns = lora.rank_pattern.iter().map(|(&pattern, &rank)| {
        (format!("lora.rank_pattern.\"{}\"", String::from(pattern)), rank, MAX_RANK)
    });
    known.chain(duration).chain(own).chain(patterns).collect()
}
