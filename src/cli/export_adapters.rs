//! `dylora export-adapters`: writes each expert as a PEFT adapter, with the router beside them, or
//! as a LoRA adapter for llama.cpp.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::open::ModelArgs;
use super::results::Schema;
use super::{Shared, print_result, table, usage};
use crate::config::SaveDtype;
use crate::export::{
    self, gguf,
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
    /// What is written: PEFT adapters, joined by `dylora.json` and the router (`dylora`) or as an
    /// X-LoRA folder (`xlora`), which needs a router that reads the base's last hidden state; or
    /// each expert alone as a LoRA adapter for llama.cpp (`gguf`), which has no routing.
    #[arg(long, default_value = "dylora")]
    format: ExportFormat,
    /// The dtype of GGUF adapters [default: `f32`]. PEFT adapters are always in `f32`.
    #[arg(long, value_name = "DTYPE")]
    save_dtype: Option<SaveDtype>,
    /// Replace the folder if it exists. It must be one that dylora wrote, with nothing else in it.
    #[arg(long)]
    overwrite: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// The value of `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExportFormat {
    /// PEFT adapters, `dylora.json` and `router.safetensors`.
    Dylora,
    /// PEFT adapters, `xlora_config.json` and `xlora_classifier.safetensors`.
    Xlora,
    /// A LoRA adapter of GGUF for each expert.
    Gguf,
}

/// Runs the command.
pub fn run(args: ExportArgs, shared: &Shared) -> Result<()> {
    if args.save_dtype.is_some() && args.format != ExportFormat::Gguf {
        return Err(usage(anyhow!(
            "`--save-dtype` is for `--format gguf`: PEFT adapters are always f32"
        )));
    }
    // the output is checked before anything is read
    let early = args.model.output(&args.out, args.overwrite)?;
    early.check_folder(export::is_unmarked_output)?;
    let open = args.model.open(shared)?;
    let (out, provenance) = (open.output(early), open.provenance()?);
    match args.format {
        ExportFormat::Dylora => {
            peft::export(&out, &open.model, &provenance, Layout::Dylora)?;
        }
        ExportFormat::Xlora => peft::export(&out, &open.model, &provenance, Layout::Xlora)?,
        ExportFormat::Gguf => {
            let dtype = args.save_dtype.unwrap_or(SaveDtype::F32);
            gguf::export_experts(&out, &open.model, &provenance, dtype)?;
            for note in gguf::notes(&open.model) {
                tracing::warn!("{note}");
            }
        }
    }
    let files = files(&args.out)?;
    if args.json {
        let files: Vec<_> = files.iter().map(|(f, n)| json!({ "file": f, "bytes": n })).collect();
        let json = json!({ "out": args.out, "experts": open.model.num_experts(), "files": files });
        return print_result(&Schema::ExportAdapters.text(json));
    }
    let rows = files.iter().map(|(file, bytes)| vec![file.clone(), table::count(*bytes)]);
    let table = table::table(&["file", "bytes"], rows.collect());
    let wrote = format!("each file was read back and compared; wrote `{}`", args.out.display());
    print_result(&format!("{table}\n{wrote}"))
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
