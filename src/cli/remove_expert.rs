//! `dylora remove-expert` and `dylora merge-experts`: they make a mixture with one expert less and
//! report what that costs in loss.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use super::eval::validate;
use super::open::{device_name, open_base};
use super::results::Schema;
use super::start::load_data;
use super::{Shared, device, print_result, table, usage};
use crate::checkpoint::{self, Preferred};
use crate::config::DeviceChoice;
use crate::lifecycle::shrink::{Change, ShrinkingMixture, without_use};
use crate::train::check_new_run;

/// The arguments of both commands.
#[derive(Debug, Args)]
pub struct ShrinkArgs {
    /// A checkpoint's folder (`RUN/checkpoints/step-*`) or a run's folder. For a run, the best
    /// checkpoint is used, or the last one if there is no best.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// The folder of the new run, which begins with a checkpoint of step 0.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The device to compute on: `auto`, `cpu` or `cuda[:N]`. It overrides `run.device`.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `dylora remove-expert`.
#[derive(Debug, Args)]
pub struct RemoveExpertArgs {
    /// The number of the expert to remove, counted from 0.
    #[arg(long, value_name = "N")]
    expert: usize,
    #[command(flatten)]
    shrink: ShrinkArgs,
}

/// Arguments of `dylora merge-experts`.
#[derive(Debug, Args)]
pub struct MergeExpertsArgs {
    /// The numbers of the two experts to merge, as `0,2` [default: the two with the most similar
    /// updates].
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    experts: Option<Vec<usize>>,
    #[command(flatten)]
    shrink: ShrinkArgs,
}

/// Runs `remove-expert`.
pub fn remove(args: RemoveExpertArgs, shared: &Shared) -> Result<()> {
    shrink(&args.shrink, &Change::Remove(args.expert), shared)
}

/// Runs `merge-experts`.
pub fn merge(args: MergeExpertsArgs, shared: &Shared) -> Result<()> {
    let pair = match args.experts.as_deref() {
        None => None,
        Some(&[a, b]) if a != b => Some((a.min(b), a.max(b))),
        Some(found) => {
            return Err(usage(anyhow!("`--experts` must name two experts, got {found:?}")));
        }
    };
    shrink(&args.shrink, &Change::Merge(pair), shared)
}

fn shrink(args: &ShrinkArgs, change: &Change, shared: &Shared) -> Result<()> {
    let dir = checkpoint::find(&args.checkpoint, Preferred::Best)?;
    let run_dir = std::path::absolute(&args.out)?;
    check_new_run(&run_dir)?;
    let shrinking = ShrinkingMixture::new(&dir, change).map_err(usage)?;
    let config = shrinking.config().clone();
    let device = device(args.device.unwrap_or(config.run.device))?;
    let base = open_base(&config.base, shared)?;
    let weights = shrinking.weights(&base)?;
    let data = load_data(&config, &base, shared)?;

    let model = shrinking.model(&weights, device)?;
    let before = validate(&model, &data.validation, &config, shared)?;
    let shrunk = shrinking.change(change, &model, before.as_ref(), run_dir).map_err(usage)?;
    drop(model);
    let smaller = shrunk.model(&weights, device)?;
    let after = validate(&smaller, &data.validation, shrunk.config(), shared)?;
    drop(smaller);
    if let (Some(merged), Some(after)) = (shrunk.merged(), &after) {
        let without = |expert| {
            let model = shrinking.without(expert, &weights, device)?;
            let report = validate(&model, &data.validation, shrunk.config(), shared)?;
            report.map(|report| report.loss).context("there is validation data")
        };
        let without = [without(merged[0])?, without(merged[1])?];
        if let Some(message) = without_use(merged, after.loss, without) {
            bail!("{message}");
        }
    }

    let (name, message) = (shrunk.name().to_owned(), shrunk.message().to_owned());
    let trainer = shrinking.stage(shrunk, &base, data, device, before.as_ref(), after.as_ref())?;
    let written = trainer.save()?;
    if args.json {
        let json = json!({
            "change": name,
            "message": message,
            "before": before,
            "after": after,
            "checkpoint": written,
            "device": device_name(device),
        });
        print_result(&Schema::Shrink.text(json))?;
        return Ok(());
    }
    print_result(&message)?;
    if let (Some(before), Some(after)) = (&before, &after) {
        let names = ["before".to_owned(), "after".to_owned()];
        print_result(&table::rules(&names, before, after))?;
    }
    print_result(&format!("checkpoint: {}", written.display()))?;
    Ok(())
}
