//! The options that say how text is generated, for all commands that generate.

use anyhow::{Result, anyhow, bail};
use clap::Args;

use super::open::OpenModel;
use super::usage;
use crate::generate::{GenerationDefaults, Route, RouteChoice, Sampling};

/// Most new tokens if nothing says another number.
const MAX_NEW_TOKENS: usize = 256;

/// How tokens are chosen, and when a text ends.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// Most tokens to generate for a prompt [default: that of the base's `generation_config.json`,
    /// or 256].
    #[arg(long, visible_alias = "max-tokens", value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// Divide the logits by this before a token is drawn. 0 takes the most probable token
    /// [default: that of `generation_config.json` if it has `do_sample`; else 1 if another of these
    /// options is given, and 0 if none is].
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Draw from the K most probable tokens only; 0 for all.
    #[arg(long, value_name = "K")]
    pub top_k: Option<i64>,
    /// Draw from the most probable tokens only whose probabilities sum to P.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Draw only tokens with at least P times the largest probability.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    /// Divide the positive logits of tokens that the text contains by this, and multiply the
    /// negative ones by it. 1 has no effect.
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f64>,
    /// Seed of the random numbers.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// End the text before this string. May be repeated.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// What decides the routing weights: `router`, `uniform`, `all`, `expert:N`, `domain:NAME` or
    /// `none`, the base alone [default: what decided them in training].
    #[arg(long, value_name = "ROUTING")]
    pub routing: Option<RouteChoice>,
}

impl SamplingArgs {
    /// How tokens are chosen, where `defaults` holds what no option says.
    ///
    /// # Errors
    /// A value that makes no sense.
    pub fn sampling(&self, defaults: &GenerationDefaults) -> Result<Sampling> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = *self;
        let default = defaults.sampling;
        let asks = top_k.is_some() || top_p.is_some() || min_p.is_some();
        let usual = match default.temperature {
            0.0 if asks => 1.0,
            temperature => temperature,
        };
        let sampling = Sampling {
            temperature: temperature.unwrap_or(usual),
            top_k: top_k.unwrap_or(default.top_k),
            top_p: top_p.unwrap_or(default.top_p),
            min_p: min_p.unwrap_or(default.min_p),
            repetition_penalty: repetition_penalty.unwrap_or(default.repetition_penalty),
            seed,
        };
        sampling.check().map_err(usage)?;
        if self.stop.iter().any(String::is_empty) {
            return Err(usage(anyhow!("`--stop` must not be empty")));
        }
        Ok(sampling)
    }

    /// Changes an option by its name, such as `top_p`.
    ///
    /// # Errors
    /// An unknown name, and a value that is no number or makes no sense. Nothing changes then.
    pub fn set(&mut self, key: &str, value: &str, defaults: &GenerationDefaults) -> Result<()> {
        fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T> {
            value.parse().map_err(|_| anyhow!("`{key}` must be a number, got `{value}`"))
        }
        let mut changed = self.clone();
        match key {
            "temperature" => changed.temperature = Some(number(key, value)?),
            "top_k" => changed.top_k = Some(number(key, value)?),
            "top_p" => changed.top_p = Some(number(key, value)?),
            "min_p" => changed.min_p = Some(number(key, value)?),
            "repetition_penalty" => changed.repetition_penalty = Some(number(key, value)?),
            "max_new_tokens" => changed.max_new_tokens = Some(number(key, value)?),
            "seed" => changed.seed = number(key, value)?,
            _ => bail!("there is no option `{key}`\nhint: `/help` lists them"),
        }
        changed.sampling(defaults)?;
        changed.max_new_tokens(defaults)?;
        *self = changed;
        Ok(())
    }

    /// Most new tokens of a text.
    ///
    /// # Errors
    /// 0.
    pub fn max_new_tokens(&self, defaults: &GenerationDefaults) -> Result<usize> {
        match self.max_new_tokens.or(defaults.max_new_tokens).unwrap_or(MAX_NEW_TOKENS) {
            0 => Err(usage(anyhow!("`--max-new-tokens` must be at least 1, got 0"))),
            count => Ok(count),
        }
    }

    /// The routing of a text.
    ///
    /// # Errors
    /// An expert or a domain that does not exist, and no choice where the training's is none for a
    /// text.
    pub fn route(&self, open: &OpenModel) -> Result<(RouteChoice, Route)> {
        let choice = match &self.routing {
            Some(choice) => choice.clone(),
            None => RouteChoice::of_training(open.routing(None)?).map_err(usage)?,
        };
        let route = choice.route(open.model.num_experts(), open.config.as_ref()).map_err(usage)?;
        Ok((choice, route))
    }
}
