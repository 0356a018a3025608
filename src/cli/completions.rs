//! `dylora completions` and `dylora man`: what shells and `man` know of the command line.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use super::{Cli, print_result, write};

/// Arguments of `dylora completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Prints the completions of a shell.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut text = vec![];
    clap_complete::generate(args.shell, &mut shown(), "dylora", &mut text);
    write(&String::from_utf8(text)?).map(|_| ())
}

/// The command line without the commands that are hidden in `--help`.
fn shown() -> Command {
    let cli = Cli::command();
    let commands = cli.get_subcommands().filter(|command| !command.is_hide_set());
    Command::new("dylora").args(cli.get_arguments()).subcommands(commands)
}

/// Arguments of `dylora man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The folder to write to, as `share/man/man1`. It is made if it does not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Writes the man pages of dylora and of each command: `dylora.1`, `dylora-train.1` and so on.
pub fn man(args: &ManArgs) -> Result<()> {
    fs_err::create_dir_all(&args.out)?;
    let in_dir = || format!("cannot write to `{}`", args.out.display());
    clap_mangen::generate_to(Cli::command(), &args.out).with_context(in_dir)?;
    print_result(&format!("wrote the pages to `{}`", args.out.display()))
}
