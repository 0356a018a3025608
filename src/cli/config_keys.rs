//! `dylora config`: what the keys of a config mean, and the schema by which editors check one.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::{print_result, terminal, usage};
use crate::config::{explain, reference, schema};

/// Arguments of `dylora config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Explain a key with its type, its default and its values, or a section with its keys.
    Explain {
        /// The key, such as `lora.rank` or `train.duration`, or a section, such as `router`.
        key: String,
    },
    /// Print every key with its type, its default and its meaning.
    Reference {
        /// Print Markdown.
        #[arg(long)]
        markdown: bool,
    },
    /// Print the JSON schema of configs. Editors complete and check keys by it: `#:schema FILE` in
    /// the first line of a config names it.
    Schema {
        /// The file to write instead. A file that is there is replaced.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

/// Runs the command.
pub fn run(args: ConfigArgs) -> Result<()> {
    match args.action {
        Action::Explain { key } => {
            print_result(&explain::explain(&key, terminal::width()).map_err(usage)?)
        }
        Action::Reference { markdown: true } => print_result(reference::page().trim_end()),
        Action::Reference { markdown: false } => {
            print_result(&explain::reference(terminal::width()))
        }
        Action::Schema { out } => {
            let text = serde_json::to_string_pretty(&schema::for_editors())?;
            match out {
                Some(file) => Ok(fs_err::write(file, text + "\n")?),
                None => print_result(&text),
            }
        }
    }
}
