//! `dylora push`: uploads an export or a merged model to the Hugging Face Hub.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::progress::DownloadBar;
use super::results::Schema;
use super::{Shared, hub_settings, print_result, table, usage};
use crate::durable::output;
use crate::hub::push::{self, PushFile, Pushed};

/// Arguments of `dylora push`.
#[derive(Debug, Args)]
pub struct PushArgs {
    /// The repository on the Hub. It is created if it does not exist.
    #[arg(value_name = "OWNER/NAME")]
    repo: String,
    /// The folder to upload: an export, a merged model or a `model/` that dylora wrote.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Upload the files. Without this option, the command only says what it would upload.
    #[arg(long)]
    yes: bool,
    /// Make a new repository private. One that exists stays as it is.
    #[arg(long)]
    private: bool,
    /// The message of the commit.
    #[arg(long, default_value = "Upload by dylora")]
    message: String,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &PushArgs, shared: &Shared) -> Result<()> {
    push::check_name(&args.repo).map_err(usage)?;
    let files = files_of(&args.from)?;
    check_names_of_bases(&files)?;
    if !args.yes {
        return print_result(&dry_text(args, &files));
    }
    let (settings, bar) = (hub_settings(), DownloadBar::new(shared.show_progress));
    let pushed = push::push(&args.repo, &files, args.private, &args.message, &settings, &bar)?;
    print_result(&done_text(args, &pushed))
}

/// The files that dylora wrote to a folder. Others stay where they are, and a warning names them.
fn files_of(dir: &Path) -> Result<Vec<PushFile>> {
    let (ours, others) = output::written_files(dir)?;
    for other in others {
        tracing::warn!("`{other}` is not uploaded, because dylora did not write it");
    }
    ours.into_iter()
        .map(|path| {
            let file = dir.join(&path);
            let bytes = fs_err::metadata(&file)?.len();
            Ok(PushFile { path, file, bytes })
        })
        .collect()
}

/// Refuses adapters that name their base by a folder, which nobody else has.
fn check_names_of_bases(files: &[PushFile]) -> Result<()> {
    for file in files.iter().filter(|file| file.path.ends_with("adapter_config.json")) {
        let json: Value = serde_json::from_str(&fs_err::read_to_string(&file.file)?)?;
        let key = "base_model_name_or_path";
        let Some(name) = json[key].as_str().filter(|name| Path::new(name).is_absolute()) else {
            continue;
        };
        bail!(
            "`{key}` in `{}` is the folder `{name}` of this machine\nhint: write the name of the \
             base's repository there, such as `HuggingFaceTB/SmolLM2-135M-Instruct`",
            file.file.display()
        );
    }
    Ok(())
}

fn dry_text(args: &PushArgs, files: &[PushFile]) -> String {
    let endpoint = hub_settings().shown_endpoint();
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    if args.json {
        let files: Vec<_> =
            files.iter().map(|f| json!({ "file": f.path, "bytes": f.bytes })).collect();
        let json = json!({
            "repo": args.repo, "endpoint": endpoint, "private": args.private, "uploaded": false,
            "bytes": total, "files": files,
        });
        return Schema::Push.text(json);
    }
    let rows = files.iter().map(|file| vec![file.path.clone(), table::count(file.bytes)]);
    let kind = if args.private { "private" } else { "public" };
    format!(
        "{}\n{} files, {} bytes, would go to `{}` on `{endpoint}`, {kind} if it is new; what it \
         has already is skipped\nnothing was uploaded: add `--yes` to upload them",
        table::table(&["file", "bytes"], rows.collect()),
        files.len(),
        table::count(total),
        args.repo,
    )
}

fn done_text(args: &PushArgs, pushed: &Pushed) -> String {
    let Pushed { is_new, sent, unchanged, commit } = pushed;
    if args.json {
        let json = json!({
            "repo": args.repo, "uploaded": true, "created": is_new, "sent": sent,
            "unchanged": unchanged, "commit": commit,
        });
        return Schema::Push.text(json);
    }
    let created = if *is_new { "created the repository\n" } else { "" };
    match commit {
        None => format!("{created}`{}` has all {} files already", args.repo, unchanged.len()),
        Some(commit) => format!(
            "{created}sent {} files, {} were there already\n{commit}",
            sent.len(),
            unchanged.len()
        ),
    }
}
