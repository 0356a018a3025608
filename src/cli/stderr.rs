//! Standard error, the loss of which ends nothing.

use std::io::{self, Write};

/// Standard error as a writer that never fails: what nobody can read (a closed pipe or terminal, a full
/// disk) is dropped.
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
