//! Signals that end a training run: the first asks it to save and stop, the second ends it at once.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::ffi;

/// What is added to a signal's number for the exit code of a process that it ended, as shells do.
const SIGNAL_EXIT: i32 = 128;

/// Whether and by what a run was asked to stop.
#[derive(Debug, Default)]
pub struct Interrupt {
    is_set: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Listens from now on to SIGINT, SIGTERM and SIGHUP, but for those that the process was started to
    /// ignore.
    pub fn listen() -> Result<Self> {
        let this = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|s| !ffi::ignores_signal(*s)) {
            // every file is written beside its place and renamed, so that the process may end anywhere
            let code = SIGNAL_EXIT + signal;
            flag::register_conditional_shutdown(signal, code, Arc::clone(&this.is_set))?;
            flag::register_usize(signal, Arc::clone(&this.signal), signal as usize)?;
            flag::register(signal, Arc::clone(&this.is_set))?;
        }
        Ok(this)
    }

    /// Set by the first signal.
    pub fn flag(&self) -> &AtomicBool {
        &self.is_set
    }

    /// The error of a run that has saved and stopped, and that lies in `run_dir`.
    pub fn error(&self, run_dir: &Path) -> Interrupted {
        let signal = self.signal.load(Ordering::Relaxed) as i32;
        Interrupted { exit_code: (SIGNAL_EXIT + signal) as u8, run_dir: quoted(run_dir) }
    }
}

/// A run was interrupted, and has saved: no fault, but not what was asked for either.
#[derive(Debug)]
pub struct Interrupted {
    /// Of the process: 128 and the signal's number.
    pub exit_code: u8,
    run_dir: String,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted; go on with `dylora train --resume {}`", self.run_dir)
    }
}

impl std::error::Error for Interrupted {}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=,@%".contains(c);
    match text.chars().all(is_plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_resumes_can_be_pasted() {
        for (path, text) in [
            ("/runs/a-1.b", "/runs/a-1.b"),
            ("/my runs/a", "'/my runs/a'"),
            ("/it's/$HOME", "'/it'\\''s/$HOME'"),
        ] {
            assert_eq!(quoted(Path::new(path)), text);
        }
    }
}
