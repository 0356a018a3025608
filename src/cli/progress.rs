//! Progress bars on stderr. If stderr is no terminal, or one on which nothing can be drawn again
//! (`TERM=dumb`), there are none.

use std::cell::Cell;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::terminal;
use crate::data::LoadProgress;
use crate::hub::DownloadProgress;

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is a literal").progress_chars("━╸─")
}

pub(super) fn bar(show: bool, len: u64, template: &str) -> ProgressBar {
    let shows = show && terminal::has_bars();
    let target = if shows { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(Some(len), target).with_style(style(template))
}

/// A bar that counts, for example evaluated blocks.
pub struct CountBar(ProgressBar);

impl CountBar {
    /// A bar that counts up to `len`, with the label `what`.
    pub fn new(show: bool, what: &'static str, len: u64) -> Self {
        Self(bar(show, len, "{msg} {bar:30} {pos}/{len} [{eta} left]").with_message(what))
    }

    /// Sets the count.
    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// The bar for reading and tokenizing source files, in bytes.
pub struct LoadBar {
    bar: ProgressBar,
    is_over: Cell<bool>,
}

impl LoadBar {
    /// A bar that appears with the first file.
    pub fn new(show: bool) -> Self {
        let bar = bar(show, 0, "reading data {bar:30} {bytes}/{total_bytes} [{eta} left]");
        Self { bar, is_over: Cell::new(false) }
    }

    /// Draws the progress, and removes the bar after the last file.
    pub fn update(&self, progress: &LoadProgress) {
        self.bar.set_length(progress.num_bytes);
        self.bar.set_position(progress.bytes_done);
        if progress.files_done == progress.num_files {
            self.bar.finish_and_clear();
            if !self.is_over.replace(true) {
                let (files, cached) = (progress.num_files, progress.files_cached);
                tracing::debug!("read {files} file(s), the tokens of {cached} from the cache");
            }
        }
    }
}

/// The bar for downloads from the Hub.
pub struct DownloadBar(ProgressBar);

impl DownloadBar {
    /// A bar that appears with the first download.
    pub fn new(show: bool) -> Self {
        Self(bar(
            show,
            0,
            "{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} [{eta} left]",
        ))
    }
}

impl DownloadProgress for DownloadBar {
    fn start(&self, file: &str, total_bytes: u64) {
        self.0.reset();
        self.0.set_length(total_bytes);
        self.0.set_message(file.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// The bar for a study, which counts the steps of all runs.
pub struct StudyBar(ProgressBar);

impl StudyBar {
    /// A bar of `num_steps` steps.
    pub fn new(show: bool, num_steps: u64) -> Self {
        let bar = bar(show, num_steps, "{msg} {bar:24} step {pos}/{len} [{eta} left]");
        bar.enable_steady_tick(Duration::from_millis(500));
        Self(bar)
    }

    /// Begins anew with the estimate of the time that is left, after `done` steps.
    pub fn begin(&self, done: u64) {
        self.0.set_position(done);
        self.0.reset_eta();
    }

    /// Draws the number of steps, and a message beside the bar.
    pub fn update(&self, steps: u64, message: String) {
        self.0.set_position(steps);
        self.0.set_message(message);
    }

    /// Prints a line above the bar, or logs it if no bar is drawn.
    pub fn line(&self, text: String) {
        if self.0.is_hidden() {
            tracing::info!("{text}");
        } else {
            self.0.println(text);
        }
    }

    /// Logs an error above the bar.
    pub fn error(&self, text: &str) {
        self.0.suspend(|| tracing::error!("{text}"));
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
