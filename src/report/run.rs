//! A run as its folder shows it: metrics, config, checkpoint, study. Nothing is computed anew but
//! hashes and the norms of the experts' updates, and no model is needed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;

use crate::checkpoint::{self, Preferred, TrainState};
use crate::config::{Config, expert_names, load};
use crate::eval::experts::ExpertReport;
use crate::model::experts::spec::part_name;
use crate::model::experts::update::{Update, updates};
use crate::study::report::StudyReport;
use crate::train::files::METRICS_FILE;
use crate::train::machine::{MACHINE_FILE, Machine};
use crate::train::metrics::{Metrics, StepMetrics, ValidationMetrics, WindowMetrics};

/// The name of a study's results.
const STUDY_FILE: &str = "study.json";

/// What a run's folder shows.
#[derive(Debug)]
pub struct Run {
    /// The end of its path, as long as it takes to tell it from the others of a report.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Its steps, in their order.
    pub steps: Vec<StepMetrics>,
    /// Its windows.
    pub windows: Vec<WindowMetrics>,
    /// Its evaluations.
    pub validations: Vec<ValidationMetrics>,
    /// Whether the last line of its metrics is not whole, because it is just being written or the
    /// run was interrupted.
    pub is_cut: bool,
    /// Its config, and the text of it.
    pub config: Option<(Config, String)>,
    /// What it was started on, if it says so.
    pub machine: Option<Machine>,
    /// Its checkpoint, or why there is none.
    pub checkpoint: Result<CheckpointFacts, String>,
    /// The study in this folder.
    pub study: Option<StudyReport>,
    /// The files that were read.
    pub files: Vec<FileFacts>,
}

/// What a checkpoint says without a model.
#[derive(Debug)]
pub struct CheckpointFacts {
    /// Its folder.
    pub dir: PathBuf,
    /// Its counters.
    pub state: TrainState,
    /// How far each expert has moved.
    pub moved: Vec<Moved>,
}

/// How far an expert has moved from its start ([`crate::eval::experts`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    /// Its name in files.
    pub name: String,
    /// The Frobenius norm of its update; `None` if that needs the base, as for DoRA.
    pub update_norm: Option<f64>,
    /// The same, divided by the norm of the base's weights; `None` without the base.
    pub relative_norm: Option<f64>,
}

impl From<&ExpertReport> for Moved {
    fn from(report: &ExpertReport) -> Self {
        Self {
            name: report.name.clone(),
            update_norm: Some(report.update_norm),
            relative_norm: Some(report.relative_norm),
        }
    }
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileFacts {
    /// Its path in the run's folder.
    pub name: String,
    /// Its size.
    pub num_bytes: u64,
    /// BLAKE3 of its content.
    pub hash: String,
}

impl Run {
    /// Reads the folder of a run or of a study. A run may be in progress or interrupted.
    ///
    /// # Errors
    /// A folder with neither metrics nor a study, and a file that is damaged; the message names it.
    pub fn read(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            bail!("there is no folder `{}`\nhint: name the folder of a run", dir.display());
        }
        let mut run = Self {
            name: String::new(),
            dir: dir.to_owned(),
            steps: vec![],
            windows: vec![],
            validations: vec![],
            is_cut: false,
            config: None,
            machine: None,
            checkpoint: Err("there is no checkpoint".into()),
            study: None,
            files: vec![],
        };
        let metrics = run.file(METRICS_FILE)?;
        for name in [STUDY_FILE.to_owned(), format!("study/{STUDY_FILE}")] {
            if run.study.is_none() {
                run.study = run.json(&name)?;
            }
        }
        match metrics {
            Some(text) => run.take_metrics(&text)?,
            None if run.study.is_some() => {}
            None => bail!(
                "`{}` has no `{METRICS_FILE}`, so it is not the folder of a run\nhint: name a \
                 `run.dir`, or the folder of a study that is over",
                dir.display()
            ),
        }
        if let Some(text) = run.file("config.toml")? {
            let path = dir.join("config.toml");
            let config = load::resolve(&text, &[]);
            run.config = Some((config.with_context(|| format!("in `{}`", path.display()))?, text));
        }
        run.machine = run.json(MACHINE_FILE)?;
        if checkpoint::folder(dir).is_dir() {
            run.read_checkpoint()?;
        }
        Ok(run)
    }

    /// The text of a file; `None` if there is none.
    fn file(&mut self, name: &str) -> Result<Option<String>> {
        let path = self.dir.join(name);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs_err::read(&path)?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        self.files.push(FileFacts { name: name.into(), num_bytes: bytes.len() as u64, hash });
        let text = String::from_utf8(bytes);
        text.map(Some).map_err(|_| anyhow!("`{}` is not UTF-8", path.display()))
    }

    fn json<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.file(name)? else { return Ok(None) };
        let parsed = serde_json::from_str(&text);
        parsed.map(Some).with_context(|| format!("`{}` is damaged", self.dir.join(name).display()))
    }

    fn take_metrics(&mut self, text: &str) -> Result<()> {
        for (index, line) in text.split_inclusive('\n').enumerate() {
            match serde_json::from_str(line) {
                Ok(Metrics::Train(metrics)) => self.steps.push(metrics),
                Ok(Metrics::Window(metrics)) => self.windows.push(metrics),
                Ok(Metrics::Validation(metrics)) => self.validations.push(metrics),
                // the line is just being written, or its run was interrupted
                Err(_) if !line.ends_with('\n') => self.is_cut = true,
                Err(error) => bail!(
                    "line {} of `{}` is damaged: {error}\nhint: repair or delete the line",
                    index + 1,
                    self.dir.join(METRICS_FILE).display()
                ),
            }
        }
        Ok(())
    }

    fn read_checkpoint(&mut self) -> Result<()> {
        let dir = match checkpoint::find(&self.dir, Preferred::Best) {
            Ok(dir) => fs_err::canonicalize(dir)?,
            Err(error) => {
                self.checkpoint = Err(format!("{error:#}"));
                return Ok(());
            }
        };
        let state = checkpoint::read_state(&dir)?;
        let specs = checkpoint::read_experts(&dir)?;
        let tensors = checkpoint::read_model(&dir)?;
        let moved = |expert: usize| {
            let norm2 = || -> Result<f64> {
                let updates = updates(&specs, &tensors, expert)?;
                Ok(updates.values().map(Update::norm2).sum())
            };
            let update_norm = (!specs[expert].use_dora).then(norm2).transpose()?.map(f64::sqrt);
            Ok(Moved { name: part_name(&specs, expert), update_norm, relative_norm: None })
        };
        let moved = (0..specs.len()).map(moved).collect::<Result<_>>();
        let moved = moved.with_context(|| format!("in checkpoint `{}`", dir.display()))?;
        let mut hasher = blake3::Hasher::new();
        let file = fs_err::File::open(dir.join("model.safetensors"))?;
        let num_bytes = file.metadata()?.len();
        hasher.update_reader(file)?;
        let step = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.files.push(FileFacts {
            name: format!("checkpoints/{step}/model.safetensors"),
            num_bytes,
            hash: hasher.finalize().to_hex().to_string(),
        });
        self.checkpoint = Ok(CheckpointFacts { dir, state, moved });
        Ok(())
    }

    /// Whether it has metrics: the folder of a study has none.
    pub(crate) fn has_metrics(&self) -> bool {
        self.files.iter().any(|file| file.name == METRICS_FILE)
    }

    /// The names of its domains, in the config's order, then those that only the metrics know.
    pub fn domains(&self) -> Vec<String> {
        let config = self.config.iter().flat_map(|(config, _)| &config.data.domains);
        let mut names: Vec<String> = config.map(|domain| domain.name.clone()).collect();
        let steps = self.steps.iter().flat_map(|step| step.domain_losses.keys());
        let validations = self.validations.iter().flat_map(|pass| pass.domain_losses.keys());
        let windows = self.windows.iter().flat_map(|window| window.mix.keys());
        for name in steps.chain(validations).chain(windows) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// The domains of a window's routing weights with their values, in the order of
    /// [`Run::domains`].
    pub(crate) fn in_order<'a, T>(
        &self,
        of_domains: &'a BTreeMap<String, T>,
    ) -> Vec<(&'a String, &'a T)> {
        let order = self.domains();
        let mut all: Vec<_> = of_domains.iter().collect();
        all.sort_by_key(|(domain, _)| order.iter().position(|name| name == *domain));
        all
    }

    /// The name of each expert, with those of its domains: `expert_0 (law)`.
    pub(crate) fn expert_names(&self, count: usize) -> Vec<String> {
        let domains = self.config.as_ref().map_or(&[][..], |(config, _)| &config.data.domains);
        expert_names(domains, count)
    }

    /// The last window that says how tokens were routed.
    pub(crate) fn last_routed(&self) -> Option<&WindowMetrics> {
        self.windows.iter().rev().find(|window| window.routing.is_some())
    }

    /// The evaluation with the lowest loss.
    pub(crate) fn best_validation(&self) -> Option<&ValidationMetrics> {
        let finite = self.validations.iter().filter(|pass| pass.loss.is_finite());
        finite.min_by(|a, b| a.loss.total_cmp(&b.loss))
    }
}

/// Reads the folders of a report, and names each run so that no two have the same name.
///
/// # Errors
/// As for [`Run::read`], and a folder that is named twice.
pub fn read_all(dirs: &[PathBuf]) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = vec![];
    let mut real: Vec<PathBuf> = vec![];
    for dir in dirs {
        let run = Run::read(dir)?;
        let path = fs_err::canonicalize(dir)?;
        if real.contains(&path) {
            bail!("`{}` is named twice\nhint: name each run once", dir.display());
        }
        real.push(path);
        runs.push(run);
    }
    for (run, name) in runs.iter_mut().zip(names(&real)) {
        run.name = name;
    }
    Ok(runs)
}

/// The shortest ends of paths by which they differ.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let end = |path: &Path, parts: usize| {
        let all: Vec<_> = path.components().collect();
        let own: PathBuf = all[all.len().saturating_sub(parts)..].iter().collect();
        own.to_string_lossy().into_owned()
    };
    let name = |path: &PathBuf| {
        let is_own = |parts: &usize| {
            paths.iter().filter(|other| end(other, *parts) == end(path, *parts)).count() == 1
        };
        end(path, (1..path.components().count()).find(is_own).unwrap_or(usize::MAX))
    };
    paths.iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_long_as_they_must_be() {
        let paths = ["/runs/a/mixture", "/runs/b/mixture", "/runs/single"].map(PathBuf::from);
        assert_eq!(names(&paths), ["a/mixture", "b/mixture", "single"]);
        assert_eq!(names(&paths[..1]), ["mixture"]);
    }

    #[test]
    fn domains_stand_in_the_order_of_the_config() -> Result<()> {
        let folder = tempfile::tempdir()?;
        fs_err::write(folder.path().join(METRICS_FILE), "")?;
        let config = "base.source = { path = \"base\" }\ndata.seq_len = 8\ndata.domains = [\
                      {name = \"law\", train = [\"a\"]}, {name = \"code\", train = [\"b\"]}]";
        fs_err::write(folder.path().join("config.toml"), config)?;
        let run = Run::read(folder.path())?;
        let weights = ["code", "law"].map(|name| (name.to_owned(), 0.5)).into();
        let names: Vec<&String> =
            run.in_order(&weights).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["law", "code"]);
        Ok(())
    }

    #[test]
    fn a_line_that_is_not_whole_is_left_out_at_the_end_alone() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join(METRICS_FILE);
        let whole = r#"{"kind":"validation","step":0,"tokens_seen":0,"loss":1.0,"token_loss":1.0,"#
            .to_owned()
            + "\"domain_losses\":{},\"eval_secs\":1.0}\n";
        fs_err::write(&file, format!("{whole}{{\"kind\":\"tr"))?;
        let run = Run::read(folder.path())?;
        assert_eq!((run.validations.len(), run.steps.len(), run.is_cut), (1, 0, true));
        fs_err::write(&file, format!("oops\n{whole}"))?;
        let error = format!("{:#}", Run::read(folder.path()).expect_err("a line is damaged"));
        assert!(error.contains("line 1 of `") && error.contains(METRICS_FILE), "{error}");
        fs_err::remove_file(&file)?;
        let error = format!("{:#}", Run::read(folder.path()).expect_err("there are no metrics"));
        assert!(error.contains("has no `metrics.jsonl`"), "{error}");
        Ok(())
    }
}
