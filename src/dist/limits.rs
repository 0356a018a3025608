//! The limits of a world: of time, and of what is added up in one operation.

use std::time::Duration;

/// How long processes wait for each other, and how many gradients they add up in one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For all processes to meet at the start.
    pub meeting: Duration,
    /// For a process to come to an operation that the others have begun.
    pub operation: Duration,
    /// For a sign of life, which a process gives every second as long as it runs at all.
    pub silence: Duration,
    /// Gradients of at least so many bytes are added up in two operations, of which the first runs
    /// while the rest is computed. A second operation costs some time by itself.
    pub overlap_bytes: usize,
}

impl Limits {
    /// Time between two signs of life.
    pub(super) const BEAT: Duration = Duration::from_secs(1);
    /// Silence after which a process counts as lost if its connection has broken too.
    pub(super) const BROKEN_SILENCE: Duration = Duration::from_secs(4);
    /// For a process whose world has failed to end by itself.
    pub(super) const ENDING: Duration = Duration::from_secs(5);
    /// Waiting of which the log speaks.
    pub(super) const NOTABLE: Duration = Duration::from_secs(30);
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            meeting: Duration::from_secs(300),
            operation: Duration::from_secs(600),
            silence: Duration::from_secs(15),
            overlap_bytes: 32 << 20,
        }
    }
}
