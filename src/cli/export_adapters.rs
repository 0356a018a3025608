//! `dylora export-adapters`: writes each expert as a PEFT adapter, with the router beside them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::open::ModelArgs;
use super::{Shared, table};
use crate::export::{
    self,
    peft::{self, Layout},
};

/// Arguments of `dylora export-adapters`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The folder to create.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How the experts are joined: by `dylora.json` and the router (`dylora`), or as an X-LoRA
    /// folder (`xlora`), which needs a router that reads the base's last hidden state.
    #[arg(long, default_value = "dylora")]
    format: Layout,
    /// Replace the folder if it exists. It must be one that dylora wrote, with nothing else in it.
    #[arg(long)]
    overwrite: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: ExportArgs, shared: &Shared) -> Result<()> {
    // the output is checked before anything is read
    let early = args.model.output(&args.out, args.overwrite)?;
    early.check_folder(export::is_unmarked_output)?;
    let open = args.model.open(shared)?;
    peft::export(&open.output(early), &open.model, &open.provenance()?, args.format)?;
    let files = files(&args.out)?;
    if args.json {
        let files: Vec<_> = files.iter().map(|(f, n)| json!({ "file": f, "bytes": n })).collect();
        let json = json!({ "out": args.out, "experts": open.model.num_experts(), "files": files });
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    let rows = files.iter().map(|(file, bytes)| vec![file.clone(), table::count(*bytes)]);
    println!("{}", table::table(&["file", "bytes"], rows.collect()));
    println!("each file was read back and compared; wrote `{}`", args.out.display());
    Ok(())
}

/// The files below a folder, sorted, with their sizes in bytes.
pub fn files(dir: &Path) -> Result<Vec<(String, u64)>> {
    let mut files = vec![];
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).expect("the walk began at `dir`");
                files.push((name.display().to_string(), fs_err::metadata(&path)?.len()));
            }
        }
    }
    files.sort();
    Ok(files)
}
