//! What a file holds: by its name, and checked against its first bytes.
//!
//! A name with another suffix than those of [`FileFormat`] is refused, and so is a file that begins
//! like one of another kind. `.json` stands for two formats, an array or one object per line; the
//! first character tells them apart.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use crate::config::FileFormat;

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Zstd,
    Gzip,
}

/// What the name of a file, or the config, says about its format.
#[derive(Debug, Clone, Copy)]
pub(super) enum Named {
    /// The format.
    Format(FileFormat),
    /// The config says that the file is one plain text, whatever it looks like.
    TextByConfig,
    /// A `.json` file: an array, or one object per line.
    Json,
}

impl Named {
    /// What the name of the file at `path` says, unless the config chooses a format.
    ///
    /// - `stem`: its name without the suffix of its compression
    ///
    /// # Errors
    /// An unknown suffix.
    pub fn new(path: &Path, stem: &str, chosen: Option<FileFormat>) -> Result<Self> {
        match chosen {
            Some(FileFormat::Text) => return Ok(Self::TextByConfig),
            Some(format) => return Ok(Self::Format(format)),
            None => {}
        }
        let suffix = extension(stem);
        Ok(Self::Format(match suffix.as_deref() {
            Some("jsonl" | "ndjson") => FileFormat::Jsonl,
            Some("json") => return Ok(Self::Json),
            Some("csv") => FileFormat::Csv,
            Some("tsv") => FileFormat::Tsv,
            Some("parquet") => FileFormat::Parquet,
            Some("txt" | "text" | "md" | "markdown" | "rst") => FileFormat::Text,
            _ => {
                let what = match suffix {
                    Some(suffix) => format!("has the unknown suffix `.{suffix}`"),
                    None => "has no suffix".into(),
                };
                bail!(
                    "`{}` {what}, so that it is not clear what it holds\nhint: files of records \
                     are called `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, and plain texts \
                     `.txt` or `.md`; or set the domain's `format`, as in `format = \"text\"`",
                    path.display()
                );
            }
        }))
    }

    /// The format of a file, whose first bytes must agree with its name.
    ///
    /// - `head`: the first bytes, unpacked
    ///
    /// # Errors
    /// A file that begins like one of another kind.
    pub fn check(self, path: &Path, packing: Packing, head: &[u8]) -> Result<FileFormat> {
        let path = path.display();
        let format = match self {
            Self::Format(format) => format,
            Self::TextByConfig => FileFormat::Text,
            Self::Json => json_format(head).unwrap_or(FileFormat::Json),
        };
        let kind = kind(head);
        if format == FileFormat::Parquet {
            if packing != Packing::Plain {
                bail!("`{path}` is a packed Parquet file, which is not read\nhint: unpack it");
            }
            if !head.starts_with(PARQUET) {
                let found = kind.unwrap_or_else(|| begins(head));
                bail!("`{path}` is no Parquet file: it is {found}");
            }
            return Ok(format);
        }
        if let Some(found) = kind {
            bail!("`{path}` is not {}: it is {found}{}", what(format), hint(&found));
        }
        match self {
            Self::Json if json_format(head).is_none() => bail!(
                "`{path}` holds neither an array of JSON objects nor one object per line: it is \
                 {}\nhint: write `[{{\"text\": \"..\"}}, ..]`, or one object per line",
                begins(head)
            ),
            Self::Format(FileFormat::Jsonl) if is_array_of_objects(head) => bail!(
                "`{path}` is not JSON with one object per line: it is a JSON array\nhint: call it \
                 `.json`"
            ),
            Self::Format(FileFormat::Text) if is_object(first_line(head)) => bail!(
                "`{path}` is not plain text: its first line is a JSON object\nhint: call it \
                 `.jsonl`; if it is to be learned as it stands, set its domain's \
                 `format = \"text\"`"
            ),
            _ => Ok(format),
        }
    }
}

/// The extension of a file name, in lower case.
fn extension(name: &str) -> Option<String> {
    Path::new(name).extension().map(|extension| extension.to_string_lossy().to_lowercase())
}

/// The file name without the suffix of its compression, and the compression.
pub(super) fn unpacked_name(path: &Path) -> (String, Packing) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let packing = match extension(&name).as_deref() {
        Some("zst") => Packing::Zstd,
        Some("gz") => Packing::Gzip,
        _ => return (name, Packing::Plain),
    };
    let stem = Path::new(&name).file_stem().unwrap_or_default();
    (stem.to_string_lossy().into_owned(), packing)
}

const PARQUET: &[u8] = b"PAR1";

/// What kinds of files begin with.
const MAGIC: [(&[u8], &str); 16] = [
    (PARQUET, "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"BZh91AY&SY", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"PK\x03\x04", "a zip archive, as spreadsheets and `.docx` files are"),
    (b"%PDF-", "a PDF document"),
    (b"{\\rtf", "a document in Rich Text Format"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3", "a database"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"version https://git-lfs", "a pointer of Git LFS, which stands for the content"),
];

/// What a file is that begins with `head`, if it is no text.
fn kind(head: &[u8]) -> Option<String> {
    let magic = MAGIC.into_iter().find(|(bytes, _)| head.starts_with(bytes));
    let zero = || head.iter().position(|byte| *byte == 0);
    match magic {
        Some((_, kind)) => Some(kind.into()),
        None => zero().map(|at| format!("binary data, with a byte 0 at byte {}", at + 1)),
    }
}

/// What can be done about a file that [`kind`] describes.
fn hint(kind: &str) -> &'static str {
    match kind {
        _ if kind.contains("gzip") => "\nhint: call it `.gz` behind its own suffix",
        _ if kind.contains("zstd") => "\nhint: call it `.zst` behind its own suffix",
        _ if kind.contains("archive") => "\nhint: unpack it",
        _ if kind.contains("UTF-16") => "\nhint: save it as UTF-8",
        _ if kind.contains("Parquet") => "\nhint: call it `.parquet`",
        _ if kind.contains("Git LFS") => "\nhint: `git lfs pull` fetches the content",
        _ => "",
    }
}

fn what(format: FileFormat) -> &'static str {
    match format {
        FileFormat::Jsonl => "JSON with one object per line",
        FileFormat::Json => "an array of JSON objects",
        FileFormat::Csv => "a table of values separated by commas",
        FileFormat::Tsv => "a table of values separated by tabs",
        FileFormat::Parquet => "a Parquet file",
        FileFormat::Text => "plain text",
    }
}

/// How a file of no known kind begins.
fn begins(head: &[u8]) -> String {
    const MOST: usize = 40;
    let text = String::from_utf8_lossy(without_mark(head));
    let start: String = text.trim_start().chars().take(MOST).collect();
    match start.lines().next() {
        None => "empty".into(),
        Some(line) => format!("text that begins with `{line}`"),
    }
}

fn without_mark(head: &[u8]) -> &[u8] {
    head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head)
}

/// The format of a `.json` file, if it is one of records.
fn json_format(head: &[u8]) -> Option<FileFormat> {
    let head = without_mark(head).trim_ascii_start();
    match head.first() {
        Some(b'[') => Some(FileFormat::Json),
        Some(b'{') if !head.contains(&b'\n') || is_object(first_line(head)) => {
            Some(FileFormat::Jsonl)
        }
        _ => None,
    }
}

/// The first line that is not empty, if it ends within `head`.
fn first_line(head: &[u8]) -> &[u8] {
    let head = without_mark(head).trim_ascii_start();
    let end = head.iter().position(|byte| *byte == b'\n').unwrap_or(head.len());
    &head[..end]
}

fn is_object(line: &[u8]) -> bool {
    serde_json::from_slice::<Map<String, Value>>(line).is_ok()
}

fn is_array_of_objects(head: &[u8]) -> bool {
    let head = without_mark(head).trim_ascii_start();
    head.strip_prefix(b"[").is_some_and(|rest| rest.trim_ascii_start().starts_with(b"{"))
}
