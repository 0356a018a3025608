//! `dylora init`: looks at a base and data, and writes a config that suits them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use tch::Device;

use super::doctor_facts;
use super::init_ask::Questions;
use super::init_data::{DataFiles, domains, files_table};
use super::init_plan::{Plan, PlanDomain, Schedule};
use super::open::{base_source, device_name, open_base, open_mixture};
use super::signals::quoted;
use super::start::load_data;
use super::{Shared, device, print_result, table, usage};
use crate::base::Base;
use crate::config::{self, BaseConfig, Config, DeviceChoice, Dtype, FieldNames, schema};
use crate::data::{Datasets, TokenDataset};
use crate::durable;
use crate::ffi::driver;
use crate::train::plan::{MemoryEstimate, ParameterCounts};

/// The file by which editors check the config, which lies beside it.
const SCHEMA: &str = "dylora.schema.json";
/// The lengths of blocks to choose from, besides the base's number of positions.
const SEQ_LENS: [usize; 4] = [256, 512, 1024, 2048];
/// A block is long enough if it holds this share of the documents whole.
const WHOLE: f64 = 0.95;
/// The share of the memory of a CPU's machine, and of a GPU, that a step may take.
const CPU_SHARE: f64 = 0.6;
const GPU_SHARE: f64 = 0.8;

/// Arguments of `dylora init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The base: a folder, or a Hub id, `NAME[@REVISION]`, which is fetched. A terminal is asked
    /// for it if it is missing.
    #[arg(long, value_name = "DIR")]
    base: Option<String>,
    /// The training files, or a glob, of each domain. Without NAME, a file's own name up to its
    /// first dot is the name of its domain. Files of the same name are one domain. A file
    /// `NAME.validation.*` beside `NAME.train.*` becomes its validation data. A terminal is asked
    /// for them if they are missing.
    #[arg(long, value_name = "[NAME=]FILE", num_args = 1..)]
    data: Vec<String>,
    /// The names of keys or columns in data that has none of the usual ones, as in
    /// `prompt=question,completion=answer`.
    #[arg(long, value_name = "KEY=NAME,..")]
    fields: Option<FieldNames>,
    /// The config to write.
    #[arg(long, value_name = "FILE.toml", default_value = "dylora.toml")]
    out: PathBuf,
    /// The folder of the run, which begins where a command is started [default: `runs/` and the
    /// name of the config].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<String>,
    /// The device to train on, which decides the dtype and the size of micro-batches: `auto`, `cpu`
    /// or `cuda[:N]`.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Replace the config if it exists.
    #[arg(long)]
    force: bool,
}

/// Runs the command.
pub fn run(args: &InitArgs, shared: &Shared) -> Result<()> {
    args.check_out()?;
    let device = device(args.device)?;
    let (base, data) = args.base_and_data()?;
    print_result(&format!("{}\n", files_table(&data)))?;
    let dtype = if device == Device::Cpu { Dtype::F32 } else { Dtype::Bf16 };
    let source = base_source(&base)?;
    let (tokenizer, chat_template) = (None, None);
    let base = open_base(&BaseConfig { source, tokenizer, chat_template, dtype }, shared)?;
    let (mut plan, config, data) =
        args.plan(&base, domains(&data).map_err(usage)?, dtype, shared)?;
    fit_memory(&mut plan, config, &base, device, shared)?;
    let file = std::path::absolute(&args.out)?;
    let folder = file.parent().context("a file lies in a folder")?;
    let text = plan.text(&quoted(&args.out), Some(folder));
    let schema = serde_json::to_string_pretty(&schema::for_editors())? + "\n";
    fs_err::create_dir_all(folder)?;
    durable::replace(&folder.join(SCHEMA), schema.as_bytes())?;
    durable::replace(&file, format!("#:schema ./{SCHEMA}\n{text}").as_bytes())?;
    print_result(&args.summary(&plan, &base, &data, device))
}

impl InitArgs {
    /// Checks that the config does not exist, unless it may be replaced.
    fn check_out(&self) -> Result<()> {
        let out = self.out.display();
        if self.out.is_dir() {
            return Err(usage(anyhow!("`{out}` is a folder\nhint: `--out {out}/dylora.toml`")));
        }
        match self.out.exists() && !self.force {
            true => Err(usage(anyhow!(
                "`{out}` exists already\nhint: name another file by `--out`, or replace it with \
                 `--force`"
            ))),
            false => Ok(()),
        }
    }

    /// The base and the data that are named, or those that a terminal is asked for.
    fn base_and_data(&self) -> Result<(String, Vec<DataFiles>)> {
        let mut questions = Questions::open()?;
        let base = match (&self.base, &mut questions) {
            (Some(base), _) => base.clone(),
            (None, Some(questions)) => questions.base()?,
            (None, None) => {
                return Err(usage(anyhow!("name the base by `--base DIR` or `--base OWNER/NAME`")));
            }
        };
        let fields = self.fields.clone().unwrap_or_default();
        let data = match &mut questions {
            _ if !self.data.is_empty() => self
                .data
                .iter()
                .map(|argument| DataFiles::open(argument, &fields))
                .collect::<Result<_>>()?,
            Some(questions) => questions.data(&fields)?,
            None => {
                return Err(usage(anyhow!(
                    "name the data by `--data [NAME=]FILE..`, one file for each domain"
                )));
            }
        };
        Ok((base, data))
    }

    fn run_dir(&self) -> String {
        let stem = self.out.file_stem().unwrap_or_default().display();
        self.run_dir.clone().unwrap_or_else(|| format!("runs/{stem}"))
    }

    /// The plan for `domains`, with the config that it makes and the data, which is tokenized for
    /// it.
    fn plan(
        &self,
        base: &Base,
        domains: Vec<PlanDomain>,
        dtype: Dtype,
        shared: &Shared,
    ) -> Result<(Plan, Config, Datasets)> {
        let mut plan = Plan {
            base: base.source.clone(),
            parameters: base.spec.num_parameters(),
            dtype,
            seq_len: 0,
            whole_share: 1.0,
            domains,
            run_dir: self.run_dir(),
            schedule: Schedule::new(1),
            gradient_checkpointing: false,
        };
        let longest = base.spec.max_positions as usize;
        let mut seq_lens: Vec<usize> =
            SEQ_LENS.into_iter().filter(|length| *length < longest).collect();
        if longest <= *SEQ_LENS.last().expect("there are some") || seq_lens.is_empty() {
            seq_lens.push(longest);
        }
        let mut found = None;
        for seq_len in seq_lens {
            plan.seq_len = seq_len;
            let config = resolve(&plan)?;
            // tokens are cached, so that another length only packs them anew
            let data = load_data(&config, base, shared)?;
            plan.whole_share = whole_share(&data.train);
            found = Some((config, data));
            if plan.whole_share >= WHOLE {
                break;
            }
        }
        let (_, data) = found.expect("there is at least one length");
        let blocks = data.train.num_blocks() as u64;
        if blocks == 0 {
            bail!("there is nothing to train on: the data holds no label token");
        }
        plan.schedule = Schedule::new(blocks);
        let config = resolve(&plan)?;
        Ok((plan, config, data))
    }

    /// What was found and written, and what to do next.
    fn summary(&self, plan: &Plan, base: &Base, data: &Datasets, device: Device) -> String {
        let rows = data.train.domains.iter().zip(&data.validation.domains).map(|(train, held)| {
            let counts = [
                train.counts.documents,
                held.counts.documents,
                train.counts.tokens / train.counts.documents.max(1),
                train.counts.blocks,
                train.counts.split_documents,
            ];
            std::iter::once(train.name.clone()).chain(counts.map(table::count)).collect()
        });
        let header = ["domain", "to train", "to validate", "mean tokens", "blocks", "split"];
        let documents = table::table(&header, rows.collect());
        let what = match plan.domains.len() {
            1 => "a single LoRA, since one domain needs no router".to_owned(),
            count => format!("a mixture of {count} experts"),
        };
        let (file, run_dir) = (quoted(&self.out), quoted(Path::new(&plan.run_dir)));
        let Schedule { steps, micro_batch_size, grad_accum_steps, .. } = plan.schedule;
        format!(
            "{documents}\n\n\
             wrote {file}, and {SCHEMA} for editors: {what},\n\
             on `{}` ({} parameters),\n\
             {} steps of {} blocks of {} tokens on {}\n\n\
             Next:\n  \
               dylora data preview --config {file}\n  \
               dylora train --config {file} --dry-run\n  \
               dylora train --config {file}\n  \
               dylora eval --checkpoint {run_dir}\n  \
               dylora report {run_dir}",
            base.label,
            table::count(plan.parameters.unsigned_abs()),
            table::count(steps),
            micro_batch_size * grad_accum_steps,
            plan.seq_len,
            device_name(device),
        )
    }
}

/// The config that a plan makes.
fn resolve(plan: &Plan) -> Result<Config> {
    config::load::resolve(&plan.text("dylora.toml", None), &[])
}

/// The share of the documents that no block splits.
fn whole_share(dataset: &TokenDataset) -> f64 {
    let sum = |of: fn(&crate::data::Domain) -> u64| dataset.domains.iter().map(of).sum::<u64>();
    let documents = sum(|domain| domain.counts.documents).max(1);
    1.0 - sum(|domain| domain.counts.split_documents) as f64 / documents as f64
}

/// Makes micro-batches smaller until a step fits into the memory, and turns checkpointing on if one
/// block does not fit.
fn fit_memory(
    plan: &mut Plan,
    mut config: Config,
    base: &Base,
    device: Device,
    shared: &Shared,
) -> Result<()> {
    let specs = open_mixture(&config, base, shared)?.specs;
    let counts = ParameterCounts::new(&config, &specs, &base.spec);
    let most = memory_bytes(device)?;
    let mut fits = |plan: &Plan| {
        config.train.micro_batch_size = plan.schedule.micro_batch_size;
        config.train.gradient_checkpointing = plan.gradient_checkpointing;
        let memory = MemoryEstimate::new(&config, &specs, &base.spec, &counts, device);
        memory.total() as f64 <= most
    };
    while !fits(plan) {
        match plan.schedule.halved() {
            Some(halved) => plan.schedule = halved,
            None if !plan.gradient_checkpointing => plan.gradient_checkpointing = true,
            None => {
                tracing::warn!(
                    "the base may be too large for this machine, even with one block in a forward \
                     pass; `dylora train --dry-run` estimates the memory"
                );
                break;
            }
        }
    }
    Ok(())
}

/// The memory that a step may take on a device.
fn memory_bytes(device: Device) -> Result<f64> {
    let Device::Cuda(index) = device else {
        return Ok(CPU_SHARE * doctor_facts::memory()?.available_bytes as f64);
    };
    let driver = driver::driver()?.context("a CUDA device has a driver")?;
    let gpu = driver.gpus.get(index).with_context(|| format!("there is no `cuda:{index}`"))?;
    Ok(GPU_SHARE * gpu.memory_bytes as f64)
}
