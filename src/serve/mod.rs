//! OpenAI's HTTP interface to a mixture.
//!
//! ```text
//! connection -> http: who may ask -> completions, chat: fields -> prompts -> orders
//!                                                                               |
//! answer: whole or as a stream  <-  pieces of text  <-  worker: engine  <-------+
//! ```
//!
//! One thread owns the model ([`Server::run`]); a few others run the tasks that answer requests.
//! The tasks send orders over a bounded channel and get pieces of text over a channel of their own.
//! A text whose receiver is gone, or does not keep up, is cancelled, so that no client can hold up
//! others.

mod answer;
mod chat;
mod completions;
mod connection;
mod error;
mod fields;
mod http;
mod keys;
mod limits;
mod live;
mod logprobs;
mod metrics;
mod models;
mod request;
mod token_text;
mod worker;

use std::net::{SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::SystemTime;

use anyhow::{Context, Result};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

pub use self::keys::Keys;
pub use self::limits::Limits;
pub use self::models::ServedModel;

use self::http::App;
use self::live::Order;
use self::metrics::Metrics;
use self::token_text::TokenTexts;
use self::worker::Worker;
use crate::generate::{Engine, EngineLimits};
use crate::model::RoutedModel;

/// Number of threads that run the tasks which answer requests.
const TASK_THREADS: usize = 2;
/// Most threads that tokenize prompts.
const TOKENIZER_THREADS: usize = 4;

/// A server that has an address, but does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    keys: Keys,
    limits: Limits,
}

impl Server {
    /// Binds a server to an address. Clients can connect, and wait for [`Server::run`].
    ///
    /// # Errors
    /// An address that cannot be bound, for example because another program has it.
    pub fn bind(address: SocketAddr, keys: Keys, limits: Limits) -> Result<Self> {
        let listener =
            TcpListener::bind(address).with_context(|| format!("cannot listen on `{address}`"))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, keys, limits })
    }

    /// The address, with the port that was chosen if it was 0.
    ///
    /// # Errors
    /// A socket that does not say it.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Takes the memory for the texts, and returns an engine for them.
    ///
    /// # Errors
    /// Those of [`Engine::new`].
    pub fn engine<'a>(&self, model: &'a RoutedModel) -> Result<Engine<'a>> {
        let Limits { max_texts, context, .. } = self.limits;
        let mut engine = Engine::new(model, EngineLimits { max_texts, context })?;
        engine.reserve_all();
        Ok(engine)
    }

    /// Answers requests until `stop` is set and running texts have ended. The calling thread runs
    /// the engine.
    ///
    /// # Errors
    /// A socket or threads that the system refuses.
    ///
    /// # Panics
    /// A step of the engine that panics, as when memory runs out. Running texts have then ended
    /// with an error.
    pub fn run(self, engine: Engine<'_>, model: ServedModel, stop: &AtomicBool) -> Result<()> {
        let tokenizer = model.tokenizer.clone();
        let metrics = Arc::new(Metrics::default());
        metrics.cache_bytes.store(engine.cache_bytes(), Ordering::Relaxed);
        let capacity = (self.limits.max_texts * self.limits.context) as u64;
        metrics.capacity.store(capacity, Ordering::Relaxed);
        let (app, orders) = self.app(model, metrics.clone());
        let worker = Worker::new(engine, &tokenizer, orders, metrics);
        let runtime = runtime()?;
        let has_failed = AtomicBool::new(false);
        thread::scope(|scope| {
            let listener = self.listener;
            let tasks = scope.spawn(|| {
                runtime.block_on(async {
                    let listener = tokio::net::TcpListener::from_std(listener)?;
                    connection::serve(listener, app, [stop, &has_failed]).await;
                    anyhow::Ok(())
                })?;
                // ends the tasks that are left, and with them the channel of orders
                drop(runtime);
                anyhow::Ok(())
            });
            let worked = catch_unwind(AssertUnwindSafe(|| worker.run()));
            has_failed.store(worked.is_err(), Ordering::Relaxed);
            let served = tasks.join().unwrap_or_else(|panic| resume_unwind(panic));
            worked.unwrap_or_else(|panic| resume_unwind(panic));
            served
        })
    }

    fn app(
        &self,
        model: ServedModel,
        metrics: Arc<Metrics>,
    ) -> (Arc<App>, mpsc::Receiver<Vec<Order>>) {
        let num_places = self.limits.num_places();
        let (sender, receiver) = sync_channel(num_places);
        let of_chats = match &model.template {
            Some(template) => model.defaults.clone().with_end_of_turn(template, &model.tokenizer),
            None => model.defaults.clone(),
        };
        let app = App {
            texts: TokenTexts::new(model.tokenizer.clone()),
            end_tokens: model.defaults.end_tokens.clone().into(),
            chat_end_tokens: of_chats.end_tokens.into(),
            model,
            limits: self.limits,
            keys: self.keys.clone(),
            metrics,
            orders: sender,
            places: Arc::new(Semaphore::new(num_places)),
            is_draining: AtomicBool::new(false),
            started: SystemTime::now(),
        };
        (Arc::new(app), receiver)
    }
}

fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(TASK_THREADS)
        .max_blocking_threads(TOKENIZER_THREADS)
        .thread_name("dylora-serve")
        .enable_io()
        .enable_time()
        .build()
        .context("cannot start the threads that answer requests")
}
