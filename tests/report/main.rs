//! `dylora report`. The tests write the files of runs by hand, so that nothing need be trained.
//! `scripts/check_report` checks the pages of real runs, a growth and a study.

mod command;
mod figures;
mod hostile;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use dylora::checkpoint::TrainState;
use dylora::eval::{RoutingReport, SiteReport};
use dylora::report::page::page;
use dylora::report::run::{CheckpointFacts, read_all};
use dylora::report::{Reported, Run, Sample};
use dylora::train::metrics::{Metrics, MixShare, StepMetrics, ValidationMetrics, WindowMetrics};
use serde_json::json;

/// A folder with runs.
struct Scene(tempfile::TempDir);

impl Scene {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes the metrics of a run of some steps, with a window and an evaluation after each
    /// second.
    ///
    /// - `shift`: what is added to all losses
    fn run(&self, name: &str, domains: [&str; 2], num_steps: u64, shift: f64) -> Result<PathBuf> {
        let dir = self.path(name);
        fs_err::create_dir_all(&dir)?;
        let mut lines = String::new();
        for metrics in metrics(domains, num_steps, shift) {
            lines += &serde_json::to_string(&metrics)?;
            lines.push('\n');
        }
        fs_err::write(dir.join("metrics.jsonl"), lines)?;
        Ok(dir)
    }
}

/// Numbers that differ from each other and need all digits.
fn number(seed: u64, place: u64) -> f64 {
    0.1 + ((seed * 7919 + place * 104_729) % 10_007) as f64 / 10_007.0
}

fn metrics(domains: [&str; 2], num_steps: u64, shift: f64) -> Vec<Metrics> {
    let losses = |step: u64, place: u64| -> BTreeMap<String, f64> {
        let loss =
            |(i, name): (usize, &str)| (name.to_owned(), number(step, place + i as u64) + shift);
        domains.into_iter().enumerate().map(loss).collect()
    };
    let step_of = |step: u64| {
        Metrics::Train(StepMetrics {
            step,
            epoch: 0.25 * step as f64,
            tokens_seen: 900 * step,
            loss: number(step, 0) + shift,
            domain_losses: losses(step, 1),
            load_balancing_loss: None,
            uniform_mse: None,
            router_z_loss: None,
            routing_entropy: None,
            domain_supervision: None,
            domain_accuracy: BTreeMap::new(),
            orthogonality: None,
            expert_load: None,
            mature_experts: None,
            temperature: None,
            // a step whose gradient is not finite
            grad_norm: if step == 3 { f64::NAN } else { number(step, 3) },
            learning_rates: [("adapters".into(), 1e-3 / step as f64)].into(),
            label_tokens: 900,
            step_secs: 0.5,
            host_secs: 0.25,
            tokens_per_sec: 1000.0 * number(step, 4),
            peak_memory_bytes: 3 << 29,
        })
    };
    let validation = |step: u64| {
        Metrics::Validation(ValidationMetrics {
            step,
            tokens_seen: 900 * step,
            loss: number(step, 5) + shift,
            token_loss: number(step, 6) + shift,
            domain_losses: losses(step, 7),
            routing_entropy: Some(number(step, 9)),
            expert_load: None,
            mutual_information: Some(number(step, 10)),
            domain_supervision: None,
            domain_accuracy: BTreeMap::new(),
            accuracy_by_domain: BTreeMap::new(),
            domain_routing_weights: BTreeMap::new(),
            eval_secs: 1.5,
        })
    };
    let mut all = vec![];
    for step in 1..=num_steps {
        all.push(step_of(step));
        if step % 2 == 0 {
            all.extend([Metrics::Window(window(domains, step)), validation(step)]);
        }
    }
    all
}

/// A window of two routers, of which the second lacks the middle one of three experts.
fn window(domains: [&str; 2], step: u64) -> WindowMetrics {
    let weights = |place: u64, count: u64| -> Vec<f64> {
        (0..count).map(|i| number(step, place + i) / 2.0).collect()
    };
    let by_domain = |place: u64, count: u64| -> BTreeMap<String, Vec<f64>> {
        let of =
            |(i, name): (usize, &str)| (name.to_owned(), weights(place + 10 * i as u64, count));
        domains.into_iter().enumerate().map(of).collect()
    };
    let site = |name: &str, experts: &[usize]| SiteReport {
        site: name.into(),
        experts: experts.to_vec(),
        mean_routing_weights: weights(40, experts.len() as u64),
        expert_load: weights(50, experts.len() as u64),
        routing_entropy: 0.5,
        mutual_information: Some(number(step, 60)),
        dead_experts: vec![],
        domain_supervision: None,
        domain_accuracy: None,
    };
    let share = MixShare { asked: 0.5, realised: 0.5 };
    WindowMetrics {
        step,
        window_steps: 2,
        mix: domains.map(|name| (name.to_owned(), share)).into(),
        domain_routing_weights: by_domain(70, 3),
        site_routing_weights: [
            ("h.0".to_owned(), by_domain(100, 3)),
            ("h.1".to_owned(), by_domain(130, 2)),
        ]
        .into(),
        routing: Some(RoutingReport {
            mean_routing_weights: weights(160, 3),
            expert_load: weights(170, 3),
            routing_entropy: 0.5,
            mutual_information: Some(0.25),
            dead_share: 0.0,
            sites: vec![site("h.0", &[0, 1, 2]), site("h.1", &[0, 2])],
        }),
        collapse: vec![],
    }
}

/// The state of a checkpoint with these stages.
fn state(stages: serde_json::Value) -> Result<TrainState> {
    Ok(serde_json::from_value(json!({
        "format": dylora::checkpoint::FORMAT, "step": 4, "tokens_seen": 3600,
        "position": {"epoch": 0, "offset": 4}, "best": null, "evals_without_improvement": 0,
        "base_hash": "ba5e", "data_fingerprint": "da7a", "domain_blocks": [2, 2],
        "routing": {"window_steps": 0, "window": [], "collapsed": false, "experts": []},
        "stages": stages,
    }))?)
}

/// The page of runs, with samples for the first.
fn page_of(dirs: &[PathBuf], samples: Vec<Sample>) -> Result<String> {
    let mut samples = Some(samples);
    let report = |run: Run| Reported {
        run,
        moved: None,
        samples: samples.take().ok_or_else(|| "none were asked for".to_owned()),
    };
    let runs: Vec<Reported> = read_all(dirs)?.into_iter().map(report).collect();
    Ok(page(&runs))
}

/// The facts of a checkpoint that has nothing but stages.
fn checkpoint(dir: &Path, stages: serde_json::Value) -> Result<CheckpointFacts> {
    Ok(CheckpointFacts { dir: dir.to_owned(), state: state(stages)?, moved: vec![] })
}
