//! The keys of the store.
//!
//! ```text
//! dylora/{attempt}/joined/{rank}     the size of the process's world, and a token of its own
//!                 /beat/{rank}       a count that grows every second, and the number of operations
//!                 /lifeline/{rank}   where the process before connects to this one
//!                 /done/{rank}       set when the process has ended well
//!                 /failure           the first failure: the rank, and a message
//!                 /gloo              of c10d
//! ```

/// The keys of one attempt.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub fn new(attempt: u64) -> Self {
        Self { prefix: format!("dylora/{attempt}") }
    }

    pub fn joined(&self, dist_rank: usize) -> String {
        format!("{}/joined/{dist_rank}", self.prefix)
    }

    pub fn beat(&self, dist_rank: usize) -> String {
        format!("{}/beat/{dist_rank}", self.prefix)
    }

    pub fn lifeline(&self, dist_rank: usize) -> String {
        format!("{}/lifeline/{dist_rank}", self.prefix)
    }

    pub fn done(&self, dist_rank: usize) -> String {
        format!("{}/done/{dist_rank}", self.prefix)
    }

    pub fn failure(&self) -> String {
        format!("{}/failure", self.prefix)
    }

    pub fn gloo(&self) -> String {
        format!("{}/gloo", self.prefix)
    }
}
