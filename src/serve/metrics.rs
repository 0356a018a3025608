//! What a server counts, in Prometheus' text format (version 0.0.4).

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;

/// Upper bounds of the time to the first token, in seconds.
const FIRST_TOKEN: [f64; 12] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// Upper bounds of the time of each further token, in seconds.
const TOKEN: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// How a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// At an end token or a stop string.
    Stop,
    /// With as many tokens as it may have.
    Length,
    /// Its client went away.
    Cancelled,
    /// Its client read too slowly.
    Unread,
    /// It took too long.
    TimedOut,
    /// A token could not be decoded.
    Failed,
}

impl Ending {
    fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Unread => "unread",
            Self::TimedOut => "timed_out",
            Self::Failed => "failed",
        }
    }
}

/// All that a server counts.
#[derive(Debug)]
pub struct Metrics {
    /// Number of responses by endpoint and status.
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
    endings: Mutex<BTreeMap<Ending, u64>>,
    /// Number of open connections.
    pub connections: AtomicU64,
    /// Number of tokens of the prompts that were computed.
    pub prompt_tokens: AtomicU64,
    /// Number of tokens that were generated.
    pub completion_tokens: AtomicU64,
    /// Number of texts that wait.
    pub waiting: AtomicU64,
    /// Number of texts that are being generated.
    pub active: AtomicU64,
    /// Number of positions that these texts have.
    pub positions: AtomicU64,
    /// Number of positions for which the cache has memory.
    pub capacity: AtomicU64,
    /// The memory of the cache, in bytes.
    pub cache_bytes: AtomicU64,
    /// Time from a request to the first token of each of its texts.
    pub first_token: Histogram,
    /// Time between two tokens of a text.
    pub token: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            responses: Mutex::default(),
            endings: Mutex::default(),
            connections: AtomicU64::default(),
            prompt_tokens: AtomicU64::default(),
            completion_tokens: AtomicU64::default(),
            waiting: AtomicU64::default(),
            active: AtomicU64::default(),
            positions: AtomicU64::default(),
            capacity: AtomicU64::default(),
            cache_bytes: AtomicU64::default(),
            first_token: Histogram::new(&FIRST_TOKEN),
            token: Histogram::new(&TOKEN),
        }
    }
}

impl Metrics {
    /// Counts a response.
    pub(crate) fn responded(&self, endpoint: &'static str, status: StatusCode) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        *responses.entry((endpoint, status.as_u16())).or_default() += 1;
    }

    /// Counts the end of a text.
    pub fn ended(&self, ending: Ending) {
        let mut endings = self.endings.lock().unwrap_or_else(PoisonError::into_inner);
        *endings.entry(ending).or_default() += 1;
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        head(text, "dylora_http_requests_total", "counter", "Requests by endpoint and status.")?;
        let responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        for ((endpoint, status), count) in &*responses {
            let labels = format!("endpoint=\"{endpoint}\",status=\"{status}\"");
            writeln!(text, "dylora_http_requests_total{{{labels}}} {count}")?;
        }
        head(text, "dylora_texts_ended_total", "counter", "Texts by how they ended.")?;
        for (ending, count) in &*self.endings.lock().unwrap_or_else(PoisonError::into_inner) {
            let reason = ending.name();
            writeln!(text, "dylora_texts_ended_total{{reason=\"{reason}\"}} {count}")?;
        }
        for (name, kind, help, value) in [
            ("connections", "gauge", "Open connections.", &self.connections),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", &self.prompt_tokens),
            ("completion_tokens_total", "counter", "Tokens generated.", &self.completion_tokens),
            ("texts_waiting", "gauge", "Texts that wait for their turn.", &self.waiting),
            ("texts_active", "gauge", "Texts that are being generated.", &self.active),
            ("cache_positions_used", "gauge", "Positions of active texts.", &self.positions),
            ("cache_positions", "gauge", "Positions that the cache can hold.", &self.capacity),
            ("cache_bytes", "gauge", "Memory of keys and values.", &self.cache_bytes),
        ] {
            let name = format!("dylora_{name}");
            head(text, &name, kind, help)?;
            writeln!(text, "{name} {}", value.load(Ordering::Relaxed))?;
        }
        let help = "Time from a request to the first token of a text.";
        self.first_token.write(text, "dylora_time_to_first_token_seconds", help)?;
        let help = "Time between two tokens of a text.";
        self.token.write(text, "dylora_time_per_token_seconds", help)
    }
}

/// The page that Prometheus reads.
impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.write(&mut text)?;
        f.write_str(&text)
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// How often times lie in each of several ranges.
#[derive(Debug)]
pub(crate) struct Histogram {
    /// Upper bounds in seconds, ascending. The range behind the last has none.
    bounds: &'static [f64],
    /// Number of times in each range.
    counts: Vec<AtomicU64>,
    sum_nanos: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_nanos: AtomicU64::new(0) }
    }

    /// Adds a time.
    pub fn add(&self, time: Duration) {
        let range = self.bounds.partition_point(|bound| *bound < time.as_secs_f64());
        self.counts[range].fetch_add(1, Ordering::Relaxed);
        self.sum_nanos.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn write(&self, text: &mut String, name: &str, help: &str) -> fmt::Result {
        head(text, name, "histogram", help)?;
        let mut sum = 0;
        let bounds = self.bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&self.counts) {
            sum += count.load(Ordering::Relaxed);
            writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {sum}")?;
        }
        let seconds = self.sum_nanos.load(Ordering::Relaxed) as f64 / 1e9;
        writeln!(text, "{name}_sum {seconds}\n{name}_count {sum}")
    }
}
