//! Several processes that compute together, on the CPU by Gloo.

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod kills;
mod launch;
mod operations;
mod processes;
mod scene;
#[path = "../common/signals.rs"]
mod signals;
mod steps;

use anyhow::{Result, bail};

/// What a process does that a test has started: see [`processes`].
#[test]
fn worker() -> Result<()> {
    let Some((job, dir)) = processes::own_job() else { return Ok(()) };
    match job.split_once(' ').unwrap_or((&job, "")) {
        ("operations", _) => operations::work(),
        ("idle", _) => faults::idle(),
        ("steps", names) => steps::work(&dir, names),
        (job, _) => bail!("there is no job `{job}` in `{}`", dir.display()),
    }
}
