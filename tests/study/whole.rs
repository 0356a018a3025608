//! Whole studies of the demo's base, with little data and few steps.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dylora::study::report::StudyReport;
use dylora::study::run::RunResult;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A folder with a config of two small domains.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Result<Self> {
        let world = Self { dir: tempfile::tempdir()? };
        let (root, dir) = (env!("CARGO_MANIFEST_DIR"), world.dir.path().display());
        let mut domains = String::new();
        for name in ["code", "verse"] {
            for (split, count) in [("train", 30), ("validation", 12)] {
                let text = fs_err::read_to_string(format!("demo/data/{name}.{split}.jsonl"))?;
                let lines: Vec<&str> = text.lines().take(count).collect();
                fs_err::write(world.path(&format!("{name}.{split}.jsonl")), lines.join("\n"))?;
            }
            domains += &format!(
                "[[data.domains]]\nname = \"{name}\"\ntrain = [\"{dir}/{name}.train.jsonl\"]\n\
                 validation = {{ files = [\"{dir}/{name}.validation.jsonl\"] }}\n"
            );
        }
        let config = format!(
            "[run]\ndir = \"{dir}/run\"\ndevice = \"cpu\"\ntensorboard = false\n\
             [base]\nsource = {{ path = \"{root}/demo/base\" }}\n\
             [data]\nseq_len = 64\n{domains}\
             [lora]\nnum_experts = 2\nrank = 2\nalpha = 4.0\n\
             [train]\nduration = {{ steps = 3 }}\nmicro_batch_size = 2\n"
        );
        fs_err::write(world.path("study.toml"), config)?;
        Ok(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, out: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(["study", "--config"]).arg(self.path("study.toml"));
        command.arg("--out").arg(self.path(out)).args(arguments);
        command.env("DYLORA_CACHE", self.path("cache")).env("OMP_NUM_THREADS", "1");
        command
    }

    fn study(&self, out: &str, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(out, arguments).output()?)
    }

    fn report(&self, out: &str) -> Result<StudyReport> {
        let text = fs_err::read_to_string(self.path(out).join("study.json"))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The results in the order in which they came.
    fn results(&self, out: &str) -> Result<Vec<RunResult>> {
        let text = fs_err::read_to_string(self.path(out).join("runs.jsonl"))?;
        Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    }

    /// The folder of the run with this name.
    fn run_dir(&self, out: &str, name: &str) -> Result<PathBuf> {
        let entries = fs_err::read_dir(self.path(out).join("runs"))?;
        let mut dirs = entries.filter_map(|entry| Some(entry.ok()?.path()));
        dirs.find(|dir| {
            let dir = dir.file_name().and_then(|dir| dir.to_str()).unwrap_or_default();
            dir.rsplit_once('-').is_some_and(|(found, _)| found == name)
        })
        .with_context(|| format!("there is no run `{name}`"))
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The report without what differs from one study to the next: the times.
fn without_times(mut report: StudyReport) -> StudyReport {
    for row in &mut report.arms {
        row.measured.iter_mut().for_each(|of| of.train_secs = 0.0);
    }
    for run in &mut report.runs {
        if let dylora::study::run::Outcome::Trained(of) = &mut run.outcome {
            of.train_secs = 0.0;
        }
    }
    report
}

const SMALL: [&str; 4] =
    ["--arms=single,supervised,oracle", "--seeds=2", "--rates=1,2", "--jobs=2"];

#[test]
fn a_study_is_complete_and_makes_only_missing_runs_again() -> Result<()> {
    let world = World::new()?;
    let output = world.study("out", &[&SMALL[..], &["--json"]].concat())?;
    assert!(output.status.success(), "{}", stderr(&output));
    let report = world.report("out")?;
    let mut printed: Value = serde_json::from_slice(&output.stdout)?;
    let schema = printed.as_object_mut().and_then(|object| object.remove("schema"));
    assert_eq!(schema, Some("study/1".into()));
    assert_eq!(serde_json::from_value::<StudyReport>(printed)?, report);
    assert_eq!((report.runs.len(), report.seeds.clone()), (9, vec![0, 1]));
    for row in &report.arms {
        let of = row.measured.as_ref().context("all runs are over")?;
        assert_eq!((of.losses.len(), of.domains.len()), (2, 2));
        assert!(row.trials.len() == 2 && row.factor.is_some() && of.train_secs > 0.0);
    }
    // the totals are equal but for the routers
    let measured = |arm: usize| report.arms[arm].measured.as_ref().expect("all runs are over");
    let parameters = [0, 1, 2].map(|arm| measured(arm).parameters);
    assert!(parameters[0] == parameters[2] && parameters[1] > parameters[0], "{parameters:?}");
    let ranks = [0, 1, 2].map(|arm| measured(arm).active_rank.expect("it has one"));
    assert!((ranks[0], ranks[2]) == (4.0, 2.0) && (2.0..=4.0).contains(&ranks[1]), "{ranks:?}");
    for name in ["supervised", "oracle", "G_total"] {
        let comparison = report.comparison(name).context("it is compared")?;
        assert_eq!(comparison.differences.len(), 2);
    }
    assert!(report.verdict.contains("supervised"), "{}", report.verdict);

    // the raw rows came as the runs ended; their files stay, but not their checkpoints
    assert_eq!(world.results("out")?.len(), 9);
    let seed = format!("supervised-x{}-seed1", report.arms[1].factor.context("it has one")?);
    let dir = world.run_dir("out", &seed)?;
    let has = |name: &str| dir.join(name).exists();
    assert!(has("config.toml") && has("metrics.jsonl") && !has("checkpoints"));

    fs_err::remove_file(dir.join("result.json"))?;
    let again = world.study("out", &SMALL)?;
    assert!(again.status.success(), "{}", stderr(&again));
    let results = world.results("out")?;
    assert_eq!((results.len(), results[9].id.name()), (10, seed));
    assert_eq!(without_times(world.report("out")?), without_times(report));
    let text = String::from_utf8(again.stdout)?;
    assert!(text.contains("| supervised |") && text.contains("nats"), "{text}");
    a_run_that_fails_is_named_while_the_others_go_on(&world, &dir)
}

/// A file in the place of the folder of a run's checkpoints lets the run fail.
fn a_run_that_fails_is_named_while_the_others_go_on(world: &World, dir: &Path) -> Result<()> {
    fs_err::remove_file(dir.join("result.json"))?;
    fs_err::write(dir.join("checkpoints"), "")?;
    let output = world.study("out", &SMALL)?;
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("error: 1 run(s) failed: supervised, rate x "), "{said}");
    let report = world.report("out")?;
    assert_eq!((report.failed.len(), report.runs.len()), (1, 8));
    assert!(report.failed[0].run.starts_with("supervised, rate x "));
    assert!(report.arms[0].measured.is_some() && report.arms[1].measured.is_none());
    assert!(report.verdict.starts_with("There is no verdict"), "{}", report.verdict);
    Ok(())
}

/// Experts with even weights are slices of one LoRA: with the same seed, the same scaling and the
/// same rank in all, they are the same function and learn the same.
#[test]
fn the_uniform_arm_is_the_single_lora() -> Result<()> {
    let world = World::new()?;
    let arguments = ["--arms=single,uniform", "--seeds=1", "--rates=1", "--jobs=2"];
    let output = world.study("out", &arguments)?;
    assert!(output.status.success(), "{}", stderr(&output));
    let report = world.report("out")?;
    let difference = report.comparison("uniform").context("it is compared")?.interval.mean;
    assert!(difference.abs() < 1e-5, "{difference}");
    let ranks = report.arms.iter().map(|row| row.measured.as_ref()?.active_rank);
    assert_eq!(ranks.collect::<Vec<_>>(), [Some(4.0); 2]);
    Ok(())
}

#[test]
fn an_interrupted_study_goes_on_where_it_was() -> Result<()> {
    let world = World::new()?;
    let arguments = [
        "--arms=learned",
        "--seeds=1",
        "--rates=1",
        "--set=train.duration={steps=60}",
        "--set=schedule.warmup_steps=2",
    ];
    let unbroken = world.study("unbroken", &arguments)?;
    assert!(unbroken.status.success(), "{}", stderr(&unbroken));

    let mut child = world.command("out", &arguments).spawn()?;
    let started = Instant::now();
    let has_begun = || -> Result<bool> {
        let Ok(dir) = world.run_dir("out", "learned-x1-seed0") else { return Ok(false) };
        let metrics = fs_err::read_to_string(dir.join("metrics.jsonl")).unwrap_or_default();
        Ok(metrics.lines().count() > 3)
    };
    while !has_begun()? {
        ensure!(started.elapsed() < Duration::from_secs(60), "the run does not begin");
        sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    assert_eq!(child.wait()?.code(), Some(128 + 15));
    let dir = world.run_dir("out", "learned-x1-seed0")?;
    assert!(dir.join("checkpoints/last").exists() && !dir.join("result.json").exists());

    let resumed = world.study("out", &arguments)?;
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    let loss = |out: &str| -> Result<Vec<f64>> {
        let report = world.report(out)?;
        Ok(report.arms[0].measured.as_ref().context("the run is over")?.losses.clone())
    };
    assert_eq!(loss("out")?, loss("unbroken")?);
    Ok(())
}

#[test]
fn faults_are_found_before_anything_is_trained() -> Result<()> {
    let world = World::new()?;
    for (arguments, code, said) in [
        (&["--rates=0"][..], 2, "`--rates` must be numbers from 0.000001 to 1000000, got 0"),
        (&["--seeds=0"], 2, "`--seeds` must be at least 1, got 0"),
        (&["--jobs=0"], 2, "`--jobs` must be at least 1, got 0"),
        (&["--arms=best"], 2, "invalid value 'best' for '--arms <ARM,..>'"),
        (&["--set=train.routing=uniform"], 2, "`train.routing` must be `router` for a study"),
        (&["--set=data.seq_len=512"], 2, "at most the base's 256 positions, got 512"),
        (&["--set=lora.init=pissa", "--set=lora.rank=100"], 2, "in the arm `single`"),
        (&["--set=base.source={path=\"nothing\"}"], 2, "nothing` does not exist"),
    ] {
        let output = world.study("out", arguments)?;
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(said), "{arguments:?}: {}", stderr(&output));
    }
    fs_err::write(world.path("verse.validation.jsonl"), "{\"text\": \"one\"}\n")?;
    let output = world.study("out", &[])?;
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let said = "the validation set of domain `verse` has no two halves";
    assert!(stderr(&output).contains(said), "{}", stderr(&output));
    assert!(!world.path("out").exists());
    Ok(())
}

#[test]
fn a_dry_run_says_what_would_be_made() -> Result<()> {
    let world = World::new()?;
    let output = world.study("out", &["--dry-run", "--json", "--arms=single,per_domain,full"])?;
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout)?;
    // three rates and four more seeds, of one run or of one for each of two domains
    assert_eq!(json["runs"], 7 + 14 + 7);
    assert_eq!(json["steps_of_a_run"], 3);
    assert_eq!(json["arms"][0]["config"]["lora"]["rank"], 4);
    let documents = |domain: usize| -> Option<u64> {
        let of = &json["domains"][domain];
        Some(of["selection_documents"].as_u64()? + of["report_documents"].as_u64()?)
    };
    assert_eq!((documents(0), documents(1)), (Some(12), Some(12)));
    let text = world.study("out", &["--dry-run"])?;
    let text = String::from_utf8(text.stdout)?;
    assert!(text.contains("| single_active |") && text.contains("49 runs"), "{text}");
    assert!(!world.path("out").exists());
    Ok(())
}
