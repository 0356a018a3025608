//! Signals of processes that tests start.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Lets the command's process notice SIGINT and SIGHUP. Without this, it ignores SIGINT if a script
/// runs the tests in the background, and SIGHUP if they run under `nohup`.
pub fn notice_signals(command: &mut Command) {
    // SAFETY: `signal` may be called between fork and exec
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGINT, libc::SIGHUP] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        })
    };
}
