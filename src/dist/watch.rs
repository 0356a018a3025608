//! Signs of life. Each process gives one to the store every second, from a thread of its own, and
//! looks for those of the others. A process that is killed or stopped gives none, and one that
//! fails says so. Either way all processes learn which one it was, and end. A second thread, which
//! uses no connection, sees to it that the first one gets answers from the store, and that the
//! process ends.
//!
//! Ages are measured by the clock of the process that looks, so clocks need not agree.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::keys::Keys;
use super::lifeline::Lifeline;
use super::limits::Limits;
use super::meet::ranks;
use crate::ffi::dist::Store;
use crate::ffi::nccl::Nccl;

/// What happens if a world has failed and this process has not ended soon after, since it waits for
/// something that will not come: it gets the message, and must end the process.
pub type OnLost = Box<dyn Fn(&str) + Send>;

/// What the watching thread and the others share.
struct Shared {
    /// How the world failed.
    failure: Mutex<Option<String>>,
    has_failed: AtomicBool,
    /// Whether the store does not answer.
    store_is_lost: AtomicBool,
    /// When the store last answered.
    last_round: Mutex<Instant>,
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
}

/// The thread that talks with the store.
struct Watcher {
    store: Store,
    lifeline: Option<Lifeline>,
    keys: Keys,
    dist_rank: usize,
    limits: Limits,
    /// What to say if the store does not answer.
    store_is_lost: String,
    shared: Arc<Shared>,
}

/// The thread that talks with nobody.
struct Guard {
    limits: Limits,
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
    /// - `store`, `lifeline`: connections of the thread's own
    pub fn start(
        (store, lifeline): (Store, Option<Lifeline>),
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
        let shared = Arc::new(Shared {
            failure: Mutex::new(None),
            has_failed: AtomicBool::new(false),
            store_is_lost: AtomicBool::new(false),
            last_round: Mutex::new(Instant::now()),
            is_broken: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            num_operations: AtomicU64::new(0),
            nccl: Mutex::new(None),
            others: Mutex::new(others),
        });
        let guard = Guard {
            limits,
            store_is_lost: store_is_lost.clone(),
            shared: Arc::clone(&shared),
            on_lost,
        };
        let shared_too = Arc::clone(&shared);
        let watcher =
            Watcher { store, lifeline, keys, dist_rank, limits, store_is_lost, shared: shared_too };
        std::thread::Builder::new().name("watch".into()).spawn(|| watcher.run())?;
        std::thread::Builder::new().name("guard".into()).spawn(|| guard.run())?;
        Ok(Self { shared })
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

    /// The error to report for an operation that has failed with `error`. It names the process that
    /// caused the failure, if that becomes known soon.
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

    /// The processes that have given a sign of life of late, so that they can still read the store.
    pub fn heard(&self) -> Vec<usize> {
        let others = lock(&self.shared.others);
        let of_late = |other: &&Other| other.heard_at.elapsed() < Limits::BROKEN_SILENCE;
        others.iter().filter(of_late).map(|other| other.dist_rank).collect()
    }

    /// Stops to watch.
    pub fn end(&self) {
        self.shared.ends.store(true, Ordering::Release);
    }

    /// Whether the store does not answer, so that a call to it might not return.
    pub fn store_is_lost(&self) -> bool {
        self.shared.store_is_lost.load(Ordering::Acquire)
    }
}

impl Watcher {
    fn run(self) {
        let mut count = 0_u64;
        let mut last_round = Instant::now();
        while self.shared.goes_on() {
            count += 1;
            if last_round.elapsed() > self.limits.silence / 2 {
                // this process did not run itself, so it has not heard the others
                lock(&self.shared.others).iter_mut().for_each(|o| o.heard_at = Instant::now());
            }
            last_round = Instant::now();
            if let Err(failure) = self.round(count) {
                let message = format!("{failure:#}");
                if !failure.is::<StoreIsLost>() {
                    let _ = self.store.set_once(&self.keys.failure(), message.as_bytes());
                }
                self.shared.fail(message);
                return;
            }
            *lock(&self.shared.last_round) = Instant::now();
            for _ in 0..20 {
                if !self.shared.goes_on() {
                    return;
                }
                if self.lifeline.as_ref().is_some_and(Lifeline::is_broken) {
                    self.shared.is_broken.store(true, Ordering::Release);
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
            self.shared.store_is_lost.store(true, Ordering::Release);
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            StoreIsLost(format!("{}: {first}", self.store_is_lost))
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
}

impl Guard {
    fn run(self) {
        let mut last_look = Instant::now();
        let mut failed_at: Option<Instant> = None;
        while self.shared.goes_on() {
            if last_look.elapsed() > self.limits.silence / 2 {
                // this process did not run itself
                *lock(&self.shared.last_round) = Instant::now();
            }
            last_look = Instant::now();
            if self.shared.has_failed.load(Ordering::Acquire) {
                let since = *failed_at.get_or_insert(last_look);
                if since.elapsed() > Limits::ENDING {
                    (self.on_lost)(&lock(&self.shared.failure).clone().unwrap_or_default());
                    return;
                }
            } else if lock(&self.shared.last_round).elapsed() > self.limits.silence {
                self.shared.store_is_lost.store(true, Ordering::Release);
                let secs = self.limits.silence.as_secs();
                self.shared.fail(format!("{}: no answer for {secs} s", self.store_is_lost));
            }
            sleep(Limits::BEAT / 10);
        }
    }
}

impl Shared {
    fn goes_on(&self) -> bool {
        !self.ends.load(Ordering::Acquire)
    }

    /// Notes a failure, unless there is one already.
    fn fail(&self, message: String) {
        lock(&self.failure).get_or_insert(message);
        self.has_failed.store(true, Ordering::Release);
        if let Some(nccl) = &*lock(&self.nccl) {
            // the world has failed already, whatever becomes of its operations
            let _ = nccl.abort();
        }
    }
}

/// The error of a store that does not answer.
#[derive(Debug)]
struct StoreIsLost(String);

impl fmt::Display for StoreIsLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StoreIsLost {}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
