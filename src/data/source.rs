//! Expands patterns into files, and reads files line by line.
//!
//! A file with the suffix `.zst` or `.gz` is decompressed while it is read. The suffix before that
//! says what the file holds ([`super::format`]).

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use fs_err::File;

use super::format::{Named, Packing, unpacked_name};
use crate::config::{FileFormat, RecordConfig};

/// A file with documents.
#[derive(Debug, Clone)]
pub(super) struct SourceFile {
    pub path: PathBuf,
    pub format: FileFormat,
    pub packing: Packing,
    /// The file's size on disk.
    pub num_bytes: u64,
    /// What the domain says about the file's records.
    pub records: RecordConfig,
}

impl SourceFile {
    /// A file whose format is that of `records` or of its name, and whose content begins like it.
    pub fn new(path: PathBuf, records: RecordConfig) -> Result<Self> {
        let metadata = fs_err::metadata(&path)?;
        if metadata.is_dir() {
            bail!("`{0}` is a folder\nhint: name its files, as in `{0}/*.jsonl`", path.display());
        }
        if !metadata.is_file() {
            // a pipe would not do: the file is read once for its hash and again for its records
            bail!("`{}` is no regular file\nhint: write its content to one", path.display());
        }
        let (stem, packing) = unpacked_name(&path);
        let named = Named::new(&path, &stem, records.format)?;
        let num_bytes = metadata.len();
        // the format is settled by the file's first bytes
        let mut source = Self { path, format: FileFormat::Text, packing, num_bytes, records };
        source.format = named.check(&source.path, packing, &source.head())?;
        Ok(source)
    }

    /// The first bytes of the decompressed content, as far as they can be read. What cannot be
    /// read is an error later, when the file is read as a whole.
    pub fn head(&self) -> Vec<u8> {
        const HEAD_BYTES: u64 = 64 << 10;
        let mut head = Vec::new();
        if let Ok(reader) = self.open(Arc::default()) {
            reader.take(HEAD_BYTES).read_to_end(&mut head).ok();
        }
        head
    }

    /// The file's name without the folder and the known suffixes: `b` for `a/b.jsonl.zst`.
    pub fn stem(&self) -> String {
        let (name, _) = unpacked_name(&self.path);
        let stem = Path::new(&name).file_stem().unwrap_or_default();
        stem.to_string_lossy().into_owned()
    }

    /// A line or, in a Parquet file, a row, as messages name it.
    pub fn place(&self, number: u64) -> String {
        let path = self.path.display();
        match self.format {
            FileFormat::Parquet => format!("{path}, row {number}"),
            _ => format!("{path}:{number}"),
        }
    }

    /// Opens the decompressed content. `bytes_read` grows by the number of bytes read from disk.
    pub fn open(&self, bytes_read: Arc<AtomicU64>) -> Result<Box<dyn BufRead>> {
        let file = CountingReader { inner: File::open(&self.path)?, bytes_read };
        let file = BufReader::with_capacity(1 << 16, file);
        Ok(match self.packing {
            Packing::Plain => Box::new(file),
            Packing::Gzip => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file))),
            Packing::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(file)
                    .with_context(|| format!("cannot unpack `{}`", self.path.display()))?;
                // files compressed with `zstd --long=31` need this window
                decoder.window_log_max(31).context("cannot set up the unpacking")?;
                Box::new(BufReader::new(decoder))
            }
        })
    }
}

/// Counts the bytes that are read, so that progress can be shown within a file.
struct CountingReader {
    inner: File,
    bytes_read: Arc<AtomicU64>,
}

impl Read for CountingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes_read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// The longest record, or line of a text. Tokenizing takes about 10 times its size, and about 150
/// times where it has no place to cut ([`super::tokenize`]): 600 MiB.
pub(super) const MAX_RECORD_BYTES: usize = 4 << 20;

/// The lines of a file as bytes. They keep their line feeds; a byte order mark is removed.
pub(super) struct Lines {
    reader: Box<dyn BufRead>,
    /// The number of the line that was read last, counted from 1.
    pub number: u64,
}

impl Lines {
    pub fn new(reader: Box<dyn BufRead>) -> Self {
        Self { reader, number: 0 }
    }

    /// Reads the next line into `line`; returns false at the end of the file.
    ///
    /// # Errors
    /// A file that cannot be read, and a line that is too long.
    pub fn read(&mut self, line: &mut Vec<u8>) -> io::Result<bool> {
        line.clear();
        let most = MAX_RECORD_BYTES as u64 + 1;
        if self.reader.by_ref().take(most).read_until(b'\n', line)? == 0 {
            return Ok(false);
        }
        if line.len() > MAX_RECORD_BYTES {
            let (number, mib) = (self.number + 1, MAX_RECORD_BYTES >> 20);
            return Err(io::Error::other(format!(
                "line {number} is longer than {mib} MiB, the most that a record may have\nhint: \
                 split it into several"
            )));
        }
        if self.number == 0 && line.starts_with(b"\xef\xbb\xbf") {
            line.drain(..3);
        }
        self.number += 1;
        Ok(true)
    }
}

/// The distinct files of a run. Several domains may share a file.
#[derive(Debug, Default)]
pub(super) struct SourceFiles {
    pub files: Vec<SourceFile>,
    indices: HashMap<(PathBuf, RecordConfig), usize>,
}

impl SourceFiles {
    /// Adds the files that `patterns` name and returns their indices in `files`, in the order of
    /// the patterns. The files of one pattern are sorted by name. A file whose records are read in
    /// two ways counts as two.
    ///
    /// # Errors
    /// If a pattern matches no file, if a file is matched twice, or if a file does not hold what
    /// its name says.
    pub fn add(&mut self, patterns: &[String], records: &RecordConfig) -> Result<Vec<usize>> {
        if let Err((key, fault)) = records.known_shape() {
            bail!("`{key}` {fault}");
        }
        let mut found = Vec::new();
        let mut found_by: HashMap<usize, &str> = HashMap::new();
        for pattern in patterns {
            for path in expand(pattern)? {
                let index = self.index(path, records)?;
                if let Some(first) = found_by.insert(index, pattern) {
                    bail!(
                        "`{}` is listed twice, by `{first}` and `{pattern}`\n\
                         hint: to see a domain more often, raise its `weight`",
                        self.files[index].path.display()
                    );
                }
                found.push(index);
            }
        }
        Ok(found)
    }

    fn index(&mut self, path: PathBuf, records: &RecordConfig) -> Result<usize> {
        let identity = (fs_err::canonicalize(&path)?, records.clone());
        if let Some(index) = self.indices.get(&identity) {
            return Ok(*index);
        }
        self.files.push(SourceFile::new(path, records.clone())?);
        self.indices.insert(identity, self.files.len() - 1);
        Ok(self.files.len() - 1)
    }
}

/// The files that a path or a glob names, sorted. The name of an existing file is never a glob.
fn expand(pattern: &str) -> Result<Vec<PathBuf>> {
    if Path::new(pattern).exists() {
        return Ok(vec![pattern.into()]);
    }
    let is_glob = pattern.contains(['*', '?', '[']);
    // `*` does not match hidden files, as in a shell
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
    let mut paths = Vec::new();
    let entries = glob::glob_with(pattern, options)
        .with_context(|| format!("`{pattern}` is neither a file nor a valid glob"))?;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list the files of `{pattern}`"))?;
        if path.is_file() {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        if is_glob {
            bail!("`{pattern}` matches no file");
        }
        bail!("there is no file `{pattern}`");
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_that_name_nothing_or_twice_the_same_are_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for name in ["a.jsonl", "a[1].txt", "b.txt", ".hidden.txt"] {
            fs_err::write(dir.path().join(name), "").expect("a temporary file");
        }
        let pattern = |name: &str| dir.path().join(name).display().to_string();
        let add = |names: &[&str]| {
            let patterns: Vec<_> = names.iter().map(|name| pattern(name)).collect();
            SourceFiles::default().add(&patterns, &RecordConfig::default()).map(|files| files.len())
        };
        let fault = |names: &[&str]| format!("{:#}", add(names).expect_err("a faulty pattern"));
        assert!(fault(&["*.zst"]).ends_with("*.zst` matches no file"));
        assert!(fault(&["b.jsonl"]).starts_with("there is no file"));
        assert!(fault(&[""]).contains("is a folder\nhint: name its files"));
        assert!(fault(&["a.jsonl", "*.jsonl"]).contains("a.jsonl` is listed twice, by"));
        // an existing file's name is not read as a glob, and `*` does not match hidden files
        assert_eq!(add(&["a[1].txt"]).expect("a file"), 1);
        assert_eq!(add(&["*.txt", "a.jsonl"]).expect("files"), 3);
    }

    #[test]
    fn a_stem_has_no_known_suffixes() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (name, stem) in [("a.b.jsonl.zst", "a.b"), ("c.TXT.GZ", "c"), ("d.md", "d")] {
            let path = dir.path().join(name);
            fs_err::write(&path, "").expect("a temporary file");
            let file = SourceFile::new(path, RecordConfig::default());
            assert_eq!(file.expect("a file").stem(), stem);
        }
    }
}
