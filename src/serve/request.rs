//! What both endpoints are asked for. Their own fields are in `completions` and `chat`.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::Sender;

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::limits::Limits;
use super::live::{Order, Piece};
use super::models::ServedModel;
use crate::generate::{Request, Route, Sampling};

/// Most strings that end a text.
const MAX_STOPS: usize = 16;
/// The longest of them, in bytes.
const MAX_STOP_BYTES: usize = 512;
/// Most alternatives to a token.
pub(crate) const MAX_ALTERNATIVES: i64 = 20;

/// Fields that change nothing here: notes about the client, and where OpenAI computes.
const NOTES: [&str; 7] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
];

/// Which form a request and its answer have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `POST /v1/completions`.
    Completions,
    /// `POST /v1/chat/completions`.
    Chat,
}

/// A text to continue.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Its tokens.
    pub ids: Vec<i64>,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// What stands in front of each answer to it; empty without `echo`.
    pub echo: String,
}

/// A request whose fields are all right.
#[derive(Debug)]
pub(crate) struct Ask {
    /// Its form.
    pub endpoint: Endpoint,
    /// The prompts; at least one.
    pub prompts: Vec<Prompt>,
    /// How many of the most probable tokens are listed; `None` without log-probabilities.
    pub logprobs: Option<usize>,
    /// The fields of both endpoints.
    pub common: Common,
}

/// The fields that both endpoints have.
#[derive(Debug)]
pub(crate) struct Common {
    /// The model's name.
    pub model: String,
    /// Number of answers to each prompt.
    pub n: usize,
    /// What decides the routing weights.
    pub route: Route,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The strings that end a text.
    pub stop: Vec<String>,
    /// Whether the answer comes in pieces.
    pub is_stream: bool,
    /// Whether the last piece counts tokens.
    pub include_usage: bool,
    /// Whether the answer has routing weights.
    pub return_routing: bool,
}

impl Common {
    /// Takes the common fields.
    ///
    /// # Errors
    /// The first field that is wrong, and those that are not supported.
    pub fn take(
        fields: &mut Fields,
        model: &ServedModel,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        let Some(name) = fields.string("model")? else {
            return Err(ApiError::field("model", "`model` is missing"));
        };
        let routing = fields.string("routing")?;
        let route = model.route(&name, routing.as_deref())?;
        let is_stream = fields.boolean("stream")?;
        let common = Self {
            model: name,
            n: fields.integer("n", 1..=limits.num_places() as i64)?.unwrap_or(1) as usize,
            route,
            sampling: sampling(fields, model)?,
            stop: stop(fields)?,
            is_stream,
            include_usage: include_usage(fields, is_stream)?,
            return_routing: fields.boolean("return_routing")?,
        };
        let is_zero = |value: &Value| value.as_f64() == Some(0.0);
        fields.refuse("presence_penalty", is_zero)?;
        fields.refuse("frequency_penalty", is_zero)?;
        fields.refuse("logit_bias", is_empty)?;
        fields.ignore(&NOTES);
        Ok(common)
    }
}

/// Whether a value is `[]`, `{}` or `""`.
pub fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// How tokens are chosen. What the request does not say, the base's `generation_config.json` says
/// if it has `do_sample`; else the temperature is OpenAI's, 1.
fn sampling(fields: &mut Fields, model: &ServedModel) -> Result<Sampling, ApiError> {
    let default = model.defaults.sampling;
    let usual = if default.temperature == 0.0 { 1.0 } else { default.temperature };
    let sampling = Sampling {
        temperature: fields.number("temperature")?.unwrap_or(usual),
        top_k: fields.integer("top_k", 0..=i64::MAX)?.unwrap_or(default.top_k),
        top_p: fields.number("top_p")?.unwrap_or(default.top_p),
        min_p: fields.number("min_p")?.unwrap_or(default.min_p),
        repetition_penalty: fields
            .number("repetition_penalty")?
            .unwrap_or(default.repetition_penalty),
        seed: match fields.integer("seed", i64::MIN..=i64::MAX)? {
            Some(seed) => seed as u64,
            None => random(),
        },
    };
    let Sampling { temperature, top_p, min_p, repetition_penalty, .. } = sampling;
    let greedy = Sampling::GREEDY;
    for (name, alone) in [
        ("temperature", Sampling { temperature, ..greedy }),
        ("top_p", Sampling { top_p, ..greedy }),
        ("min_p", Sampling { min_p, ..greedy }),
        ("repetition_penalty", Sampling { repetition_penalty, ..greedy }),
    ] {
        alone.check().map_err(|error| ApiError::field(name, error.to_string()))?;
    }
    Ok(sampling)
}

/// A number that differs from request to request.
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let Some(value) = fields.take("stop") else { return Ok(vec![]) };
    let list = match &value {
        Value::String(text) => vec![text.clone()],
        Value::Array(list) => {
            let texts = list.iter().map(|text| text.as_str().map(str::to_owned));
            texts
                .collect::<Option<_>>()
                .ok_or_else(|| wrong("stop", "a string or a list of strings", &value))?
        }
        other => return Err(wrong("stop", "a string or a list of strings", other)),
    };
    if list.len() > MAX_STOPS {
        let message = format!("`stop` must have at most {MAX_STOPS} strings, got {}", list.len());
        return Err(ApiError::field("stop", message));
    }
    if let Some(text) = list.iter().find(|text| !(1..=MAX_STOP_BYTES).contains(&text.len())) {
        let message =
            format!("a string of `stop` must have 1 to {MAX_STOP_BYTES} bytes, got {}", text.len());
        return Err(ApiError::field("stop", message));
    }
    Ok(list)
}

fn include_usage(fields: &mut Fields, is_stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.object("stream_options")? else { return Ok(false) };
    if !is_stream {
        return Err(ApiError::field("stream_options", "`stream_options` needs `\"stream\": true`"));
    }
    let mut options = Fields::of(options);
    let include_usage = options.boolean("include_usage")?;
    // padding against listeners; a proxy's encryption is the place for it
    options.ignore(&["include_obfuscation"]);
    options.end()?;
    Ok(include_usage)
}

/// Most new tokens of a prompt.
///
/// - `asked`: what the request says
/// - `usual`: what holds if it says nothing; the context cuts it
/// - `names`: the fields of the prompt and of the number
///
/// # Errors
/// A prompt that leaves no room in the context, and more tokens than it leaves.
pub fn max_new_tokens(
    ids: &[i64],
    asked: Option<usize>,
    usual: usize,
    limits: &Limits,
    names: [&str; 2],
) -> Result<usize, ApiError> {
    let (context, len) = (limits.context, ids.len());
    let room = context.saturating_sub(len);
    let [prompt, number] = names;
    let fault = |param: &str, message: String| {
        Err(ApiError { code: Some("context_length_exceeded"), ..ApiError::field(param, message) })
    };
    match asked {
        _ if room == 0 => fault(
            prompt,
            format!(
                "the prompt has {len} tokens, which leave no room in a context of {context} \
                 positions"
            ),
        ),
        Some(asked) if asked > room => fault(
            number,
            format!(
                "`{number}` must be at most {room}, got {asked}: the prompt has {len} tokens, and \
                 the context has {context} positions"
            ),
        ),
        asked => Ok(asked.unwrap_or(usual).clamp(1, room)),
    }
}

impl Ask {
    /// Number of texts.
    pub(crate) fn num_choices(&self) -> usize {
        self.prompts.len() * self.common.n
    }

    /// Number of tokens of the prompts.
    pub(crate) fn num_prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.ids.len()).sum()
    }

    /// The prompt of a choice.
    pub(crate) fn prompt_of(&self, choice: usize) -> &Prompt {
        &self.prompts[choice / self.common.n]
    }

    /// The orders of all texts.
    ///
    /// - `place`: room for all of them
    pub fn orders(
        &self,
        end_tokens: &Arc<[i64]>,
        pieces: &Sender<Piece>,
        mut place: OwnedSemaphorePermit,
        [received, deadline]: [Instant; 2],
    ) -> Vec<Order> {
        let Common { route, sampling, stop, return_routing, .. } = &self.common;
        let order = |choice: usize| {
            let prompt = self.prompt_of(choice);
            let request = Request {
                key: choice as u64,
                prompt: prompt.ids.clone(),
                max_new_tokens: prompt.max_new_tokens,
                sampling: *sampling,
                route: route.clone(),
                end_tokens: end_tokens.clone(),
                num_alternatives: self.logprobs.unwrap_or(0),
                wants_weights: *return_routing,
            };
            Order {
                request,
                stop: stop.clone(),
                choice,
                wants_tokens: self.logprobs.is_some() || *return_routing,
                pieces: pieces.clone(),
                place: place.split(1).expect("there is room for each text"),
                received,
                deadline,
            }
        };
        (0..self.num_choices()).map(order).collect()
    }
}

/// Checks that a server can hold so many texts.
///
/// # Errors
/// More texts than it can ever hold.
pub(crate) fn check_num_texts(
    num_prompts: usize,
    n: usize,
    limits: &Limits,
) -> Result<(), ApiError> {
    let (texts, places) = (num_prompts.saturating_mul(n), limits.num_places());
    if texts > places {
        let message = format!(
            "the request asks for {texts} texts, but the server holds at most {places} at a time"
        );
        return Err(ApiError::invalid(message));
    }
    Ok(())
}
