//! Generates several texts at once. Each step is one forward pass: of the prompts that wait, or of
//! the last token of all texts that have begun. A text that ends makes room for the next.
//!
//! Letters of shapes: `b` texts of a step, `d` width, `v` vocabulary, `e` routed expert, `s` parts
//! (the experts and the part that is always on).

use std::collections::VecDeque;

use anyhow::{Result, bail};

use super::graphs::StepGraphs;
use super::next::{StepOutput, fetched_tokens, next_tokens, source, wants_most_probable};
use super::request::{Event, NewToken, Request, Route, Text};
use crate::ffi::cuda::Fetch;
use crate::model::RoutedModel;
use crate::model::batch::{GenerationCache, StepRow};
use crate::model::experts::spec::ExpertSpec;
use crate::model::routing::source::active_from;

/// Most tokens of prompts in one forward pass. A longer prompt is computed in parts.
const PREFILL_TOKENS: usize = 2048;

/// How much an engine may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Most texts at a time.
    pub max_texts: usize,
    /// Most positions of a text, prompt included.
    pub context: usize,
}

/// Generates texts.
///
/// ```no_run
/// use dylora::generate::{Engine, EngineLimits, Request, Route, Sampling};
/// # use dylora::model::RoutedModel;
///
/// # fn generate(model: &RoutedModel) -> anyhow::Result<()> {
/// let mut engine = Engine::new(model, EngineLimits { max_texts: 8, context: 512 })?;
/// engine.add(Request {
///     key: 0,
///     prompt: vec![4, 1, 7],
///     max_new_tokens: 16,
///     sampling: Sampling::GREEDY,
///     route: Route::Router,
///     end_tokens: vec![0].into(),
///     num_alternatives: 0,
///     wants_weights: false,
/// })?;
/// while !engine.is_idle() {
///     for event in engine.step() {
///         println!("text {}: token {}", event.text, event.token.id);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Engine<'a> {
    model: &'a RoutedModel,
    limits: EngineLimits,
    cache: GenerationCache,
    /// The texts that have begun; the index of each is its row of the cache.
    texts: Vec<Text>,
    waiting: VecDeque<Text>,
    num_added: u64,
    graphs: StepGraphs,
    /// The tokens of a step that was begun before those of the step in front of it were read.
    ahead: Option<Fetch>,
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
        model.prepare_steps();
        Ok(Self {
            model,
            limits,
            cache,
            texts: vec![],
            waiting: VecDeque::new(),
            num_added: 0,
            graphs: StepGraphs::new(model),
            ahead: None,
        })
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
    /// that is not that of the experts, and settings that [`super::Sampling::check`] refuses.
    pub fn add(&mut self, request: Request) -> Result<u64> {
        self.check(&request)?;
        self.num_added += 1;
        let active_from = active_from(self.routed(), &request.prompt);
        let tokens = request.prompt.clone();
        let number = self.num_added;
        let text = Text { number, request, tokens, active_from, has_ended: false };
        self.waiting.push_back(text);
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
        if let Some(text) = self.texts.iter_mut().find(|text| text.number == number) {
            text.has_ended = true;
        }
        self.remove_ended();
    }

    /// Number of texts that have begun, and of those that wait.
    pub fn num_texts(&self) -> (usize, usize) {
        (self.going_on().count(), self.waiting.len())
    }

    /// Number of positions of the texts that have begun.
    pub fn num_positions(&self) -> usize {
        self.going_on().map(|text| text.tokens.len()).sum()
    }

    /// The memory that keys and values take, in bytes.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.num_texts() == (0, 0)
    }

    /// The texts that have begun and not ended.
    fn going_on(&self) -> impl Iterator<Item = &Text> {
        self.texts.iter().filter(|text| !text.has_ended)
    }

    /// Computes the next token of the texts that begin, or of all that have begun, and returns what
    /// happened, in no particular order. Nothing happens without texts.
    pub fn step(&mut self) -> Vec<Event> {
        let _no_grad = tch::no_grad_guard();
        if self.going_on().next().is_none() {
            // what a step ahead computes is for texts that have ended
            self.ahead = None;
            self.remove_ended();
        }
        let (first, tokens) = match self.ahead.take() {
            Some(fetch) => (0, self.fetched(fetch)),
            None => {
                let first = self.texts.len();
                self.begin_waiting();
                match self.texts.len() {
                    0 => return vec![],
                    all if all > first => {
                        let output = self.prefill(first);
                        (first, next_tokens(self.model, &self.texts[first..], &output))
                    }
                    _ => (0, self.decode()),
                }
            }
        };
        let mut events = vec![];
        for (text, token) in self.texts[first..].iter_mut().zip(tokens) {
            if text.has_ended {
                continue;
            }
            text.tokens.push(token.id);
            let finish = text.finish_after(token.id, self.limits.context);
            text.has_ended = finish.is_some();
            events.push(Event { text: text.number, token, finish });
        }
        self.remove_ended();
        events
    }

    /// Computes and reads the last step's tokens of all texts.
    fn decode(&mut self) -> Vec<NewToken> {
        let Self { model, cache, texts, graphs, .. } = self;
        let len = |text: &Text| text.tokens.len();
        let rows: Vec<_> = texts.iter().map(|text| text.row(len(text) - 1, len(text))).collect();
        let longest = texts.iter().map(len).max().unwrap_or(0);
        let source = |count| source(model, texts, count);
        let Some(output) = graphs.step(model, cache, &rows, longest, &source) else {
            return next_tokens(model, texts, &run(model, cache, texts, 0, &rows));
        };
        let wanted = texts.iter().all(wants_most_probable);
        match wanted.then(|| output.fetch()).flatten() {
            Some(fetch) => self.fetched(fetch),
            None => next_tokens(model, texts, &output),
        }
    }

    /// Reads the tokens of a step. If the next step is sure to be wanted, it begins first.
    fn fetched(&mut self, fetch: Fetch) -> Vec<NewToken> {
        if self.goes_on_alike() {
            // with the token that is about to be read
            let longest = self.texts.iter().map(|text| text.tokens.len() + 1).max().unwrap_or(0);
            let next = self.graphs.again(&self.cache, self.texts.len(), longest);
            self.ahead = next.and_then(|output| output.fetch());
        }
        fetched_tokens(fetch, &self.texts)
    }

    /// Whether the step after the one whose tokens are about to be read is one of the same texts,
    /// as far as can be known. A text that an end token ends takes part in one step more.
    fn goes_on_alike(&self) -> bool {
        let may_begin = !self.waiting.is_empty() && self.texts.len() < self.limits.max_texts;
        let goes_on = |text: &Text| !text.has_ended && text.has_room_after(1, self.limits.context);
        !may_begin && self.texts.iter().all(|text| goes_on(text) && wants_most_probable(text))
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
        let run = |rows: &[StepRow<'_>]| run(self.model, &self.cache, &self.texts, first, rows);
        let mut past = 0;
        if let [text] = texts {
            while text.prompt_len() - past > PREFILL_TOKENS {
                run(&[text.row(past, past + PREFILL_TOKENS)]);
                past += PREFILL_TOKENS;
            }
        }
        let rows: Vec<_> = texts.iter().map(|text| text.row(past, text.prompt_len())).collect();
        run(&rows)
    }

    /// Removes the texts that have ended, unless a step for them is still under way.
    fn remove_ended(&mut self) {
        if self.ahead.is_some() {
            return;
        }
        // from the last, so that rows that are still to be removed do not move
        for row in (0..self.texts.len()).rev() {
            if self.texts[row].has_ended {
                self.remove(row);
            }
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

/// Runs new tokens of the rows from `first` on.
fn run(
    model: &RoutedModel,
    cache: &GenerationCache,
    texts: &[Text],
    first: usize,
    rows: &[StepRow<'_>],
) -> StepOutput {
    let inputs = cache.inputs(first, rows, model.device());
    let source = source(model, &texts[first..], rows.len());
    let last: Vec<i64> = rows.iter().map(|row| row.tokens.len() as i64 - 1).collect();
    StepOutput::new(model, &inputs, &source, Some(&last))
}
