//! The processes of a study: one for each run, several at a time.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::available_parallelism;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::launch::own_binary;
use super::variable;
use crate::study::run::RunSpec;
use crate::train::files::METRICS_FILE;

/// The file of a run's messages.
const LOG: &str = "log.txt";
/// The variable by which CUDA shows a process only some GPUs.
pub const VISIBLE_GPUS: &str = "CUDA_VISIBLE_DEVICES";
/// The part at the end of a file of metrics that certainly holds the last step.
const TAIL_BYTES: u64 = 1 << 16;

/// The processes that make runs.
pub struct Pool {
    program: PathBuf,
    jobs: usize,
    threads: Option<usize>,
    /// The GPUs that the runs share, by their names in `CUDA_VISIBLE_DEVICES`; empty if each run
    /// finds its device by itself.
    gpus: Vec<String>,
    running: Vec<Running>,
}

/// A process that makes a run.
struct Running {
    spec: RunSpec,
    child: Child,
    started: Instant,
    /// The step from which an interrupted run goes on, or 0.
    first_step: u64,
    /// The index of its GPU among those that the runs share.
    gpu: Option<usize>,
}

/// A run whose process has ended.
pub struct Ended {
    /// The run.
    pub spec: RunSpec,
    /// The wall-clock time of its process, in seconds.
    pub secs: f64,
    /// Number of steps that were done before.
    pub steps_before: u64,
    /// The error, if the process failed.
    pub error: Option<String>,
}

impl Pool {
    /// A pool of at most `jobs` processes. Unless `OMP_NUM_THREADS` is set, they share the cores.
    ///
    /// - `gpus`: the GPUs that they share, by their names in `CUDA_VISIBLE_DEVICES`
    pub fn new(jobs: usize, gpus: Vec<String>) -> Result<Self> {
        let program = own_binary()?;
        let shares = jobs > 1 && variable("OMP_NUM_THREADS").is_none();
        let cores = available_parallelism().map_or(1, usize::from);
        let threads = shares.then(|| (cores / jobs).max(1));
        Ok(Self { program, jobs, threads, gpus, running: vec![] })
    }

    /// Whether another process may be started.
    pub fn has_room(&self) -> bool {
        self.running.len() < self.jobs
    }

    /// The runs that are being made.
    pub fn running(&self) -> impl Iterator<Item = &RunSpec> {
        self.running.iter().map(|running| &running.spec)
    }

    /// Starts the process of a run.
    pub fn start(&mut self, spec: RunSpec) -> Result<()> {
        let file = spec.write()?;
        let first_step = last_step(spec.dir()).unwrap_or(0);
        let log = fs_err::File::create(spec.dir().join(LOG))?;
        let mut command = Command::new(&self.program);
        command.args(["study-run", "--quiet", "--spec"]).arg(file);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.into_parts().0);
        // a Ctrl-C reaches the study alone, which passes it on once
        command.process_group(0);
        if let Some(threads) = self.threads {
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
        let gpu = least_used(self.gpus.len(), self.running.iter().filter_map(|run| run.gpu));
        if let Some(gpu) = gpu {
            command.env(VISIBLE_GPUS, &self.gpus[gpu]);
        }
        let child = command.spawn().context("cannot start the process of a run")?;
        self.running.push(Running { spec, child, started: Instant::now(), first_step, gpu });
        Ok(())
    }

    /// Asks all processes to save and stop.
    pub fn stop(&self) {
        for running in &self.running {
            // a process that has ended in the meantime need not be asked
            let _ = kill_process(Pid::from_child(&running.child), Signal::TERM);
        }
    }

    /// Takes the processes that have ended.
    pub fn ended(&mut self) -> Result<Vec<Ended>> {
        let mut ended = vec![];
        let mut still_running = vec![];
        for mut running in self.running.drain(..) {
            let Some(status) = running.child.try_wait()? else {
                still_running.push(running);
                continue;
            };
            let Running { spec, started, first_step: steps_before, .. } = running;
            let error = (!status.success()).then(|| error_of(spec.dir(), status));
            let secs = started.elapsed().as_secs_f64();
            ended.push(Ended { spec, secs, steps_before, error });
        }
        self.running = still_running;
        Ok(ended)
    }

    /// Number of steps that the runs which are being made have done.
    pub fn steps(&self) -> u64 {
        self.running.iter().filter_map(|running| last_step(running.spec.dir())).sum()
    }
}

/// The GPU with the fewest runs, the first of several.
///
/// - `used`: the GPU of each run that is being made
fn least_used(num_gpus: usize, used: impl Iterator<Item = usize>) -> Option<usize> {
    let mut counts = vec![0; num_gpus];
    for gpu in used {
        counts[gpu] += 1;
    }
    (0..num_gpus).min_by_key(|&gpu| counts[gpu])
}

/// The GPUs of this machine by their names in `CUDA_VISIBLE_DEVICES`, if there are several.
///
/// - `visible`: the present value of that variable
/// - `count`: number of devices
pub fn gpu_names(visible: Option<&str>, count: usize) -> Vec<String> {
    if count < 2 {
        return vec![];
    }
    match visible {
        Some(names) => names.split(',').take(count).map(|name| name.trim().to_owned()).collect(),
        None => (0..count).map(|index| index.to_string()).collect(),
    }
}

/// The error at the end of a run's messages.
fn error_of(run_dir: &Path, status: ExitStatus) -> String {
    let text = fs_err::read_to_string(run_dir.join(LOG)).unwrap_or_default();
    match text.rfind("error: ") {
        Some(at) => text[at + "error: ".len()..].trim_end().to_owned(),
        None => format!("its process ended with {status}"),
    }
}

/// The last step in the metrics of a run, if it has begun.
fn last_step(run_dir: &Path) -> Option<u64> {
    let mut file = fs_err::File::open(run_dir.join(METRICS_FILE)).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES))).ok()?;
    let mut tail = vec![];
    file.read_to_end(&mut tail).ok()?;
    step_in(&String::from_utf8_lossy(&tail))
}

/// The number after the last `"step":` in a text.
fn step_in(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once("\"step\":")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
    rest[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_share_the_gpus_evenly() {
        assert_eq!(least_used(0, [].into_iter()), None);
        assert_eq!(least_used(3, [].into_iter()), Some(0));
        assert_eq!(least_used(3, [0, 2].into_iter()), Some(1));
        assert_eq!(least_used(2, [0, 1, 0].into_iter()), Some(1));
        assert_eq!(gpu_names(None, 2), ["0", "1"]);
        assert_eq!(gpu_names(Some("3, 5"), 2), ["3", "5"]);
        assert!(gpu_names(Some("3"), 1).is_empty() && gpu_names(None, 0).is_empty());
    }

    #[test]
    fn the_last_step_is_found_even_if_its_line_is_cut_off() {
        let lines = "0.5}\n{\"kind\":\"train\",\"step\":8,\"loss\":1.5}\n\
                     {\"kind\":\"train\",\"step\":9,\"lo";
        assert_eq!(step_in(lines), Some(9));
        assert_eq!((step_in(""), step_in("{\"step\":")), (None, None));
    }
}
