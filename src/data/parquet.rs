//! The rows of a Parquet file, by the record API of the crate `parquet`.
//!
//! Only the columns that records use are decoded, page by page. A list becomes a list and a struct
//! an object. A struct always has all of its fields, so that a field without a value counts as
//! absent; only the `content` of a message stays `null`. Bytes that are UTF-8 count as text.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::json::too_long;
use super::keys::{Keys, Raw};
use super::source::MAX_RECORD_BYTES;
use crate::ffi;

/// Number of values of a column that are decoded at once.
const BATCH_ROWS: usize = 64;

/// The rows of a file.
pub(super) struct Rows {
    rows: RowIter<'static>,
    /// All columns of the file.
    pub columns: Vec<String>,
    /// The number of rows.
    pub num_rows: u64,
    /// The number of the row that was read last, counted from 1.
    pub number: u64,
}

impl Rows {
    /// Opens a file.
    ///
    /// # Errors
    /// A file that is no Parquet file, or that is damaged.
    pub fn open(file: fs_err::File, keys: &Keys) -> Result<Self> {
        let file = file.into_parts().0;
        guarded(|| {
            let reader = SerializedFileReader::new(file)?;
            let metadata = reader.metadata().file_metadata();
            let num_rows =
                u64::try_from(metadata.num_rows()).context("it has a negative length")?;
            let schema = metadata.schema_descr().root_schema_ptr();
            let name = |column: &Arc<Type>| column.name().to_owned();
            let columns: Vec<String> = schema.get_fields().iter().map(name).collect();
            let used =
                schema.get_fields().iter().filter(|column| keys.find(column.name()).is_some());
            let used = Type::group_type_builder(schema.name()).with_fields(used.cloned().collect());
            let rows = RowIter::from_file_into(Box::new(reader));
            let rows = rows.project(Some(used.build()?))?.with_batch_size(BATCH_ROWS);
            Ok(Self { rows, columns, num_rows, number: 0 })
        })
    }

    /// The next row, as the number of its bytes and its values or their fault; `None` at the end of
    /// the file.
    ///
    /// # Errors
    /// A damaged file, and a row that is too long.
    pub fn read(&mut self, keys: &Keys) -> Result<Option<(usize, Result<Raw, String>)>> {
        if self.number == self.num_rows {
            return Ok(None);
        }
        let row = guarded(|| Ok(self.rows.next().transpose()?))?;
        let row = row.with_context(|| {
            format!(
                "the file says that it has {} rows, but ends after {}",
                self.num_rows, self.number
            )
        })?;
        self.number += 1;
        let used = || {
            let columns = row.get_column_iter();
            columns.filter_map(|(name, field)| Some((keys.find(name)?, field)))
        };
        let num_bytes = used().map(|(_, field)| size(field)).sum();
        ensure!(num_bytes <= MAX_RECORD_BYTES, too_long(&format!("row {}", self.number)));
        let raw = used().try_fold(Raw::default(), |mut raw, (key, field)| {
            raw.set(key, value(field)?);
            Ok(raw)
        });
        Ok(Some((num_bytes, raw)))
    }
}

/// What `read` returns. The crate panics at some faults of a file, which are errors too.
fn guarded<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        Err(anyhow!("the file is damaged: {}", ffi::panic_message(panic.as_ref())))
    })
}

/// About how many bytes of text a value has.
fn size(field: &Field) -> usize {
    match field {
        Field::Str(text) => text.len(),
        Field::Bytes(bytes) => bytes.len(),
        Field::Group(row) => {
            row.get_column_iter().map(|(name, field)| name.len() + size(field)).sum()
        }
        Field::ListInternal(list) => list.elements().iter().map(size).sum(),
        Field::MapInternal(map) => {
            map.entries().iter().map(|(key, value)| size(key) + size(value)).sum()
        }
        _ => 8,
    }
}

/// A value as JSON.
///
/// # Errors
/// A value that JSON has no type for. The error describes it.
fn value(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => (*value).into(),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => value.to_f64().into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Decimal(_) => return Err("has a decimal number, which is not read".into()),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => return Err("has bytes that are no UTF-8".into()),
        },
        Field::Group(row) => object(row)?,
        Field::ListInternal(list) => {
            list.elements().iter().map(value).collect::<Result<Vec<Value>, String>>()?.into()
        }
        Field::MapInternal(map) => {
            let entry = |(key, of): &(Field, Field)| match key {
                Field::Str(key) => Ok((key.clone(), value(of)?)),
                _ => Err("has a map whose keys are no texts".to_owned()),
            };
            Value::Object(map.entries().iter().map(entry).collect::<Result<_, String>>()?)
        }
    })
}

fn object(row: &Row) -> Result<Value, String> {
    let mut object = Map::new();
    for (name, field) in row.get_column_iter() {
        let value = value(field)?;
        if !value.is_null() || name == "content" {
            object.insert(name.clone(), value);
        }
    }
    Ok(Value::Object(object))
}
