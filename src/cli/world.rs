//! The world that the environment names, and commands in it.
//!
//! Besides the variables of [`Place`], there are
//!
//! | variable | meaning |
//! |---|---|
//! | `GLOO_SOCKET_IFNAME` | the network interface for sums on the CPU, as in PyTorch |
//! | `DYLORA_MEETING_SECS` | how long the processes wait for each other at the start |
//! | `DYLORA_OPERATION_SECS` | how long they wait for one that is late |
//! | `DYLORA_SILENCE_SECS` | how long a process may give no sign of life |
//! | `DYLORA_OVERLAP_BYTES` | the size of gradients from which on their sum overlaps |

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};

use super::signals::Interrupted;
use super::{Shared, Stderr, describe, usage, variable};
use crate::data::visible;
use crate::dist::{Limits, Place, World};
use crate::ffi;

/// The place of this process; `None` if it is alone.
///
/// # Errors
/// A [`super::UsageError`] if the environment is not sound.
pub fn place() -> Result<Option<Place>> {
    Place::read(&variable).map_err(usage)
}

/// Whether this process belongs to a world and is not its first. It then logs less.
pub fn is_later() -> bool {
    place().is_ok_and(|place| place.is_some_and(|place| place.dist_rank > 0))
}

/// Runs a command that processes can share.
///
/// # Errors
/// Those of the command, and those of a process that cannot join its world or loses others.
pub fn in_world(
    place: Option<&Place>,
    show_progress: bool,
    run: impl FnOnce(&Shared) -> Result<()>,
) -> Result<()> {
    let Some(place) = place else { return run(&Shared::alone(show_progress)) };
    if variable("TORCH_CPP_LOG_LEVEL").is_none() {
        ffi::dist::hide_warnings();
    }
    if variable("NCCL_CUMEM_ENABLE").is_none() {
        ffi::nccl::take_plain_memory();
    }
    let world = World::join(place, variable("GLOO_SOCKET_IFNAME"), limits()?, Box::new(end))?;
    let world = Arc::new(world);
    let shared = Shared {
        show_progress: show_progress && world.is_first(),
        world: Arc::clone(&world),
        local_rank: place.local_rank,
        attempt: place.attempt,
    };
    let result = run(&shared);
    match &result {
        Err(error) if !error.is::<Interrupted>() => {
            world.leave(Some(&describe(error)))?;
            result
        }
        _ => world.leave(None).and(result),
    }
}

/// Runs a command that is one process's alone.
///
/// # Errors
/// If the environment names a world of several processes.
pub fn alone(
    place: Option<&Place>,
    show_progress: bool,
    run: impl FnOnce(&Shared) -> Result<()>,
) -> Result<()> {
    match place {
        Some(place) if place.world_size > 1 => Err(usage(anyhow!(
            "this command runs in one process, and `WORLD_SIZE` is {}\nhint: `train`, \
             `add-expert`, `eval`, `generate` and `bench` can be shared by processes; unset `RANK` \
             and `WORLD_SIZE` for the others",
            place.world_size
        ))),
        _ => run(&Shared::alone(show_progress)),
    }
}

fn limits() -> Result<Limits> {
    let default = Limits::default();
    let secs = |name: &str, default: Duration| match variable(name) {
        None => Ok(default),
        Some(text) => match text.trim().parse::<u64>() {
            Ok(secs) if secs > 0 => Ok(Duration::from_secs(secs)),
            _ => Err(usage(anyhow!("`{name}` must be a number of seconds from 1, got `{text}`"))),
        },
    };
    let overlap_bytes = match variable("DYLORA_OVERLAP_BYTES") {
        None => default.overlap_bytes,
        Some(text) => text.trim().parse().map_err(|_| {
            usage(anyhow!("`DYLORA_OVERLAP_BYTES` must be a number of bytes from 0, got `{text}`"))
        })?,
    };
    Ok(Limits {
        overlap_bytes,
        meeting: secs("DYLORA_MEETING_SECS", default.meeting)?,
        operation: secs("DYLORA_OPERATION_SECS", default.operation)?,
        silence: secs("DYLORA_SILENCE_SECS", default.silence)?,
    })
}

/// Ends a process whose world has failed while it waits for something that will not come.
#[expect(clippy::exit, reason = "the main thread may wait for a GPU that never answers")]
fn end(message: &str) {
    let _ = writeln!(Stderr, "error: {}", visible(message));
    std::process::exit(1);
}
