//! Writes the two pages of the reference that are generated from the code:
//!
//! | file | made from |
//! |---|---|
//! | `docs/reference/config.md` | the types of `dylora::config`, by their JSON schema |
//! | `docs/reference/commands.md` | the arguments of `dylora::cli::Cli`, as clap describes them |
//!
//! `cargo run --example docs_reference` writes both; `tests/docs.rs` fails if they are out of date.

mod commands;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use dylora::config::reference;

/// Writes the generated pages of the reference.
#[derive(Debug, Parser)]
struct Args {
    /// The folder of the pages.
    #[arg(long, default_value = "docs/reference")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    fs_err::create_dir_all(&args.out)?;
    for (name, text) in [("config.md", reference::page()), ("commands.md", commands::page())] {
        let path = args.out.join(name);
        fs_err::write(&path, text)?;
        println!("wrote {}", path.display());
    }
    Ok(())
}
