//! The command line: clap types, what commands share, and the environment, which only this room reads.

mod add_expert;
mod bench;
mod bench_report;
mod eval;
mod export_adapters;
mod merge;
mod open;
mod progress;
mod remove_expert;
mod signals;
mod stderr;
mod table;
mod trace;
mod train;

use std::env;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use clap::{ArgAction, Parser, Subcommand};
use tch::Device;

use signals::Interrupted;
pub use stderr::Stderr;

use crate::config::DeviceChoice;
use crate::ffi;
use crate::hub::{HubLimits, HubSettings};

/// Train a Mixture of LoRA Experts on GPT-2, end to end.
#[derive(Debug, Parser)]
#[command(name = "dylora", disable_version_flag = true, arg_required_else_help = true)]
pub struct Cli {
    /// Print the versions of dylora and libtorch, and whether CUDA was found.
    #[arg(short = 'V', long)]
    version: bool,
    /// More messages (`-vv` for most).
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Only warnings and errors; no progress bars.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a mixture (or, with `method = "full"`, a base) from a TOML config.
    Train(train::TrainArgs),
    /// Loss, perplexity and routing of a checkpoint or a base, by domain.
    Eval(eval::EvalArgs),
    /// Write each expert as a PEFT adapter, and the router beside them.
    ExportAdapters(export_adapters::ExportArgs),
    /// Merge a static mixture of the experts into the base or into one PEFT adapter.
    Merge(merge::MergeArgs),
    /// Add an expert for a new skill to a checkpoint's mixture, and train it.
    AddExpert(add_expert::AddExpertArgs),
    /// Remove an expert from a checkpoint's mixture, and tell what that costs.
    RemoveExpert(remove_expert::RemoveExpertArgs),
    /// Merge two experts of a checkpoint's mixture into one, and tell what that costs.
    MergeExperts(remove_expert::MergeExpertsArgs),
    /// Show how one text is routed, and save the inside of its forward pass.
    Trace(trace::TraceArgs),
    /// Measure the mixture here: tokens/s, memory, and what it costs beside other ways to compute it.
    Bench(bench::BenchArgs),
}

/// A fault in how dylora was called or configured; the process exits with 2.
#[derive(Debug)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// What people are told of an error, and the exit code of the process.
pub fn report(error: &anyhow::Error) -> (String, u8) {
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        return (interrupted.to_string(), interrupted.exit_code);
    }
    (format!("error: {}", describe(error)), if error.is::<UsageError>() { 2 } else { 1 })
}

/// Prints a result. A reader that has gone, as `| head` goes, is no fault.
///
/// # Errors
/// Standard output that takes nothing, such as a full disk.
fn print_result(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow!("cannot write to standard output: {error}"))
        }
        _ => Ok(()),
    }
}

/// Marks an error as one of usage or config.
fn usage(error: anyhow::Error) -> anyhow::Error {
    UsageError(describe(&error)).into()
}

/// An error's chain as people read it: causes follow on the line, or below where they have lines.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        // anyhow's context repeats what a cause already says in its own words
        if text.ends_with(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(if cause.trim_end().contains('\n') { ":\n" } else { ": " });
        }
        text.push_str(cause.trim_end());
    }
    text
}

impl Cli {
    /// How much is told: 0 with `--quiet`, 1 as a rule, more with each `-v`.
    pub fn verbosity(&self) -> u8 {
        if self.quiet { 0 } else { 1 + self.verbose }
    }

    /// Runs the command.
    pub fn run(self) -> Result<()> {
        // libtorch looks for CUDA once, at its first use
        let cuda = ffi::load_cuda();
        ffi::cuda::keep_code_in(&own_cache().join("kernels"));
        if self.version {
            return print_result(&version(cuda));
        }
        let shared = Shared { show_progress: !self.quiet };
        match self.command {
            Some(Command::Train(args)) => train::run(args, &shared),
            Some(Command::Eval(args)) => eval::run(args, &shared),
            Some(Command::ExportAdapters(args)) => export_adapters::run(args, &shared),
            Some(Command::Merge(args)) => merge::run(args, &shared),
            Some(Command::AddExpert(args)) => add_expert::run(args, &shared),
            Some(Command::RemoveExpert(args)) => remove_expert::remove(args, &shared),
            Some(Command::MergeExperts(args)) => remove_expert::merge(args, &shared),
            Some(Command::Trace(args)) => trace::run(args, &shared),
            Some(Command::Bench(args)) => bench::run(args, &shared),
            None => Err(usage(anyhow!("no command given\nhint: `dylora --help` lists them"))),
        }
    }
}

/// What every command is given.
#[derive(Debug)]
struct Shared {
    show_progress: bool,
}

fn version(cuda: Result<(), &'static str>) -> String {
    let cuda = match cuda {
        Ok(()) => format!("yes, {} device(s)", tch::Cuda::device_count()),
        Err(reason) => format!("no: {reason}"),
    };
    let (dylora, torch) = (env!("CARGO_PKG_VERSION"), ffi::torch_version());
    format!("dylora {dylora}\nlibtorch {torch}\nCUDA {cuda}")
}

/// The device that a choice means here.
fn device(choice: DeviceChoice) -> Result<Device> {
    match (choice, ffi::load_cuda()) {
        (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, Err(_)) => Ok(Device::Cpu),
        (DeviceChoice::Auto, Ok(())) => Ok(Device::Cuda(0)),
        (DeviceChoice::Cuda(_), Err(reason)) => {
            Err(usage(anyhow!("there is no CUDA device: {reason}\nhint: `--device cpu`")))
        }
        (DeviceChoice::Cuda(index), Ok(())) => {
            let count = tch::Cuda::device_count();
            if index as i64 >= count {
                return Err(usage(anyhow!("there is no `cuda:{index}`, only {count} device(s)")));
            }
            ffi::use_device(Device::Cuda(index))?;
            Ok(Device::Cuda(index))
        }
    }
}

/// A variable of the environment, unless it is empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn home(relative: &str) -> PathBuf {
    PathBuf::from(variable("HOME").unwrap_or_else(|| ".".into())).join(relative)
}

fn user_cache() -> PathBuf {
    variable("XDG_CACHE_HOME").map_or_else(|| home(".cache"), PathBuf::from)
}

/// Where caches of our own go: `DYLORA_CACHE`, else `dylora` in the user's cache.
fn own_cache() -> PathBuf {
    variable("DYLORA_CACHE").map_or_else(|| user_cache().join("dylora"), PathBuf::from)
}

fn token_cache() -> PathBuf {
    own_cache().join("tokens")
}

/// How to reach the Hub, by huggingface_hub's variables: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`,
/// `HF_TOKEN` (else the token that `hf auth login` saved), `HF_HUB_OFFLINE`.
fn hub_settings() -> HubSettings {
    let hf_home =
        variable("HF_HOME").map_or_else(|| user_cache().join("huggingface"), PathBuf::from);
    let saved_token = || fs_err::read_to_string(hf_home.join("token")).ok();
    let token = variable("HF_TOKEN").or_else(saved_token).map(|token| token.trim().to_owned());
    let offline = variable("HF_HUB_OFFLINE")
        .is_some_and(|value| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on"));
    HubSettings {
        endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
        cache_dir: variable("HF_HUB_CACHE").map_or_else(|| hf_home.join("hub"), PathBuf::from),
        token: token.filter(|token| !token.is_empty()),
        offline,
        limits: HubLimits::default(),
    }
}

/// What a panic says to people: out of memory is theirs to mend, a reader of stdout that has gone, as
/// `| head` does, is nobody's fault and no error; anything else is a bug.
pub fn from_panic(panic: &(dyn std::any::Any + Send)) -> Result<()> {
    let text = ffi::panic_message(panic);
    let lower = text.to_lowercase();
    if let Some((_, fault)) = text.split_once("failed printing to stdout: ") {
        return match lower.contains("broken pipe") {
            true => Ok(()),
            false => Err(anyhow!("cannot write to standard output: {fault}")),
        };
    }
    if lower.contains("out of memory") || lower.contains("can't allocate memory") {
        bail!(
            "out of memory\nhint: a smaller `train.micro_batch_size` (with more \
             `train.grad_accum_steps`), `train.gradient_checkpointing = true` or a smaller \
             `train.loss_chunk_tokens`"
        );
    }
    bail!("this is a bug in dylora, please report it: {text}\nhint: `-vv` shows where")
}
