//! `dylora study`: trains the arms of a study, each run in a process of its own, and compares them.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;

use super::inputs::check_inputs;
use super::open::open_base;
use super::progress::StudyBar;
use super::results::Schema;
use super::signals::Interrupt;
use super::start::{check_base, load_halved_data};
use super::study_pool::{Ended, Pool};
use super::study_text;
use super::{Shared, device, print_result, table, usage};
use crate::base::Base;
use crate::config::{self, DeviceChoice};
use crate::data::HalvedDatasets;
use crate::durable;
use crate::durable::lock::FolderLock;
use crate::study::arms::{self, Arm, check_arms, on_one_domain};
use crate::study::plan::{DomainFacts, Facts, Plan, Results, Settings, secs_left};
use crate::study::report::{Failure, StudyReport};
use crate::study::run::RunSpec;
use crate::train::plan::num_steps;

/// The file with what a study found.
const REPORT: &str = "study.json";
/// The file to which the result of each run is appended.
const RUNS: &str = "runs.jsonl";
/// Time between two looks at the processes.
const POLL: Duration = Duration::from_millis(100);

/// The factors of the learning rate that are tried by default.
const RATES: [f64; 3] = [0.5, 1.0, 2.0];

/// The smallest and the largest factor.
const RATE_RANGE: [f64; 2] = [1e-6, 1e6];

/// Arguments of `dylora study`.
#[derive(Debug, Args)]
pub struct StudyArgs {
    /// The TOML file of the mixture's config.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The arms to compare, separated by commas.
    #[arg(long, value_name = "ARM,..", value_delimiter = ',', default_values_t = Arm::DEFAULT)]
    arms: Vec<Arm>,
    /// Number of seeds, from `run.seed` on. One seed shows no difference between arms.
    #[arg(long, value_name = "N", default_value_t = 5)]
    seeds: u64,
    /// Factors of `optimizer.adapters.learning_rate` (for the arm `full`, of
    /// `optimizer.base.learning_rate`) that each arm tries with the first seed.
    #[arg(long, value_name = "FACTOR,..", value_delimiter = ',', default_values_t = RATES)]
    rates: Vec<f64>,
    /// Number of runs at a time.
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// The study's folder. A study that is there goes on: finished runs are not made again
    /// [default: `study` in the folder `run.dir`].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Override a key of the config, for example `lora.rank=16`. The option can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The device to train on: `auto`, `cpu` or `cuda[:N]`. It overrides `run.device`.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Keep the checkpoints of all runs.
    #[arg(long)]
    keep: bool,
    /// Print the arms, the number of runs and the halves of the validation data, but do not train.
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: StudyArgs, shared: &Shared) -> Result<()> {
    let (json, is_dry, jobs) = (args.json, args.dry_run, args.jobs);
    if jobs == 0 {
        return Err(usage(anyhow!("`--jobs` must be at least 1, got 0")));
    }
    let settings = settings(args).map_err(usage)?;
    device(settings.config.run.device)?;
    let base = open_base(&settings.config.base, shared)?;
    for &arm in &settings.arms {
        let check = check_base(&arm.config(&settings.config), &base);
        check.with_context(|| format!("in the arm `{arm}`")).map_err(usage)?;
    }
    let halves = load_halved_data(&settings.config, &base, settings.config.run.seed, shared)?;
    let facts = facts(&settings, &base, &halves, shared)?;
    let plan = Plan { settings, facts };
    if is_dry {
        return print_result(&study_text::plan(&plan, &base, &halves, json)?);
    }
    drop((base, halves));
    fs_err::create_dir_all(&plan.settings.dir)?;
    let _lock = FolderLock::take(&plan.settings.dir)?;
    let size = plan.size();
    tracing::info!(
        "{} run(s) with {} steps in all, {jobs} at a time",
        table::count(size.runs),
        table::count(size.steps),
    );
    let report = Progress::new(&plan, jobs, shared)?.run()?;
    let text = serde_json::to_string_pretty(&report)? + "\n";
    durable::replace(&plan.settings.dir.join(REPORT), text.as_bytes())?;
    let printed = match json {
        true => Schema::Study.text(serde_json::to_value(&report)?),
        false => study_text::report(&report),
    };
    conclude(&report).and(print_result(&printed))
}

/// The error of a study with runs that failed.
fn conclude(report: &StudyReport) -> Result<()> {
    if report.failed.is_empty() {
        return Ok(());
    }
    let runs: Vec<String> = report.failed.iter().map(|failure| failure.run.clone()).collect();
    let count = runs.len();
    bail!(
        "{count} run(s) failed: {}\nhint: run the same command again to make them again",
        runs.join("; ")
    )
}

/// The settings of the study, all of which are checked as far as no base and data are needed.
fn settings(args: StudyArgs) -> Result<Settings> {
    let StudyArgs { mut arms, seeds: num_seeds, mut rates, keep, .. } = args;
    let mut config = config::load::load(&args.config, &args.set)?;
    check_inputs(&config, Some(&args.config))?;
    config.run.device = args.device.unwrap_or(config.run.device);
    arms::check(&config)?;
    arms.sort_unstable();
    arms.dedup();
    check_arms(&config, &arms)?;
    if num_seeds == 0 {
        bail!("`--seeds` must be at least 1, got 0");
    }
    let [least, most] = RATE_RANGE;
    if let Some(rate) = rates.iter().find(|rate| !(least..=most).contains(*rate)) {
        bail!("`--rates` must be numbers from {least} to {most}, got {rate:?}");
    }
    rates.sort_unstable_by(f64::total_cmp);
    rates.dedup();
    let dir = args.out.unwrap_or_else(|| config.run.dir.join("study"));
    Ok(Settings { config, arms, rates, num_seeds, dir: std::path::absolute(dir)?, keep })
}

/// What the plan must know of the data and the base.
fn facts(
    settings: &Settings,
    base: &Base,
    halves: &HalvedDatasets,
    shared: &Shared,
) -> Result<Facts> {
    let config = &settings.config;
    let steps = num_steps(config, &halves.train)?;
    let splits = settings.arms.iter().find(|arm| arm.splits_domains());
    let of_domain = |(domain, share): (usize, f64)| -> Result<DomainFacts> {
        let alone = |arm: &Arm| -> Result<String> {
            let mut alone = arm.config(config);
            on_one_domain(&mut alone, domain, steps, share);
            let halves = load_halved_data(&alone, base, config.run.seed, shared)?;
            Ok(halves.fingerprint())
        };
        Ok(DomainFacts { share, data: splits.map(alone).transpose()? })
    };
    let domains = halves.train.mix().into_iter().enumerate().map(of_domain);
    Ok(Facts {
        steps,
        data: halves.fingerprint(),
        domains: domains.collect::<Result<_>>()?,
        base: base.files_hash()?,
    })
}

/// A study while it runs.
struct Progress<'a> {
    plan: &'a Plan,
    jobs: usize,
    pool: Pool,
    bar: StudyBar,
    results: Results,
    failed: BTreeMap<String, Failure>,
    /// The steps and seconds of each run that was made.
    made: Vec<(u64, f64)>,
    /// Number of steps of all runs that are over.
    steps_done: u64,
}

impl<'a> Progress<'a> {
    fn new(plan: &'a Plan, jobs: usize, shared: &Shared) -> Result<Self> {
        Ok(Self {
            plan,
            jobs,
            pool: Pool::new(jobs)?,
            bar: StudyBar::new(shared.show_progress, plan.size().steps),
            results: Results::new(),
            failed: BTreeMap::new(),
            made: vec![],
            steps_done: 0,
        })
    }

    /// Makes all runs that are not over yet.
    fn run(mut self) -> Result<StudyReport> {
        let interrupt = Interrupt::listen()?;
        let mut is_stopping = false;
        self.take_finished();
        loop {
            if interrupt.is_set() && !is_stopping {
                is_stopping = true;
                self.pool.stop();
            }
            if !is_stopping {
                self.start_runs()?;
            }
            if self.pool.running().next().is_none() {
                break;
            }
            self.draw();
            sleep(POLL);
            for ended in self.pool.ended()? {
                self.note(ended, is_stopping)?;
            }
        }
        self.bar.finish();
        if is_stopping {
            let hint = "run the same command again to go on";
            return Err(interrupt.error_with(hint.into()).into());
        }
        let failed = self.failed.into_values().collect();
        Ok(StudyReport::new(self.plan, &self.results, failed))
    }

    /// Takes the results of runs that were made before.
    fn take_finished(&mut self) {
        loop {
            let ready = self.plan.ready(&self.results);
            let finished = ready.iter().filter_map(|run| Some((run, run.result()?)));
            let finished: Vec<_> = finished.collect();
            if finished.is_empty() {
                break;
            }
            for (run, result) in finished {
                self.steps_done += self.plan.steps(run);
                self.results.insert(run.id.name(), result);
            }
        }
        if !self.results.is_empty() {
            let count = table::count(self.results.len() as u64);
            self.bar.line(format!("{count} run(s) are there already and are not made again"));
        }
        self.bar.begin(self.steps_done);
    }

    /// The next run that is to be started.
    fn next(&self) -> Option<RunSpec> {
        let is_running = |name: &str| self.pool.running().any(|run| run.id.name() == name);
        self.plan.ready(&self.results).into_iter().find(|run| {
            let name = run.id.name();
            !self.failed.contains_key(&name) && !is_running(&name)
        })
    }

    fn start_runs(&mut self) -> Result<()> {
        while self.pool.has_room()
            && let Some(run) = self.next()
        {
            self.pool.start(run)?;
        }
        Ok(())
    }

    /// Notes a run whose process has ended.
    fn note(&mut self, ended: Ended, is_stopping: bool) -> Result<()> {
        let Ended { spec, secs, steps_before, error } = ended;
        let label = spec.id.label(&spec.config);
        let Some(result) = spec.result() else {
            if !is_stopping {
                let error = error.unwrap_or_else(|| "its process wrote no result".into());
                self.bar.error(&format!("{label} failed: {error}"));
                self.failed.insert(spec.id.name(), Failure { run: label, error });
            }
            return Ok(());
        };
        append(&self.plan.settings.dir.join(RUNS), &serde_json::to_string(&result)?)?;
        let steps = self.plan.steps(&spec);
        self.bar.line(study_text::result(&label, &result));
        self.results.insert(spec.id.name(), result);
        self.steps_done += steps;
        self.made.push((steps.saturating_sub(steps_before), secs));
        let left = self.plan.size().steps.saturating_sub(self.steps_done);
        if self.made.len() == 1 && left > 0 {
            let secs = secs_left(&self.made, left, self.jobs as u64).unwrap_or_default();
            self.bar.line(format!("the rest will take about {}", study_text::duration(secs)));
        }
        Ok(())
    }

    fn draw(&self) {
        let (made, all) = (self.results.len(), self.plan.size().runs);
        let names = self.pool.running().map(|run| run.id.name()).collect::<Vec<_>>();
        let message = format!("{made} of {all} runs; {}", names.join(", "));
        self.bar.update(self.steps_done + self.pool.steps(), message);
    }
}

/// Appends a line to a file.
fn append(file: &Path, line: &str) -> Result<()> {
    let mut file = fs_err::OpenOptions::new().create(true).append(true).open(file)?;
    Ok(file.write_all(format!("{line}\n").as_bytes())?)
}
