//! A standard error that may be lost without ending the process.

use std::io::{self, Write};

/// Standard error as a writer that never fails. What cannot be written is dropped, for example when
/// the pipe or terminal is closed or the disk is full.
#[derive(Debug, Clone, Copy)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}
