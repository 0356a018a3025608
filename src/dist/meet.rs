//! How the processes of a world find each other: one of them, or torchrun's agent, holds a store at
//! a known address, to which all connect.

use std::net::{IpAddr, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};

use super::keys::Keys;
use super::limits::Limits;
use super::place::Place;
use crate::ffi::dist::Store;

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// A connection to the store.
#[derive(Debug)]
pub(super) struct Met {
    pub store: Store,
    /// The address of this machine on the way to the store.
    pub address: IpAddr,
}

/// Connects to the store, which this process may hold itself.
pub(super) fn connect(place: &Place, limits: Limits) -> Result<Met> {
    let deadline = Instant::now() + limits.meeting;
    let at = format!("{}:{}", place.host, place.port);
    if place.holds_store() {
        let store = Store::new(&place.host, place.port, true, limits.meeting);
        let store = store.map_err(|error| describe(&error, &at, place.port))?;
        let address = reach(&place.host, place.port, deadline).with_context(|| {
            format!("rank 0 holds the store, but cannot reach itself at `{at}`")
        })?;
        return Ok(Met { store, address });
    }
    let address = reach(&place.host, place.port, deadline)?;
    let store = Store::new(&place.host, place.port, false, limits.meeting)
        .with_context(|| format!("what answers at `{at}` is no store of rank 0"))?;
    Ok(Met { store, address })
}

/// Another connection to the same store, whose calls take at most `timeout`.
pub(super) fn connect_again(place: &Place, timeout: Duration) -> Result<Store> {
    Store::new(&place.host, place.port, false, timeout)
}

/// The error of a store that does not start.
fn describe(error: &anyhow::Error, at: &str, port: u16) -> anyhow::Error {
    let text = error.to_string();
    if text.contains("EADDRINUSE") || text.contains("ddress already in use") {
        return anyhow!(
            "rank 0 cannot hold the store at `{at}`: port {port} is in use\nhint: choose another \
             `MASTER_PORT`, the same for all processes; does an earlier run still end?"
        );
    }
    anyhow!("rank 0 cannot hold the store at `{at}`: {}", text.lines().next().unwrap_or_default())
}

/// Waits until something answers at `host` and `port`. Returns the address of this machine on the
/// way there.
fn reach(host: &str, port: u16, deadline: Instant) -> Result<IpAddr> {
    let begun = Instant::now();
    let mut is_noted = false;
    loop {
        let error = match attempt(host, port, deadline) {
            Ok(address) => return Ok(address),
            Err(error) => error,
        };
        if Instant::now() + PAUSE >= deadline {
            bail!(
                "nothing answers at `{host}:{port}` within {} s: {error:#}\nhint: `MASTER_ADDR` \
                 and `MASTER_PORT` must lead to rank 0, which must run, with no firewall between",
                (deadline - begun).as_secs_f64().round()
            );
        }
        if begun.elapsed() > Limits::NOTABLE && !std::mem::replace(&mut is_noted, true) {
            tracing::warn!("still waiting for rank 0 at `{host}:{port}`: {error:#}");
        }
        sleep(PAUSE);
    }
}

fn attempt(host: &str, port: u16, deadline: Instant) -> Result<IpAddr> {
    let found: Vec<_> = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("the name `{host}` has no address"))?
        .collect();
    let mut last = anyhow!("the name `{host}` has no address");
    for address in found {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.min(Duration::from_secs(5)).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => return Ok(stream.local_addr()?.ip()),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Says in the store that this process is there, and waits until all are.
///
/// # Errors
/// If a process does not come, if two have the same rank, or if one has another size of the world.
pub(super) fn join(store: &Store, keys: &Keys, place: &Place, limits: Limits) -> Result<()> {
    let size = place.world_size;
    let own = format!("{size} {}", token());
    let key = keys.joined(place.dist_rank);
    store.set_once(&key, own.as_bytes())?;
    if store.get(&key)? != own.as_bytes() {
        bail!(
            "another process has `RANK` {} too\nhint: each process needs a rank of its own from 0 \
             to {}; does an earlier run still use this port?",
            place.dist_rank,
            size - 1
        );
    }
    let deadline = Instant::now() + limits.meeting;
    for dist_rank in 0..size {
        let key = keys.joined(dist_rank);
        while !store.has(&key)? {
            if Instant::now() > deadline {
                let absent = absent(store, keys, size)?;
                bail!(
                    "{absent} of {size} did not come within {} s\nhint: were all processes \
                     started, with the same `MASTER_ADDR` and `MASTER_PORT`?",
                    limits.meeting.as_secs_f64().round()
                );
            }
            sleep(PAUSE);
        }
        let value = String::from_utf8_lossy(&store.get(&key)?).into_owned();
        let theirs = value.split(' ').next().unwrap_or_default();
        if theirs != size.to_string() {
            bail!("rank {dist_rank} has `WORLD_SIZE` {theirs}, this process has {size}");
        }
    }
    Ok(())
}

/// The ranks that have not come, such as `ranks 2, 3`.
fn absent(store: &Store, keys: &Keys, size: usize) -> Result<String> {
    let mut absent = vec![];
    for dist_rank in 0..size {
        if !store.has(&keys.joined(dist_rank))? {
            absent.push(dist_rank);
        }
    }
    Ok(ranks(&absent))
}

/// Names some ranks: `rank 2`, `ranks 2, 3`.
pub(super) fn ranks(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, list.join(", "))
}

/// A text that no other process has.
fn token() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    format!("{}-{now}", std::process::id())
}
