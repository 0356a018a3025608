//! Tables as text: RFC 4180's CSV, and the same with tabs (TSV).
//!
//! A row ends with a line feed, or with a carriage return and a line feed. A value that begins with
//! `"` ends at the next single `"`; in between, `""` stands for `"`, and delimiters and line ends
//! are part of the value. In any other value, `"` is a character like others. Python's `csv` reads
//! the same from such files. What it guesses from others is refused: text behind a closing quote,
//! and a quote that is never closed. The first row names the columns. An empty value counts as
//! absent, and a row without any character is skipped.

use std::io;

use serde_json::Value;

use super::json::too_long;
use super::keys::{Key, Keys, Raw};
use super::source::{Lines, MAX_RECORD_BYTES};

/// The rows of a table.
pub(super) struct Table {
    lines: Lines,
    delimiter: u8,
    /// The columns, and what each of them means.
    pub columns: Vec<String>,
    keys: Vec<Option<Key>>,
    /// The line on which the row that was read last begins, counted from 1.
    pub number: u64,
    row: Vec<u8>,
}

/// The state of [`values`] behind a byte.
#[derive(Clone, Copy)]
enum State {
    /// At the start of a value.
    Start,
    Plain,
    Quoted,
    /// Behind a quote within a quoted value, which ends it unless another follows.
    Closed,
}

impl Table {
    /// Reads the names of the columns.
    ///
    /// # Errors
    /// A file that cannot be read, and names that are faulty.
    pub fn new(lines: Lines, delimiter: u8, keys: &Keys) -> io::Result<Self> {
        let mut table =
            Self { lines, delimiter, columns: vec![], keys: vec![], number: 0, row: vec![] };
        let fault = |fault: String| io::Error::other(format!("the row of columns {fault}"));
        if table.read_row()? {
            table.columns = values(&table.row, delimiter).map_err(fault)?;
        }
        let columns = table.columns.iter().enumerate();
        if let Some((_, twice)) = columns
            .into_iter()
            .find(|(at, name)| !name.is_empty() && table.columns[..*at].contains(name))
        {
            return Err(fault(format!("names `{twice}` twice")));
        }
        table.keys = table.columns.iter().map(|name| keys.find(name)).collect();
        Ok(table)
    }

    /// The next row, as the number of its bytes and its values or their fault; `None` at the end of
    /// the file.
    ///
    /// # Errors
    /// A file that cannot be read, a row that is too long, and a quote that is never closed.
    pub fn read(&mut self) -> io::Result<Option<(usize, Result<Raw, String>)>> {
        if !self.read_row()? {
            return Ok(None);
        }
        Ok(Some((self.row.len(), values(&self.row, self.delimiter).and_then(|v| self.raw(v)))))
    }

    fn raw(&self, values: Vec<String>) -> Result<Raw, String> {
        if values.len() != self.keys.len() {
            let (found, expected) = (values.len(), self.keys.len());
            return Err(format!("has {found} values, but there are {expected} columns"));
        }
        let mut raw = Raw::default();
        for (key, value) in self.keys.iter().zip(values) {
            match key {
                None => {}
                Some(_) if value.is_empty() => {}
                // an index is a number, which a table cannot tell from a text
                Some(Key::Expert) => {
                    let number = value.parse::<u64>().map(Value::from);
                    raw.set(Key::Expert, number.unwrap_or(Value::String(value)));
                }
                Some(key) => raw.set(*key, Value::String(value)),
            }
        }
        Ok(raw)
    }

    /// Reads the next row that is not empty, without the end of its line.
    fn read_row(&mut self) -> io::Result<bool> {
        self.row.clear();
        let (mut line, mut state) = (Vec::new(), State::Start);
        while self.lines.read(&mut line)? {
            if self.row.is_empty() {
                if line.iter().all(|byte| b"\r\n".contains(byte)) {
                    continue;
                }
                self.number = self.lines.number;
            }
            self.row.extend_from_slice(&line);
            if self.row.len() > MAX_RECORD_BYTES {
                return Err(too_long(&format!("the row on line {}", self.number)));
            }
            state = line.iter().fold(state, |state, byte| next(state, *byte, self.delimiter));
            if !matches!(state, State::Quoted) {
                let end = if self.row.ends_with(b"\r\n") { 2 } else { 1 };
                if self.row.ends_with(b"\n") {
                    self.row.truncate(self.row.len() - end);
                }
                return Ok(true);
            }
        }
        match self.row.is_empty() {
            true => Ok(false),
            false => Err(io::Error::other(format!(
                "the row on line {} has a quote that is never closed",
                self.number
            ))),
        }
    }
}

fn next(state: State, byte: u8, delimiter: u8) -> State {
    match state {
        State::Quoted if byte == b'"' => State::Closed,
        State::Quoted => State::Quoted,
        State::Start | State::Plain | State::Closed if byte == delimiter => State::Start,
        State::Start | State::Closed if byte == b'"' => State::Quoted,
        State::Start | State::Plain | State::Closed => State::Plain,
    }
}

/// The values of a row.
fn values(row: &[u8], delimiter: u8) -> Result<Vec<String>, String> {
    if let Some(at) = row.iter().position(|byte| *byte == 0) {
        return Err(format!("has a byte 0 at byte {}, which no text has", at + 1));
    }
    let mut values = Vec::new();
    let mut value = Vec::new();
    let mut state = State::Start;
    for byte in row {
        let after = next(state, *byte, delimiter);
        match (&state, &after) {
            (State::Start | State::Plain | State::Closed, State::Start) => {
                values.push(text(std::mem::take(&mut value))?);
            }
            (State::Start, State::Quoted) | (State::Quoted, State::Closed) => {}
            (State::Closed, State::Plain) => {
                let column = values.len() + 1;
                return Err(format!("has text behind the closing quote of its value {column}"));
            }
            (_, State::Plain) if *byte == b'\r' => {
                return Err("has a carriage return outside of quotes".into());
            }
            // a doubled quote reopens a value, and stands for one
            _ => value.push(*byte),
        }
        state = after;
    }
    values.push(text(value)?);
    Ok(values)
}

fn text(value: Vec<u8>) -> Result<String, String> {
    String::from_utf8(value).map_err(|error| {
        let at = error.utf8_error().valid_up_to() + 1;
        format!("has invalid UTF-8 at byte {at} of a value")
    })
}
