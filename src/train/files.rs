//! The files of a run's metrics: `metrics.jsonl`, and events for TensorBoard.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use super::history::METRICS_FILE;
use super::history::{self, LATER_FILE};
use super::metrics::{Metrics, ValidationMetrics};
use super::summaries;
use super::tensorboard::{EventWriter, Value};
use crate::config::Config;
use crate::eval::EvalReport;
use crate::{checkpoint, durable};

/// The name of the folder in a run's folder that holds the event files.
pub(crate) const TENSORBOARD_DIR: &str = "tensorboard";

/// Writes a run's metrics to its folder.
#[derive(Debug)]
pub struct MetricsWriter {
    run_dir: PathBuf,
    /// `None` in a process that writes nothing.
    file: Option<fs_err::File>,
    events: Option<EventWriter>,
    first_step: u64,
}

impl MetricsWriter {
    /// A writer that writes nothing, for the processes of a world after the first.
    pub fn absent() -> Self {
        Self { run_dir: PathBuf::new(), file: None, events: None, first_step: 0 }
    }

    /// Opens `metrics.jsonl` in `run_dir` to continue after `resume_step`, and with `tensorboard` a
    /// new event file in the folder `tensorboard`. The folders are created if necessary.
    ///
    /// `resume_step` is the step of the checkpoint from which the run is resumed. The lines that a
    /// broken run wrote after this step are removed, so that the file becomes that of an unbroken
    /// run; those of later checkpoints are kept aside (`history.rs`). The shortened file is written
    /// beside the old one and renamed, so that a complete file is there at any moment. With 0 the
    /// run starts anew: no line is kept in the file, lines of step 0 included.
    pub fn open(run_dir: &Path, tensorboard: bool, resume_step: u64) -> Result<Self> {
        fs_err::create_dir_all(run_dir).context("cannot create the folder of the run")?;
        let path = run_dir.join(METRICS_FILE);
        let newest = checkpoint::steps(run_dir)?.last().copied().unwrap_or(0);
        history::resume_at(run_dir, resume_step, newest.max(resume_step))?;
        let file = fs_err::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .context("cannot open the file of metrics")?;
        let first_step = if resume_step == 0 { 0 } else { resume_step + 1 };
        let events = tensorboard
            .then(|| EventWriter::create(&run_dir.join(TENSORBOARD_DIR), first_step))
            .transpose()?;
        durable::sync_folder(run_dir)?;
        Ok(Self { run_dir: run_dir.to_owned(), file: Some(file), events, first_step })
    }

    /// Writes the config as a text for TensorBoard. Its step is the first one that this process
    /// makes.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn write_config(&mut self, config: &Config) -> Result<()> {
        match &mut self.events {
            Some(events) => events.write_values(self.first_step, vec![summaries::config(config)]),
            None => Ok(()),
        }
    }

    /// Writes the metrics of an evaluation as [`Self::write`] does, and its heat maps and
    /// histograms for TensorBoard.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn write_evaluation(
        &mut self,
        metrics: ValidationMetrics,
        report: &EvalReport,
    ) -> Result<()> {
        let step = metrics.step;
        self.write(&Metrics::Validation(metrics))?;
        match &mut self.events {
            Some(events) => events.write_values(step, summaries::evaluation(report)?),
            None => Ok(()),
        }
    }

    /// Writes one line, and its scalars for TensorBoard. Nothing is buffered.
    ///
    /// Write a step's metrics before its checkpoint, and call [`Self::settle`] in between: a run
    /// that is resumed from the checkpoint does not write them again.
    ///
    /// # Errors
    /// If a file cannot be written, or if it is not at its path any more.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut line = serde_json::to_vec(metrics).context("cannot put the metrics into JSON")?;
        line.push(b'\n');
        file.write_all(&line).context("cannot write the metrics")?;
        durable::check_place(file, &self.run_dir.join(METRICS_FILE))?;
        match &mut self.events {
            Some(events) => {
                let scalars = metrics.scalars().into_iter();
                let values = scalars.map(|(tag, value)| Value::scalar(tag, value));
                events.write_values(metrics.step(), values.collect())
            }
            None => Ok(()),
        }
    }

    /// Waits until the metrics are on disk. The run is then about to write a checkpoint of `step`,
    /// and what was kept of an earlier history up to this step is forgotten.
    pub fn settle(&mut self, step: u64) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        file.sync_all().context("cannot write the metrics")?;
        match self.run_dir.join(LATER_FILE).exists() {
            true => history::forget_until(&self.run_dir, step),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::samples::{train, validation};
    use super::*;

    /// Writes the metrics of `steps`, with an evaluation at each even step, 0 included.
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

    /// What `metrics.jsonl` must hold after these steps of an unbroken run.
    fn unbroken(steps: std::ops::RangeInclusive<u64>) -> Result<String> {
        let dir = tempfile::tempdir()?;
        write_steps(&mut MetricsWriter::open(dir.path(), false, 0)?, steps)?;
        read(dir.path())
    }

    fn read(run_dir: &Path) -> Result<String> {
        Ok(fs_err::read_to_string(run_dir.join(METRICS_FILE))?)
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
}
