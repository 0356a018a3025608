//! Signals of processes that tests start.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Lets the command's process notice SIGINT and SIGHUP. It would ignore SIGINT if the tests were
/// started in the background of a script, and SIGHUP under `nohup`.
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
