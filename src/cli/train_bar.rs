//! The progress bar of a training run: what the run does, and how long its steps will still take.

use std::cell::Cell;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::progress::bar;

/// The bar for training steps, with the latest loss and speed.
pub struct TrainBar {
    bar: ProgressBar,
    num_steps: u64,
    /// If no bar is drawn, the first step and every multiple of this are logged.
    every: u64,
    pace: Pace,
}

impl TrainBar {
    /// A bar of `num_steps` steps, of which `done` were done in earlier sessions.
    pub fn new(show: bool, num_steps: u64, done: u64) -> Self {
        let bar = bar(show, num_steps, "{prefix} step {pos}/{len} {bar:20} {msg}");
        let bar = bar.with_position(done).with_prefix("training");
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar, num_steps, every: num_steps.div_ceil(20).max(1), pace: Pace::new() }
    }

    /// Draws or logs a finished step.
    pub fn step(&self, step: u64, loss: f64, tokens_per_sec: f64) {
        self.pace.step();
        self.bar.set_position(step);
        let message = format!("loss {loss:.4}  {tokens_per_sec:.0} tokens/s");
        if self.bar.is_hidden() && (step == 1 || step.is_multiple_of(self.every)) {
            tracing::info!("step {step}: {message}");
        }
        let left = self.pace.left(self.num_steps.saturating_sub(step));
        let left = left.map(|left| format!("  [{} left]", short(left))).unwrap_or_default();
        self.bar.set_message(message + &left);
    }

    /// Draws how far an evaluation is.
    pub fn validating(&self, done: u64, all: u64) {
        self.bar.set_prefix(format!("validating {done}/{all},"));
    }

    /// Draws that a checkpoint is written.
    pub fn saving(&self) {
        self.bar.set_prefix("saving,");
    }

    /// Draws that training goes on.
    pub fn training(&self) {
        self.bar.set_prefix("training");
        self.pace.begin_step();
    }

    /// Prints a line above the bar, or logs it if no bar is drawn.
    pub fn line(&self, text: String) {
        if self.bar.is_hidden() {
            tracing::info!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// How fast steps are, without the evaluations and checkpoints between them.
#[derive(Debug)]
struct Pace {
    begun: Cell<Instant>,
    /// Number of steps that count, and the time that they took. The first step does not count: it
    /// takes longer, because kernels are made and memory is reserved in it.
    steps: Cell<Option<u32>>,
    time: Cell<Duration>,
}

impl Pace {
    fn new() -> Self {
        let begun = Cell::new(Instant::now());
        Self { begun, steps: Cell::new(None), time: Cell::new(Duration::ZERO) }
    }

    /// Notes that a step begins now.
    fn begin_step(&self) {
        self.begun.set(Instant::now());
    }

    /// Notes that a step is done, and that the next one begins.
    fn step(&self) {
        let took = self.begun.replace(Instant::now()).elapsed();
        self.take(took);
    }

    fn take(&self, took: Duration) {
        match self.steps.get() {
            None => self.steps.set(Some(0)),
            Some(steps) => {
                self.steps.set(Some(steps + 1));
                self.time.set(self.time.get() + took);
            }
        }
    }

    /// The time that so many steps will take; `None` while that is not known.
    fn left(&self, steps: u64) -> Option<Duration> {
        let known = self.steps.get().filter(|&steps| steps > 0)?;
        Some(Duration::from_secs_f64(
            self.time.get().as_secs_f64() / f64::from(known) * steps as f64,
        ))
    }
}

/// A time in one or two units, as `2h 05m`.
fn short(time: Duration) -> String {
    let secs = time.as_secs();
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m {:02}s", secs / 60, secs % 60),
        _ => format!("{}h {:02}m", secs / 3600, secs / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_leaves_out_the_first_step() {
        let pace = Pace::new();
        pace.take(Duration::from_secs(60));
        assert_eq!(pace.left(10), None);
        pace.take(Duration::from_secs(1));
        pace.take(Duration::from_secs(3));
        assert_eq!(pace.left(10), Some(Duration::from_secs(20)));
    }

    #[test]
    fn times_are_short() {
        let shown = |secs| short(Duration::from_secs(secs));
        assert_eq!([59, 60, 3661].map(shown), ["59s", "1m 00s", "1h 01m"]);
    }
}
