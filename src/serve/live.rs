//! A text that is being generated, and the pieces in which it reaches the task that answers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{OwnedPermit, Sender};

use super::error::ApiError;
use crate::data::Tokenizer;
use crate::generate::{Event, Finish, NewToken, Request, TextStream};

/// A text to generate.
#[derive(Debug)]
pub(crate) struct Order {
    /// What the engine is asked for.
    pub request: Request,
    /// The strings that end the text.
    pub stop: Vec<String>,
    /// The number of the text among those of its request.
    pub choice: usize,
    /// Whether the pieces carry tokens.
    pub wants_tokens: bool,
    /// Where the pieces go.
    pub pieces: Sender<Piece>,
    /// The text's place among those that may be generated or wait.
    pub place: OwnedSemaphorePermit,
    /// When the request arrived.
    pub received: Instant,
    /// When the text must be complete.
    pub deadline: Instant,
}

/// A part of a text.
#[derive(Debug)]
pub(crate) struct Piece {
    /// The number of the text among those of its request.
    pub choice: usize,
    /// Whole characters behind those of earlier pieces.
    pub text: String,
    /// The tokens that begin in them, if they were asked for.
    pub tokens: Vec<TextToken>,
    /// How the text ended, if it has.
    pub end: Option<End>,
}

/// A token with its place in the text.
#[derive(Debug)]
pub(crate) struct TextToken {
    /// Number of characters in front of it.
    pub offset: usize,
    /// The token.
    pub token: NewToken,
}

/// How a text ended.
#[derive(Debug)]
pub enum End {
    /// As it should, after this number of tokens.
    Complete(Finish, usize),
    /// By a fault.
    Failed(ApiError),
}

/// Why a text cannot go on.
#[derive(Debug)]
pub enum Fault {
    /// Too many pieces wait for the task that answers.
    Unread,
    /// The task that answers has ended.
    Abandoned,
    /// A token has no text.
    Undecodable(anyhow::Error),
}

/// A text that waits or is being generated.
#[derive(Debug)]
pub(crate) struct LiveText<'a> {
    choice: usize,
    wants_tokens: bool,
    stream: TextStream<'a>,
    /// Tokens whose text was not sent yet, with its place in bytes.
    unsent: VecDeque<(usize, NewToken)>,
    /// Number of bytes and of characters of the text that were sent.
    sent: (usize, usize),
    num_tokens: usize,
    pieces: Sender<Piece>,
    /// Room for the last piece, however slowly the others are read.
    end: Option<OwnedPermit<Piece>>,
    prompt_len: usize,
    /// When the request or, later, the last token came.
    last: Instant,
    deadline: Instant,
    _place: OwnedSemaphorePermit,
}

impl<'a> LiveText<'a> {
    /// A text without tokens, and what the engine is asked for. `None` if nobody waits for it.
    pub fn new(tokenizer: &'a Tokenizer, order: Order) -> Option<(Self, Request)> {
        let Order { request, stop, choice, wants_tokens, pieces, place, received, deadline } =
            order;
        let end = pieces.clone().try_reserve_owned().ok()?;
        let text = Self {
            choice,
            wants_tokens,
            stream: TextStream::new(tokenizer, &request.prompt, stop),
            unsent: VecDeque::new(),
            sent: (0, 0),
            num_tokens: 0,
            pieces,
            end: Some(end),
            prompt_len: request.prompt.len(),
            last: received,
            deadline,
            _place: place,
        };
        Some((text, request))
    }

    /// Whether nobody waits for the text.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.pieces.is_closed()
    }

    /// When the text must be complete.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Number of tokens of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Number of tokens that were taken.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Notes the time of a token, and returns the time since the one before it, or since the
    /// request.
    pub(crate) fn tick(&mut self, now: Instant) -> Duration {
        now.duration_since(std::mem::replace(&mut self.last, now))
    }

    /// Takes a token and sends what it completes. Returns how the text has ended, if it has.
    ///
    /// # Errors
    /// A piece that cannot be sent, and a token that cannot be decoded.
    pub fn take(&mut self, event: Event) -> Result<Option<Finish>, Fault> {
        self.num_tokens += 1;
        if self.wants_tokens && event.finish != Some(Finish::Stop) {
            self.unsent.push_back((self.stream.text().len(), event.token.clone()));
        }
        let (text, finish) = self.stream.take(&event).map_err(Fault::Undecodable)?;
        let tokens = self.sendable(&text, finish.is_some());
        if let Some(finish) = finish {
            self.end(text, tokens, End::Complete(finish, self.num_tokens));
            return Ok(Some(finish));
        }
        if text.is_empty() && tokens.is_empty() {
            return Ok(None);
        }
        match self.pieces.try_send(Piece { choice: self.choice, text, tokens, end: None }) {
            Ok(()) => Ok(None),
            Err(TrySendError::Full(_)) => Err(Fault::Unread),
            Err(TrySendError::Closed(_)) => Err(Fault::Abandoned),
        }
    }

    /// The tokens that go with the next piece: those that begin in front of its end. Those of a
    /// stop string are never sent.
    fn sendable(&mut self, text: &str, is_last: bool) -> Vec<TextToken> {
        let (bytes, chars) = self.sent;
        let end = bytes + text.len();
        let takes_all = is_last && !self.stream.has_stopped();
        let mut tokens = vec![];
        while let Some((place, _)) = self.unsent.front()
            && (takes_all || *place < end)
        {
            let (place, token) = self.unsent.pop_front().expect("there is a first");
            let within = text.get(..place.saturating_sub(bytes)).unwrap_or(text);
            tokens.push(TextToken { offset: chars + within.chars().count(), token });
        }
        self.sent = (end, chars + text.chars().count());
        tokens
    }

    /// Ends the text by a fault.
    pub fn fail(&mut self, error: ApiError) {
        self.end(String::new(), vec![], End::Failed(error));
    }

    fn end(&mut self, text: String, tokens: Vec<TextToken>, end: End) {
        if let Some(permit) = self.end.take() {
            permit.send(Piece { choice: self.choice, text, tokens, end: Some(end) });
        }
    }
}
