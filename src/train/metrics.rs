//! What a run reports of itself: one JSON object a line in `metrics.jsonl`, and the same numbers
//! for TensorBoard.
//!
//! ```text
//! {"kind":"train","step":1,"epoch":0.01,"tokens_seen":8192,"loss":3.21,...}
//! {"kind":"window","step":50,"window_steps":50,"mix":{..},"routing":{..}}
//! {"kind":"validation","step":1,"tokens_seen":8192,"loss":3.18,...}
//! ```
//!
//! JSON has no number that is not finite: such a value is written as `null` and read as NaN, while
//! a value that does not apply (the routing's, in a run without a router) has no key at all.
//! TensorBoard gets NaN and infinities as they are, and all else in f32.
//!
//! | TensorBoard tag | value |
//! |---|---|
//! | `train/loss`, `train/loss/<domain>` | `loss`, `domain_losses` |
//! | `train/grad_norm` | `grad_norm` |
//! | `train/learning_rate/<group>` | `learning_rates` |
//! | `train/tokens_per_sec` | `tokens_per_sec` |
//! | `train/peak_memory_gib` | `peak_memory_bytes / 2^30` |
//! | `train/orthogonality` | `orthogonality` |
//! | `router/load_balancing_loss`, `/uniform_mse`, `/z_loss` | the losses of the same name |
//! | `router/temperature`, `router/mature_experts` | `temperature`, `mature_experts` |
//! | `router/entropy`, `router/load/expert_<e>` | `routing_entropy`, `expert_load` of a step |
//! | `router/window/dead_share`, `/mutual_information` | the same of a window's `routing` |
//! | `router/window/<site>/<figure>` | `largest_share`, `entropy`, `dead_share`, `mutual_information` |
//! | `data/mix/<domain>` | the realised share of the blocks so far |
//! | `validation/loss`, `validation/loss/<domain>` | `loss`, `domain_losses` |
//! | `validation/token_loss` | `token_loss` |
//! | `validation/router/entropy` | `routing_entropy` on the validation sets |
//! | `validation/router/load/expert_<e>` | `expert_load` on the validation sets |
//! | `validation/router/mutual_information` | `mutual_information` on the validation sets |

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Deserializer, Serialize};

use super::tensorboard::EventWriter;
use crate::eval::RoutingReport;

/// The file of the metrics in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The folder of the event files in a run's folder.
pub const TENSORBOARD_DIR: &str = "tensorboard";

const BYTES_PER_GIB: f64 = (1_u64 << 30) as f64;

/// A line of `metrics.jsonl`; its `kind` tells which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Metrics {
    /// One optimizer update.
    Train(StepMetrics),
    /// A window of updates: how they were routed, and the mix of domains so far.
    Window(WindowMetrics),
    /// One pass over the validation sets.
    Validation(ValidationMetrics),
}

/// One optimizer update, over all of its micro-batches and processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Which update, from 1.
    pub step: u64,
    /// Passes over the training set so far, with the fraction of the present one.
    #[serde(deserialize_with = "number")]
    pub epoch: f64,
    /// Target tokens trained on so far, this step's among them.
    pub tokens_seen: u64,
    /// Mean over the step's label tokens, nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// The same for each domain that has label tokens in the step, by its name.
    #[serde(deserialize_with = "numbers")]
    pub domain_losses: BTreeMap<String, f64>,
    /// 1 when even, before its factor; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub load_balancing_loss: Option<f64>,
    /// Mean squared distance of the mean routing_probs from even, before its factor; absent without a
    /// router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub uniform_mse: Option<f64>,
    /// Mean squared logsumexp of the scores, before its factor; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub router_z_loss: Option<f64>,
    /// Mean entropy of the routing probabilities, nats; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub routing_entropy: Option<f64>,
    /// Before its factor; absent unless it counts.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub orthogonality: Option<f64>,
    /// Share of assignments per expert `[e]`, sums to 1; absent without a router.
    #[serde(default, deserialize_with = "some_list", skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<Vec<f64>>,
    /// Experts that are mature after the step; absent unless the rule is hybrid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mature_experts: Option<u64>,
    /// Of the step's softmax over the scores; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// L2 norm of all gradients together, before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// The step's learning rate for each parameter group, by its name.
    #[serde(deserialize_with = "numbers")]
    pub learning_rates: BTreeMap<String, f64>,
    /// Target tokens of the step.
    pub label_tokens: u64,
    /// Wall-clock time of the step.
    #[serde(deserialize_with = "number")]
    pub step_secs: f64,
    /// Wall-clock time in which the device had nothing to do: from the end of the step before, or of an
    /// evaluation or checkpoint after it, until this one was in its queue (without a graph: until its first kernel
    /// was; gaps within the step do not count).
    #[serde(default, deserialize_with = "number")]
    pub host_secs: f64,
    /// Positions of the step, padding included, per second of it.
    #[serde(deserialize_with = "number")]
    pub tokens_per_sec: f64,
    /// The most memory that was in use on the device; 0 if unknown.
    pub peak_memory_bytes: u64,
}

/// A window of `router.window_steps` updates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowMetrics {
    /// Its last update.
    pub step: u64,
    /// Its updates.
    pub window_steps: u64,
    /// Each domain's share of all blocks so far, by its name.
    pub mix: BTreeMap<String, MixShare>,
    /// Mean routing weight of each expert on each domain's tokens, by the domain's name: the router x
    /// domain table; empty without a router.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub domain_routing_weights: BTreeMap<String, Vec<f64>>,
    /// How the window's label tokens were routed, at each place; absent without a router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingReport>,
    /// What is wrong with it; empty if nothing is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub collapse: Vec<String>,
}

/// A domain's share of the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MixShare {
    /// As `data.mixing` asks.
    pub asked: f64,
    /// As it came.
    pub realised: f64,
}

/// One pass over the validation sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationMetrics {
    /// Updates done before it; 0 before training.
    pub step: u64,
    /// Target tokens trained on before it.
    pub tokens_seen: u64,
    /// Mean of the domains' losses, each of which counts the same, nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Mean over the label tokens of all domains, nats.
    #[serde(deserialize_with = "number")]
    pub token_loss: f64,
    /// Mean over a domain's label tokens, nats, by the domain's name.
    #[serde(deserialize_with = "numbers")]
    pub domain_losses: BTreeMap<String, f64>,
    /// Mean entropy of the routing probabilities, nats; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub routing_entropy: Option<f64>,
    /// Share of assignments per expert `[e]`, sums to 1; absent without a router.
    #[serde(default, deserialize_with = "some_list", skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<Vec<f64>>,
    /// Of expert and domain, nats; absent without a router.
    #[serde(default, deserialize_with = "some_number", skip_serializing_if = "Option::is_none")]
    pub mutual_information: Option<f64>,
    /// Wall-clock time of the pass.
    #[serde(deserialize_with = "number")]
    pub eval_secs: f64,
}

/// Reads a number, `null` as NaN.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let values = BTreeMap::<String, Option<f64>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

fn some_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer).map(Some)
}

fn some_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<f64>>, D::Error> {
    let values = Vec::<Option<f64>>::deserialize(deserializer)?;
    Ok(Some(values.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect()))
}

impl Metrics {
    /// The number of updates done.
    pub fn step(&self) -> u64 {
        match self {
            Self::Train(metrics) => metrics.step,
            Self::Window(metrics) => metrics.step,
            Self::Validation(metrics) => metrics.step,
        }
    }

    /// What TensorBoard shows: tags and values, as listed at the top of this file.
    fn scalars(&self) -> Vec<(String, f32)> {
        match self {
            Self::Train(metrics) => metrics.scalars(),
            Self::Window(metrics) => metrics.scalars(),
            Self::Validation(metrics) => metrics.scalars(),
        }
    }
}

impl StepMetrics {
    fn scalars(&self) -> Vec<(String, f32)> {
        let mut scalars = vec![
            scalar("train/loss", self.loss),
            scalar("train/grad_norm", self.grad_norm),
            scalar("train/tokens_per_sec", self.tokens_per_sec),
            scalar("train/peak_memory_gib", self.peak_memory_bytes as f64 / BYTES_PER_GIB),
        ];
        scalars.extend(named("train/loss", &self.domain_losses));
        scalars.extend(named("train/learning_rate", &self.learning_rates));
        let others = [
            ("router/load_balancing_loss", self.load_balancing_loss),
            ("router/uniform_mse", self.uniform_mse),
            ("router/z_loss", self.router_z_loss),
            ("router/temperature", self.temperature),
            ("router/mature_experts", self.mature_experts.map(|count| count as f64)),
            ("train/orthogonality", self.orthogonality),
        ];
        scalars.extend(others.into_iter().filter_map(|(tag, v)| Some(scalar(tag, v?))));
        scalars.extend(routing("router", self.routing_entropy, self.expert_load.as_deref()));
        scalars
    }
}

impl WindowMetrics {
    fn scalars(&self) -> Vec<(String, f32)> {
        let realised = self.mix.iter().map(|(name, share)| (name.clone(), share.realised));
        let mut scalars: Vec<_> = named("data/mix", &realised.collect()).collect();
        let Some(routing) = &self.routing else { return scalars };
        scalars.extend([
            scalar("router/window/dead_share", routing.dead_share),
            scalar("router/window/mutual_information", routing.mutual_information.unwrap_or(0.0)),
        ]);
        for site in &routing.sites {
            let name = site.site.replace(' ', "_");
            let values = [
                ("largest_share", site.largest().1),
                ("entropy", site.routing_entropy),
                ("dead_share", site.dead_share()),
                ("mutual_information", site.mutual_information.unwrap_or(0.0)),
            ];
            let tag = |(key, value)| scalar(&format!("router/window/{name}/{key}"), value);
            scalars.extend(values.map(tag));
        }
        scalars
    }
}

impl ValidationMetrics {
    fn scalars(&self) -> Vec<(String, f32)> {
        let mut scalars = vec![
            scalar("validation/loss", self.loss),
            scalar("validation/token_loss", self.token_loss),
        ];
        scalars.extend(named("validation/loss", &self.domain_losses));
        let load = self.expert_load.as_deref();
        scalars.extend(routing("validation/router", self.routing_entropy, load));
        let information = self.mutual_information;
        scalars.extend(information.map(|v| scalar("validation/router/mutual_information", v)));
        scalars
    }
}

fn scalar(tag: &str, value: f64) -> (String, f32) {
    (tag.to_owned(), value as f32)
}

fn named(prefix: &str, values: &BTreeMap<String, f64>) -> impl Iterator<Item = (String, f32)> {
    values.iter().map(move |(name, &value)| (format!("{prefix}/{name}"), value as f32))
}

fn routing(
    prefix: &str,
    entropy: Option<f64>,
    load: Option<&[f64]>,
) -> impl Iterator<Item = (String, f32)> {
    let entropy = entropy.map(|value| (format!("{prefix}/entropy"), value as f32));
    let load = load.unwrap_or_default().iter().enumerate();
    entropy
        .into_iter()
        .chain(load.map(move |(e, &share)| (format!("{prefix}/load/expert_{e}"), share as f32)))
}

/// Writes a run's metrics to its folder. Of several processes, only the first has one.
#[derive(Debug)]
pub struct MetricsWriter {
    file: fs_err::File,
    events: Option<EventWriter>,
}

impl MetricsWriter {
    /// Opens `metrics.jsonl` in `run_dir` to write on after `resume_step`, and if `tensorboard`, a
    /// new event file in its `tensorboard` folder. The folders are made if need be.
    ///
    /// `resume_step` is the step of the checkpoint that is resumed. What a broken run wrote after
    /// it is cut off, so that the file becomes that of an unbroken run; this takes a new file and
    /// a rename, so that no moment is without a complete one. With 0 the run starts anew and what
    /// another one left is dropped, its step 0 included.
    pub fn open(run_dir: &Path, tensorboard: bool, resume_step: u64) -> Result<Self> {
        fs_err::create_dir_all(run_dir).context("cannot create the folder of the run")?;
        let path = run_dir.join(METRICS_FILE);
        cut_after(&path, resume_step)?;
        let file = fs_err::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .context("cannot open the file of metrics")?;
        let first_step = if resume_step == 0 { 0 } else { resume_step + 1 };
        let events = tensorboard
            .then(|| EventWriter::create(&run_dir.join(TENSORBOARD_DIR), first_step))
            .transpose()?;
        Ok(Self { file, events })
    }

    /// Writes one line, and its scalars to TensorBoard. Nothing is held back in a buffer.
    ///
    /// A step's metrics must be written before its checkpoint is saved: a run that resumes from it
    /// does not write them again.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let mut line = serde_json::to_vec(metrics).context("cannot put the metrics into JSON")?;
        line.push(b'\n');
        self.file.write_all(&line).context("cannot write the metrics")?;
        match &mut self.events {
            Some(events) => events.write_scalars(metrics.step(), metrics.scalars()),
            None => Ok(()),
        }
    }
}

/// Cuts the lines after `resume_step` off the file at `path`, if there is one.
fn cut_after(path: &Path, resume_step: u64) -> Result<()> {
    let bytes = match fs_err::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context("cannot read the metrics so far"),
    };
    let kept = match resume_step {
        0 => Vec::new(),
        _ => kept_lines(&bytes, resume_step)
            .with_context(|| format!("cannot add to the metrics in `{}`", path.display()))?,
    };
    if kept == bytes {
        return Ok(());
    }
    let new_path = path.with_extension("jsonl.new");
    let mut file = fs_err::File::create(&new_path).context("cannot shorten the metrics")?;
    file.write_all(&kept).context("cannot shorten the metrics")?;
    file.sync_all().context("cannot shorten the metrics")?;
    fs_err::rename(&new_path, path).context("cannot shorten the metrics")
}

/// The lines up to `resume_step`, to the byte. A last line without its end, which a broken run
/// leaves, is dropped unless it is whole.
fn kept_lines(bytes: &[u8], resume_step: u64) -> Result<Vec<u8>> {
    /// All that has to be known of a line, so that other versions' lines are kept too.
    #[derive(Deserialize)]
    struct Line {
        step: u64,
    }

    let mut kept = Vec::with_capacity(bytes.len() + 1);
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let ended = line.ends_with(b"\n");
        match serde_json::from_slice::<Line>(line) {
            Ok(Line { step }) if step <= resume_step => {
                kept.extend_from_slice(line);
                if !ended {
                    kept.push(b'\n');
                }
            }
            Ok(_) => {}
            Err(_) if !ended => {}
            Err(error) => bail!(
                "line {} is no JSON object with a `step`: {error}\n\
                 hint: repair or delete the line, then resume again",
                index + 1
            ),
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(step: u64) -> Metrics {
        let loss = 4.0 - 0.1 * step as f64;
        Metrics::Train(StepMetrics {
            step,
            epoch: 0.25 * step as f64,
            tokens_seen: 900 * step,
            loss,
            domain_losses: [("law".into(), loss - 0.5), ("medicine".into(), loss + 0.5)].into(),
            load_balancing_loss: Some(1.0625),
            uniform_mse: Some(0.01),
            router_z_loss: Some(1.5),
            orthogonality: None,
            mature_experts: None,
            temperature: Some(1.0),
            routing_entropy: Some(0.5),
            expert_load: Some(vec![0.25, 0.75, 0.0]),
            grad_norm: 0.7,
            learning_rates: [("adapters".into(), 1e-3), ("router".into(), 5e-4)].into(),
            label_tokens: 900,
            step_secs: 0.5,
            host_secs: 0.25,
            tokens_per_sec: 2048.0,
            peak_memory_bytes: 3 << 29,
        })
    }

    fn validation(step: u64) -> Metrics {
        Metrics::Validation(ValidationMetrics {
            step,
            tokens_seen: 900 * step,
            loss: 3.5,
            token_loss: 3.25,
            domain_losses: [("law".into(), 3.0), ("medicine".into(), 4.0)].into(),
            routing_entropy: None,
            expert_load: None,
            mutual_information: None,
            eval_secs: 1.5,
        })
    }

    /// The steps of a run that evaluates before the first and at each even one.
    fn write_steps(writer: &mut MetricsWriter, steps: std::ops::RangeInclusive<u64>) -> Result<()> {
        for step in steps {
            if step > 0 {
                writer.write(&train(step))?;
            }
            if step % 2 == 0 {
                writer.write(&validation(step))?;
            }
        }
        Ok(())
    }

    /// What `metrics.jsonl` must hold after these steps without a break.
    fn unbroken(steps: std::ops::RangeInclusive<u64>) -> Result<String> {
        let dir = tempfile::tempdir()?;
        write_steps(&mut MetricsWriter::open(dir.path(), false, 0)?, steps)?;
        read(dir.path())
    }

    fn read(run_dir: &Path) -> Result<String> {
        Ok(fs_err::read_to_string(run_dir.join(METRICS_FILE))?)
    }

    #[test]
    fn metrics_survive_a_round_trip() -> Result<()> {
        for metrics in [train(3), validation(4)] {
            let line = serde_json::to_string(&metrics)?;
            assert_eq!(serde_json::from_str::<Metrics>(&line)?, metrics);
        }
        Ok(())
    }

    #[test]
    fn a_line_is_tagged_by_kind_and_leaves_out_what_does_not_apply() -> Result<()> {
        assert_eq!(
            serde_json::to_string(&validation(2))?,
            r#"{"kind":"validation","step":2,"tokens_seen":1800,"loss":3.5,"token_loss":3.25,"#
                .to_owned()
                + r#""domain_losses":{"law":3.0,"medicine":4.0},"eval_secs":1.5}"#
        );
        assert!(serde_json::to_string(&train(1))?.starts_with(r#"{"kind":"train","step":1,"#));
        Ok(())
    }

    #[test]
    fn a_value_that_is_not_finite_becomes_null_and_is_read_as_nan() -> Result<()> {
        let Metrics::Train(mut metrics) = train(1) else { unreachable!() };
        metrics.loss = f64::NAN;
        metrics.grad_norm = f64::INFINITY;
        metrics.domain_losses.insert("law".into(), f64::NAN);
        metrics.routing_entropy = Some(f64::NAN);
        metrics.expert_load = Some(vec![f64::NAN, 1.0]);
        let line = serde_json::to_string(&Metrics::Train(metrics))?;
        assert!(line.contains(r#""loss":null,"domain_losses":{"law":null,"#), "{line}");

        let Metrics::Train(metrics) = serde_json::from_str(&line)? else { unreachable!() };
        assert!(metrics.loss.is_nan() && metrics.grad_norm.is_nan());
        assert!(metrics.domain_losses["law"].is_nan());
        assert!(metrics.routing_entropy.is_some_and(f64::is_nan));
        assert!(metrics.expert_load.is_some_and(|load| load[0].is_nan() && load[1] == 1.0));
        Ok(())
    }

    #[test]
    fn a_resumed_runs_file_equals_an_unbroken_ones() -> Result<()> {
        let dir = tempfile::tempdir()?;
        write_steps(&mut MetricsWriter::open(dir.path(), true, 0)?, 0..=7)?;
        let mut resumed = MetricsWriter::open(dir.path(), true, 4)?;
        assert_eq!(read(dir.path())?, unbroken(0..=4)?);
        write_steps(&mut resumed, 5..=9)?;
        assert_eq!(read(dir.path())?, unbroken(0..=9)?);
        let names = fs_err::read_dir(dir.path())?.count();
        assert_eq!(names, 2, "nothing but the metrics and the TensorBoard folder is left");
        Ok(())
    }

    #[test]
    fn a_half_written_last_line_is_cut_off() -> Result<()> {
        let whole = unbroken(1..=3)?;
        for half in ["{", r#"{"kind":"train","step":4,"epoch":0."#] {
            let dir = tempfile::tempdir()?;
            fs_err::write(dir.path().join(METRICS_FILE), format!("{whole}{half}"))?;
            let mut resumed = MetricsWriter::open(dir.path(), false, 3)?;
            write_steps(&mut resumed, 4..=5)?;
            assert_eq!(read(dir.path())?, unbroken(1..=5)?);
        }
        Ok(())
    }

    #[test]
    fn a_whole_last_line_that_lacks_its_end_is_kept() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let whole = unbroken(1..=3)?;
        fs_err::write(dir.path().join(METRICS_FILE), whole.trim_end())?;
        MetricsWriter::open(dir.path(), false, 3)?;
        assert_eq!(read(dir.path())?, whole);
        Ok(())
    }

    #[test]
    fn a_run_that_starts_anew_keeps_nothing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        write_steps(&mut MetricsWriter::open(dir.path(), false, 0)?, 0..=3)?;
        MetricsWriter::open(dir.path(), false, 0)?;
        assert_eq!(read(dir.path())?, "");
        Ok(())
    }

    #[test]
    fn a_broken_line_amid_others_is_an_error_that_names_it() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let text = unbroken(1..=1)? + "oops\n" + &unbroken(3..=3)?;
        fs_err::write(dir.path().join(METRICS_FILE), &text)?;
        let error = MetricsWriter::open(dir.path(), false, 3).unwrap_err();
        let message = format!("{error:#}");
        assert!(message.contains("line 2 is no JSON object with a `step`"), "{message}");
        assert_eq!(read(dir.path())?, text, "the file is left as it was");
        Ok(())
    }

    #[test]
    fn tags_name_domains_groups_and_experts() {
        let mut tags: Vec<_> = train(1).scalars().into_iter().map(|(tag, _)| tag).collect();
        tags.extend(validation(2).scalars().into_iter().map(|(tag, _)| tag));
        tags.sort();
        let expected = [
            "router/entropy",
            "router/load/expert_0",
            "router/load/expert_1",
            "router/load/expert_2",
            "router/load_balancing_loss",
            "router/temperature",
            "router/uniform_mse",
            "router/z_loss",
            "train/grad_norm",
            "train/learning_rate/adapters",
            "train/learning_rate/router",
            "train/loss",
            "train/loss/law",
            "train/loss/medicine",
            "train/peak_memory_gib",
            "train/tokens_per_sec",
            "validation/loss",
            "validation/loss/law",
            "validation/loss/medicine",
            "validation/token_loss",
        ];
        assert_eq!(tags, expected);
        assert!(train(1).scalars().contains(&("train/peak_memory_gib".into(), 1.5)));
    }
}
