//! Answers to the documents of a dataset, compared with their references.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use fancy_regex::Regex;
use serde::{Deserialize, Serialize};

use super::engine::{Engine, EngineLimits};
use super::request::{Finish, Request, Route};
use super::sampling::Sampling;
use super::text::TextStream;
use crate::data::{Answered, Tokenizer};
use crate::model::RoutedModel;

/// What is asked of the answers.
#[derive(Debug)]
pub struct AnswerSettings<'a> {
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Most answers at a time.
    pub batch_size: usize,
    /// The tokens that end an answer.
    pub end_tokens: Arc<[i64]>,
    /// Finds the final answer in a text: the last match counts, by its first group or as a whole.
    pub pattern: &'a Regex,
}

/// A document's answer beside its reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The domain.
    pub domain: String,
    /// The prompt, without special tokens.
    pub prompt: String,
    /// What the document says.
    pub reference: String,
    /// What the model says.
    pub text: String,
    /// `stop`, or `length` if the answer is not complete.
    pub finish_reason: String,
    /// Whether both texts are equal, white space at their ends aside.
    pub exact: bool,
    /// Whether both have the same final answer; `None` if the reference has none.
    pub correct: Option<bool>,
}

/// How many answers of a domain are right.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerReport {
    /// The domain.
    pub domain: String,
    /// Number of answers.
    pub num_answers: usize,
    /// The share of them that equal their reference; `None` without answers.
    pub exact_match: Option<f64>,
    /// Number of references that have a final answer.
    pub num_final: usize,
    /// The share of these whose final answer is right; `None` without any.
    pub accuracy: Option<f64>,
}

/// The final answer of a text by a pattern: what it matches last, without commas between digits and
/// without white space or a full stop at the end.
pub fn final_answer(text: &str, pattern: &Regex) -> Option<String> {
    let last = pattern.captures_iter(text).filter_map(Result::ok).last()?;
    let found = last.get(1).or_else(|| last.get(0))?.as_str().trim();
    let found = found.strip_suffix('.').unwrap_or(found).trim();
    let characters: Vec<char> = found.chars().collect();
    let is_digit = |index: Option<usize>| {
        index.and_then(|i| characters.get(i)).is_some_and(char::is_ascii_digit)
    };
    let is_separator =
        |i: usize| characters[i] == ',' && is_digit(i.checked_sub(1)) && is_digit(Some(i + 1));
    Some((0..characters.len()).filter(|&i| !is_separator(i)).map(|i| characters[i]).collect())
}

/// A document to answer.
#[derive(Debug)]
pub struct Question {
    /// The name of its domain.
    pub domain: String,
    /// The document.
    pub document: Answered,
    /// What decides the routing weights.
    pub route: Route,
}

/// Answers documents greedily. The answer of a document whose prompt fills the context is `None`.
///
/// - `progress`: is told the number of answers so far
///
/// # Errors
/// A prompt that is longer than the context, and tokens that cannot be decoded.
pub fn answer(
    model: &RoutedModel,
    tokenizer: &Tokenizer,
    questions: Vec<Question>,
    settings: &AnswerSettings<'_>,
    progress: &dyn Fn(u64),
) -> Result<Vec<Option<Sample>>> {
    let context = model.base().spec.max_positions as usize;
    let mut engine = Engine::new(model, EngineLimits { max_texts: settings.batch_size, context })?;
    let mut waiting = BTreeMap::new();
    let mut samples: Vec<Option<Sample>> = questions.iter().map(|_| None).collect();
    for (index, Question { domain, document, route }) in questions.into_iter().enumerate() {
        if document.prompt.len() >= context {
            continue;
        }
        let number = engine.add(Request {
            key: 0,
            prompt: document.prompt.clone(),
            max_new_tokens: settings.max_new_tokens,
            sampling: Sampling::GREEDY,
            route,
            end_tokens: settings.end_tokens.clone(),
            num_alternatives: 0,
            wants_weights: false,
        })?;
        let stream = TextStream::new(tokenizer, &document.prompt, &[]);
        waiting.insert(number, (index, domain, document, stream));
    }
    let mut num_done = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            let (index, domain, document, stream) =
                waiting.get_mut(&event.text).ok_or_else(|| anyhow!("an unknown text"))?;
            if let (_, Some(finish)) = stream.take(&event)? {
                let text = stream.text();
                let sample = Sample::new(domain, document, text, finish, tokenizer, settings)?;
                samples[*index] = Some(sample);
                num_done += 1;
            }
        }
        progress(num_done);
    }
    Ok(samples)
}

impl Sample {
    fn new(
        domain: &str,
        document: &Answered,
        text: &str,
        finish: Finish,
        tokenizer: &Tokenizer,
        settings: &AnswerSettings<'_>,
    ) -> Result<Self> {
        let ids = |ids: &[i64]| ids.iter().map(|id| *id as u32).collect::<Vec<_>>();
        let mut reference = TextStream::new(tokenizer, &document.prompt, &[]);
        for id in &document.reference {
            reference.push(*id)?;
        }
        reference.finish()?;
        let reference = reference.text().to_owned();
        let right = final_answer(&reference, settings.pattern);
        let found = final_answer(text, settings.pattern);
        Ok(Self {
            domain: domain.to_owned(),
            prompt: tokenizer.decode_text(&ids(&document.prompt))?,
            exact: reference.trim() == text.trim(),
            correct: right.map(|right| found == Some(right)),
            reference,
            text: text.to_owned(),
            finish_reason: finish.name().to_owned(),
        })
    }
}

/// How many answers are right, by domain, in the order of the domains `names`.
pub fn reports(samples: &[Sample], names: &[&str]) -> Vec<AnswerReport> {
    let share = |part: usize, all: usize| (all > 0).then(|| part as f64 / all as f64);
    let of = |name: &&str| {
        let own: Vec<&Sample> = samples.iter().filter(|sample| sample.domain == *name).collect();
        let num_final = own.iter().filter(|sample| sample.correct.is_some()).count();
        let correct = own.iter().filter(|sample| sample.correct == Some(true)).count();
        AnswerReport {
            domain: (*name).to_owned(),
            num_answers: own.len(),
            exact_match: share(own.iter().filter(|sample| sample.exact).count(), own.len()),
            num_final,
            accuracy: share(correct, num_final),
        }
    };
    names.iter().map(of).collect()
}
