//! A folder with the demo's base, and processes of the binary that work in it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::processes::{free_port, place_of};
use crate::signals::notice_signals;

/// A temporary folder with a copy of the demo's base in `base`.
pub struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs_err::create_dir(dir.path().join("base"))?;
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs_err::copy(demo.join("base").join(name), dir.path().join("base").join(name))?;
        }
        let config = include_str!("../../configs/lifecycle.toml");
        let config = config.replace("../demo/base", "base");
        let config = config.replace("../demo/data", &demo.join("data").display().to_string());
        fs_err::write(dir.path().join("config.toml"), config)?;
        Ok(Self { dir })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command of the binary in one thread, with this folder as its working folder and nothing in
    /// the environment about a world.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_dylora")), arguments)
    }

    /// The same with a copy of the binary.
    pub fn command_of(&self, binary: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command.args(arguments).current_dir(self.dir.path());
        command.env("DYLORA_CACHE", self.path("cache")).env("OMP_NUM_THREADS", "1");
        for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        notice_signals(&mut command);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).output()?)
    }

    /// Starts the processes of a world.
    pub fn start(&self, size: usize, arguments: &[&str]) -> Result<Vec<Child>> {
        let port = free_port()?;
        let start = |dist_rank| self.start_one(dist_rank, size, port, arguments);
        (0..size).map(start).collect()
    }

    /// Starts one process of a world.
    pub fn start_one(
        &self,
        dist_rank: usize,
        size: usize,
        port: u16,
        arguments: &[&str],
    ) -> Result<Child> {
        Ok(self.command(arguments).envs(place_of(dist_rank, size, port)).spawn()?)
    }

    /// The metrics of a run that are of a kind.
    pub fn metrics(&self, run: &str, kind: &str) -> Result<Vec<Value>> {
        let text = fs_err::read_to_string(self.path(run).join("metrics.jsonl"))?;
        let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(lines.into_iter().filter(|line| line["kind"] == kind).collect())
    }

    /// Waits until a run has written `count` lines of metrics.
    pub fn wait_for_lines(&self, run: &str, count: usize) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(90) {
            let path = self.path(run).join("metrics.jsonl");
            if fs_err::read_to_string(path).unwrap_or_default().lines().count() >= count {
                return Ok(());
            }
            sleep(Duration::from_millis(20));
        }
        bail!("the run makes no steps")
    }
}

/// The arguments that train two experts on two domains for `steps` steps.
pub fn train(run: &str, steps: u64, saves_every: u64, set: &[&str]) -> Vec<String> {
    let sets = [
        format!("run.dir={run}"),
        "run.device=cpu".to_owned(),
        "run.tensorboard=false".to_owned(),
        format!("train.duration={{steps={steps}}}"),
        format!("train.checkpoint_every_steps={saves_every}"),
        "train.eval_every_steps=1000000".to_owned(),
        "train.micro_batch_size=1".to_owned(),
        "schedule.warmup_steps=1".to_owned(),
    ];
    let mut arguments: Vec<String> = ["train", "--config", "config.toml"].map(str::to_owned).into();
    let set = set.iter().map(|set| (*set).to_owned());
    arguments.extend(sets.into_iter().chain(set).flat_map(|set| ["--set".to_owned(), set]));
    arguments
}

pub fn as_str(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// Waits for a process, and kills it after `limit`. Returns how it ended and how long that took.
pub fn ended(mut child: Child, limit: Duration) -> Result<(Output, Duration)> {
    let begun = Instant::now();
    let mut status = child.try_wait()?;
    while status.is_none() && begun.elapsed() < limit {
        sleep(Duration::from_millis(20));
        status = child.try_wait()?;
    }
    let took = begun.elapsed();
    if status.is_none() {
        child.kill()?;
        let output = child.wait_with_output()?;
        bail!("the process did not end within {limit:?}: {}", text(&output));
    }
    Ok((child.wait_with_output().context("the process has ended")?, took))
}

pub fn send(child: &Child, signal: i32) {
    // SAFETY: `kill` takes two numbers and accesses no memory
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}
