//! Generates several texts at once. Each step is one forward pass: of the prompts that wait, or of
//! the last token of all texts that have begun. A text that ends makes room for the next.
//!
//! Letters of shapes: `b` texts of a step, `d` width, `v` vocabulary, `e` routed expert, `s` parts
//! (the experts and the part that is always on).

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::sampling::{Chooser, Sampling, choose};
use crate::model::batch::{GenerationCache, StepRow};
use crate::model::experts::spec::ExpertSpec;
use crate::model::experts::weights::RoutingWeights;
use crate::model::routing::source::active_from;
use crate::model::{ForwardMode, ForwardOutput, RoutedModel, RoutingSource, RowSources};

/// Most tokens of prompts in one forward pass. A longer prompt is computed in parts.
const PREFILL_TOKENS: usize = 2048;

/// What decides the routing weights of a text.
#[derive(Debug, Clone, PartialEq)]
pub enum Route {
    /// The router.
    Router,
    /// These weights, one for each routed expert. With all of them 0, the base alone answers;
    /// otherwise the part that is always on takes part.
    Fixed(Vec<f64>),
}

/// A text to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// Distinguishes the random numbers of texts with the same seed.
    pub key: u64,
    /// The tokens to continue; at least one.
    pub prompt: Vec<i64>,
    /// Most tokens to generate; at least one.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What decides the routing weights.
    pub route: Route,
    /// The tokens that end the text.
    pub end_tokens: Arc<[i64]>,
    /// How many of the most probable tokens to return at each position.
    pub num_alternatives: usize,
    /// Whether to return routing weights.
    pub wants_weights: bool,
}

/// Why a text has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model wrote an end token, or the text contains a string that stops it.
    Stop,
    /// It has as many tokens as were asked for, or fills the context.
    Length,
}

impl Finish {
    /// `stop` or `length`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A token that was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct NewToken {
    /// The token's id.
    pub id: i64,
    /// The logarithm of the probability that the model gave it, before temperature, penalty and
    /// filters, in nats.
    pub log_prob: f64,
    /// The most probable tokens with the logarithms of their probabilities, if they were asked for.
    pub alternatives: Vec<(i64, f64)>,
    /// The routing weights at the position that predicted the token, as a mean over the sites,
    /// `[e]`; empty if they were not asked for.
    pub weights: Vec<f64>,
}

/// What a step brought to a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The text, as [`Engine::add`] numbered it.
    pub text: u64,
    /// Its new token.
    pub token: NewToken,
    /// Why it has ended, if it has.
    pub finish: Option<Finish>,
}

/// How much an engine may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Most texts at a time.
    pub max_texts: usize,
    /// Most positions of a text, prompt included.
    pub context: usize,
}

/// A text that has begun.
#[derive(Debug)]
struct Text {
    number: u64,
    request: Request,
    /// Prompt and generated tokens.
    tokens: Vec<i64>,
    active_from: Vec<i64>,
}

impl Text {
    fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    fn row(&self, past: usize, end: usize) -> StepRow<'_> {
        StepRow {
            past,
            tokens: &self.tokens[past..end],
            prompt_len: self.prompt_len(),
            active_from: &self.active_from,
        }
    }

    /// Number of positions that the text may have in the end.
    fn most_positions(request: &Request, context: usize) -> usize {
        // the last token is not computed again
        (request.prompt.len() + request.max_new_tokens - 1).min(context)
    }

    fn finish_after(&self, token: i64, context: usize) -> Option<Finish> {
        let num_new = self.tokens.len() - self.prompt_len();
        if self.request.end_tokens.contains(&token) {
            Some(Finish::Stop)
        } else if num_new >= self.request.max_new_tokens || self.tokens.len() > context {
            Some(Finish::Length)
        } else {
            None
        }
    }
}

/// Generates texts.
#[derive(Debug)]
pub struct Engine<'a> {
    model: &'a RoutedModel,
    limits: EngineLimits,
    cache: GenerationCache,
    /// The texts that have begun; the index of each is its row of the cache.
    texts: Vec<Text>,
    waiting: VecDeque<Text>,
    num_added: u64,
}

impl<'a> Engine<'a> {
    /// An engine without texts.
    ///
    /// # Errors
    /// A context that is longer than the base's positions, and limits of 0.
    pub fn new(model: &'a RoutedModel, limits: EngineLimits) -> Result<Self> {
        let positions = model.base().spec.max_positions as usize;
        if limits.context > positions {
            bail!(
                "the base has {positions} positions, so a context cannot have {}",
                limits.context
            );
        }
        if limits.context == 0 || limits.max_texts == 0 {
            bail!("a context and a number of texts must be at least 1");
        }
        let cache = model.generation_cache(0, 0);
        Ok(Self { model, limits, cache, texts: vec![], waiting: VecDeque::new(), num_added: 0 })
    }

    /// Takes memory for as many and as long texts as the limits allow. Without this call, it is
    /// taken when texts need it.
    pub fn reserve_all(&mut self) {
        self.cache.reserve(self.limits.max_texts, self.limits.context);
    }

    /// Adds a text, which begins at one of the next steps, and returns its number.
    ///
    /// # Errors
    /// An empty prompt, one that is longer than the context, an unknown token, a number of weights
    /// that is not that of the experts, and settings that [`Sampling::check`] refuses.
    pub fn add(&mut self, request: Request) -> Result<u64> {
        self.check(&request)?;
        self.num_added += 1;
        let active_from = active_from(self.routed(), &request.prompt);
        let tokens = request.prompt.clone();
        self.waiting.push_back(Text { number: self.num_added, request, tokens, active_from });
        Ok(self.num_added)
    }

    /// Checks a request as [`Engine::add`] does.
    ///
    /// # Errors
    /// Those of [`Engine::add`].
    pub fn check(&self, request: &Request) -> Result<()> {
        let (len, context) = (request.prompt.len(), self.limits.context);
        if len == 0 {
            bail!("the prompt has no token");
        }
        if len > context {
            bail!("the prompt has {len} tokens, but the context is {context} positions long");
        }
        if request.max_new_tokens == 0 {
            bail!("the number of new tokens must be at least 1");
        }
        let vocab_size = self.model.base().spec.vocab_size;
        if let Some(id) = request.prompt.iter().find(|id| !(0..vocab_size).contains(id)) {
            bail!("the prompt has the token {id}, but the base has {vocab_size} tokens");
        }
        if let Route::Fixed(weights) = &request.route
            && weights.len() as i64 != self.model.num_experts()
        {
            let (found, right) = (weights.len(), self.model.num_experts());
            bail!("there are {found} routing weights, but {right} experts");
        }
        request.sampling.check()
    }

    /// The experts that are routed.
    fn routed(&self) -> &[ExpertSpec] {
        &self.model.specs()[..self.model.num_experts() as usize]
    }

    /// Ends a text. Nothing happens if it has ended already.
    pub fn cancel(&mut self, number: u64) {
        self.waiting.retain(|text| text.number != number);
        if let Some(row) = self.texts.iter().position(|text| text.number == number) {
            self.remove(row);
        }
    }

    /// Number of texts that have begun, and of those that wait.
    pub fn num_texts(&self) -> (usize, usize) {
        (self.texts.len(), self.waiting.len())
    }

    /// Number of positions of the texts that have begun.
    pub fn num_positions(&self) -> usize {
        self.texts.iter().map(|text| text.tokens.len()).sum()
    }

    /// The memory that keys and values take, in bytes.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.texts.is_empty() && self.waiting.is_empty()
    }

    /// Computes the next token of the texts that begin, or of all that have begun, and returns what
    /// happened, in no particular order. Nothing happens without texts.
    pub fn step(&mut self) -> Vec<Event> {
        let _no_grad = tch::no_grad_guard();
        let first = self.texts.len();
        self.begin_waiting();
        let new = self.texts.len() > first;
        let first = if new { first } else { 0 };
        if self.texts.is_empty() {
            return vec![];
        }
        let output = if new { self.prefill(first) } else { self.decode() };
        let tokens = self.choose(first, &output);
        let mut events = vec![];
        for (row, token) in (first..).zip(tokens) {
            let text = &mut self.texts[row];
            text.tokens.push(token.id);
            let finish = text.finish_after(token.id, self.limits.context);
            events.push(Event { text: text.number, token, finish });
        }
        // from the last, so that rows that are still to be removed do not move
        for (index, event) in events.iter().enumerate().rev() {
            if event.finish.is_some() {
                self.remove(first + index);
            }
        }
        events
    }

    /// Lets texts begin for which there is room, and whose prompts fit into one forward pass.
    fn begin_waiting(&mut self) {
        let (mut num_new, mut longest) = (0, 0);
        while let Some(text) = self.waiting.front() {
            longest = text.prompt_len().max(longest);
            let fits = (num_new + 1) * longest <= PREFILL_TOKENS;
            if self.texts.len() == self.limits.max_texts || (num_new > 0 && !fits) {
                break;
            }
            num_new += 1;
            self.texts.extend(self.waiting.pop_front());
        }
        if num_new > 0 {
            let context = self.limits.context;
            let positions = self.texts.iter().map(|x| Text::most_positions(&x.request, context));
            let positions = positions.max().unwrap_or(0);
            // with space for those to come, so that few caches are copied
            let capacity = match positions <= self.cache.capacity() {
                true => positions,
                false => positions.next_power_of_two().max(positions).min(context),
            };
            let rows = self.texts.len().next_power_of_two().min(self.limits.max_texts);
            self.cache.reserve(rows, capacity);
        }
    }

    /// Runs the prompts of the rows from `first` on. Only a single one can be so long that it takes
    /// several passes.
    fn prefill(&self, first: usize) -> StepOutput {
        let texts = &self.texts[first..];
        let mut past = 0;
        if let [text] = texts {
            while text.prompt_len() - past > PREFILL_TOKENS {
                self.run(first, &[text.row(past, past + PREFILL_TOKENS)]);
                past += PREFILL_TOKENS;
            }
        }
        let rows: Vec<_> = texts.iter().map(|text| text.row(past, text.prompt_len())).collect();
        self.run(first, &rows)
    }

    /// Runs the last token of each text.
    fn decode(&self) -> StepOutput {
        let last = |text: &Text| text.tokens.len();
        let rows: Vec<_> =
            self.texts.iter().map(|text| text.row(last(text) - 1, last(text))).collect();
        self.run(0, &rows)
    }

    /// Runs new tokens of the rows from `first` on.
    fn run(&self, first: usize, rows: &[StepRow<'_>]) -> StepOutput {
        let device = self.model.device();
        let inputs = self.cache.inputs(first, rows, device);
        let source = self.source(first, rows.len());
        let mode = ForwardMode { rule: self.model.router_spec().eval, ..ForwardMode::EVAL };
        let output = self.model.forward(&inputs, &source, mode, None);
        let last: Vec<i64> = rows.iter().map(|row| row.tokens.len() as i64 - 1).collect();
        StepOutput::new(output, &Tensor::from_slice(&last).to_device(device))
    }

    /// The routing of `count` rows from `first` on.
    fn source(&self, first: usize, count: usize) -> RoutingSource {
        let texts = &self.texts[first..first + count];
        let is_routed = |text: &Text| text.request.route == Route::Router;
        if self.model.num_experts() == 0 {
            return RoutingSource::Base;
        }
        if texts.iter().all(is_routed) {
            return RoutingSource::Router;
        }
        let num_parts = self.model.specs().len();
        let fixed: Vec<f64> = texts.iter().flat_map(|text| self.parts(text, num_parts)).collect();
        if fixed.iter().all(|weight| *weight == 0.0) {
            return RoutingSource::Base;
        }
        let device = self.model.device();
        let fixed = Tensor::from_slice(&fixed).view([count as i64, -1]).to_device(device);
        let by_router: Vec<bool> = texts.iter().map(is_routed).collect();
        let some = by_router.contains(&true) && !self.model.routers().is_empty();
        let by_router = some.then(|| Tensor::from_slice(&by_router).to_device(device));
        RoutingSource::Rows(RowSources { fixed, by_router })
    }

    /// The weights of all parts, as far as no router decides them.
    fn parts(&self, text: &Text, num_parts: usize) -> Vec<f64> {
        let num_experts = self.model.num_experts() as usize;
        let mut weights = match &text.request.route {
            // a single expert has no router
            Route::Router => vec![1.0; num_experts],
            Route::Fixed(weights) => weights.clone(),
        };
        let is_base = weights.iter().all(|weight| *weight == 0.0);
        weights.resize(num_parts, if is_base { 0.0 } else { 1.0 });
        weights
    }

    /// Chooses the next token of each row from `first` on.
    fn choose(&self, first: usize, output: &StepOutput) -> Vec<NewToken> {
        let texts = &self.texts[first..];
        let choosers = texts.iter().map(|text| Chooser {
            sampling: &text.request.sampling,
            key: text.request.key,
            tokens: &text.tokens,
        });
        let logits = self.model.logits(&output.hidden).to_kind(Kind::Float);
        let ids = choose(&logits, &choosers.collect::<Vec<_>>());
        let log_sums = logits.logsumexp(-1, true);
        let chosen = logits.gather(-1, &ids.unsqueeze(-1), false) - &log_sums;
        let (ids, chosen) = (integers(&ids), numbers(&chosen));
        let most = texts.iter().map(|text| text.request.num_alternatives).max().unwrap_or(0);
        let best = (most > 0).then(|| {
            let k = (most as i64).min(logits.size()[1]);
            let (values, ids) = logits.topk(k, -1, true, true);
            (integers(&ids), numbers(&(values - &log_sums)), k as usize)
        });
        let weights = texts.iter().any(|text| text.request.wants_weights);
        let weights = weights.then(|| output.mean_weights()).flatten();
        let token = |(row, text): (usize, &Text)| {
            let alternatives = best.iter().flat_map(|(ids, values, k)| {
                let own = row * k..row * k + text.request.num_alternatives.min(*k);
                own.map(|i| (ids[i], values[i]))
            });
            NewToken {
                id: ids[row],
                log_prob: chosen[row],
                alternatives: alternatives.collect(),
                weights: self.weights_of(text, row, weights.as_deref()),
            }
        };
        texts.iter().enumerate().map(token).collect()
    }

    /// The routing weights of a text, if it asked for them.
    fn weights_of(&self, text: &Text, row: usize, routed: Option<&[f64]>) -> Vec<f64> {
        let e = self.model.num_experts() as usize;
        match (&text.request, routed) {
            (Request { wants_weights: false, .. }, _) => vec![],
            (Request { route: Route::Fixed(weights), .. }, _) => weights.clone(),
            (_, Some(routed)) => routed[row * e..(row + 1) * e].to_vec(),
            // a single expert has no router
            (_, None) => vec![1.0; e],
        }
    }

    /// Removes a text. The last one takes its row.
    fn remove(&mut self, row: usize) {
        let last = self.texts.len() - 1;
        if row != last {
            // the last token has not been computed yet
            let len = self.texts[last].tokens.len() - 1;
            let _no_grad = tch::no_grad_guard();
            self.cache.copy_row(last, row, len);
        }
        self.texts.swap_remove(row);
    }
}

/// What a step computed at the last new position of each text.
struct StepOutput {
    /// The last hidden states, `[b, d]`.
    hidden: Tensor,
    /// The routing weights at each site, `[b, e]`; empty if no tensor says them.
    weights: Vec<Tensor>,
}

impl StepOutput {
    /// The part of a pass at the positions `last`, `[b]`.
    fn new(output: ForwardOutput, last: &Tensor) -> Self {
        let at_last = |x: &Tensor| {
            let index = last.view([-1, 1, 1]).expand([-1, 1, x.size()[2]], false);
            x.gather(1, &index, false).squeeze_dim(1)
        };
        let weights = output.weights.iter().filter_map(|weights| match weights {
            RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) => {
                Some(at_last(weights))
            }
            RoutingWeights::Off | RoutingWeights::Ones => None,
        });
        Self { hidden: at_last(&output.hidden), weights: weights.collect() }
    }

    /// The means of the weights over the sites, `[b e]`.
    fn mean_weights(&self) -> Option<Vec<f64>> {
        let all: Vec<Tensor> = self.weights.iter().map(|x| x.to_kind(Kind::Double)).collect();
        let mean = (!all.is_empty()).then(|| Tensor::stack(&all, 0).mean_dim(0, false, None))?;
        Some(numbers(&mean))
    }
}

fn numbers(x: &Tensor) -> Vec<f64> {
    let x = x.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, -1);
    Vec::try_from(x).expect("a flat tensor of numbers is a list")
}

fn integers(x: &Tensor) -> Vec<i64> {
    let x = x.to_device(Device::Cpu).flatten(0, -1);
    Vec::try_from(x).expect("a flat tensor of integers is a list")
}
