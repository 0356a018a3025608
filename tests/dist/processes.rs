//! Several processes of this test binary, each of which runs a job of the test that starts them.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, bail};
use dylora::dist::{Limits, Place, World};

/// The variable that names the job of a process.
const JOB: &str = "DYLORA_TEST_JOB";
/// The variable that names the folder of a job.
const DIR: &str = "DYLORA_TEST_DIR";

/// A port that nothing uses, below those that Linux gives to outgoing connections.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 1000) as u16;
    for _ in 0..1000 {
        let port = 10_000 + (first * 20 + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port is free")
}

/// The variables of a process's place.
pub fn place_of(dist_rank: usize, size: usize, port: u16) -> [(&'static str, String); 5] {
    [
        ("RANK", dist_rank.to_string()),
        ("LOCAL_RANK", dist_rank.to_string()),
        ("WORLD_SIZE", size.to_string()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string()),
    ]
}

/// Starts `size` processes, each of which runs `job` in `dir`.
pub fn start(size: usize, job: &str, dir: &Path) -> Result<Vec<Child>> {
    let port = free_port()?;
    let start = |dist_rank| -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", "worker", "--nocapture"]);
        command.env(JOB, job).env(DIR, dir).envs(place_of(dist_rank, size, port));
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    };
    (0..size).map(start).collect()
}

/// What the processes put out.
pub fn outputs(children: Vec<Child>) -> Result<Vec<Output>> {
    children.into_iter().map(|child| Ok(child.wait_with_output()?)).collect()
}

/// Runs `job` in `size` processes. With size 1, the process is alone.
pub fn run(size: usize, job: &str, dir: &Path) -> Result<()> {
    for (dist_rank, output) in outputs(start(size, job, dir)?)?.iter().enumerate() {
        if !output.status.success() {
            let [out, err] =
                [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
            bail!("rank {dist_rank} of `{job}`: {}\n{out}{err}", output.status);
        }
    }
    Ok(())
}

/// The job of this process and its folder; `None` if it is the one that runs the tests.
pub fn own_job() -> Option<(String, std::path::PathBuf)> {
    let variable = |name: &str| std::env::var(name).ok();
    Some((variable(JOB)?, variable(DIR)?.into()))
}

/// The world of this process.
pub fn own_world(limits: Limits) -> Result<Arc<World>> {
    let place = Place::read(&|name| std::env::var(name).ok())?.context("a test sets the place")?;
    let on_lost = Box::new(|_: &str| std::process::abort());
    Ok(Arc::new(World::join(&place, None, limits, on_lost)?))
}
