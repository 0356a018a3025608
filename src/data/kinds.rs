//! What kinds of records were read, for people.

use std::fmt;

use serde::Serialize;

use super::keys::Keys;
use super::source::SourceFile;
use super::visible::count;
use crate::config::{FileFormat, RecordShape};

/// Records of one kind in the files of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordKind {
    /// The format of their files.
    pub format: FileFormat,
    /// Their shape; `None` for plain texts.
    pub shape: Option<RecordShape>,
    /// The names of their keys, as `` `prompt`/`completion` ``; empty for plain texts.
    pub keys: String,
    /// How many there are, without the malformed ones.
    pub num_records: u64,
}

/// As ``7,473 records of `question`/`answer` (parquet)``.
impl fmt::Display for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, shape, keys, num_records } = self;
        let number = count(*num_records);
        let plural = if *num_records == 1 { "" } else { "s" };
        match shape {
            None => write!(f, "{number} plain text{plural}"),
            Some(_) => write!(f, "{number} record{plural} of {keys} ({})", format.name()),
        }
    }
}

/// The kinds of records in a file.
///
/// - `shapes`: the number of records of each shape, in the order of [`RecordShape::ALL`]
/// - `num_texts`: the number of documents, if they are plain texts
pub(super) fn of_file(
    source: &SourceFile,
    shapes: [u64; RecordShape::ALL.len()],
    num_texts: usize,
) -> Vec<RecordKind> {
    let format = source.format;
    if format == FileFormat::Text {
        let num_records = num_texts as u64;
        return vec![RecordKind { format, shape: None, keys: String::new(), num_records }];
    }
    let keys = Keys::new(&source.records);
    let counts = RecordShape::ALL.into_iter().zip(shapes).filter(|(_, count)| *count > 0);
    let kind = |(shape, num_records)| RecordKind {
        format,
        shape: Some(shape),
        keys: keys.of_shape(shape),
        num_records,
    };
    counts.map(kind).collect()
}

/// Adds records to those of the same kind in `kinds`.
pub(super) fn add(kinds: &mut Vec<RecordKind>, more: &[RecordKind]) {
    for kind in more {
        let is_same = |other: &&mut RecordKind| {
            (other.format, other.shape, &other.keys) == (kind.format, kind.shape, &kind.keys)
        };
        match kinds.iter_mut().find(is_same) {
            Some(same) => same.num_records += kind.num_records,
            None => kinds.push(kind.clone()),
        }
    }
}

/// Kinds in one line; empty if there are none.
pub(super) fn listed(kinds: &[RecordKind]) -> String {
    let texts: Vec<String> = kinds.iter().map(ToString::to_string).collect();
    texts.join(", ")
}
