//! The largest and smallest values of the numbers of a config. They are far beyond those of any
//! run; what exceeds them is a mistake that would otherwise end in a hang, without memory or in a
//! loss that is no number.

use super::faults::{Faults, number};
use super::{
    Config, Duration, ExpertConfig, GroupConfig, LoraConfig, Maturity, Mixing, Orthogonality,
    Plateau, RouterNoise,
};

/// Most experts of a mixture.
const MAX_EXPERTS: i64 = 4096;
/// Largest rank of an expert, and width of a router's hidden layers.
const MAX_RANK: i64 = 1 << 16;
/// Largest id of a token, which is kept in 32 bits.
const MAX_TOKEN_ID: i64 = i32::MAX as i64;
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
/// Most tokens of a step.
const MAX_STEP_TOKENS: u128 = 1 << 28;
/// The smallest and the largest weight of a domain above 0, and temperature.
const WEIGHTS: [f64; 2] = [1e-6, 1e6];
/// The smallest and the largest learning rate.
const LEARNING_RATES: [f64; 2] = [1e-20, 1e3];
/// The smallest and the largest alpha.
const ALPHAS: [f64; 2] = [1e-6, 1e9];
/// The smallest and the largest `optimizer.eps`, which must not be 0 as an f32.
const EPS: [f64; 2] = [1e-30, 1.0];
/// Largest factor of a loss or of a learning rate, and fall of a loss.
const MAX_FACTOR: f64 = 1e6;
/// Largest weight decay.
const MAX_DECAY: f64 = 1e3;
/// Largest norm of gradients.
const MAX_NORM: f64 = 1e9;

/// Checks that the numbers of a config are not absurdly large or small.
pub(super) fn check_bounds(config: &Config, faults: &mut Faults) {
    for (key, value, most) in counts(config) {
        faults.at_most(&key, value, most);
    }
    check_step(config, faults);
    // other checks are about what is not above 0 or no number
    let is_faulty = |value: f64| !value.is_finite() || value <= 0.0;
    for (key, value, [least, most]) in ranges(config) {
        let ok = is_faulty(value) || (least..=most).contains(&value);
        let what = format!("from {} to {}", number(least), number(most));
        faults.in_range(&key, value, ok, &what);
    }
    for (key, value, most) in limits(config) {
        let ok = is_faulty(value) || value <= most;
        faults.in_range(&key, value, ok, &format!("at most {}", number(most)));
    }
    let entropy = config.router.entropy_coef;
    let ok = !entropy.is_finite() || entropy.abs() <= MAX_FACTOR;
    let what = format!("from -{0} to {0}", number(MAX_FACTOR));
    faults.in_range("router.entropy_coef", entropy, ok, &what);
}

/// Checks the number of tokens of a step.
fn check_step(config: &Config, faults: &mut Faults) {
    let (data, train) = (&config.data, &config.train);
    let parts = [train.micro_batch_size, train.grad_accum_steps, data.seq_len];
    // each part is below 2^63 in TOML, and one that is too large is a fault of its own
    let tokens: u128 = parts.iter().map(|&part| (part as u128).min(1 << 40)).product();
    if tokens > MAX_STEP_TOKENS {
        let fault = format!(
            "times `train.grad_accum_steps` times `data.seq_len` must be at most \
             {MAX_STEP_TOKENS} tokens, got {tokens}"
        );
        faults.add("train.micro_batch_size", fault);
    }
}

/// The numbers that have a smallest and a largest value, by their keys.
fn ranges(config: &Config) -> Vec<(String, f64, [f64; 2])> {
    let Config { data, lora, router, optimizer, growth, .. } = config;
    let mixing = match data.mixing {
        Mixing::Temperature(temperature) => Some(temperature),
        _ => None,
    };
    let noise = match router.noise {
        RouterNoise::Gaussian(std) => Some(std),
        _ => None,
    };
    let start = router.temperature_schedule.map(|schedule| schedule.start);
    let growth = growth.as_ref();
    let known = [
        ("data.mixing.temperature", mixing, WEIGHTS),
        ("router.temperature", Some(router.temperature), WEIGHTS),
        ("router.temperature_schedule.start", start, WEIGHTS),
        ("router.noise.gaussian", noise, WEIGHTS),
        ("optimizer.eps", Some(optimizer.eps), EPS),
        ("growth.consolidation_rate", growth.map(|growth| growth.consolidation_rate), WEIGHTS),
        (
            "growth.column_learning_rate",
            growth.map(|growth| growth.column_learning_rate),
            LEARNING_RATES,
        ),
        ("lora.alpha", Some(lora.alpha), ALPHAS),
    ];
    let known = known.into_iter().filter_map(|(key, value, range)| {
        let value = value?;
        Some((key.to_owned(), value, range))
    });
    let weights = data.domains.iter().enumerate();
    let weights =
        weights.map(|(i, domain)| (format!("data.domains[{i}].weight"), domain.weight, WEIGHTS));
    let rates = groups(config).map(|(name, group)| {
        (format!("optimizer.{name}.learning_rate"), group.learning_rate, LEARNING_RATES)
    });
    let own = lora.experts.iter().enumerate().filter_map(|(i, expert)| {
        Some((format!("lora.experts[{i}].alpha"), expert.alpha?, ALPHAS))
    });
    let alphas = alpha_patterns(config).map(|(key, alpha)| (key, alpha, ALPHAS));
    known.chain(weights).chain(rates).chain(own).chain(alphas).collect()
}

/// The numbers that have a largest value alone, by their keys.
fn limits(config: &Config) -> Vec<(String, f64, f64)> {
    let Config { lora, router, train, optimizer, growth, .. } = config;
    let plateau = plateau(config).map(|plateau| plateau.min_delta);
    let growth = growth.as_ref();
    let known = [
        ("router.load_balancing_coef", Some(router.load_balancing_coef), MAX_FACTOR),
        ("router.uniform_mse_coef", Some(router.uniform_mse_coef), MAX_FACTOR),
        ("router.z_loss_coef", Some(router.z_loss_coef), MAX_FACTOR),
        ("router.domain_supervision", router.domain_supervision, MAX_FACTOR),
        ("router.balance_bias_rate", Some(router.balance_bias_rate), MAX_FACTOR),
        ("router.hybrid.plateau.min_delta", plateau, MAX_FACTOR),
        ("lora.orthogonality", lora.orthogonality.map(Orthogonality::coef), MAX_FACTOR),
        (
            "train.early_stopping.min_delta",
            train.early_stopping.map(|stopping| stopping.min_delta),
            MAX_FACTOR,
        ),
        ("optimizer.max_grad_norm", Some(optimizer.max_grad_norm), MAX_NORM),
        ("growth.old_experts_rate", growth.map(|growth| growth.old_experts_rate), MAX_FACTOR),
        ("growth.old_columns_rate", growth.map(|growth| growth.old_columns_rate), MAX_FACTOR),
        ("growth.seed_router_coef", growth.map(|growth| growth.seed_router_coef), MAX_FACTOR),
    ];
    let known = known.into_iter().filter_map(|(key, value, most)| {
        let value = value?;
        Some((key.to_owned(), value, most))
    });
    let decays = groups(config).map(|(name, group)| {
        (format!("optimizer.{name}.weight_decay"), group.weight_decay, MAX_DECAY)
    });
    let norms = groups(config).filter_map(|(name, group)| {
        Some((format!("optimizer.{name}.max_grad_norm"), group.max_grad_norm?, MAX_NORM))
    });
    known.chain(decays).chain(norms).collect()
}

fn groups(config: &Config) -> impl Iterator<Item = (&'static str, &GroupConfig)> {
    let optimizer = &config.optimizer;
    [("adapters", &optimizer.adapters), ("router", &optimizer.router), ("base", &optimizer.base)]
        .into_iter()
}

fn plateau(config: &Config) -> Option<Plateau> {
    match config.router.hybrid {
        Some(Maturity::Plateau(plateau)) => Some(plateau),
        _ => None,
    }
}

/// The alphas of single modules, by their keys.
fn alpha_patterns(config: &Config) -> impl Iterator<Item = (String, f64)> {
    let lora = &config.lora;
    let own = lora.experts.iter().enumerate().filter_map(|(i, expert)| {
        Some((format!("lora.experts[{i}]"), expert.alpha_pattern.as_ref()?))
    });
    let all = [("lora".to_owned(), &lora.alpha_pattern)].into_iter().chain(own);
    all.flat_map(|(at, patterns)| {
        patterns.iter().map(move |(&pattern, &alpha)| {
            (format!("{at}.alpha_pattern.\"{}\"", String::from(pattern)), alpha)
        })
    })
}

/// The counts of a config by their keys, each with the largest value.
fn counts(config: &Config) -> Vec<(String, i64, i64)> {
    let Config { data, lora, train, router, schedule, growth, .. } = config;
    let steps = |steps: Option<u64>| steps.map(|steps| steps as i64);
    let window = plateau(config).map(|plateau| plateau.window_steps);
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
        ("router.hidden_width", Some(router.hidden_width), MAX_RANK),
        ("router.hybrid.plateau.window_steps", steps(window), MAX_STEPS),
        (
            "train.early_stopping.patience",
            steps(train.early_stopping.map(|stopping| stopping.patience)),
            MAX_STEPS,
        ),
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
    let warmups = groups(config).filter_map(|(name, group)| {
        Some((format!("optimizer.{name}.warmup_steps"), group.warmup_steps? as i64, MAX_STEPS))
    });
    known.chain(duration).chain(warmups).chain(counts_of_experts(lora)).collect()
}

/// The counts of single experts and modules, as in [`counts`].
fn counts_of_experts(lora: &LoraConfig) -> Vec<(String, i64, i64)> {
    let rank = |(i, expert): (usize, &ExpertConfig)| {
        Some((format!("lora.experts[{i}].rank"), expert.rank?, MAX_RANK))
    };
    let own = lora.experts.iter().enumerate().filter_map(rank);
    let own_patterns = lora.experts.iter().enumerate().filter_map(|(i, expert)| {
        Some((format!("lora.experts[{i}]"), expert.rank_pattern.as_ref()?))
    });
    let patterns = [("lora".to_owned(), &lora.rank_pattern)].into_iter().chain(own_patterns);
    let patterns = patterns.flat_map(|(at, patterns)| {
        patterns.iter().map(move |(&pattern, &rank)| {
            (format!("{at}.rank_pattern.\"{}\"", String::from(pattern)), rank, MAX_RANK)
        })
    });
    let tokens = lora.experts.iter().enumerate().filter_map(|(i, expert)| {
        let largest = *expert.alora_invocation_tokens.iter().max()?;
        Some((format!("lora.experts[{i}].alora_invocation_tokens"), largest, MAX_TOKEN_ID))
    });
    own.chain(patterns).chain(tokens).collect()
}
