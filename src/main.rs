//! The `dylora` binary: it parses the arguments, logs to stderr, runs the command, prints an error
//! if there is one, and exits.

use std::io::{ErrorKind, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;
use dylora::cli::{Cli, Stderr, from_panic, has_colours, report};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return show(&error),
    };
    let default = ["dylora=warn", "dylora=info", "dylora=debug", "debug"];
    let default = default[usize::from(cli.verbosity()).min(default.len() - 1)];
    let asked = std::env::var("DYLORA_LOG").ok().filter(|asked| !asked.is_empty());
    let filter = match EnvFilter::try_new(asked.as_deref().unwrap_or(default)) {
        Ok(filter) => filter,
        Err(error) => {
            let _ = writeln!(
                Stderr,
                "error: `DYLORA_LOG` is no filter: {error}\nhint: `DYLORA_LOG=debug`, or \
                 `dylora::hub=debug,warn`"
            );
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Stderr)
        .with_ansi(has_colours(std::io::stderr().is_terminal()))
        .with_target(false)
        .without_time()
        .init();
    // at the trace level, the HTTP client logs each request byte by byte, with the Hub's token
    log::set_max_level(log::max_level().min(log::LevelFilter::Debug));
    // tch panics when libtorch fails, as when memory runs out; the error is printed below instead
    std::panic::set_hook(Box::new(|panic| tracing::debug!("{panic}")));
    let result = catch_unwind(AssertUnwindSafe(|| cli.run()))
        .unwrap_or_else(|panic| from_panic(panic.as_ref()));
    let Err(error) = result else { return ExitCode::SUCCESS };
    let (message, exit_code) = report(&error);
    let _ = writeln!(Stderr, "{message}");
    ExitCode::from(exit_code)
}

/// Prints clap's help or error, and returns the exit code. Help that cannot be written is an error,
/// unless nobody reads it.
fn show(message: &clap::Error) -> ExitCode {
    match message.print() {
        Err(error) if !message.use_stderr() && error.kind() != ErrorKind::BrokenPipe => {
            let _ = writeln!(Stderr, "error: cannot write to standard output: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::from(message.exit_code() as u8),
    }
}
