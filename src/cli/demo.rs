//! `dylora demo`: the whole way of a mixture on files that the binary holds, from training to the
//! report.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use super::demo_files::{self, BASE, CONFIG};
use super::demo_results::Results;
use super::eval::{self, DataArgs};
use super::open::ModelArgs;
use super::report::{self, ReportArgs};
use super::results::Schema;
use super::signals::{Interrupt, quoted};
use super::start::{ReadyRun, load_data};
use super::train::{self, Trained};
use super::{Shared, print_result, usage};
use crate::config::{self, Config, DeviceChoice, Validation};
use crate::durable;
use crate::eval::EvalReport;
use crate::export::peft::{self, Layout};
use crate::train::Ending;

/// What the demo writes beside its files: the runs of the mixture and of the single LoRA, the
/// exported experts, the report, and what `--json` prints.
const MIXTURE: &str = "mixture";
const SINGLE: &str = "single";
const EXPERTS: &str = "experts";
const REPORT: &str = "report.html";
const RESULTS: &str = "results.json";
/// The single LoRA has the mixture's rank, 16 + 4 * 4, and the rate that is best for it among 2e-3,
/// 3e-3, 5e-3, 7e-3 and 1e-2.
const SINGLE_LORA: [&str; 6] = [
    "lora.num_experts=1",
    "lora.rank=32",
    "lora.alpha=64",
    "lora.shared_rank=0",
    "lora.capacity=even",
    "optimizer.adapters.learning_rate=5e-3",
];
/// Below this number of steps, the warm-up becomes a tenth of the steps, and the results need not
/// be those of the demo.
const ENOUGH_STEPS: u64 = 200;

/// Arguments of `dylora demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The folder to create for the demo's files and all results.
    #[arg(long, value_name = "DIR", default_value = "dylora-demo")]
    out: PathBuf,
    /// Replace the folder if an earlier demo made it.
    #[arg(long)]
    overwrite: bool,
    /// Number of steps of each of the two trainings [default: the config's, 300].
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Seed of the trainings.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The device to compute on: `auto`, `cpu` or `cuda[:N]`.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Also if the results are not those that the demo is meant to show, unless it was given fewer
/// steps; they are printed first.
pub fn run(args: &DemoArgs, shared: &Shared) -> Result<()> {
    let started = Instant::now();
    args.make_room()?;
    demo_files::unpack(&args.out)?;
    let interrupt = Interrupt::listen()?;
    let mixture = args.train(MIXTURE, &[], &interrupt, shared)?;
    args.train(SINGLE, &SINGLE_LORA, &interrupt, shared)?;
    let results = args.evaluate(&mixture, shared)?;
    tracing::info!("writing the report");
    let runs = [MIXTURE, SINGLE].map(|name| args.out.join(name)).to_vec();
    report::write(&ReportArgs::of_runs(runs, args.out.join(REPORT), args.device), shared)?;
    let faults = results.faults();
    let json = json!({
        "out": args.out,
        "seconds": started.elapsed().as_secs_f64(),
        "domains": results.domains,
        "mean": results.mean,
        "mutual_information": results.mutual_information,
        "faults": faults,
    });
    let json = Schema::Demo.text(json);
    durable::replace(&args.out.join(RESULTS), format!("{json}\n").as_bytes())?;
    match args.json {
        true => print_result(&json)?,
        false => print_result(&args.text(&results, started.elapsed().as_secs()))?,
    }
    if faults.is_empty() {
        return Ok(());
    }
    let faults = faults.join("; ");
    if args.steps.is_some_and(|steps| steps < ENOUGH_STEPS) {
        tracing::warn!("with so few steps, the results are not those of the whole demo: {faults}");
        return Ok(());
    }
    bail!("the results are not what they should be: {faults}")
}

impl DemoArgs {
    /// Makes the folder, for which an earlier demo's folder may make way.
    fn make_room(&self) -> Result<()> {
        let out = &self.out;
        let entries = match fs_err::read_dir(out) {
            Ok(entries) => entries.collect::<Result<Vec<_>, _>>()?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => vec![],
            Err(error) => return Err(usage(anyhow!("{error}\nhint: name another `--out`"))),
        };
        let mut names = demo_files::folders();
        names.extend([MIXTURE, SINGLE, EXPERTS, REPORT, RESULTS]);
        let is_known = |name: &std::ffi::OsStr| name.to_str().is_some_and(|n| names.contains(n));
        let other = entries.iter().map(fs_err::DirEntry::file_name).find(|name| !is_known(name));
        let (is_empty, shown) = (entries.is_empty(), out.display());
        match other {
            _ if is_empty => Ok(fs_err::create_dir_all(out)?),
            Some(name) => Err(usage(anyhow!(
                "`{shown}` holds `{}`, which is not the demo's\nhint: name another `--out`",
                name.display()
            ))),
            None if !self.overwrite || !out.join(CONFIG).exists() => Err(usage(anyhow!(
                "`{shown}` is there already\nhint: name another `--out`, or `--overwrite` the \
                 folder of an earlier demo"
            ))),
            None => {
                for name in entries.iter().map(fs_err::DirEntry::path) {
                    match name.is_dir() {
                        true => fs_err::remove_dir_all(name)?,
                        false => fs_err::remove_file(name)?,
                    }
                }
                Ok(())
            }
        }
    }

    /// Trains by the demo's config with `changes` to it, and returns the config.
    fn train(
        &self,
        name: &str,
        changes: &[&str],
        interrupt: &Interrupt,
        shared: &Shared,
    ) -> Result<Config> {
        tracing::info!("training `{}`", self.out.join(name).display());
        let mut set: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
        if let Some(steps) = self.steps {
            set.push(format!("train.duration={{steps={steps}}}"));
            if steps < ENOUGH_STEPS {
                set.push(format!("schedule.warmup_steps={}", steps / 10));
            }
        }
        let mut config = config::load::load(&self.out.join(CONFIG), &set).map_err(usage)?;
        config.run.dir = std::path::absolute(self.out.join(name))?;
        (config.run.seed, config.run.device) = (self.seed, self.device);
        let load = |config: &Config, base: &_| load_data(config, base, shared);
        let ready = ReadyRun::open(config, None, shared, load)?;
        let Trained { config, summary, .. } = train::train(ready, interrupt, shared)?;
        match summary.ending {
            Ending::Interrupted => {
                let again = "start again with `dylora demo --overwrite`".to_owned();
                Err(interrupt.error_with(again).into())
            }
            _ => Ok(config),
        }
    }

    /// Evaluates the mixture, the single LoRA and the base, and exports the mixture's experts.
    fn evaluate(&self, config: &Config, shared: &Shared) -> Result<Results> {
        tracing::info!("evaluating the base, the single LoRA and the mixture");
        let base = ModelArgs { base: Some(self.path(BASE)?), ..self.model() };
        let files = DataArgs::of_files(validation_files(config), config.data.seq_len);
        let base = losses(&base, &files, shared)?;
        let of_run = DataArgs::default();
        let single = ModelArgs { checkpoint: Some(self.out.join(SINGLE)), ..self.model() };
        let single = losses(&single, &of_run, shared)?;
        let mixture = ModelArgs { checkpoint: Some(self.out.join(MIXTURE)), ..self.model() };
        let results = Results::new(&base, &single, &losses(&mixture, &of_run, shared)?);
        tracing::info!("exporting the mixture's experts");
        let open = mixture.open(shared)?;
        let output = open.output(mixture.output(&self.out.join(EXPERTS), false)?);
        peft::export(&output, &open.model, &open.provenance()?, Layout::Dylora)?;
        Ok(results)
    }

    /// The arguments for a model on the demo's device.
    fn model(&self) -> ModelArgs {
        ModelArgs { device: Some(self.device), ..ModelArgs::default() }
    }

    /// A path below the folder, as text.
    fn path(&self, name: &str) -> Result<String> {
        let path = self.out.join(name);
        path.to_str().map(str::to_owned).with_context(|| format!("`{}`", path.display()))
    }

    /// The results for people, and what to do next.
    fn text(&self, results: &Results, secs: u64) -> String {
        let at = |name: &str| quoted(&self.out.join(name));
        let [mixture, experts, report, config] = [MIXTURE, EXPERTS, REPORT, CONFIG].map(at);
        let asked = "For 7 hours of work at 11 crowns per hour, Elias is paid";
        format!(
            "{}\n\n\
             This took {secs} s. Next:\n\
             - Open {report} in a browser: losses, routing, and answers of both runs.\n\
             - See how a text is routed, and continue it:\n  \
               dylora trace --checkpoint {mixture} --text \"{asked}\"\n  \
               dylora generate --checkpoint {mixture} --prompt \"{asked}\"\n\
             - Load an expert in Python: each folder in {experts} is a PEFT adapter.\n\
             - Train on your own data: `dylora init` asks what is needed and writes a config.\n  \
               That of this mixture is {config}.",
            results.text()
        )
    }
}

/// The losses of a model by what decided its routing in training, as `dylora eval` measures them.
fn losses(model: &ModelArgs, data: &DataArgs, shared: &Shared) -> Result<EvalReport> {
    let open = model.open(shared)?;
    let routing = open.routing(None)?;
    let dataset = data.load(&open, shared)?;
    let (report, _) = eval::losses(&open, &dataset, routing, eval::BATCH_SIZE, shared)?;
    eval::check_loss(&report)?;
    Ok(report)
}

/// The validation files of a config as values of `--data`.
fn validation_files(config: &Config) -> Vec<String> {
    let mut found = vec![];
    for domain in &config.data.domains {
        if let Some(Validation::Files(files)) = &domain.validation {
            found.extend(files.iter().map(|file| format!("{}={file}", domain.name)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demo(out: PathBuf, overwrite: bool) -> DemoArgs {
        DemoArgs { out, overwrite, steps: None, seed: 0, device: DeviceChoice::Cpu, json: false }
    }

    #[test]
    fn only_an_earlier_demo_makes_way() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("new/demo");
        demo(out.clone(), false).make_room()?;
        demo_files::unpack(&out)?;
        fs_err::create_dir(out.join(MIXTURE))?;
        let error = demo(out.clone(), false).make_room().expect_err("it is there");
        assert!(error.is::<super::super::UsageError>(), "{error}");
        assert!(error.to_string().contains("is there already"), "{error}");
        fs_err::write(out.join("thesis.txt"), "mine")?;
        let error = demo(out.clone(), true).make_room().expect_err("it holds something else");
        assert!(error.to_string().contains("holds `thesis.txt`, which is not"), "{error}");
        assert!(out.join(CONFIG).exists());
        fs_err::remove_file(out.join("thesis.txt"))?;
        demo(out.clone(), true).make_room()?;
        assert_eq!(fs_err::read_dir(&out)?.count(), 0);
        // a folder that has the names, but not the files, of a demo
        fs_err::create_dir(out.join(MIXTURE))?;
        assert!(demo(out, true).make_room().is_err());
        Ok(())
    }

    #[test]
    fn the_config_names_the_files_that_are_unpacked() -> Result<()> {
        let dir = tempfile::tempdir()?;
        demo_files::unpack(dir.path())?;
        let set = SINGLE_LORA.map(str::to_owned);
        for set in [&[][..], &set] {
            let config = config::load::load(&dir.path().join(CONFIG), set)?;
            super::super::inputs::check_inputs(&config, None)?;
            let files = validation_files(&config);
            assert_eq!(files.len(), 4);
            assert!(files[0].starts_with("arithmetic=/"), "{files:?}");
        }
        Ok(())
    }
}
