//! Answers in OpenAI's forms, as a whole or as chunks of a stream.

use std::collections::VecDeque;
use std::time::SystemTime;

use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use super::error::ApiError;
use super::live::{End, Piece, TextToken};
use super::logprobs;
use super::models::unix_seconds;
use super::request::{Ask, Endpoint, random};
use super::token_text::TokenTexts;
use crate::generate::Finish;

/// What identifies the software that answers.
const FINGERPRINT: &str = concat!("dylora-", env!("CARGO_PKG_VERSION"));

/// An answer whose texts are being generated.
#[derive(Debug)]
pub struct Answer {
    ask: Ask,
    pieces: Receiver<Piece>,
    texts: TokenTexts,
    experts: Vec<String>,
    id: String,
    created: u64,
    num_open: usize,
    num_tokens: usize,
    /// The lines of a stream that were not sent yet.
    lines: VecDeque<String>,
}

/// A text that is being put together.
#[derive(Debug, Default)]
struct Choice {
    text: String,
    tokens: Vec<TextToken>,
    finish: Option<Finish>,
}

impl Answer {
    /// An answer to `ask`, whose texts come as `pieces`.
    pub fn new(ask: Ask, pieces: Receiver<Piece>, texts: TokenTexts, experts: Vec<String>) -> Self {
        let prefix = match ask.endpoint {
            Endpoint::Completions => "cmpl",
            Endpoint::Chat => "chatcmpl",
        };
        Self {
            id: format!("{prefix}-{:016x}{:016x}", random(), random()),
            created: unix_seconds(SystemTime::now()),
            num_open: ask.num_choices(),
            num_tokens: 0,
            lines: VecDeque::new(),
            ask,
            pieces,
            texts,
            experts,
        }
    }

    /// Whether the answer comes in pieces.
    pub(crate) fn is_stream(&self) -> bool {
        self.ask.common.is_stream
    }

    /// The answer when all texts are complete.
    ///
    /// # Errors
    /// A text that failed.
    pub async fn whole(mut self) -> Result<Value, ApiError> {
        let mut choices: Vec<Choice> = (0..self.num_open).map(|_| Choice::default()).collect();
        while self.num_open > 0 {
            let piece = self.pieces.recv().await.ok_or_else(ApiError::internal)?;
            let choice = &mut choices[piece.choice];
            choice.text += &piece.text;
            choice.tokens.extend(piece.tokens);
            match piece.end {
                None => {}
                Some(End::Complete(finish, num_tokens)) => {
                    choice.finish = Some(finish);
                    self.num_open -= 1;
                    self.num_tokens += num_tokens;
                }
                Some(End::Failed(error)) => return Err(error),
            }
        }
        let choices: Vec<Value> = choices
            .into_iter()
            .enumerate()
            .map(|(index, choice)| self.choice(index, &choice))
            .collect();
        let object = match self.ask.endpoint {
            Endpoint::Completions => "text_completion",
            Endpoint::Chat => "chat.completion",
        };
        let mut json = self.head(object, choices);
        json["usage"] = self.usage();
        Ok(json)
    }

    fn head(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.ask.common.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    fn usage(&self) -> Value {
        let prompt_tokens = self.ask.num_prompt_tokens();
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt_tokens + self.num_tokens,
        })
    }

    fn choice(&self, index: usize, choice: &Choice) -> Value {
        let Choice { text, tokens, finish } = choice;
        let text = format!("{}{text}", self.ask.prompt_of(index).echo);
        let part = match self.ask.endpoint {
            Endpoint::Completions => json!({"text": text}),
            Endpoint::Chat => json!({
                "message": {"role": "assistant", "content": text, "refusal": null}
            }),
        };
        self.with_rest(index, part, tokens, *finish)
    }

    /// A choice, whole or in part, with what every choice has.
    fn with_rest(
        &self,
        index: usize,
        mut part: Value,
        tokens: &[TextToken],
        finish: Option<Finish>,
    ) -> Value {
        part["index"] = index.into();
        part["finish_reason"] = finish.map(Finish::name).into();
        part["logprobs"] = match (self.ask.logprobs, self.ask.endpoint) {
            (None, _) => Value::Null,
            // the last part of a stream has only the reason
            (Some(_), _) if tokens.is_empty() && finish.is_some() && self.ask.common.is_stream => {
                Value::Null
            }
            (Some(_), Endpoint::Completions) => {
                let start = self.ask.prompt_of(index).echo.chars().count();
                logprobs::of_completions(tokens, &self.texts, start)
            }
            (Some(_), Endpoint::Chat) => logprobs::of_chat(tokens, &self.texts),
        };
        if self.ask.common.return_routing && (!tokens.is_empty() || !self.ask.common.is_stream) {
            part["routing"] = logprobs::routing(tokens, &self.texts, &self.experts);
        }
        part
    }

    /// Puts what comes before the first token into the stream.
    pub(crate) fn begin_stream(&mut self) {
        for index in 0..self.num_open {
            let echo = self.ask.prompt_of(index).echo.clone();
            match self.ask.endpoint {
                Endpoint::Chat => {
                    let delta = json!({"role": "assistant", "content": "", "refusal": null});
                    self.chunk(index, json!({"delta": delta}), &[], None);
                }
                Endpoint::Completions if !echo.is_empty() => {
                    self.chunk(index, json!({"text": echo}), &[], None);
                }
                Endpoint::Completions => {}
            }
        }
    }

    /// The data of the stream's next event; `None` at its end.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            if self.num_open == 0 {
                return None;
            }
            match self.pieces.recv().await {
                Some(piece) => self.add(&piece),
                None => self.fail(&ApiError::internal()),
            }
        }
    }

    fn add(&mut self, piece: &Piece) {
        let is_chat = self.ask.endpoint == Endpoint::Chat;
        if !piece.text.is_empty() || !piece.tokens.is_empty() {
            let part = match is_chat {
                true => json!({"delta": {"content": piece.text}}),
                false => json!({"text": piece.text}),
            };
            self.chunk(piece.choice, part, &piece.tokens, None);
        }
        match &piece.end {
            None => {}
            Some(End::Failed(error)) => self.fail(error),
            Some(End::Complete(finish, num_tokens)) => {
                let part = if is_chat { json!({"delta": {}}) } else { json!({"text": ""}) };
                self.chunk(piece.choice, part, &[], Some(*finish));
                self.num_open -= 1;
                self.num_tokens += num_tokens;
                if self.num_open == 0 {
                    self.end();
                }
            }
        }
    }

    fn chunk(&mut self, index: usize, part: Value, tokens: &[TextToken], finish: Option<Finish>) {
        let choice = self.with_rest(index, part, tokens, finish);
        let mut json = self.head(self.chunk_object(), vec![choice]);
        if self.ask.common.include_usage {
            json["usage"] = Value::Null;
        }
        self.lines.push_back(json.to_string());
    }

    fn chunk_object(&self) -> &'static str {
        match self.ask.endpoint {
            Endpoint::Completions => "text_completion",
            Endpoint::Chat => "chat.completion.chunk",
        }
    }

    fn end(&mut self) {
        if self.ask.common.include_usage {
            let mut json = self.head(self.chunk_object(), vec![]);
            json["usage"] = self.usage();
            self.lines.push_back(json.to_string());
        }
        self.lines.push_back("[DONE]".to_owned());
    }

    /// Ends the stream by an error, without `[DONE]`.
    fn fail(&mut self, error: &ApiError) {
        self.lines.push_back(error.json().to_string());
        self.num_open = 0;
    }
}
