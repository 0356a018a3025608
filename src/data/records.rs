//! The records of a file of any format, one after another: the one place where a format is chosen.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, Result, anyhow, bail};
use fs_err::File;

use super::json::{self, Elements};
use super::keys::{Key, Keys, Raw};
use super::parquet::Rows;
use super::record::{self, Record};
use super::source::{Lines, SourceFile};
use super::table::Table;
use crate::config::{FileFormat, RecordShape};

/// A file of records that is being read.
pub(super) struct Records<'a> {
    source: &'a SourceFile,
    keys: Keys,
    reader: Reader,
    buffer: Vec<u8>,
}

enum Reader {
    Lines(Lines),
    Elements(Elements),
    Table(Table),
    Rows(Box<Rows>),
}

/// A record, or what is wrong with it.
pub(super) struct Item {
    /// The number of the line on which it begins, or of its row in a Parquet file, from 1.
    pub number: u64,
    /// How many bytes it has in the file, once these are unpacked.
    pub num_bytes: usize,
    pub record: Result<Record, String>,
}

impl<'a> Records<'a> {
    /// Opens a file, which is not one plain text.
    ///
    /// - `bytes_read`: grows by the number of bytes read from disk
    ///
    /// # Errors
    /// A file that cannot be opened, and a table whose columns are not those of records.
    pub fn open(source: &'a SourceFile, bytes_read: Arc<AtomicU64>) -> Result<Self> {
        let mut keys = Keys::new(&source.records);
        let path = source.path.display();
        let cannot_read = || format!("cannot read `{path}`");
        let reader = match source.format {
            FileFormat::Jsonl => Reader::Lines(Lines::new(source.open(bytes_read)?)),
            FileFormat::Json => Reader::Elements(Elements::new(source.open(bytes_read)?)),
            FileFormat::Csv | FileFormat::Tsv => {
                let delimiter = if source.format == FileFormat::Csv { b',' } else { b'\t' };
                let lines = Lines::new(source.open(bytes_read)?);
                Reader::Table(Table::new(lines, delimiter, &keys).with_context(cannot_read)?)
            }
            FileFormat::Parquet => {
                // the file is not read from its start to its end
                bytes_read.fetch_add(source.num_bytes, std::sync::atomic::Ordering::Relaxed);
                let rows =
                    Rows::open(File::open(&source.path)?, &keys).with_context(cannot_read)?;
                Reader::Rows(Box::new(rows))
            }
            FileFormat::Text => bail!("`{path}` is one plain text and has no records"),
        };
        let columns = match &reader {
            Reader::Lines(_) | Reader::Elements(_) => None,
            Reader::Table(table) => Some(&table.columns),
            Reader::Rows(rows) => Some(&rows.columns),
        };
        if let Some(columns) = columns {
            let shape = shape_of_columns(columns, &keys);
            keys.shape = Some(shape.map_err(|fault| anyhow!("`{path}` {fault}"))?);
        }
        Ok(Self { source, keys, reader, buffer: vec![] })
    }

    /// The number of records, if the file says it.
    pub fn num_records(&self) -> Option<u64> {
        match &self.reader {
            Reader::Rows(rows) => Some(rows.num_rows),
            Reader::Lines(_) | Reader::Elements(_) | Reader::Table(_) => None,
        }
    }

    /// The number of the record that was read last.
    pub fn number(&self) -> u64 {
        match &self.reader {
            Reader::Lines(lines) => lines.number,
            Reader::Elements(elements) => elements.number,
            Reader::Table(table) => table.number,
            Reader::Rows(rows) => rows.number,
        }
    }

    /// The next record; `None` at the end of the file.
    ///
    /// # Errors
    /// A file that cannot be read on. A record that is malformed is no error.
    pub fn read(&mut self) -> Result<Option<Item>> {
        let found = self.read_raw();
        let found = found.with_context(|| {
            let what = if self.source.format == FileFormat::Parquet { "row" } else { "line" };
            format!("cannot read `{}` after {what} {}", self.source.path.display(), self.number())
        })?;
        let number = self.number();
        Ok(found.map(|(num_bytes, raw)| {
            let record = raw.and_then(|raw| record::convert(raw, &self.keys));
            Item { number, num_bytes, record: record.map_err(|fault| self.with_keys(fault)) }
        }))
    }

    fn read_raw(&mut self) -> Result<Option<(usize, Result<Raw, String>)>> {
        let Self { keys, reader, buffer, .. } = self;
        Ok(match reader {
            Reader::Lines(lines) => loop {
                if !lines.read(buffer)? {
                    return Ok(None);
                }
                if !buffer.trim_ascii().is_empty() {
                    break Some((buffer.len(), json::parse(buffer, keys)));
                }
            },
            Reader::Elements(elements) => match elements.read(buffer)? {
                true => Some((buffer.len(), json::parse(buffer, keys))),
                false => None,
            },
            Reader::Table(table) => table.read()?,
            Reader::Rows(rows) => rows.read(keys)?,
        })
    }

    /// A fault of the record in `buffer`, with its keys if it lacks those that it needs.
    fn with_keys(&self, fault: String) -> String {
        if !record::is_lack_of_keys(&fault) {
            return fault;
        }
        let names = json::key_names(&self.buffer);
        match names.is_empty() {
            true => fault,
            false => format!("{fault}; its keys are {}", quoted(&names)),
        }
    }
}

/// The shape of the records of a table.
///
/// # Errors
/// Columns that no shape has, or several.
fn shape_of_columns(columns: &[String], keys: &Keys) -> Result<RecordShape, String> {
    let mut raw = Raw::default();
    for column in columns {
        if let Some(key) = keys.find(column) {
            raw.set(key, true.into());
        }
    }
    let names = quoted(columns);
    let given = Key::ALL.into_iter().filter(|key| keys.is_given(*key));
    for key in given {
        if !raw.has(key) {
            return Err(format!("has no column `{}`; its columns are {names}", keys.name(key)));
        }
    }
    let shape = record::shape(&raw, keys)
        .and_then(|shape| record::check_keys(&raw, keys, shape).map(|()| shape));
    shape.map_err(|fault| format!("{fault}; its columns are {names}{FIELDS_HINT}"))
}

const FIELDS_HINT: &str = "\nhint: name the columns, as in `fields = { prompt = \"question\", \
                           completion = \"answer\" }`, which is `--fields \
                           prompt=question,completion=answer`";

fn quoted(names: &[String]) -> String {
    const MOST: usize = 20;
    let shown: Vec<String> = names.iter().take(MOST).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(MOST) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
