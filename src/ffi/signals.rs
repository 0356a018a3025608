//! Signals that would end the process without a word become errors.
//!
//! `SIGXFSZ`, which a write beyond the limit of file sizes (`ulimit -f`) sends, is ignored: the
//! write then fails. `SIGBUS` comes from a mapped file that has become shorter or that the disk no
//! longer gives. Its handler names the file and ends the process with code 1. Files are mapped and
//! not read because a base's pages are then shared by all processes and loaded when they are used;
//! no check of a file's size could rule out that it shrinks a moment later.

use std::ffi::{c_int, c_void};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Beginning of the message of the handler; the file's path follows.
const BEFORE: &[u8] = b"error: `";
const AFTER: &[u8] = b"` has become shorter or cannot be read, while it is mapped into memory\n\
    hint: start again with whole files; a damaged cache of tokens is made again by itself\n";
/// What the process knows of its maps (proc(5)).
const MAPS: &std::ffi::CStr = c"/proc/self/maps";
/// Longest line of it that is read: the path has at most 4096 bytes.
const LINE_BYTES: usize = 4400;

/// Makes errors of the signals that tell of faulty files.
pub fn files_fail_with_errors() {
    // SAFETY: the handler calls only functions that a handler may call; a `sigaction` of zeros is
    // valid
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        // on the thread's own stack, because the one for handlers is too small for a line
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

/// Has a process asked to stop, by SIGTERM, once the thread that starts it ends.
pub fn end_with_parent(command: &mut Command) {
    // SAFETY: `prctl` may be called between fork and exec, and takes numbers alone
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        })
    };
}

extern "C" fn on_bus_error(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid `info`; `open`, `read`, `write` and `_exit` may be called
    // in a handler, and the buffers are on its stack
    unsafe {
        let address = (*info).si_addr() as usize;
        let file = libc::open(MAPS.as_ptr(), libc::O_RDONLY);
        let say = |bytes: &[u8]| libc::write(2, bytes.as_ptr().cast(), bytes.len());
        say(BEFORE);
        let mut line = [0_u8; LINE_BYTES];
        let (mut len, mut byte) = (0, 0_u8);
        while libc::read(file, (&raw mut byte).cast(), 1) == 1 {
            if byte != b'\n' {
                if len < LINE_BYTES {
                    line[len] = byte;
                    len += 1;
                }
                continue;
            }
            if let Some(path) = path_at(&line[..len], address) {
                say(path);
                break;
            }
            len = 0;
        }
        say(AFTER);
        libc::_exit(1);
    }
}

/// The path of a line of `/proc/self/maps` if its range has the address:
/// `start-end permissions offset device inode path`.
fn path_at(line: &[u8], address: usize) -> Option<&[u8]> {
    let range = line.split(|&byte| byte == b' ').next()?;
    let mut ends = range.split(|&byte| byte == b'-').map(hexadecimal);
    let (start, end) = (ends.next()??, ends.next()??);
    let path = line.iter().position(|&byte| byte == b'/')?;
    (start..end).contains(&address).then(|| &line[path..])
}

fn hexadecimal(digits: &[u8]) -> Option<usize> {
    let add = |number: usize, digit: &u8| {
        Some(number.checked_mul(16)? + char::from(*digit).to_digit(16)? as usize)
    };
    digits.iter().try_fold(0, add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_maps_gives_its_path() {
        let line = b"7f00-7fff r--p 00000000 08:01 42                     /a b/model.safetensors";
        assert_eq!(path_at(line, 0x7f10), Some(&b"/a b/model.safetensors"[..]));
        assert_eq!(path_at(line, 0x7fff), None);
        assert_eq!(path_at(b"7f00-7fff rw-p 00000000 00:00 0", 0x7f10), None);
        assert_eq!(path_at(b"", 0), None);
    }
}
