//! The metrics of a run that is resumed from an earlier step while later checkpoints exist.
//!
//! ```text
//! metrics.jsonl          the steps up to the one that is resumed, then those done since
//! metrics.later.jsonl    the steps after the last checkpoint written since, up to the newest one
//! ```
//!
//! The later steps are kept as long as their checkpoints are, since the run may be resumed from one
//! of those next. The lines of a checkpoint at step `s` are thus those of `metrics.jsonl` before
//! the first later one, and then the later ones up to `s`; without later ones, those of
//! `metrics.jsonl` up to `s`. A process may be killed between any two of the writes below: the
//! files before and after each of them have the same lines in this sense.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::durable;

/// The name of the metrics file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The name of the file in a run's folder that holds the metrics of later steps.
pub(crate) const LATER_FILE: &str = "metrics.later.jsonl";

/// A line with its step.
type Line<'a> = (u64, &'a [u8]);

/// Makes `metrics.jsonl` in `run_dir` that of the checkpoint at `step`, from which the run is
/// resumed, and keeps the later lines up to `newest`, the step of the newest checkpoint. With 0 the
/// run starts anew and keeps no line, those of step 0 included.
pub(super) fn resume_at(run_dir: &Path, step: u64, newest: u64) -> Result<()> {
    let [path, later] = [METRICS_FILE, LATER_FILE].map(|name| run_dir.join(name));
    let [now, before] = [read(&path)?, read(&later)?];
    if newest == 0 {
        replace(&path, &now, &[])?;
        return replace(&later, &before, &[]);
    }
    let before_lines = lines(&before, &later)?;
    let first_later = before_lines.iter().map(|line| line.0).min();
    let is_earlier = |line: &Line<'_>| first_later.is_none_or(|first| line.0 < first);
    let mut all = lines(&now, &path)?;
    all.retain(is_earlier);
    all.extend(before_lines);
    let kept = joined(&all, |line| step > 0 && line <= step);
    let kept_later = joined(&all, |line| line > step && line <= newest);
    // whichever file gains lines is written first
    if first_later.is_none_or(|first| step < first) && !kept_later.is_empty() {
        replace(&later, &before, &kept_later)?;
        return replace(&path, &now, &kept);
    }
    replace(&path, &now, &kept)?;
    replace(&later, &before, &kept_later)
}

/// Forgets the later lines up to `step`, of which the run is about to write a checkpoint.
pub(super) fn forget_until(run_dir: &Path, step: u64) -> Result<()> {
    let later = run_dir.join(LATER_FILE);
    let before = read(&later)?;
    let kept = joined(&lines(&before, &later)?, |line| line > step);
    replace(&later, &before, &kept)
}

/// The bytes of a file; none if it is absent.
fn read(path: &Path) -> Result<Vec<u8>> {
    match fs_err::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error).context("cannot read the metrics so far"),
    }
}

/// Replaces the bytes of a file, unless they are the same. The file of later steps is removed if
/// nothing is left.
fn replace(path: &Path, before: &[u8], after: &[u8]) -> Result<()> {
    if before == after {
        return Ok(());
    }
    if after.is_empty() && path.ends_with(LATER_FILE) {
        return Ok(fs_err::remove_file(path)?);
    }
    durable::replace(path, after).context("cannot shorten the metrics")
}

/// The lines that satisfy `is_kept`, each with its line feed.
fn joined(lines: &[Line<'_>], is_kept: impl Fn(u64) -> bool) -> Vec<u8> {
    let mut bytes = vec![];
    for (_, line) in lines.iter().filter(|line| is_kept(line.0)) {
        bytes.extend_from_slice(line);
        if !line.ends_with(b"\n") {
            bytes.push(b'\n');
        }
    }
    bytes
}

/// The lines of a file, unchanged. If the last line lacks its newline, as a broken run may leave
/// it, it counts only if it is complete JSON.
fn lines<'a>(bytes: &'a [u8], path: &Path) -> Result<Vec<Line<'a>>> {
    /// The only field that is read, so that lines of other versions are kept too.
    #[derive(Deserialize)]
    struct Step {
        step: u64,
    }
    let mut found = vec![];
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        match serde_json::from_slice::<Step>(line) {
            Ok(Step { step }) => found.push((step, line)),
            Err(_) if !line.ends_with(b"\n") => {}
            Err(error) => bail!(
                "cannot add to the metrics in `{}`: line {} is no JSON object with a `step`: \
                 {error}\nhint: repair or delete the line, then resume again",
                path.display(),
                index + 1
            ),
        }
    }
    Ok(found)
}
