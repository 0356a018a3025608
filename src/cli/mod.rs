//! The command line: the clap types, what the commands share, and the environment variables, which
//! no other part of the library reads.

mod add_expert;
mod bench;
mod bench_report;
mod bench_shapes;
mod chat;
mod chat_lines;
mod chat_text;
mod completions;
mod config_keys;
mod data;
mod demo;
mod demo_files;
mod demo_results;
mod doctor;
mod doctor_checks;
mod doctor_facts;
mod dry_run;
mod eval;
mod eval_answers;
mod export_adapters;
mod fit;
mod generate;
mod init;
mod init_ask;
mod init_data;
mod init_plan;
mod inputs;
mod launch;
mod memory;
mod merge;
mod open;
mod progress;
mod push;
mod record_args;
mod remove_expert;
mod report;
mod results;
mod sampling;
mod serve;
mod signals;
mod stage;
mod start;
mod stderr;
mod strip;
mod study;
mod study_pool;
mod study_run;
mod study_text;
mod table;
mod terminal;
mod trace;
mod train;
mod train_bar;
mod world;

use std::borrow::Cow;
use std::env;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use clap::{ArgAction, Parser, Subcommand};
use tch::Device;

use signals::Interrupted;
pub use stderr::Stderr;
pub use terminal::has_colours;

use crate::config::{self, DeviceChoice};
use crate::data::visible;
use crate::dist::World;
use crate::ffi;
use crate::hub::{HubLimits, HubSettings};

/// Heads the options of every command in `--help`.
const GLOBAL: &str = "Global options";

/// What `--help` of dylora itself ends with.
const AFTER_HELP: &str = "\
Exit codes:
  0              success
  1              any other fault, such as a file that is damaged or a full disk
  2              a fault in the arguments or the config, such as a file that it names and that is
                 not there
  129, 130, 143  interrupted by SIGHUP, SIGINT (Ctrl-C) or SIGTERM, after the work was saved

Environment:
  DYLORA_LOG     what is logged, instead of `-v` and `-q`: `warn`, `info`, `debug` or, for single
                 parts, `dylora::hub=debug,warn`
  DYLORA_CACHE   the folder of caches instead of `dylora` in the user's cache
  NO_COLOR       no colours; CLICOLOR_FORCE=1 asks for them where there is no terminal
  COLUMNS        the width of tables where there is no terminal, instead of 80";

/// Train a Mixture of LoRA Experts on a frozen GPT-2, Llama, Qwen, SmolLM or Mistral, evaluate it,
/// merge it and export it.
#[derive(Debug, Parser)]
#[command(
    name = "dylora",
    disable_version_flag = true,
    arg_required_else_help = true,
    after_help = AFTER_HELP
)]
pub struct Cli {
    /// Print the versions of dylora and libtorch, and whether CUDA was found.
    #[arg(short = 'V', long)]
    version: bool,
    /// Show debug messages: those of dylora with `-v`, and those of all libraries with `-vv`.
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = GLOBAL)]
    verbose: u8,
    /// Show only warnings and errors, and no progress bars.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = GLOBAL)]
    quiet: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

/// The usage of a command that opens a model.
///
/// - `more`: what else it needs
fn of_model(command: &str, more: &str) -> String {
    format!("dylora {command} [OPTIONS] <--checkpoint DIR | --base DIR [--adapters DIR]>{more}")
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a mixture (or a whole base, with `method = "full"`) from a TOML config.
    #[command(override_usage = "dylora train [OPTIONS] <--config FILE [--resume] | --resume DIR>")]
    Train(train::TrainArgs),
    /// Start several processes on this machine that share a command, one for each GPU.
    Launch(launch::LaunchArgs),
    /// Look at data before they are trained on.
    Data(data::DataCommand),
    /// Measure the loss, perplexity and routing of a model on each domain.
    #[command(override_usage = of_model("eval", ""))]
    Eval(eval::EvalArgs),
    /// Write each expert as a PEFT adapter, with the router beside them, or for llama.cpp.
    #[command(override_usage = of_model("export-adapters", " --out DIR"))]
    ExportAdapters(export_adapters::ExportArgs),
    /// Merge the experts, with fixed weights, into the base or into one adapter.
    #[command(override_usage = of_model("merge", " --out DIR"))]
    Merge(merge::MergeArgs),
    /// Upload an export or a merged model to the Hugging Face Hub. Without `--yes`, say what would
    /// be uploaded.
    Push(push::PushArgs),
    /// Add an expert for a new skill to a checkpoint's mixture, and train it.
    AddExpert(add_expert::AddExpertArgs),
    /// Remove an expert from a checkpoint's mixture, and report what that costs in loss.
    RemoveExpert(remove_expert::RemoveExpertArgs),
    /// Merge two experts of a checkpoint's mixture into one, and report what that costs in loss.
    MergeExperts(remove_expert::MergeExpertsArgs),
    /// Continue prompts with a mixture, one of its experts or its base.
    #[command(override_usage = of_model("generate", ""))]
    Generate(generate::GenerateArgs),
    /// Talk to a mixture, one of its experts or its base in the terminal.
    #[command(override_usage = of_model("chat", ""))]
    Chat(chat::ChatArgs),
    /// Answer requests over HTTP as OpenAI does, with a mixture, its experts and its base.
    #[command(override_usage = of_model("serve", ""))]
    Serve(serve::ServeArgs),
    /// Show how one text is routed, and with `--out` save tensors of its forward pass.
    #[command(override_usage = of_model("trace", " <--text TEXT | --tokens IDS>"))]
    Trace(trace::TraceArgs),
    /// Write one HTML page about runs: losses, routing, samples, growth and studies.
    Report(report::ReportArgs),
    /// Find out whether routing helps on your data: train a mixture, single LoRAs and other arms
    /// with the same chances, and compare them.
    Study(study::StudyArgs),
    /// Make one run of a study. `dylora study` starts it.
    #[command(hide = true)]
    StudyRun(study_run::StudyRunArgs),
    /// Measure the speed and memory of a mixture, and compare it with other ways to compute it.
    Bench(bench::BenchArgs),
    /// Write a config for your data: look at it and at a base, and choose sensible values.
    Init(init::InitArgs),
    /// Show what a mixture does: train one and a single LoRA on a tiny base and four domains that
    /// come with dylora, offline, and compare them.
    Demo(demo::DemoArgs),
    /// Look at this machine: libtorch, CUDA, threads, memory, disk, caches and the Hub's login, and
    /// say what to do about what is missing.
    Doctor(doctor::DoctorArgs),
    /// Explain the keys of a config, or print the schema by which editors check one.
    Config(config_keys::ConfigArgs),
    /// Print the completions of a shell.
    Completions(completions::CompletionsArgs),
    /// Write man pages.
    Man(completions::ManArgs),
}

/// An error in how dylora was called or configured. The process exits with code 2.
#[derive(Debug)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// A command that ends with the exit code of another process.
#[derive(Debug)]
struct Exit {
    message: String,
    code: u8,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

/// The message that is printed for an error, and the exit code of the process. Control characters,
/// which may come from data, are shown by their pictures.
pub fn report(error: &anyhow::Error) -> (String, u8) {
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        return (visible(&interrupted.to_string()), interrupted.exit_code);
    }
    let code = match error.downcast_ref::<Exit>() {
        Some(exit) => exit.code,
        None if error.is::<UsageError>() => 2,
        None => 1,
    };
    (format!("error: {}", visible(&describe(error))), code)
}

/// Prints a result to standard output. It is no error if the reader has closed the pipe, as `head`
/// does.
///
/// # Errors
/// A write that fails for another reason, such as a full disk.
fn print_result(text: &str) -> Result<()> {
    write(&format!("{}\n", for_output(text))).map(|_| ())
}

/// Foreign text as standard output may have it: in a terminal, control characters are shown by
/// their pictures.
fn for_output(text: &str) -> Cow<'_, str> {
    match std::io::stdout().is_terminal() {
        true => visible(text).into(),
        false => text.into(),
    }
}

/// Writes text to standard output at once. Returns whether anybody reads it: the reader may have
/// closed the pipe.
///
/// # Errors
/// A write that fails for another reason.
fn write(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow!("cannot write to standard output: {error}")),
    }
}

/// Turns an error into a [`UsageError`] with the same message.
fn usage(error: anyhow::Error) -> anyhow::Error {
    UsageError(describe(&error)).into()
}

/// The message of an error with its causes. A cause follows on the same line, or on a line of its
/// own if it has several lines.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        // a message may already end with that of its cause
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
    /// How much is logged: 0 with `--quiet`, 1 by default, and 1 more for each `-v`. Of several
    /// processes, the first one logs this much, and the others 1 less.
    pub fn verbosity(&self) -> u8 {
        let of_first = if self.quiet { 0 } else { 1 + self.verbose };
        if world::is_later() { of_first.saturating_sub(1) } else { of_first }
    }

    /// Runs the command.
    pub fn run(self) -> Result<()> {
        // must come first, because libtorch looks for CUDA only once, at its first use
        let cuda = ffi::load_cuda();
        ffi::signals::files_fail_with_errors();
        ffi::cuda::keep_code_in(&own_cache().join("kernels"));
        config::variables::provide(|name| env::var(name).ok());
        if self.version {
            return print_result(&version(cuda));
        }
        let none = || usage(anyhow!("no command given\nhint: `dylora --help` lists them"));
        let command = self.command.ok_or_else(none)?;
        let (place, shows) = (world::place()?, !self.quiet);
        let in_world = |run: &mut dyn FnMut(&Shared) -> Result<()>| {
            world::in_world(place.as_ref(), shows, run)
        };
        match command {
            Command::Train(args) => in_world(&mut |shared| train::run(&args, shared)),
            Command::Eval(args) => in_world(&mut |shared| eval::run(&args, shared)),
            Command::AddExpert(args) => in_world(&mut |shared| add_expert::run(&args, shared)),
            Command::Generate(args) => in_world(&mut |shared| generate::run(&args, shared)),
            Command::Bench(args) => in_world(&mut |shared| bench::run(&args, shared)),
            other => world::alone(place.as_ref(), shows, |shared| other.run_alone(shared)),
        }
    }
}

impl Command {
    /// Runs a command that is one process's alone.
    fn run_alone(self, shared: &Shared) -> Result<()> {
        match self {
            Self::Launch(args) => launch::run(&args),
            Self::Data(args) => data::run(args, shared),
            Self::ExportAdapters(args) => export_adapters::run(args, shared),
            Self::Merge(args) => merge::run(args, shared),
            Self::Push(args) => push::run(&args, shared),
            Self::RemoveExpert(args) => remove_expert::remove(args, shared),
            Self::MergeExperts(args) => remove_expert::merge(args, shared),
            Self::Chat(args) => chat::run(args, shared),
            Self::Serve(args) => serve::run(args, shared),
            Self::Trace(args) => trace::run(args, shared),
            Self::Report(args) => report::run(args, shared),
            Self::Study(args) => study::run(args, shared),
            Self::StudyRun(args) => study_run::run(&args, shared),
            Self::Init(args) => init::run(&args, shared),
            Self::Demo(args) => demo::run(&args, shared),
            Self::Doctor(args) => doctor::run(&args),
            Self::Config(args) => config_keys::run(args),
            Self::Completions(args) => completions::completions(&args),
            Self::Man(args) => completions::man(&args),
            Self::Train(_)
            | Self::Eval(_)
            | Self::AddExpert(_)
            | Self::Generate(_)
            | Self::Bench(_) => unreachable!("processes can share this command"),
        }
    }
}

/// What every command receives.
#[derive(Debug)]
struct Shared {
    show_progress: bool,
    /// The processes that share the command.
    world: Arc<World>,
    /// This process's number on its machine.
    local_rank: usize,
    /// How often the world was restarted.
    attempt: u64,
}

impl Shared {
    /// What the command of a single process receives.
    fn alone(show_progress: bool) -> Self {
        Self { show_progress, world: Arc::new(World::single()), local_rank: 0, attempt: 0 }
    }

    /// Whether this process is the first one, which alone writes files and prints results.
    fn is_first(&self) -> bool {
        self.world.is_first()
    }

    /// Runs `f` in one process of each machine first, so that the others find files in its caches.
    fn in_turn<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        self.world.in_turn(self.local_rank == 0, f)
    }

    /// Resolves a choice of device for this process. With several processes on a machine, each gets
    /// a GPU of its own, counted from the chosen one on, unless it sees a single one.
    ///
    /// # Errors
    /// A CUDA device that does not exist.
    fn device(&self, choice: DeviceChoice) -> Result<Device> {
        let first = match (choice, ffi::load_cuda()) {
            (DeviceChoice::Auto, Ok(())) => 0,
            (DeviceChoice::Cuda(index), Ok(())) => index,
            _ => return device(choice),
        };
        let own = if tch::Cuda::device_count() == 1 { 0 } else { self.local_rank };
        device(DeviceChoice::Cuda(first + own))
    }
}

fn version(cuda: Result<(), &'static str>) -> String {
    let cuda = match cuda {
        Ok(()) => format!("yes, {} device(s)", tch::Cuda::device_count()),
        Err(reason) => format!("no: {reason}"),
    };
    let (dylora, torch) = (env!("CARGO_PKG_VERSION"), ffi::torch_version());
    format!("dylora {dylora}\nlibtorch {torch}\nCUDA {cuda}")
}

/// Resolves a choice of device on this machine.
///
/// # Errors
/// A CUDA device that does not exist.
fn device(choice: DeviceChoice) -> Result<Device> {
    match (choice, ffi::load_cuda()) {
        (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, Err(_)) => Ok(Device::Cpu),
        (DeviceChoice::Auto, Ok(())) => device(DeviceChoice::Cuda(0)),
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

/// An environment variable, if it is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn home(relative: &str) -> PathBuf {
    PathBuf::from(variable("HOME").unwrap_or_else(|| ".".into())).join(relative)
}

fn user_cache() -> PathBuf {
    variable("XDG_CACHE_HOME").map_or_else(|| home(".cache"), PathBuf::from)
}

/// The folder of dylora's own caches: `DYLORA_CACHE`, or `dylora` in the user's cache.
fn own_cache() -> PathBuf {
    variable("DYLORA_CACHE").map_or_else(|| user_cache().join("dylora"), PathBuf::from)
}

fn token_cache() -> PathBuf {
    own_cache().join("tokens")
}

/// The folder of huggingface_hub: `HF_HOME`, or `huggingface` in the user's cache.
fn hf_home() -> PathBuf {
    variable("HF_HOME").map_or_else(|| user_cache().join("huggingface"), PathBuf::from)
}

/// How to reach the Hub, by the environment variables of huggingface_hub: `HF_HOME`,
/// `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`. Without `HF_TOKEN`, the token
/// that `hf auth login` saved is used.
fn hub_settings() -> HubSettings {
    let hf_home = hf_home();
    let saved_token = || fs_err::read_to_string(hf_home.join("token")).ok();
    let token = variable("HF_TOKEN").or_else(saved_token).map(|token| token.trim().to_owned());
    let offline = variable("HF_HUB_OFFLINE")
        .is_some_and(|value| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on"));
    HubSettings {
        endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| HubSettings::DEFAULT_ENDPOINT.into()),
        cache_dir: variable("HF_HUB_CACHE").map_or_else(|| hf_home.join("hub"), PathBuf::from),
        token: token.filter(|token| !token.is_empty()),
        offline,
        limits: HubLimits::default(),
    }
}

/// The result of a command that panicked. It is no error if the reader of standard output has
/// closed the pipe, as `head` does. Out of memory is an error with a hint. Anything else is a bug,
/// and is reported as one.
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
             `train.loss_chunk_tokens`; for `serve`, a smaller `--max-batch` or `--context`"
        );
    }
    bail!("this is a bug in dylora, please report it: {text}\nhint: `-vv` shows where")
}
