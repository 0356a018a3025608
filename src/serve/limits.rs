//! What a server holds at most, and how long it waits.

use std::time::Duration;

/// Limits of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most texts that are generated at a time.
    pub max_texts: usize,
    /// Most texts that wait for their turn.
    pub max_waiting: usize,
    /// Most positions of a text, prompt included.
    pub context: usize,
    /// The largest body of a request, in bytes.
    pub max_body_bytes: usize,
    /// Most connections at a time. Others wait until they are accepted.
    pub max_connections: usize,
    /// Most pieces of text that wait for a client to read them. Behind them, the text is cancelled.
    pub max_unread: usize,
    /// Longest time from a request to the end of its texts.
    pub request_time: Duration,
    /// Longest time until the headers of a request are there. A connection may be idle as long.
    pub header_time: Duration,
    /// Longest time until the body of a request is there.
    pub body_time: Duration,
    /// Longest time for which a client may read nothing of what was written.
    pub write_time: Duration,
    /// Longest time that running texts have when the server ends.
    pub drain_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_texts: 16,
            max_waiting: 256,
            context: 2048,
            max_body_bytes: 4 << 20,
            max_connections: 1000,
            max_unread: 256,
            request_time: Duration::from_secs(600),
            header_time: Duration::from_secs(30),
            body_time: Duration::from_secs(30),
            write_time: Duration::from_secs(30),
            drain_time: Duration::from_secs(30),
        }
    }
}

impl Limits {
    /// Most texts that are generated or wait.
    pub(crate) fn num_places(&self) -> usize {
        self.max_texts + self.max_waiting
    }
}
