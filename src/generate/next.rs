//! The next tokens of texts: routing, one forward pass, and the choice by logits.
//!
//! Letters of shapes: `b` texts of a step, `d` width, `v` vocabulary, `e` routed expert, `s` parts
//! (the experts and the part that is always on).

use tch::{Device, Kind, Tensor};

use super::request::{NewToken, Request, Route, Text};
use super::sampling::{Chooser, choose};
use crate::ffi::cuda::Fetch;
use crate::model::experts::weights::RoutingWeights;
use crate::model::{ForwardMode, Inputs, NextStep, RoutedModel, RoutingSource, RowSources};

/// What a step computed at the last new position of each text.
#[derive(Debug)]
pub(super) struct StepOutput {
    /// The logits, `[b, v]`.
    logits: Tensor,
    /// The most probable tokens and the logarithms of their probabilities, f64 `[_, 2, b']` of at
    /// least `b` texts ([`RoutedModel::next_tokens`]); `None` if they have not been computed.
    most_probable: Option<Tensor>,
    /// The routing weights at each site, `[b, e]`; empty if no tensor says them.
    weights: Vec<Tensor>,
}

impl StepOutput {
    /// Runs a step.
    ///
    /// - `last`: index of each text's last new position; `None` if each has one
    pub fn new(
        model: &RoutedModel,
        inputs: &Inputs,
        source: &RoutingSource,
        last: Option<&[i64]>,
    ) -> Self {
        Self::of_step(model, inputs, source, last, None)
    }

    /// Runs a step in which each text has one new position. If the most probable tokens are
    /// computed, the inputs become those of the next step, whose new tokens these are.
    pub(crate) fn repeatable(
        model: &RoutedModel,
        next: NextStep<'_>,
        source: &RoutingSource,
    ) -> Self {
        Self::of_step(model, next.inputs, source, None, Some(&next))
    }

    fn of_step(
        model: &RoutedModel,
        inputs: &Inputs,
        source: &RoutingSource,
        last: Option<&[i64]>,
        next: Option<&NextStep<'_>>,
    ) -> Self {
        let mode = ForwardMode { rule: model.router_spec().eval, ..ForwardMode::EVAL };
        let output = model.forward(inputs, source, mode, None);
        let last = last.map(|last| Tensor::from_slice(last).to_device(model.device()));
        let at_last = |x: &Tensor| match &last {
            None => x.select(1, 0),
            Some(last) => {
                let index = last.view([-1, 1, 1]).expand([-1, 1, x.size()[2]], false);
                x.gather(1, &index, false).squeeze_dim(1)
            }
        };
        let weights = output.weights.iter().filter_map(|weights| match weights {
            RoutingWeights::PerToken(weights) | RoutingWeights::Chosen(weights, _) => {
                Some(at_last(weights))
            }
            RoutingWeights::Off | RoutingWeights::Ones => None,
        });
        let weights = weights.collect();
        let (logits, most_probable) = model.next_tokens(&at_last(&output.hidden), next);
        Self { logits, most_probable, weights }
    }

    /// Starts to fetch the most probable tokens, if they have been computed.
    pub fn fetch(&self) -> Option<Fetch> {
        // of a step that was repeated, they lie outside the graph's memory, and the only step that
        // can begin before they are read writes to the other half
        let fetch = Fetch::aside(self.most_probable.as_ref()?);
        Some(fetch.unwrap_or_else(|error| panic!("{error:#}")))
    }

    /// The same of the first `b` texts.
    pub fn first(&self, b: usize) -> Self {
        let rows = |x: &Tensor| x.narrow(0, 0, b as i64);
        Self {
            logits: rows(&self.logits),
            most_probable: self.most_probable.as_ref().map(Tensor::shallow_clone),
            weights: self.weights.iter().map(rows).collect(),
        }
    }

    /// The means of the weights over the sites, `[b e]`.
    fn mean_weights(&self) -> Option<Vec<f64>> {
        let all: Vec<Tensor> = self.weights.iter().map(|x| x.to_kind(Kind::Double)).collect();
        let mean = (!all.is_empty()).then(|| Tensor::stack(&all, 0).mean_dim(0, false, None))?;
        Some(numbers(&mean))
    }
}

/// The routing of the first `count` rows, of which `texts` are the first ones. Rows behind them are
/// routed as the last text.
pub(super) fn source(model: &RoutedModel, texts: &[Text], count: usize) -> RoutingSource {
    let is_routed = |text: &Text| text.request.route == Route::Router;
    if model.num_experts() == 0 {
        return RoutingSource::Base;
    }
    if texts.iter().all(is_routed) {
        return RoutingSource::Router;
    }
    let rows = || (0..count).map(|row| &texts[row.min(texts.len() - 1)]);
    let fixed: Vec<f64> = rows().flat_map(|text| parts(model, text)).collect();
    if fixed.iter().all(|weight| *weight == 0.0) {
        return RoutingSource::Base;
    }
    let device = model.device();
    let fixed = Tensor::from_slice(&fixed).view([count as i64, -1]).to_device(device);
    let by_router: Vec<bool> = rows().map(is_routed).collect();
    let some = by_router.contains(&true) && !model.routers().is_empty();
    let by_router = some.then(|| Tensor::from_slice(&by_router).to_device(device));
    RoutingSource::Rows(RowSources { fixed, by_router })
}

/// The weights of all parts, as far as no router decides them, `[s]`.
fn parts(model: &RoutedModel, text: &Text) -> Vec<f64> {
    let mut weights = match &text.request.route {
        // a single expert has no router
        Route::Router => vec![1.0; model.num_experts() as usize],
        Route::Fixed(weights) => weights.clone(),
    };
    let is_base = weights.iter().all(|weight| *weight == 0.0);
    weights.resize(model.specs().len(), if is_base { 0.0 } else { 1.0 });
    weights
}

/// Whether the most probable token of a text is all that is wanted of a step.
pub(super) fn wants_most_probable(text: &Text) -> bool {
    let Request { sampling, num_alternatives, wants_weights, .. } = &text.request;
    sampling.takes_most_probable() && *num_alternatives == 0 && !wants_weights
}

/// The most probable tokens that were fetched, for texts that want no more than these.
pub(super) fn fetched_tokens(fetch: Fetch, texts: &[Text]) -> Vec<NewToken> {
    let fetched = fetch.wait().unwrap_or_else(|error| panic!("{error:#}"));
    let token = |(id, log_prob)| NewToken { id, log_prob, alternatives: vec![], weights: vec![] };
    most_probable(&fetched, texts).map(token).collect()
}

/// The most probable token of each text and the logarithm of its probability.
///
/// - `choices`: what [`RoutedModel::next_tokens`] computed, `[_, 2, b]`
fn most_probable(choices: &Tensor, texts: &[Text]) -> impl Iterator<Item = (i64, f64)> {
    let (halves, _, b) = choices.size3().expect("tokens and logarithms are [_, 2, b]");
    let (halves, b) = (halves as usize, b as usize);
    let all = numbers(choices);
    texts.iter().enumerate().map(move |(row, text)| {
        let position = text.tokens.len() - 1;
        let at = position % halves * 2 * b + row;
        (all[at] as i64, all[at + b])
    })
}

/// The next token of each text.
pub(super) fn next_tokens(
    model: &RoutedModel,
    texts: &[Text],
    output: &StepOutput,
) -> Vec<NewToken> {
    let takes_most_probable = |text: &Text| text.request.sampling.takes_most_probable();
    let most = texts.iter().map(|text| text.request.num_alternatives).max().unwrap_or(0);
    let (ids, log_probs, best) = match &output.most_probable {
        Some(choices) if most == 0 && texts.iter().all(takes_most_probable) => {
            let (ids, log_probs) = most_probable(choices, texts).unzip();
            (ids, log_probs, None)
        }
        _ => by_logits(texts, &output.logits, most),
    };
    let weights = texts.iter().any(|text| text.request.wants_weights);
    let weights = weights.then(|| output.mean_weights()).flatten();
    let token = |(row, text): (usize, &Text)| {
        let alternatives = best.iter().flat_map(|Best { ids, log_probs, count }| {
            let own = row * count..row * count + text.request.num_alternatives.min(*count);
            own.map(|i| (ids[i], log_probs[i]))
        });
        NewToken {
            id: ids[row],
            log_prob: log_probs[row],
            alternatives: alternatives.collect(),
            weights: weights_of(model, text, row, weights.as_deref()),
        }
    };
    texts.iter().enumerate().map(token).collect()
}

/// The most probable tokens of each text.
struct Best {
    /// `[b count]`.
    ids: Vec<i64>,
    /// `[b count]`, in nats.
    log_probs: Vec<f64>,
    /// How many there are for each text.
    count: usize,
}

/// The next tokens, `[b]`, the logarithms of their probabilities, and `most` alternatives, if that
/// is not 0.
fn by_logits(texts: &[Text], logits: &Tensor, most: usize) -> (Vec<i64>, Vec<f64>, Option<Best>) {
    let choosers = texts.iter().map(|text| Chooser {
        sampling: &text.request.sampling,
        key: text.request.key,
        tokens: &text.tokens,
    });
    let logits = logits.to_kind(Kind::Float);
    let ids = choose(&logits, &choosers.collect::<Vec<_>>());
    let log_sums = logits.logsumexp(-1, true);
    let chosen = logits.gather(-1, &ids.unsqueeze(-1), false) - &log_sums;
    let best = (most > 0).then(|| {
        let count = (most as i64).min(logits.size()[1]);
        let (values, ids) = logits.topk(count, -1, true, true);
        let log_probs = numbers(&(values - &log_sums));
        Best { ids: integers(&ids), log_probs, count: count as usize }
    });
    (integers(&ids), numbers(&chosen), best)
}

/// The routing weights of a text, if it asked for them.
fn weights_of(model: &RoutedModel, text: &Text, row: usize, routed: Option<&[f64]>) -> Vec<f64> {
    let e = model.num_experts() as usize;
    match (&text.request, routed) {
        (Request { wants_weights: false, .. }, _) => vec![],
        (Request { route: Route::Fixed(weights), .. }, _) => weights.clone(),
        (_, Some(routed)) => routed[row * e..(row + 1) * e].to_vec(),
        // a single expert has no router
        (_, None) => vec![1.0; e],
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
