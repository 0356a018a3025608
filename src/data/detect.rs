//! Says what a file of data holds, without reading all of it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow};

use super::records::Records;
use super::source::SourceFile;
use crate::config::{FileFormat, RecordConfig, RecordShape};

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detected {
    /// Its format.
    pub format: FileFormat,
    /// The shape of its first record; `None` for a plain text.
    pub shape: Option<RecordShape>,
    /// The number of its records; a plain text counts as one.
    pub num_records: u64,
    /// Whether the number is exact. Otherwise it is estimated from the first records.
    pub is_exact: bool,
    /// The file's size on disk.
    pub num_bytes: u64,
}

/// Number of records that are read to estimate how many there are.
const FIRST_RECORDS: u64 = 1000;

/// Finds out what the file at `path` holds, in the same way as training does. Its first records are
/// read.
///
/// - `records`: what a config says about the file's records; by default, nothing
///
/// # Errors
/// A file that training would refuse: one of an unknown kind, one that does not hold what its name
/// says, a table without the columns of records, and a first record that is malformed. The message
/// says what was seen.
pub fn detect(path: &Path, records: &RecordConfig) -> Result<Detected> {
    if let Err((key, fault)) = records.known_shape() {
        return Err(anyhow!("`{key}` {fault}"));
    }
    let source = SourceFile::new(path.to_owned(), records.clone())?;
    let SourceFile { format, num_bytes, .. } = source;
    let detected = Detected { format, shape: None, num_records: 1, is_exact: true, num_bytes };
    if format == FileFormat::Text {
        return Ok(detected);
    }
    let bytes_read = Arc::new(AtomicU64::new(0));
    let mut reader = Records::open(&source, Arc::clone(&bytes_read))?;
    let first = reader.read()?.with_context(|| format!("`{}` has no records", path.display()))?;
    let place = source.place(first.number);
    let shape = first.record.map_err(|fault| anyhow!("`{place}`: {fault}"))?.shape;
    let detected = Detected { shape: Some(shape), ..detected };
    if let Some(num_records) = reader.num_records() {
        return Ok(Detected { num_records, ..detected });
    }
    let mut num_records = 1;
    while num_records < FIRST_RECORDS {
        if reader.read()?.is_none() {
            return Ok(Detected { num_records, ..detected });
        }
        num_records += 1;
    }
    let bytes_read = bytes_read.load(Ordering::Relaxed).max(1);
    let num_records = (num_records as f64 * num_bytes as f64 / bytes_read as f64).round() as u64;
    Ok(Detected { num_records, is_exact: false, ..detected })
}
