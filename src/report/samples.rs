//! Answers of the base and of the model to the same documents, with the routing of each token.

use std::sync::Arc;

use anyhow::{Result, anyhow};

use crate::data::Tokenizer;
use crate::generate::answers::Question;
use crate::generate::{Engine, EngineLimits, Finish, Request, Route, Sampling, TextStream};
use crate::model::RoutedModel;

/// Most tokens of an answer.
const MAX_NEW_TOKENS: usize = 64;
/// Most answers that are generated at a time.
const MAX_TEXTS: usize = 8;
/// Least room for an answer behind its prompt.
const LEAST_TOKENS: usize = 8;

/// A document with two answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The document's domain.
    pub domain: String,
    /// The prompt, without special tokens.
    pub prompt: String,
    /// What the document says.
    pub reference: String,
    /// What the base says.
    pub before: Answer,
    /// What the model says.
    pub after: Answer,
}

/// An answer, token by token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Its tokens.
    pub tokens: Vec<RoutedToken>,
    /// Whether it ends because it has become too long.
    pub is_cut: bool,
}

/// A token's text and routing.
#[derive(Debug, Clone, PartialEq)]
pub struct RoutedToken {
    /// Its text. Bytes that are no complete character belong to the next token.
    pub text: String,
    /// The routing weights, as a mean over the sites; all of them 0 for the base.
    pub weights: Vec<f64>,
}

impl Answer {
    /// The whole text.
    pub fn text(&self) -> String {
        self.tokens.iter().map(|token| token.text.as_str()).collect()
    }
}

/// Answers documents greedily, once with the base alone and once as each says. A document whose
/// prompt leaves no room for an answer is left out.
///
/// # Errors
/// Tokens that cannot be decoded.
pub fn samples(
    model: &RoutedModel,
    tokenizer: &Tokenizer,
    questions: Vec<Question>,
    end_tokens: &Arc<[i64]>,
    progress: &dyn Fn(u64),
) -> Result<Vec<Sample>> {
    let context = model.base().spec.max_positions as usize;
    let fits = |question: &Question| question.document.prompt.len() + LEAST_TOKENS <= context;
    let questions: Vec<Question> = questions.into_iter().filter(fits).collect();
    let base = Route::Fixed(vec![0.0; model.num_experts() as usize]);
    let routes = questions.iter().flat_map(|question| [base.clone(), question.route.clone()]);
    let mut engine = Engine::new(model, EngineLimits { max_texts: MAX_TEXTS, context })?;
    let mut texts = vec![];
    for (index, route) in routes.enumerate() {
        let prompt = questions[index / 2].document.prompt.clone();
        let stream = TextStream::new(tokenizer, &prompt, &[]);
        let number = engine.add(Request {
            key: 0,
            prompt,
            max_new_tokens: MAX_NEW_TOKENS,
            sampling: Sampling::GREEDY,
            route,
            end_tokens: end_tokens.clone(),
            num_alternatives: 0,
            wants_weights: true,
        })?;
        texts.push((number, stream, Answer::default()));
    }
    let mut done = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            let text = texts.iter_mut().find(|(number, ..)| *number == event.text);
            let (_, stream, answer) = text.ok_or_else(|| anyhow!("an unknown text"))?;
            let (text, finish) = stream.take(&event)?;
            if !text.is_empty() {
                answer.tokens.push(RoutedToken { text, weights: event.token.weights });
            }
            answer.is_cut = finish == Some(Finish::Length);
            done += u64::from(finish.is_some());
        }
        progress(done);
    }
    let mut answers = texts.into_iter().map(|(_, _, answer)| answer);
    let sample = |question: Question| -> Result<Sample> {
        let text = |ids: &[i64]| {
            tokenizer.decode_text(&ids.iter().map(|id| *id as u32).collect::<Vec<_>>())
        };
        Ok(Sample {
            prompt: text(&question.document.prompt)?,
            reference: text(&question.document.reference)?,
            domain: question.domain,
            before: answers.next().unwrap_or_default(),
            after: answers.next().unwrap_or_default(),
        })
    };
    questions.into_iter().map(sample).collect()
}
