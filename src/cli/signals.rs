//! Signals that end a training run or a study. The first signal asks it to save and stop; the
//! second ends the process at once.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::ffi;

/// The exit code of a process that a signal ended is this plus the signal's number, as in shells.
const SIGNAL_EXIT: i32 = 128;

/// Whether a run was asked to stop, and by which signal.
#[derive(Debug, Default)]
pub struct Interrupt {
    is_set: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Starts to listen to SIGINT, SIGTERM and SIGHUP, except to those that the process was started
    /// to ignore, as under `nohup`.
    pub fn listen() -> Result<Self> {
        let this = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|s| !ffi::ignores_signal(*s)) {
            // the process may end at any point, because files are written elsewhere and then
            // renamed
            let code = SIGNAL_EXIT + signal;
            flag::register_conditional_shutdown(signal, code, Arc::clone(&this.is_set))?;
            flag::register_usize(signal, Arc::clone(&this.signal), signal as usize)?;
            flag::register(signal, Arc::clone(&this.is_set))?;
        }
        Ok(this)
    }

    /// Whether there was a signal.
    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    /// The flag that the first signal sets.
    pub fn flag(&self) -> &AtomicBool {
        &self.is_set
    }

    /// The error of a run in `run_dir` that has saved and stopped.
    pub fn error(&self, run_dir: &Path) -> Interrupted {
        self.error_with(format!("go on with `dylora train --resume {}`", quoted(run_dir)))
    }

    /// The error of a command that has stopped. `hint` says how to go on.
    pub fn error_with(&self, hint: String) -> Interrupted {
        // in a world, the signal may have reached another process
        let signal = match self.signal.load(Ordering::Relaxed) as i32 {
            0 => SIGTERM,
            signal => signal,
        };
        Interrupted { exit_code: (SIGNAL_EXIT + signal) as u8, hint }
    }
}

/// A command was interrupted and has saved. It has not failed, but it is not complete either.
#[derive(Debug)]
pub struct Interrupted {
    /// The exit code of the process: 128 plus the signal's number.
    pub exit_code: u8,
    hint: String,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted; {}", self.hint)
    }
}

impl std::error::Error for Interrupted {}

/// A path, quoted for a shell if it has special characters.
pub fn quoted(path: &Path) -> String {
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
