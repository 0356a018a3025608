//! `dylora report`: one HTML page about runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::eval::DataArgs;
use super::eval_answers::route;
use super::open::{ModelArgs, OpenModel};
use super::progress::CountBar;
use super::{Shared, describe, print_result, usage};
use crate::checkpoint;
use crate::config::{DeviceChoice, Method};
use crate::data::TokenDataset;
use crate::durable::output::Output;
use crate::eval::experts::expert_reports;
use crate::generate::GenerationDefaults;
use crate::generate::answers::Question;
use crate::report::page::page;
use crate::report::run::read_all;
use crate::report::samples::samples;
use crate::report::{Moved, Reported, Run, Sample};

/// Number of samples of each run, unless `--samples` says another.
const NUM_SAMPLES: usize = 4;
/// Most tokens of a document's beginning that is given where the document has no prompt.
const BEGINNING: u32 = 24;

/// Arguments of `dylora report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The folders of runs, whose curves are drawn into the same charts. The folder of a study that
    /// is over shows its verdict. A run may still be in progress.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The HTML file to write.
    #[arg(long, value_name = "FILE.html", default_value = "report.html")]
    out: PathBuf,
    /// Replace the file of `--out` if it exists.
    #[arg(long)]
    overwrite: bool,
    /// Number of documents of each run's validation data that the base and the model answer. With
    /// 0, no model is opened and only the files of the runs are read [default: 4 where a checkpoint
    /// and its base can be opened].
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// The base of the runs, a folder or a Hub id, where it is not the one that their configs name.
    #[arg(long, value_name = "DIR")]
    base: Option<String>,
    /// The device that answers: `auto`, `cpu` or `cuda[:N]` [default: that of each run's config].
    #[arg(long)]
    device: Option<DeviceChoice>,
}

/// Runs the command.
pub fn run(args: ReportArgs, shared: &Shared) -> Result<()> {
    write(&args, shared)?;
    print_result(&format!("wrote `{}`", args.out.display()))
}

/// Writes the page.
pub fn write(args: &ReportArgs, shared: &Shared) -> Result<()> {
    let early = Output {
        path: args.out.clone(),
        overwrite: args.overwrite,
        inputs: vec![],
        working_folder: std::env::current_dir()?,
    };
    // checked first, because samples take time
    early.check_file()?;
    let runs = read_all(&args.runs).map_err(usage)?;
    let output = Output { inputs: inputs(&runs), ..early };
    output.check_file()?;
    let mut reported = vec![];
    for run in runs {
        let (moved, samples) = match args.open(&run, shared) {
            Ok(open) => (Some(moved(&open)?), args.samples(&open, shared)),
            Err(error) => (None, Err(error)),
        };
        let samples = samples.map_err(|error| describe(&error).replace('\n', "; "));
        if let (Err(reason), true) = (&samples, run.has_metrics() && args.num_samples() > 0) {
            tracing::warn!("there are no samples of `{}`: {reason}", run.name);
        }
        reported.push(Reported { run, moved, samples });
    }
    let html = page(&reported);
    let write = |file: &Path| Ok(fs_err::write(file, &html)?);
    output.write_file(write).with_context(|| format!("cannot write `{}`", output.path.display()))
}

/// The files that a report reads, which it never replaces.
fn inputs(runs: &[Run]) -> Vec<PathBuf> {
    let of_run = |run: &Run| -> Vec<PathBuf> {
        let files = run.files.iter().map(|file| run.dir.join(&file.name));
        files.chain([checkpoint::folder(&run.dir)]).collect()
    };
    runs.iter().flat_map(of_run).collect()
}

/// How far the experts of a model have moved.
fn moved(open: &OpenModel) -> Result<Vec<Moved>> {
    Ok(expert_reports(&open.model)?.iter().map(Moved::from).collect())
}

impl ReportArgs {
    /// The arguments for a page at `out` about `runs`, which `device` answers for.
    pub fn of_runs(runs: Vec<PathBuf>, out: PathBuf, device: DeviceChoice) -> Self {
        let device = Some(device);
        Self { runs, out, overwrite: false, samples: None, base: None, device }
    }

    fn num_samples(&self) -> usize {
        self.samples.unwrap_or(NUM_SAMPLES)
    }

    /// Opens the model of a run.
    ///
    /// # Errors
    /// The reason why there is none to ask, in words for the page.
    fn open(&self, run: &Run, shared: &Shared) -> Result<OpenModel> {
        if self.num_samples() == 0 {
            bail!("none were asked for (`--samples 0`)");
        }
        let dir = match &run.checkpoint {
            Ok(facts) => facts.dir.clone(),
            Err(reason) => bail!("{reason}"),
        };
        if let Some((config, _)) = &run.config
            && config.method == Method::Full
        {
            bail!("the run trained the base itself, and the base before it is not opened");
        }
        let model = ModelArgs {
            checkpoint: Some(dir),
            base: self.base.clone(),
            device: self.device,
            ..ModelArgs::default()
        };
        model.open(shared)
    }

    /// The answers of a model and its base.
    fn samples(&self, open: &OpenModel, shared: &Shared) -> Result<Vec<Sample>> {
        let dataset = DataArgs::default().load(open, shared)?;
        let questions = questions(open, &dataset, self.num_samples())?;
        let bar = CountBar::new(shared.show_progress, "answering", 2 * questions.len() as u64);
        let end = GenerationDefaults::of_chats(&open.base)?.end_tokens.into();
        let tokenizer = open.base.tokenizer()?;
        let samples = samples(&open.model, tokenizer, questions, &end, &|done| bar.set(done))?;
        bar.finish();
        Ok(samples)
    }
}

/// The first documents of each domain, as evenly as `count` allows.
fn questions(open: &OpenModel, dataset: &TokenDataset, count: usize) -> Result<Vec<Question>> {
    let num_domains = dataset.domains.len();
    let routing = open.routing(None)?;
    let mut questions = vec![];
    for (index, domain) in dataset.domains.iter().enumerate() {
        let own = count / num_domains + usize::from(index < count % num_domains);
        for document in dataset.begun(index, own, BEGINNING) {
            let route = route(open, routing, &domain.name, &document)?;
            questions.push(Question { domain: domain.name.clone(), document, route });
        }
    }
    Ok(questions)
}
