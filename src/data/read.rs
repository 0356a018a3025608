//! Reads all files of a run into [`TokenFile`]s, from the cache where possible.
//!
//! The large files are read one after another, each with all threads. The small ones are then read
//! many at a time, each by one thread. Neither one big file nor a folder of many small files thus
//! leaves a core idle.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use anyhow::{Result, bail};

use super::DataOptions;
use super::cache::{self, Cache};
use super::documents::{Reading, read_documents};
use super::kinds;
use super::source::SourceFile;
use super::token_file::TokenFile;
use super::tokenize::Tokenizer;
use crate::config::OnBadRecord;

/// Files of at least this size are read with all threads.
const LARGE_BYTES: u64 = 1 << 20;

/// How much of the files has been read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Distinct files to read.
    pub num_files: usize,
    /// Files that have been read.
    pub files_done: usize,
    /// How many of `files_done` came from the cache.
    pub files_cached: usize,
    /// Size of all files on disk.
    pub num_bytes: u64,
    /// How much of it has been read, including parts of files.
    pub bytes_done: u64,
}

/// Reads every file, and returns them in the order of `files`.
///
/// - `progress`: called on this thread, after each batch of a large file and after each file
pub(super) fn read_files(
    files: &[SourceFile],
    options: &DataOptions,
    tokenizer: &Tokenizer,
    progress: &dyn Fn(LoadProgress),
) -> Result<Vec<Arc<TokenFile>>> {
    let reader = Reader {
        files,
        cache: options.cache_dir.as_deref().and_then(Cache::open),
        reading: Reading {
            tokenizer,
            eos_token_id: options.eos_token_id,
            chat: &options.chat,
            on_bad_record: options.on_bad_record,
            num_threads: std::thread::available_parallelism().map_or(1, usize::from),
        },
        files_done: AtomicUsize::new(0),
        files_cached: AtomicUsize::new(0),
        bytes_done: Arc::new(AtomicU64::new(0)),
    };
    let on_progress = || progress(reader.progress());
    on_progress();
    let is_large = |index: &usize| files[*index].num_bytes >= LARGE_BYTES;
    let (large, small): (Vec<_>, Vec<_>) = (0..files.len()).partition(is_large);
    let mut read: Vec<Option<TokenFile>> = files.iter().map(|_| None).collect();
    for index in large {
        read[index] = Some(reader.read(index, reader.reading.num_threads, &on_progress)?);
        on_progress();
    }
    reader.read_small(&small, &mut read, &on_progress)?;
    Ok(read.into_iter().map(|file| Arc::new(file.expect("each file is large or small"))).collect())
}

struct Reader<'a> {
    files: &'a [SourceFile],
    cache: Option<Cache>,
    reading: Reading<'a>,
    files_done: AtomicUsize,
    files_cached: AtomicUsize,
    bytes_done: Arc<AtomicU64>,
}

impl Reader<'_> {
    fn progress(&self) -> LoadProgress {
        LoadProgress {
            num_files: self.files.len(),
            files_done: self.files_done.load(Ordering::Relaxed),
            files_cached: self.files_cached.load(Ordering::Relaxed),
            num_bytes: self.files.iter().map(|file| file.num_bytes).sum(),
            bytes_done: self.bytes_done.load(Ordering::Relaxed),
        }
    }

    /// Reads the files with the indices `indices` into `read`, many at a time.
    fn read_small(
        &self,
        indices: &[usize],
        read: &mut [Option<TokenFile>],
        on_progress: &dyn Fn(),
    ) -> Result<()> {
        let next = AtomicUsize::new(0);
        let (sender, receiver) = mpsc::channel();
        let work = |sender: mpsc::Sender<_>| {
            while let Some(index) = indices.get(next.fetch_add(1, Ordering::Relaxed)) {
                let file = self.read(*index, 1, &|| ());
                if file.is_err() {
                    next.store(indices.len(), Ordering::Relaxed);
                }
                sender.send((*index, file)).expect("the receiver waits for all senders");
            }
        };
        let mut first_error = None;
        std::thread::scope(|scope| {
            for _ in 0..self.reading.num_threads.min(indices.len()) {
                let sender = sender.clone();
                scope.spawn(|| work(sender));
            }
            drop(sender);
            for (index, file) in receiver {
                match file {
                    Ok(file) => read[index] = Some(file),
                    // if several threads fail, the error of the first file is returned in every run
                    Err(error) if first_error.as_ref().is_none_or(|(first, _)| index < *first) => {
                        first_error = Some((index, error));
                    }
                    Err(_) => {}
                }
                on_progress();
            }
        });
        first_error.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Reads one file, from the cache if it has the file.
    fn read(&self, index: usize, num_threads: usize, on_progress: &dyn Fn()) -> Result<TokenFile> {
        let mut file = match &self.cache {
            None => self.tokenize(index, num_threads, on_progress)?,
            Some(cache) => {
                let key = self.key(index)?;
                let fails = self.reading.on_bad_record == OnBadRecord::Fail;
                // if malformed records are an error, a cached file that has some is read again,
                // because the cache does not know their lines
                let is_whole = |file: &TokenFile| {
                    file.num_bad == 0 && file.documents.iter().all(TokenFile::has_label)
                };
                match cache.get(&key).filter(|file| !fails || is_whole(file)) {
                    Some(file) => {
                        self.files_cached.fetch_add(1, Ordering::Relaxed);
                        self.bytes_done.fetch_add(self.files[index].num_bytes, Ordering::Relaxed);
                        file
                    }
                    None => {
                        let file = self.tokenize(index, num_threads, on_progress)?;
                        if self.key(index)? != key {
                            let path = self.files[index].path.display();
                            bail!("`{path}` was changed while it was read\nhint: start again");
                        }
                        cache.put(&key, file)
                    }
                }
            }
        };
        file.kinds = kinds::of_file(&self.files[index], file.shapes, file.documents.len());
        self.files_done.fetch_add(1, Ordering::Relaxed);
        Ok(file)
    }

    fn key(&self, index: usize) -> Result<blake3::Hash> {
        cache::key(&self.files[index], self.reading)
    }

    fn tokenize(
        &self,
        index: usize,
        num_threads: usize,
        on_progress: &dyn Fn(),
    ) -> Result<TokenFile> {
        let reading = Reading { num_threads, ..self.reading };
        read_documents(&self.files[index], Arc::clone(&self.bytes_done), reading, on_progress)
    }
}
