//! `dylora launch`: starts the processes of a world on this machine.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{JoinHandle, available_parallelism, sleep, spawn};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{Exit, Stderr, usage, variable};
use crate::ffi;

/// Time that the other processes get to end by themselves and say why, once one has failed.
const GRACE: Duration = Duration::from_secs(25);
/// Time between two looks at the processes.
const PAUSE: Duration = Duration::from_millis(50);
/// The exit code of a usage error, after which a restart would not help.
const USAGE: i32 = 2;

/// Arguments of `dylora launch`.
#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Number of processes: one for each GPU, or parts of the CPU.
    #[arg(long, short = 'n', value_name = "N")]
    processes: usize,
    /// How often to start all processes again if one of them fails. A run then goes on from its
    /// last checkpoint.
    #[arg(long, value_name = "K", default_value_t = 0)]
    max_restarts: u64,
    /// The port over which the processes meet [default: a free one].
    #[arg(long)]
    port: Option<u16>,
    /// The command of dylora and its arguments, such as `train --config run.toml`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// A process of the world.
struct Process {
    child: Child,
    status: Option<ExitStatus>,
    relay: Option<JoinHandle<()>>,
}

/// Runs the command.
pub fn run(args: &LaunchArgs) -> Result<()> {
    if args.processes == 0 {
        return Err(usage(anyhow!("`--processes` must be at least 1, got 0")));
    }
    let signal = listen()?;
    for attempt in 0.. {
        let mut processes = start(args, attempt)?;
        let (failed, is_stopping) = wait(&mut processes, &signal)?;
        let Some((dist_rank, status)) = failed else { return Ok(()) };
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let what = match status.signal() {
            Some(signal) => format!("rank {dist_rank} was ended by signal {signal}"),
            None => format!("rank {dist_rank} ended with exit code {code}"),
        };
        if is_stopping || code == USAGE || attempt == args.max_restarts {
            return Err(Exit { message: what, code: code as u8 }.into());
        }
        tracing::warn!("{what}; restart {} of {}", attempt + 1, args.max_restarts);
    }
    unreachable!("the loop ends with the last attempt")
}

/// The last signal that asks to stop; 0 if there is none.
fn listen() -> Result<Arc<AtomicUsize>> {
    let last = Arc::new(AtomicUsize::new(0));
    for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|s| !ffi::ignores_signal(*s)) {
        signal_hook::flag::register_usize(signal, Arc::clone(&last), signal as usize)?;
    }
    Ok(last)
}

/// Starts all processes.
fn start(args: &LaunchArgs, attempt: u64) -> Result<Vec<Process>> {
    let program = own_binary()?;
    let port = match args.port {
        Some(port) => port,
        None => free_port()?,
    };
    let cores = available_parallelism().map_or(1, usize::from);
    let threads = (cores / args.processes).max(1).to_string();
    let sets_threads = args.processes > 1 && variable("OMP_NUM_THREADS").is_none();
    let size = args.processes.to_string();
    let start = |dist_rank: usize| -> Result<Process> {
        let mut command = Command::new(&program);
        command.args(&args.command);
        let rank = dist_rank.to_string();
        command.env_remove("TORCHELASTIC_USE_AGENT_STORE").env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string()).env("RANK", &rank).env("LOCAL_RANK", &rank);
        command.env("WORLD_SIZE", &size).env("LOCAL_WORLD_SIZE", &size);
        command.env("TORCHELASTIC_RESTART_COUNT", attempt.to_string());
        if sets_threads {
            command.env("OMP_NUM_THREADS", &threads);
        }
        // a Ctrl-C reaches this process alone, which passes it on once
        command.process_group(0);
        ffi::signals::end_with_parent(&mut command);
        command.stdin(if dist_rank == 0 { Stdio::inherit() } else { Stdio::null() });
        // the first process alone has results
        command.stdout(if dist_rank == 0 { Stdio::inherit() } else { Stdio::null() });
        let mut child = command.stderr(Stdio::piped()).spawn().context("cannot start a process")?;
        let relay = child.stderr.take().map(|pipe| spawn(move || relay(dist_rank, pipe)));
        Ok(Process { child, status: None, relay })
    };
    let mut processes = vec![];
    for dist_rank in 0..args.processes {
        match start(dist_rank) {
            Ok(process) => processes.push(process),
            Err(error) => {
                kill(&mut processes);
                return Err(error);
            }
        }
    }
    Ok(processes)
}

/// The binary that this process runs, to start others with it, even if another has taken its place.
pub fn own_binary() -> Result<PathBuf> {
    let path = std::env::current_exe().context("cannot find the own binary")?;
    Ok(if path.exists() { path } else { PathBuf::from("/proc/self/exe") })
}

/// A port that nothing uses. It is below those that Linux gives to outgoing connections, one of
/// which could take it before rank 0 does.
fn free_port() -> Result<u16> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let first = now.wrapping_add(std::process::id().wrapping_mul(7919));
    let candidates = (0..100).map(|i| 10_000 + (first.wrapping_add(i * 127) % 20_000) as u16);
    let is_free = |port: &u16| TcpListener::bind(("0.0.0.0", *port)).is_ok();
    candidates.into_iter().find(is_free).context("no port is free\nhint: `--port` names one")
}

/// Passes on the messages of a process, each line with its rank in front.
fn relay(dist_rank: usize, pipe: impl Read) {
    let mut lines = BufReader::new(pipe);
    let mut line = vec![];
    while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let mut text = format!("[{dist_rank}] ").into_bytes();
        text.append(&mut line);
        if !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        let _ = Stderr.write_all(&text);
    }
}

/// Waits until all processes have ended, and passes signals on. Returns the first process that
/// failed, and whether a signal had come.
fn wait(
    processes: &mut [Process],
    signal: &AtomicUsize,
) -> Result<(Option<(usize, ExitStatus)>, bool)> {
    let mut failed: Option<(usize, ExitStatus)> = None;
    let mut deadline: Option<Instant> = None;
    let mut is_stopping = false;
    while processes.iter().any(|process| process.status.is_none()) {
        let raised = signal.swap(0, Ordering::Relaxed) as i32;
        if let Some(raised) = Signal::from_named_raw(raised) {
            is_stopping = true;
            for process in processes.iter().filter(|process| process.status.is_none()) {
                // a process that has ended in the meantime need not be asked
                let _ = kill_process(Pid::from_child(&process.child), raised);
            }
        }
        for (dist_rank, process) in processes.iter_mut().enumerate() {
            if process.status.is_none() {
                process.status = process.child.try_wait()?;
                if let Some(status) = process.status.filter(|status| !status.success()) {
                    failed.get_or_insert((dist_rank, status));
                    deadline.get_or_insert(Instant::now() + GRACE);
                }
            }
        }
        if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            kill(processes);
        }
        sleep(PAUSE);
    }
    for relay in processes.iter_mut().filter_map(|process| process.relay.take()) {
        let _ = relay.join();
    }
    Ok((failed, is_stopping))
}

/// Ends the processes that still run.
fn kill(processes: &mut [Process]) {
    for process in processes.iter_mut().filter(|process| process.status.is_none()) {
        let _ = process.child.kill();
    }
}
