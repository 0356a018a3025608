//! TensorBoard event files: scalars, texts, images and histograms over steps, in the format of
//! TensorFlow's summaries.
//!
//! A file is a series of TFRecords (`tensorflow/core/lib/io/record_writer.cc`), little-endian:
//!
//! ```text
//! u64 length | u32 masked_crc(length) | length bytes | u32 masked_crc(bytes)
//! masked_crc(bytes) = rotate_right(crc32c(bytes), 15) + 0xa282ead8
//! ```
//!
//! Each record is an `Event` (`tensorflow/core/util/event.proto`, and `summary.proto` of
//! `tensorflow/core/framework`). The structs below have the names and field numbers of these
//! messages, but only the fields that are needed here. A text is a tensor of strings that the
//! plugin `text` shows as Markdown.
//!
//! The first event of a file names the format's version. The second starts a session at a step:
//! TensorBoard then drops the events of earlier files at this step and later
//! (`_CheckForRestartAndMaybePurge` in TensorBoard's `event_accumulator.py`). Those are the events
//! that a broken run wrote after the checkpoint from which it is resumed. TensorBoard's faster data
//! server (`--load_fast`) ignores the start of a session. It drops a tag's later steps when the tag
//! comes back with an earlier or equal step, so it shows the same scalars once each tag has been
//! written again.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use prost::Message;

use crate::durable;

/// The start of an event file's name; the seconds since 1970 follow.
pub(super) const FILE_PREFIX: &str = "events.out.tfevents.";
/// The first version whose session starts drop later steps of earlier files.
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.SessionStatus.START`.
const SESSION_START: i32 = 1;
/// `DataType.DT_STRING` of `types.proto`.
const DT_STRING: i32 = 7;
/// `Summary.Image.colorspace`.
const RGB: i32 = 3;

/// The event file of one process. Events are not buffered.
#[derive(Debug)]
pub struct EventWriter {
    file: fs_err::File,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new file in `dir`, which is created if necessary, and a session at `first_step`.
    ///
    /// The name is `events.out.tfevents.<seconds since 1970>.dylora.<process id>.0`. TensorFlow has
    /// the host's name in place of `dylora` and a count of writers in place of `0`. TensorBoard
    /// reads files in the order of their names, so the seconds are always greater than those of the
    /// files that are already there.
    pub fn create(dir: &Path, first_step: u64) -> Result<Self> {
        fs_err::create_dir_all(dir).context("cannot create the folder of TensorBoard events")?;
        let after_last = last_file_secs(dir)?.map_or(0, |secs| secs + 1);
        let secs = since_1970().as_secs().max(after_last);
        let name = format!("{FILE_PREFIX}{secs:010}.dylora.{}.0", std::process::id());
        let path = dir.join(name);
        let file = fs_err::File::create_new(&path)
            .context("cannot create a file of TensorBoard events")?;
        let mut writer = Self { file, path };
        writer.write(0, What::FileVersion(FILE_VERSION.into()))?;
        writer.write(first_step, What::SessionLog(SessionLog { status: SESSION_START }))?;
        Ok(writer)
    }

    /// Writes the values of a step as one event.
    ///
    /// # Errors
    /// If the file cannot be written, or if it is not at its path any more.
    pub fn write_values(&mut self, step: u64, value: Vec<Value>) -> Result<()> {
        self.write(step, What::Summary(Summary { value }))?;
        durable::check_place(&self.file, &self.path)
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let wall_time = since_1970().as_secs_f64();
        let event = Event { wall_time, step: step as i64, what: Some(what) };
        self.file
            .write_all(&record(&event.encode_to_vec()))
            .context("cannot write a TensorBoard event")
    }
}

/// The time since 1970-01-01 UTC; zero if the clock is set to an earlier time.
fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// The seconds in the name of the last event file in `dir`, if there is one.
fn last_file_secs(dir: &Path) -> Result<Option<u64>> {
    let mut last = None;
    for entry in fs_err::read_dir(dir).context("cannot list the TensorBoard events")? {
        let name = entry.context("cannot list the TensorBoard events")?.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(FILE_PREFIX));
        let secs = rest.and_then(|rest| rest.split('.').next()?.parse().ok());
        last = last.max(secs);
    }
    Ok(last)
}

/// One TFRecord around `data`.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length, &masked_crc(&length).to_le_bytes()[..], data, &masked_crc(data).to_le_bytes()]
        .concat()
}

/// CRC-32C, masked because the CRC of data that holds CRCs is a weak checksum
/// (`tensorflow/core/lib/hash/crc32c.h`).
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// A value of a tag.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional because the field is part of a `oneof` in the original, so that a zero is written
    /// too.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    image: Option<Image>,
    #[prost(message, optional, tag = "5")]
    histo: Option<HistogramProto>,
    #[prost(message, optional, tag = "8")]
    tensor: Option<TensorProto>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<SummaryMetadata>,
}

impl Value {
    /// A number.
    pub fn scalar(tag: String, value: f32) -> Self {
        Self { tag, simple_value: Some(value), ..Self::default() }
    }

    /// A text in Markdown.
    pub fn text(tag: &str, markdown: String) -> Self {
        let tensor = TensorProto { dtype: DT_STRING, string_val: vec![markdown.into_bytes()] };
        let plugin_data = Some(PluginData { plugin_name: "text".into() });
        let metadata = Some(SummaryMetadata { plugin_data });
        Self { tag: tag.into(), tensor: Some(tensor), metadata, ..Self::default() }
    }

    /// An image in RGB, as a PNG file.
    pub fn image(tag: String, [width, height]: [u32; 2], png: Vec<u8>) -> Self {
        let (width, height) = (width as i32, height as i32);
        let image = Image { height, width, colorspace: RGB, encoded_image_string: png };
        Self { tag, image: Some(image), ..Self::default() }
    }

    /// A histogram.
    pub fn histogram(tag: String, histogram: HistogramProto) -> Self {
        Self { tag, histo: Some(histogram), ..Self::default() }
    }
}

/// The distribution of some numbers. `bucket[i]` of them lie between `bucket_limit[i - 1]` and
/// `bucket_limit[i]`. TensorBoard takes `min` for the first bucket's lower end and `max` for the
/// last one's upper end, so neither of these buckets may be empty.
#[derive(Clone, PartialEq, Message)]
pub struct HistogramProto {
    /// The smallest number.
    #[prost(double, tag = "1")]
    pub min: f64,
    /// The largest number.
    #[prost(double, tag = "2")]
    pub max: f64,
    /// How many there are.
    #[prost(double, tag = "3")]
    pub num: f64,
    /// Their sum.
    #[prost(double, tag = "4")]
    pub sum: f64,
    /// The sum of their squares.
    #[prost(double, tag = "5")]
    pub sum_squares: f64,
    /// The upper ends of the buckets.
    #[prost(double, repeated, tag = "6")]
    pub bucket_limit: Vec<f64>,
    /// How many numbers each bucket has.
    #[prost(double, repeated, tag = "7")]
    pub bucket: Vec<f64>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

/// A tensor without a shape has one element.
#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryMetadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of all files in `dir`, in the order in which TensorBoard reads them.
    fn read_events(dir: &Path) -> Result<Vec<Event>> {
        let mut paths =
            fs_err::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        paths.sort();
        let mut events = Vec::new();
        for path in paths {
            let bytes = fs_err::read(path)?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let length = u64::from_le_bytes(rest[..8].try_into()?) as usize;
                let (head, tail) = rest.split_at(12 + length + 4);
                let data = &head[12..12 + length];
                assert_eq!(head, record(data));
                events.push(Event::decode(data)?);
                rest = tail;
            }
        }
        Ok(events)
    }

    /// Reference: the check values of CRC-32C (RFC 3720, B.4, and the catalogue's
    /// `crc32c("123456789") = 0xe3069283`), masked by TensorBoard 2.21.0's `masked_crc32c`.
    #[test]
    fn masked_crc_has_the_known_values() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(&[0; 32]), 0x0fd7_fffa);
    }

    /// Reference: TensorBoard 2.21.0's `RecordWriter` and `event_pb2`. The scalar is a zero, which
    /// must be written too.
    #[test]
    fn records_equal_those_of_tensorboard_to_the_byte() {
        let value = Value::scalar("train/loss".into(), 0.0);
        let cases = [
            (
                0,
                What::FileVersion(FILE_VERSION.into()),
                "1800000000000000a37f4b2209000000000000f83f\
                 1a0d627261696e2e4576656e743a322a28646c",
            ),
            (
                7,
                What::Summary(Summary { value: vec![value] }),
                "200000000000000029eda95009000000000000f83f1007\
                 2a130a110a0a747261696e2f6c6f73731500000000844b8711",
            ),
            (
                7,
                What::SessionLog(SessionLog { status: SESSION_START }),
                "0f000000000000006d532b0909000000000000f83f10073a020801774771c7",
            ),
        ];
        for (step, what, expected) in cases {
            let event = Event { wall_time: 1.5, step, what: Some(what) };
            let bytes = record(&event.encode_to_vec());
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, expected);
        }
    }

    /// Reference: TensorBoard 2.21.0's `summary_pb2`, in an event of step 7 at 1.5 s.
    #[test]
    fn texts_images_and_histograms_equal_those_of_tensorboard_to_the_byte() {
        let histogram = HistogramProto {
            min: 0.5,
            max: 1.0,
            num: 2.0,
            sum: 1.5,
            sum_squares: 1.25,
            bucket_limit: vec![0.75, 1.0],
            bucket: vec![1.0, 1.0],
        };
        for (value, expected) in [
            (
                Value::text("config", "# a".into()),
                "2a1d0a1b0a06636f6e6669674207080742032320614a080a060a0474657874",
            ),
            (
                Value::image("map".into(), [3, 2], b"png".to_vec()),
                "2a140a120a036d6170220b0802100318032203706e67",
            ),
            (
                Value::histogram("w".into(), histogram),
                "2a580a560a01772a5109000000000000e03f11000000000000f03f190000000000000040\
                 21000000000000f83f29000000000000f43f3210000000000000e83f000000000000f03f\
                 3a10000000000000f03f000000000000f03f",
            ),
        ] {
            let what = Some(What::Summary(Summary { value: vec![value] }));
            let bytes = Event { wall_time: 1.5, step: 7, what }.encode_to_vec();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, format!("09000000000000f83f1007{expected}"));
        }
    }

    #[test]
    fn a_file_holds_its_version_the_sessions_start_and_the_scalars() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut writer = EventWriter::create(dir.path(), 5)?;
        let values = || vec![Value::scalar("a".into(), 0.0), Value::scalar("b".into(), -2.5)];
        writer.write_values(5, values())?;

        let events = read_events(dir.path())?;
        assert_eq!(events.iter().map(|event| event.step).collect::<Vec<_>>(), [0, 5, 5]);
        let what: Vec<_> = events.into_iter().filter_map(|event| event.what).collect();
        let expected = [
            What::FileVersion(FILE_VERSION.into()),
            What::SessionLog(SessionLog { status: SESSION_START }),
            What::Summary(Summary { value: values() }),
        ];
        assert_eq!(what, expected);
        Ok(())
    }

    #[test]
    fn a_later_file_sorts_after_earlier_ones_even_within_a_second() -> Result<()> {
        let dir = tempfile::tempdir()?;
        for step in 0..3 {
            EventWriter::create(dir.path(), step)?;
        }
        let steps: Vec<_> = read_events(dir.path())?.iter().map(|event| event.step).collect();
        assert_eq!(steps, [0, 0, 0, 1, 0, 2]);
        Ok(())
    }
}
