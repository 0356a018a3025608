//! Signs of life. Each process gives one to the store every second, from a thread of its own, and
//! looks for those of the others. A process that is killed or stopped gives none, and one that fails
//! says so. Either way all processes learn which one it was, and end.
//!
//! Ages are measured by the clock of the process that looks, so clocks need not agree.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::keys::Keys;
use super::limits::Limits;
use super::meet::ranks;
use crate::ffi::dist::Store;
use crate::ffi::nccl::Nccl;

/// What happens if a world has failed and this process has not ended soon after, since it waits for
/// something that will not come: it gets the message, and must end the process.
pub type OnLost = Box<dyn Fn(&str) + Send>;

/// What the watching thread and the others share.
#[derive(Default)]
struct Shared {
    /// How the world failed.
    failure: Mutex<Option<String>>,
    has_failed: AtomicBool,
    /// Whether a connection to another process has broken.
    is_broken: AtomicBool,
    ends: AtomicBool,
    /// Number of operations that this process has begun.
    num_operations: AtomicU64,
    /// The operations on the GPU, to be ended once the world has failed.
    nccl: Mutex<Option<Arc<Nccl>>>,
    others: Mutex<Vec<Other>>,
}

/// What is known of another process.
#[derive(Debug, Clone)]
struct Other {
    dist_rank: usize,
    beat: Vec<u8>,
    heard_at: Instant,
    num_operations: u64,
    is_done: bool,
}

/// Watches the processes of a world.
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread works with.
struct Watcher {
    store: Store,
    keys: Keys,
    dist_rank: usize,
    limits: Limits,
    /// What to say if the store does not answer.
    store_is_lost: String,
    shared: Arc<Shared>,
    on_lost: OnLost,
}

impl Watch {
    /// Gives the first sign of life, with which the process may be counted as there.
    pub fn first_beat(store: &Store, keys: &Keys, dist_rank: usize) -> Result<()> {
        store.set(&keys.beat(dist_rank), b"0 0")
    }

    /// Starts to watch. All processes must have given their first sign of life.
    ///
    /// - `store`: a connection of the thread's own
    pub fn start(
        store: Store,
        keys: Keys,
        (dist_rank, size): (usize, usize),
        limits: Limits,
        store_is_lost: String,
        on_lost: OnLost,
    ) -> Result<Self> {
        let heard_at = Instant::now();
        let other = |dist_rank| Other {
            dist_rank,
            beat: vec![],
            heard_at,
            num_operations: 0,
            is_done: false,
        };
        let others = (0..size).filter(|other| *other != dist_rank).map(other).collect();
        let shared = Arc::new(Shared { others: Mutex::new(others), ..Shared::default() });
        let watcher = Watcher {
            store,
            keys,
            dist_rank,
            limits,
            store_is_lost,
            shared: Arc::clone(&shared),
            on_lost,
        };
        let thread = std::thread::Builder::new().name("watch".into()).spawn(|| watcher.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Counts an operation that this process begins with the others.
    pub fn begin(&self) {
        self.shared.num_operations.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives the operations on the GPU to the thread, which ends them once the world has failed.
    pub fn keep(&self, nccl: Option<Arc<Nccl>>) {
        *lock(&self.shared.nccl) = nccl;
    }

    /// Fails if the world has failed.
    pub fn check(&self) -> Result<()> {
        match self.shared.has_failed.load(Ordering::Acquire) {
            false => Ok(()),
            true => bail!(lock(&self.shared.failure).clone().unwrap_or_default()),
        }
    }

    /// The error of an operation that has failed with `error`: which process caused it, if that
    /// becomes known soon.
    pub fn blame(&self, error: anyhow::Error) -> anyhow::Error {
        self.shared.is_broken.store(true, Ordering::Release);
        let deadline = Instant::now() + Limits::BROKEN_SILENCE + 3 * Limits::BEAT;
        while Instant::now() < deadline {
            if let Err(cause) = self.check() {
                return cause;
            }
            sleep(Duration::from_millis(50));
        }
        let text = error.to_string();
        anyhow!("the connection to another process broke: {}", text.lines().next().unwrap_or(""))
    }

    /// The ranks that have begun fewer operations than this process.
    pub fn late(&self) -> String {
        let own = self.shared.num_operations.load(Ordering::Relaxed);
        let others = lock(&self.shared.others);
        let late: Vec<usize> = others
            .iter()
            .filter(|other| other.num_operations < own)
            .map(|other| other.dist_rank)
            .collect();
        if late.is_empty() { "another rank".into() } else { ranks(&late) }
    }

    /// Asks the thread to end.
    pub fn end(&self) {
        self.shared.ends.store(true, Ordering::Release);
    }

    /// Stops to watch.
    pub fn stop(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Watcher {
    fn run(self) {
        let mut count = 0_u64;
        let mut last_round = Instant::now();
        let mut failed_at: Option<Instant> = None;
        while !self.shared.ends.load(Ordering::Acquire) {
            count += 1;
            if last_round.elapsed() > self.limits.silence / 2 {
                // this process did not run itself, so it has not heard the others
                lock(&self.shared.others).iter_mut().for_each(|o| o.heard_at = Instant::now());
            }
            last_round = Instant::now();
            match failed_at {
                None => {
                    if let Err(failure) = self.round(count) {
                        self.fail(format!("{failure:#}"));
                        failed_at = Some(Instant::now());
                    }
                }
                Some(at) if at.elapsed() > Limits::ENDING => {
                    let failure = lock(&self.shared.failure).clone().unwrap_or_default();
                    (self.on_lost)(&failure);
                    return;
                }
                Some(_) => {}
            }
            for _ in 0..20 {
                if self.shared.ends.load(Ordering::Acquire) {
                    return;
                }
                sleep(Limits::BEAT / 20);
            }
        }
    }

    /// Gives a sign of life and looks for those of the others.
    ///
    /// # Errors
    /// If the world has failed.
    fn round(&self, count: u64) -> Result<()> {
        let lost = |error: anyhow::Error| {
            let text = error.to_string();
            anyhow!("{}: {}", self.store_is_lost, text.lines().next().unwrap_or_default())
        };
        let operations = self.shared.num_operations.load(Ordering::Relaxed);
        let beat = format!("{count} {operations}");
        self.store.set(&self.keys.beat(self.dist_rank), beat.as_bytes()).map_err(lost)?;
        if self.store.has(&self.keys.failure()).map_err(lost)? {
            let failure = self.store.get(&self.keys.failure()).map_err(lost)?;
            bail!(String::from_utf8_lossy(&failure).into_owned());
        }
        let mut others = lock(&self.shared.others).clone();
        for other in others.iter_mut().filter(|other| !other.is_done) {
            self.hear(other).map_err(lost)?;
        }
        lock(&self.shared.others).clone_from(&others);
        let limit = match self.shared.is_broken.load(Ordering::Acquire) {
            true => Limits::BROKEN_SILENCE.min(self.limits.silence),
            false => self.limits.silence,
        };
        let silent = |other: &&Other| !other.is_done && other.heard_at.elapsed() > limit;
        let silent: Vec<usize> = others.iter().filter(silent).map(|o| o.dist_rank).collect();
        if silent.is_empty() {
            return Ok(());
        }
        bail!(
            "{} gave no sign of life for {} s: killed, stopped or cut off\nhint: its own messages, \
             or those of its machine's kernel, may say why; the last checkpoint is whole",
            ranks(&silent),
            limit.as_secs()
        );
    }

    fn hear(&self, other: &mut Other) -> Result<()> {
        let beat = self.store.get(&self.keys.beat(other.dist_rank))?;
        if beat != other.beat {
            let text = String::from_utf8_lossy(&beat);
            let operations = text.split(' ').nth(1).and_then(|number| number.parse().ok());
            other.num_operations = operations.unwrap_or(other.num_operations);
            (other.beat, other.heard_at) = (beat, Instant::now());
        } else if other.heard_at.elapsed() > 2 * Limits::BEAT {
            other.is_done = self.store.has(&self.keys.done(other.dist_rank))?;
        }
        Ok(())
    }

    /// Notes a failure for this process and tells the others of it.
    fn fail(&self, message: String) {
        let _ = self.store.set_once(&self.keys.failure(), message.as_bytes());
        *lock(&self.shared.failure) = Some(message);
        self.shared.has_failed.store(true, Ordering::Release);
        if let Some(nccl) = &*lock(&self.shared.nccl) {
            nccl.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
