//! Records of JSON: a line of a `.jsonl` file, or an element of an array.
//!
//! Keys that a record does not use are skipped without keeping their values.

use std::fmt;
use std::io::{self, BufRead};

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::keys::{Key, Keys, Raw};
use super::source::MAX_RECORD_BYTES;

/// Parses a record. The error describes the fault; the caller puts the file and the line before it.
pub(super) fn parse(record: &[u8], keys: &Keys) -> Result<Raw, String> {
    let text = std::str::from_utf8(record)
        .map_err(|error| format!("invalid UTF-8 at byte {}", error.valid_up_to() + 1))?;
    if !text.trim_start().starts_with('{') && serde_json::from_str::<Value>(text).is_ok() {
        return Err("is no JSON object; write `{\"text\": \"...\"}`".into());
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let raw = RawSeed(keys).deserialize(&mut deserializer);
    let raw = raw.and_then(|raw| deserializer.end().map(|()| raw));
    raw.map_err(|error| fault(&error))
}

/// The names of a record's keys, in their order.
pub(super) fn key_names(record: &[u8]) -> Vec<String> {
    let object = serde_json::from_slice::<Map<String, Value>>(record).unwrap_or_default();
    object.into_iter().map(|(name, _)| name).collect()
}

/// serde_json's message, with the column at the front instead of `at line 1 column 5` at the end.
/// It counts lines within this one record, of which an element of an array may have several.
fn fault(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    let line = match error.line() {
        1 => String::new(),
        line => format!(" of its line {line}"),
    };
    format!("invalid JSON at column {}{line}: {message}", error.column())
}

struct RawSeed<'a>(&'a Keys);

impl<'de> DeserializeSeed<'de> for RawSeed<'_> {
    type Value = Raw;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RawSeed<'_> {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut raw = Raw::default();
        let mut seen = [false; Key::ALL.len()];
        while let Some(key) = map.next_key_seed(KeySeed(self.0))? {
            let Some(key) = key else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if std::mem::replace(&mut seen[key as usize], true) {
                return Err(A::Error::custom(format!("duplicate field `{}`", self.0.name(key))));
            }
            raw.set(key, map.next_value()?);
        }
        Ok(raw)
    }
}

struct KeySeed<'a>(&'a Keys);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Option<Key>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<Key>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Option<Key>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Option<Key>, E> {
        Ok(self.0.find(name))
    }
}

/// The elements of a JSON array, one after another. Only one of them is in memory.
pub(super) struct Elements {
    reader: Box<dyn BufRead>,
    /// The line on which the element that was read last begins, counted from 1.
    pub number: u64,
    line: u64,
    place: Place,
}

/// Where in an array the reader stands.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Outside,
    First,
    Next,
    End,
}

impl Elements {
    pub fn new(reader: Box<dyn BufRead>) -> Self {
        Self { reader, number: 0, line: 1, place: Place::Outside }
    }

    /// Reads the next element into `element`; returns false at the end of the array.
    ///
    /// # Errors
    /// A file that cannot be read or is no array, and an element that is too long.
    pub fn read(&mut self, element: &mut Vec<u8>) -> io::Result<bool> {
        element.clear();
        if self.place == Place::Outside {
            self.skip_mark()?;
            self.expect(b"[", "the beginning of an array, `[`")?;
            self.place = Place::First;
        }
        let token = self.peek_token()?;
        let first = match (self.place, token) {
            (Place::End, None) => return Ok(false),
            (Place::End, Some(_)) => return Err(self.unexpected("the end of the file")),
            (Place::First | Place::Next, Some(b']')) => {
                self.expect(b"]", "`]`")?;
                self.place = Place::End;
                return self.read(element);
            }
            (Place::Next, _) => {
                self.expect(b",", "`,` or `]` behind an element")?;
                self.peek_token()?
            }
            (_, first) => first,
        };
        if first.is_none_or(|byte| b",]".contains(&byte)) {
            return Err(self.unexpected("an element"));
        }
        self.number = self.line;
        self.take_element(element)?;
        self.place = Place::Next;
        Ok(true)
    }

    /// Skips a byte order mark.
    fn skip_mark(&mut self) -> io::Result<()> {
        if self.reader.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
            self.reader.consume(3);
        }
        Ok(())
    }

    /// The next byte that is no white space; `None` at the end of the file.
    fn peek_token(&mut self) -> io::Result<Option<u8>> {
        while let Some(byte) = self.peek()? {
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
            self.line += u64::from(byte == b'\n');
            self.reader.consume(1);
        }
        Ok(None)
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.reader.fill_buf()?.first().copied())
    }

    fn expect(&mut self, one_of: &[u8], what: &str) -> io::Result<()> {
        match self.peek_token()? {
            Some(byte) if one_of.contains(&byte) => {
                self.reader.consume(1);
                Ok(())
            }
            _ => Err(self.unexpected(what)),
        }
    }

    fn unexpected(&mut self, expected: &str) -> io::Error {
        let found = match self.peek_token() {
            Err(error) => return error,
            Ok(None) => "the file ends".to_owned(),
            Ok(Some(byte)) => format!("`{}` stands there", byte.escape_ascii()),
        };
        io::Error::other(format!("line {} should have {expected}, but {found}", self.line))
    }

    /// Reads up to the byte that ends an element, which is left in the reader.
    fn take_element(&mut self, element: &mut Vec<u8>) -> io::Result<()> {
        let (mut depth, mut in_string, mut is_escaped) = (0_usize, false, false);
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Err(self.unexpected("the end of an element"));
            }
            let mut used = 0;
            let mut is_done = false;
            for byte in buffer {
                match byte {
                    _ if is_escaped => is_escaped = false,
                    b'\\' if in_string => is_escaped = true,
                    b'"' => in_string = !in_string,
                    _ if in_string => {}
                    b'{' | b'[' => depth += 1,
                    b',' | b'}' | b']' if depth == 0 => {
                        is_done = true;
                        break;
                    }
                    b'}' | b']' => depth -= 1,
                    _ => {}
                }
                self.line += u64::from(*byte == b'\n');
                used += 1;
            }
            element.extend_from_slice(&buffer[..used]);
            self.reader.consume(used);
            if element.len() > MAX_RECORD_BYTES {
                return Err(too_long(&format!("the element on line {}", self.number)));
            }
            if is_done {
                return Ok(());
            }
        }
    }
}

/// The error for a record that is too long.
pub(super) fn too_long(what: &str) -> io::Error {
    io::Error::other(format!(
        "{what} is longer than {} MiB, the most that a record may have\nhint: split it into \
         several",
        MAX_RECORD_BYTES >> 20
    ))
}
