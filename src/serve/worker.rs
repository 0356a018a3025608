//! The thread that owns the model. It takes orders from the tasks that answer requests, runs the
//! engine step by step, and sends pieces of text back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use axum::http::StatusCode;

use super::error::ApiError;
use super::live::{Fault, LiveText, Order};
use super::metrics::{Ending, Metrics};
use crate::data::Tokenizer;
use crate::generate::{Engine, Event, Finish};

/// Generates the texts of all requests.
#[derive(Debug)]
pub(crate) struct Worker<'a> {
    engine: Engine<'a>,
    tokenizer: &'a Tokenizer,
    /// The texts of each request.
    orders: Receiver<Vec<Order>>,
    metrics: Arc<Metrics>,
    /// The texts that wait or are being generated, by the engine's numbers.
    texts: HashMap<u64, LiveText<'a>>,
}

impl<'a> Worker<'a> {
    /// A worker without texts.
    pub fn new(
        engine: Engine<'a>,
        tokenizer: &'a Tokenizer,
        orders: Receiver<Vec<Order>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { engine, tokenizer, orders, metrics, texts: HashMap::new() }
    }

    /// Works until there are no more orders and nobody can send any.
    pub fn run(mut self) {
        loop {
            if self.engine.is_idle() {
                self.publish();
                match self.orders.recv() {
                    Ok(orders) => self.begin(orders),
                    Err(_) => return,
                }
            }
            while let Ok(orders) = self.orders.try_recv() {
                self.begin(orders);
            }
            self.drop_late_texts();
            self.publish();
            for event in self.engine.step() {
                self.take(event);
            }
        }
    }

    /// Hands the texts of a request to the engine, which computes their prompts together.
    fn begin(&mut self, orders: Vec<Order>) {
        for order in orders {
            let Some((mut text, request)) = LiveText::new(self.tokenizer, order) else {
                self.metrics.ended(Ending::Cancelled);
                continue;
            };
            match self.engine.add(request) {
                Ok(number) => {
                    self.texts.insert(number, text);
                }
                Err(error) => text.fail(ApiError::invalid(error.to_string())),
            }
        }
    }

    /// Ends texts for which nobody waits, and those that took too long.
    fn drop_late_texts(&mut self) {
        let now = Instant::now();
        let (engine, metrics) = (&mut self.engine, &self.metrics);
        self.texts.retain(|number, text| {
            let is_abandoned = text.is_abandoned();
            if !is_abandoned && now < text.deadline() {
                return true;
            }
            engine.cancel(*number);
            if is_abandoned {
                metrics.ended(Ending::Cancelled);
            } else {
                metrics.ended(Ending::TimedOut);
                let message = "the text took longer than the server allows; ask for fewer tokens";
                text.fail(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message));
            }
            false
        });
    }

    fn take(&mut self, event: Event) {
        let number = event.text;
        let has_ended = event.finish.is_some();
        let Some(text) = self.texts.get_mut(&number) else { return };
        self.metrics.completion_tokens.fetch_add(1, Ordering::Relaxed);
        let time = text.tick(Instant::now());
        if text.num_tokens() == 0 {
            self.metrics.prompt_tokens.fetch_add(text.prompt_len() as u64, Ordering::Relaxed);
            self.metrics.first_token.add(time);
        } else {
            self.metrics.token.add(time);
        }
        let ending = match text.take(event) {
            Ok(None) => return,
            Ok(Some(Finish::Stop)) => Ending::Stop,
            Ok(Some(Finish::Length)) => Ending::Length,
            Err(Fault::Abandoned) => Ending::Cancelled,
            Err(Fault::Unread) => {
                let message = "the client read the text more slowly than it was generated";
                text.fail(ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_reader", message));
                Ending::Unread
            }
            Err(Fault::Undecodable(error)) => {
                tracing::error!("{error:#}");
                text.fail(ApiError::internal());
                Ending::Failed
            }
        };
        if !has_ended {
            self.engine.cancel(number);
        }
        self.metrics.ended(ending);
        self.texts.remove(&number);
    }

    /// Publishes what the engine holds.
    fn publish(&self) {
        let (active, _) = self.engine.num_texts();
        self.metrics.active.store(active as u64, Ordering::Relaxed);
        let positions = self.engine.num_positions() as u64;
        self.metrics.positions.store(positions, Ordering::Relaxed);
    }
}
