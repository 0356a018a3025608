//! The plan of a study, and what it reports for given losses.

use std::path::Path;

use anyhow::Result;
use dylora::config::{LoraInit, ModulePath, TargetModule};
use dylora::model::experts::spec::{ExpertSpec, RankAlpha};
use dylora::study::arms::Arm;
use dylora::study::plan::{DomainFacts, Facts, Plan, Results, Settings, Size, secs_left};
use dylora::study::report::{ACTIVE, Failure, StudyReport, TOTAL};
use dylora::study::run::{Losses, Measured, Outcome, RunSpec, active_rank};

use crate::arms::mixture;

fn plan(dir: &Path, arms: &[Arm], num_seeds: u64) -> Plan {
    let config = mixture(&["optimizer.adapters={learning_rate=1e-3}", "run.seed=7"]);
    let rates = vec![0.5, 1.0, 2.0];
    let dir = dir.to_owned();
    let settings = Settings { config, arms: arms.to_vec(), rates, num_seeds, dir, keep: false };
    let domain = |share| DomainFacts { share, data: Some(format!("data of {share}")) };
    let domains = vec![domain(0.75), domain(0.25)];
    let facts = Facts { steps: 100, data: "data".into(), domains, base: "base".into() };
    Plan { settings, facts }
}

fn measured(selection: f64, report: f64, routing_entropy: Option<f64>) -> Outcome {
    let losses = |loss: f64| Losses {
        loss,
        domains: [("math".into(), loss - 1.0), ("code".into(), loss + 1.0)].into(),
    };
    Outcome::Trained(Measured {
        selection: losses(selection),
        report: losses(report),
        steps: 100,
        best_step: 100,
        train_secs: 3.0,
        parameters: 1000,
        active_rank: Some(8.0),
        routing_entropy,
    })
}

/// Makes all runs of a plan, with losses by `outcome`.
fn make(plan: &Plan, outcome: impl Fn(&RunSpec) -> Outcome) -> Result<Results> {
    let mut results = Results::new();
    loop {
        let ready = plan.ready(&results);
        if ready.is_empty() {
            return Ok(results);
        }
        for run in ready {
            run.write()?;
            run.finish(outcome(&run))?;
            results.insert(run.id.name(), run.result().expect("it was just written"));
        }
    }
}

/// A single LoRA that is 0.1 worse than the oracle for each seed, and 0.08 worse than the
/// supervised router, give or take 0.001. The best rate is the middle one.
fn usual(run: &RunSpec) -> Outcome {
    let seed = (run.id.seed - 7) as f64;
    let loss = match run.id.arm {
        Arm::Single => 1.0 + 0.01 * seed,
        Arm::SingleActive => 1.2,
        Arm::Supervised => 0.92 + 0.01 * seed + 0.001 * (seed - 1.0),
        Arm::Oracle => 0.9 + 0.01 * seed,
        _ => 0.99,
    };
    measured((run.id.factor - 1.0).abs() + loss, loss, Some(0.5))
}

#[test]
fn every_arm_tries_every_rate_and_makes_the_other_seeds_at_its_best() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plan = plan(dir.path(), &[Arm::Single, Arm::Supervised], 3);
    let names = |runs: &[RunSpec]| -> Vec<String> { runs.iter().map(|r| r.id.name()).collect() };
    let trials = plan.ready(&Results::new());
    let expected = ["single-x0.5-seed7", "single-x1-seed7", "single-x2-seed7"];
    assert_eq!(names(&trials)[..3], expected);
    assert_eq!(trials.len(), 6);
    let rates: Vec<f64> =
        trials[..3].iter().map(|run| run.config.optimizer.adapters.learning_rate).collect();
    assert_eq!(rates, [5e-4, 1e-3, 2e-3]);
    let results = make(&plan, usual)?;
    assert_eq!(results.len() as u64, plan.size().runs);
    assert_eq!(plan.size(), Size { runs: 10, steps: 1000 });
    let finals = plan.finals(Arm::Single, plan.kept_rate(Arm::Single, &results).expect("kept"));
    assert_eq!(names(&finals), ["single-x1-seed7", "single-x1-seed8", "single-x1-seed9"]);
    assert!(finals.iter().all(|run| run.split_seed == 7 && run.config.run.seed == run.id.seed));
    // arms are paired: the same seeds, data and steps
    let others = plan.finals(Arm::Supervised, 1.0);
    for (a, b) in finals.iter().zip(&others) {
        assert_eq!((a.id.seed, &a.data), (b.id.seed, &b.data));
        assert_ne!(a.dir(), b.dir());
    }
    Ok(())
}

#[test]
fn of_equal_losses_the_smaller_rate_is_kept_and_diverged_ones_never_are() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plan = plan(dir.path(), &[Arm::Single], 1);
    let kept = |outcome: &dyn Fn(f64) -> Outcome| -> Result<Option<f64>> {
        Ok(plan.kept_rate(Arm::Single, &make(&plan, |run| outcome(run.id.factor))?))
    };
    let equal = |factor: f64| measured(if factor < 1.0 { 2.0 } else { 1.0 }, 0.0, None);
    assert_eq!(kept(&equal)?, Some(1.0));
    let diverged = || Outcome::Diverged("loss NaN".into());
    assert_eq!(
        kept(&|factor| if factor < 2.0 { diverged() } else { measured(9.0, 9.0, None) })?,
        Some(2.0)
    );
    assert_eq!(kept(&|_| diverged())?, None);
    Ok(())
}

#[test]
fn an_arm_whose_trials_are_not_over_has_no_rate() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plan = plan(dir.path(), &[Arm::Single, Arm::Oracle], 2);
    let mut results = make(&plan, usual)?;
    results.remove("single-x2-seed7");
    assert_eq!(plan.kept_rate(Arm::Single, &results), None);
    assert_eq!(plan.kept_rate(Arm::Oracle, &results), Some(1.0));
    assert_eq!(plan.ready(&results)[0].id.name(), "single-x2-seed7");
    Ok(())
}

#[test]
fn a_result_counts_only_for_the_run_that_made_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plan = plan(dir.path(), &[Arm::Single], 1);
    make(&plan, usual)?;
    let run = || plan.runs(Arm::Single, 1.0, 0).remove(0);
    assert_eq!(RunSpec::read(&run().write()?)?, run());
    assert!(run().result().is_some());
    let mut others = vec![plan.clone(), plan.clone(), plan.clone()];
    others[0].facts.data = "other data".into();
    others[1].facts.base = "another base".into();
    others[2].settings.config.lora.dropout = 0.1;
    for other in &others {
        assert!(other.runs(Arm::Single, 1.0, 0)[0].result().is_none());
    }
    // the device and the folder do not matter
    let mut elsewhere = plan.clone();
    elsewhere.settings.config.run.device = "cuda:3".parse()?;
    elsewhere.settings.config.run.dir = "/elsewhere".into();
    assert!(elsewhere.runs(Arm::Single, 1.0, 0)[0].result().is_some());
    // a result that was cut off does not count
    fs_err::write(run().dir().join("result.json"), "{\"format\": 1,")?;
    assert!(run().result().is_none());
    Ok(())
}

#[test]
fn a_report_has_paired_differences_recovery_and_the_verdict() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let arms = [Arm::Single, Arm::SingleActive, Arm::Supervised, Arm::Oracle];
    let plan = plan(dir.path(), &arms, 3);
    let report = StudyReport::new(&plan, &make(&plan, usual)?, vec![]);
    assert_eq!((report.seeds.clone(), report.steps), (vec![7, 8, 9], 100));
    let single = report.arms[0].measured.as_ref().expect("it is measured");
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    close(single.loss.mean, 1.01);
    close(single.loss.sd.expect("there are three seeds"), 0.01);
    close(single.domains["code"].mean, 2.01);
    assert_eq!((single.parameters, report.arms[0].factor), (1000, Some(1.0)));
    assert_eq!(report.arms[0].learning_rate, Some(1e-3));
    let total = report.comparison(TOTAL).expect("there is an oracle");
    close(total.interval.mean, 0.1);
    close(report.comparison(ACTIVE).expect("there is an oracle").interval.mean, 0.29);
    // the differences are 0.081, 0.08 and 0.079: s = 0.001, t = 4.3027, half = t s / sqrt(3)
    let gain = report.comparison("supervised").expect("it is compared").interval;
    close(gain.mean, 0.08);
    let half = gain.half_width.expect("there are three seeds");
    assert!((half - 4.302_652_73 * 0.001 / 3.0_f64.sqrt()).abs() < 1e-9, "{half}");
    close(report.recovery["supervised"], 0.8);
    assert_eq!(report.warnings, Vec::<String>::new());
    assert_eq!(
        report.verdict,
        "Routing lowers the loss by 0.0800 ± 0.0025 nats (supervised against single, 3 seeds, \
         95 % t-interval); that is 80 % of what perfect routing could bring."
    );
    // what is written can be read again
    let text = serde_json::to_string(&report)?;
    assert_eq!(serde_json::from_str::<StudyReport>(&text)?, report);
    Ok(())
}

#[test]
fn a_study_without_supervision_is_judged_by_the_learned_router() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plan = plan(dir.path(), &[Arm::Single, Arm::Learned], 2);
    let report = StudyReport::new(&plan, &make(&plan, usual)?, vec![]);
    assert!(report.verdict.contains("between learned and single"), "{}", report.verdict);
    assert!(report.recovery.is_empty());
    Ok(())
}

#[test]
fn without_a_gain_of_the_oracle_there_is_no_recovery() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plan = plan(dir.path(), &[Arm::Single, Arm::Supervised, Arm::Oracle], 3);
    let report = StudyReport::new(
        &plan,
        &make(&plan, |run| match run.id.arm {
            Arm::Oracle => measured(1.0, [0.9, 1.1, 1.2][run.id.seed as usize - 7], None),
            _ => usual(run),
        })?,
        vec![],
    );
    assert!(report.recovery.is_empty());
    let said = "; perfect routing by domain brings nothing that can be shown.";
    assert!(report.verdict.ends_with(said), "{}", report.verdict);
    Ok(())
}

#[test]
fn what_weakens_a_study_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut plan = plan(dir.path(), &[Arm::Single, Arm::Supervised, Arm::Oracle], 1);
    let results = make(&plan, |run| match (run.id.arm, run.id.factor) {
        (Arm::Single, factor) => measured(-factor, 1.0, None),
        (Arm::Supervised, factor) if factor < 1.0 => measured(factor, 1.0, None),
        (Arm::Supervised, _) => measured(2.0, 1.0, None),
        _ => Outcome::Diverged("loss NaN".into()),
    })?;
    let failed = vec![Failure { run: "oracle, seed 7".into(), error: "no disk".into() }];
    let report = StudyReport::new(&plan, &results, failed.clone());
    insta::assert_snapshot!(report.warnings.join("\n"), @"
    the best rate of `single`, x 2, is the largest that was tried, so that `single` may be \
    undertuned
    the best rate of `supervised`, x 0.5, is the smallest that was tried, so that `supervised` may \
    be undertuned
    `oracle` diverged at the rate x 0.5
    `oracle` diverged at the rate x 1
    `oracle` diverged at the rate x 2
    `oracle` is not measured: some of its runs failed or diverged
    one seed shows no difference between arms
    ");
    assert_eq!((report.failed, report.arms[2].measured.clone()), (failed, None));
    plan.settings.rates = vec![1.0];
    let report = StudyReport::new(&plan, &results, vec![]);
    assert!(report.warnings[0].starts_with("only one rate was tried"), "{:?}", report.warnings);
    assert!(!report.arms[0].is_at_edge);
    Ok(())
}

#[test]
fn an_arm_of_single_domains_is_averaged_into_one_row() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plan = plan(dir.path(), &[Arm::PerDomain], 2);
    // 3 / 4 and 1 / 4 of 100 steps, three trials and one more seed
    assert_eq!(plan.size(), Size { runs: 8, steps: 400 });
    let runs = plan.runs(Arm::PerDomain, 1.0, 1);
    let steps: Vec<u64> = runs.iter().map(|run| plan.steps(run)).collect();
    assert_eq!(steps, [75, 25]);
    assert_ne!(runs[0].data, runs[1].data);
    let results = make(&plan, |run| {
        let domain = run.id.domain.expect("each run has one");
        let loss = if domain == 0 { 1.0 } else { 3.0 };
        let Outcome::Trained(mut of) = measured((run.id.factor - 2.0).abs(), loss, None) else {
            unreachable!()
        };
        of.report.domains = [(run.config.data.domains[0].name.clone(), loss)].into();
        Outcome::Trained(of)
    })?;
    let report = StudyReport::new(&plan, &results, vec![]);
    let row = report.arms[0].measured.as_ref().expect("it is measured");
    assert_eq!((report.arms[0].factor, row.loss.mean), (Some(2.0), 2.0));
    assert_eq!((row.domains["math"].mean, row.domains["code"].mean), (1.0, 3.0));
    assert_eq!((row.parameters, row.train_secs), (2000, 6.0));
    Ok(())
}

#[test]
fn the_rest_takes_as_long_as_the_runs_so_far() {
    assert_eq!(secs_left(&[], 100, 1), None);
    assert_eq!(secs_left(&[(10, 5.0)], 100, 1), Some(50.0));
    assert_eq!(secs_left(&[(10, 5.0), (30, 5.0)], 100, 2), Some(12.5));
}

/// An expert on one module.
fn expert(rank: i64, shared: bool) -> ExpertSpec {
    let path = ModulePath { layer: 0, module: TargetModule::ALL[0] };
    ExpertSpec {
        modules: [(path, RankAlpha { rank, alpha: 16.0 })].into(),
        use_rslora: false,
        use_dora: false,
        init: LoraInit::Default,
        trainable: true,
        alora_invocation_tokens: vec![],
        shared,
    }
}

/// Reference: r e^H, k r, and the mean over the domains of their experts' ranks, plus the rank of
/// the part that is always on.
#[test]
fn the_active_rank_is_what_a_token_uses() {
    let mixture = mixture(&["lora.shared_rank=0"]);
    let routed: Vec<ExpertSpec> = [2, 6, 8, 16].map(|rank| expert(rank, false)).into();
    let with_shared = [&routed[..], &[expert(3, true)]].concat();
    let rank = |arm: Arm, top_k: Option<i64>, entropy: Option<f64>| {
        let mut config = arm.config(&mixture);
        config.data.domains[0].expert = Some(vec![0].into());
        config.data.domains[1].expert = Some(vec![1, 3].into());
        let [plain, shared] =
            [&routed, &with_shared].map(|specs| active_rank(&config, specs, top_k, entropy));
        assert_eq!(shared, plain.map(|plain| plain + 3.0));
        plain
    };
    let two = Some(2.0_f64.ln());
    assert!((rank(Arm::Learned, None, two).expect("it has one") - 16.0).abs() < 1e-12);
    assert_eq!(rank(Arm::Supervised, Some(3), two), Some(24.0));
    assert_eq!(rank(Arm::Uniform, None, None), Some(32.0));
    assert_eq!(rank(Arm::Oracle, None, None), Some((2.0 + 22.0) / 2.0));
    let single = Arm::Single.config(&mixture);
    assert_eq!(active_rank(&single, &[expert(32, false)], None, None), Some(32.0));
    assert_eq!(active_rank(&Arm::Full.config(&mixture), &[], None, None), None);
}
