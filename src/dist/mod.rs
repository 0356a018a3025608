//! Processes that compute together: a [`World`] of them, in which each has a number, its
//! `dist_rank`. A process that is alone is a world of size 1, in which every operation does
//! nothing.
//!
//! ```text
//! store    c10d's TCPStore: the processes meet over it, and give signs of life
//! Gloo     sums and copies of tensors on the CPU, and short values of the host
//! NCCL     sums and copies of tensors on GPUs
//! ```
//!
//! An operation is one that all processes call, in the same order. It fails if a process has
//! failed, was killed, or does not come ([`Limits`]); the message names that process.

mod exchange;
mod keys;
mod lifeline;
mod limits;
mod meet;
mod place;
pub mod shard;
mod watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tch::{Device, Tensor};

use crate::ffi::dist::{Address, Gloo, Pending, Store};
use crate::ffi::nccl::{self, Nccl, UniqueId};
pub use exchange::Fact;
use keys::Keys;
use lifeline::Lifeline;
pub use limits::Limits;
pub use place::Place;
pub use watch::OnLost;
use watch::Watch;

/// How often a process that waits looks whether the world has failed.
const LOOK: Duration = Duration::from_millis(100);

/// The processes that compute together, seen from one of them.
#[derive(Debug)]
pub struct World {
    dist_rank: usize,
    size: usize,
    link: Option<Link>,
    has_left: AtomicBool,
}

/// The connections to the other processes.
#[derive(Debug)]
struct Link {
    store: Store,
    keys: Keys,
    holds_store: bool,
    gloo: Option<Gloo>,
    nccl: OnceLock<Arc<Nccl>>,
    watch: Watch,
    limits: Limits,
}

/// An operation that has begun. Processes must not end before it is done.
#[must_use]
#[derive(Debug)]
pub struct Sum(Begun);

#[derive(Debug)]
enum Begun {
    OnGpu,
    OnCpu(Vec<Pending>),
}

impl World {
    /// The world of a process that is alone.
    pub fn single() -> Self {
        Self { dist_rank: 0, size: 1, link: None, has_left: AtomicBool::new(false) }
    }

    /// Meets the other processes of `place`'s world.
    ///
    /// - `interface`: the network interface over which the others reach this process; `None` for
    ///   the one that leads to the store
    /// - `on_lost`: ends the process if the world has failed and it has not ended soon after
    ///
    /// # Errors
    /// If the store cannot be held or reached, if not all processes come in time, or if they differ
    /// in [`Limits::overlap_bytes`].
    pub fn join(
        place: &Place,
        interface: Option<String>,
        limits: Limits,
        on_lost: OnLost,
    ) -> Result<Self> {
        if place.world_size == 1 {
            return Ok(Self::single());
        }
        let (dist_rank, size) = (place.dist_rank, place.world_size);
        let keys = Keys::new(place.attempt);
        let in_world = || format!("rank {dist_rank} of {size} cannot join its world");
        let met = meet::connect(place, limits).with_context(in_world)?;
        let store = met.store;
        Watch::first_beat(&store, &keys, dist_rank)?;
        meet::join(&store, &keys, place, limits).with_context(in_world)?;
        let at = format!("{}:{}", place.host, place.port);
        let store_is_lost = match place.agent_holds_store {
            true => format!("torchrun's agent, which holds the store at `{at}`, is gone"),
            false => format!("rank 0, which holds the store at `{at}`, has ended or is cut off"),
        };
        let own = meet::connect_again(place, limits.silence)?;
        let watched = (dist_rank, size);
        let lifeline = Lifeline::tie(&store, &keys, watched, met.address);
        let lifeline = lifeline.inspect_err(|error| {
            // without it, a process that ends is missed later
            tracing::debug!("no connection to the processes beside this one: {error:#}");
        });
        let lines = (own, lifeline.ok());
        let watch = Watch::start(lines, keys.clone(), watched, limits, store_is_lost, on_lost)?;
        let address = interface.map_or(Address::Ip(met.address), Address::Interface);
        // longer than the limit for operations, which is kept here and says more
        let timeout = limits.operation.max(limits.meeting) + Duration::from_secs(60);
        let gloo = Gloo::new(&store, &keys.gloo(), dist_rank, size, &address, timeout);
        let gloo = gloo.map_err(|error| watch.blame(error)).with_context(in_world)?;
        let link = Link {
            store,
            keys,
            holds_store: place.holds_store(),
            gloo: Some(gloo),
            nccl: OnceLock::new(),
            watch,
            limits,
        };
        let world = Self { dist_rank, size, link: Some(link), has_left: AtomicBool::new(false) };
        // the number of operations in a step depends on it
        let overlap_bytes = limits.overlap_bytes.to_string();
        world.agree(&[("`DYLORA_OVERLAP_BYTES`", overlap_bytes)])?;
        Ok(world)
    }

    /// This process's number in the world, from 0.
    pub fn dist_rank(&self) -> usize {
        self.dist_rank
    }

    /// Number of processes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether this process is the first one, which alone writes files and prints results.
    pub fn is_first(&self) -> bool {
        self.dist_rank == 0
    }

    /// Whether this process is alone.
    pub fn is_single(&self) -> bool {
        self.size == 1
    }

    /// The size of gradients, in bytes, from which on they are added up in two operations
    /// ([`Limits::overlap_bytes`]).
    pub fn overlap_bytes(&self) -> usize {
        self.link.as_ref().map_or(usize::MAX, |link| link.limits.overlap_bytes)
    }

    /// Prepares operations on a GPU. Does nothing for the CPU.
    ///
    /// # Errors
    /// If some processes have a GPU and others do not, or if two share one.
    pub fn use_device(&self, device: Device) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        let kind = if device.is_cuda() { "a GPU" } else { "the CPU" };
        self.agree(&[("kind of device", kind.into())])?;
        let Device::Cuda(index) = device else { return Ok(()) };
        if link.nccl.get().is_some() {
            return Ok(());
        }
        let own = if self.is_first() { nccl::unique_id()?.to_vec() } else { vec![] };
        let values = self.exchange(&own)?;
        let id: UniqueId =
            values[0].as_slice().try_into().context("rank 0 gave no identity of the group")?;
        tracing::debug!("NCCL {}, rank {} on cuda:{index}", nccl::version()?, self.dist_rank);
        let nccl = Nccl::new(index, &id, self.dist_rank, self.size).with_context(|| {
            format!(
                "rank {} cannot use NCCL on `cuda:{index}`\nhint: each process needs a GPU of its \
                 own, by `LOCAL_RANK` or `CUDA_VISIBLE_DEVICES`; `NCCL_DEBUG=INFO` says more",
                self.dist_rank
            )
        })?;
        let nccl = Arc::new(nccl);
        link.watch.keep(Some(Arc::clone(&nccl)));
        let _ = link.nccl.set(nccl);
        Ok(())
    }

    /// Replaces contiguous tensors, which are all on the CPU or all on this process's GPU, by their
    /// sums over all processes. All processes get the same sums to the bit. On a GPU, this returns
    /// once the operation is queued.
    pub fn all_reduce(&self, tensors: &[Tensor]) -> Result<()> {
        self.finish(self.begin_all_reduce(tensors)?)
    }

    /// Begins to add up tensors as [`Self::all_reduce`] does, and returns at once. This process may
    /// compute meanwhile, but must not use the tensors before [`Self::finish`] has returned.
    pub fn begin_all_reduce(&self, tensors: &[Tensor]) -> Result<Sum> {
        self.begin(tensors, Nccl::all_reduce, Gloo::all_reduce)
    }

    /// Replaces contiguous tensors by those of the first process, as [`Self::all_reduce`] does.
    pub fn broadcast(&self, tensors: &[Tensor]) -> Result<()> {
        self.finish(self.begin(tensors, Nccl::broadcast, Gloo::broadcast)?)
    }

    fn begin(
        &self,
        tensors: &[Tensor],
        on_gpu: impl Fn(&Nccl, &[Tensor]) -> Result<()>,
        on_cpu: impl Fn(&Gloo, &Tensor) -> Result<Pending>,
    ) -> Result<Sum> {
        let (Some(link), Some(first)) = (&self.link, tensors.first()) else {
            return Ok(Sum(Begun::OnCpu(vec![])));
        };
        link.watch.check()?;
        link.watch.begin();
        if first.device().is_cuda() {
            let nccl = link.nccl();
            nccl.check().and_then(|()| on_gpu(nccl, tensors)).map_err(|e| link.watch.blame(e))?;
            return Ok(Sum(Begun::OnGpu));
        }
        let gloo = link.gloo.as_ref().expect("the world is not left");
        let begin = |tensor| on_cpu(gloo, tensor).map_err(|error| link.watch.blame(error));
        Ok(Sum(Begun::OnCpu(tensors.iter().map(begin).collect::<Result<_>>()?)))
    }

    /// Waits for what was begun. On a GPU, it is not the host that waits, but what it queues from
    /// now on.
    pub fn finish(&self, sum: Sum) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        match sum.0 {
            Begun::OnGpu => link.nccl().join().map_err(|error| link.watch.blame(error)),
            Begun::OnCpu(pending) => {
                let limit = Some(link.limits.operation);
                pending.iter().try_for_each(|pending| link.wait(pending, limit))
            }
        }
    }

    /// Waits until all processes are here, however long that takes, as long as all are alive.
    pub fn meet(&self) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        link.watch.check()?;
        link.watch.begin();
        let barrier = Tensor::zeros([1], (tch::Kind::Float, Device::Cpu));
        let gloo = link.gloo.as_ref().expect("the world is not left");
        let pending = gloo.all_reduce(&barrier).map_err(|error| link.watch.blame(error))?;
        link.wait(&pending, None)
    }

    /// Runs `f` in the early processes first, and then in the others, which find what the early
    /// ones have left in files.
    pub fn in_turn<T>(&self, is_early: bool, f: impl FnOnce() -> Result<T>) -> Result<T> {
        if !is_early {
            self.meet()?;
            return f();
        }
        let value = f()?;
        self.meet()?;
        Ok(value)
    }

    /// Fails if the world has failed. Numbers that come from a GPU are right only if this returns
    /// `Ok` after they have arrived.
    pub fn check(&self) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        link.watch.check()?;
        match link.nccl.get() {
            Some(nccl) => nccl.check().map_err(|error| link.watch.blame(error)),
            None => Ok(()),
        }
    }

    /// Ends this process's part in the world: waits for the others if all is well, and otherwise
    /// tells them what is wrong.
    ///
    /// - `failure`: why the process has failed
    pub fn leave(&self, failure: Option<&str>) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        if let Some(failure) = failure {
            link.fail(self.dist_rank, failure);
            // a group whose processes have failed is not freed
            return Ok(());
        }
        self.meet()?;
        link.store.set(&link.keys.done(self.dist_rank), b"1")?;
        if link.holds_store {
            link.wait_for(&(1..self.size).collect::<Vec<_>>(), Duration::from_secs(30));
        }
        link.watch.end();
        self.has_left.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Link {
    fn nccl(&self) -> &Nccl {
        self.nccl.get().expect("`use_device` comes before operations on a GPU")
    }

    /// Waits for work, or until the world has failed.
    ///
    /// - `limit`: the longest that it may take; `None` for no limit
    fn wait(&self, pending: &Pending, limit: Option<Duration>) -> Result<()> {
        let begun = Instant::now();
        let mut is_noted = false;
        while !pending.wait(LOOK).map_err(|error| self.watch.blame(error))? {
            self.watch.check()?;
            let waited = begun.elapsed();
            if waited > Limits::NOTABLE && !std::mem::replace(&mut is_noted, true) {
                tracing::warn!("waiting for {} since 30 s", self.watch.late());
            }
            if let Some(limit) = limit.filter(|&limit| waited > limit) {
                bail!(
                    "{} did not come to an operation that the others began {} s ago, though it \
                     gives signs of life\nhint: `DYLORA_OPERATION_SECS` allows more time",
                    self.watch.late(),
                    limit.as_secs_f64().round()
                );
            }
        }
        Ok(())
    }

    /// Tells the other processes that this one has failed.
    fn fail(&self, dist_rank: usize, failure: &str) {
        let heard = self.watch.heard();
        self.watch.end();
        if self.watch.store_is_lost() {
            return;
        }
        // if the others know of a failure already, that is the cause of this one, and stays
        let message = format!("rank {dist_rank} has failed: {failure}");
        let _ = self.store.set_once(&self.keys.failure(), message.as_bytes());
        let _ = self.store.set(&self.keys.done(dist_rank), b"1");
        if self.holds_store {
            // the store ends with this process, and the others are still to read the failure
            self.wait_for(&heard, 4 * Limits::BEAT);
        }
    }

    /// Waits until some processes are done, for some time at most.
    fn wait_for(&self, others: &[usize], limit: Duration) {
        let deadline = Instant::now() + limit;
        for other in others {
            while !self.store.has(&self.keys.done(*other)).unwrap_or(true) {
                if Instant::now() > deadline || self.watch.store_is_lost() {
                    return;
                }
                sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let Some(mut link) = self.link.take() else { return };
        if !*self.has_left.get_mut() {
            link.fail(self.dist_rank, "it ended before the others");
            return;
        }
        link.watch.keep(None);
        if let Some(gloo) = link.gloo.take() {
            gloo.close();
        }
        if let Some(nccl) = link.nccl.take().and_then(Arc::into_inner) {
            // all work has ended well, so nothing is lost with the group
            let _ = nccl.close();
        }
    }
}
