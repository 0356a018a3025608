//! A cache of [`TokenFile`]s on disk, so that each source file is tokenized only once.
//!
//! A cache file is named by a BLAKE3 hash of everything that determines its content: the bytes of
//! the source file, its format and compression, what the config says about its records, the
//! tokenizer, the end token, the chat template, the learned turns of conversations and [`VERSION`].
//! It is written in a folder of its own and then renamed, so that processes that start together do
//! not disturb each other. A run keeps the files that it has opened, so that it does not matter if
//! they are deleted meanwhile.
//!
//! The file consists of, all little-endian:
//!
//! - the magic (8 bytes), the BLAKE3 hash of all that follows it (32) and the key (32);
//! - the number of records of each shape (`u64` each);
//! - the numbers of malformed records, domains, documents and tokens (`u64` each);
//! - for each domain, the length of its name (`u32`) and the name;
//! - for each document, `num_tokens`, `prompt_len`, `record_domain` and `num_spans` (`u32` each),
//!   `expert` (`i32`) and `content` (16 bytes);
//! - for each span of learned tokens, its start and end (`u32` each);
//! - the tokens (`u32` each).
//!
//! A file that does not match its checksum is made again.

use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use fs_err::File;

use super::documents::Reading;
use super::source::SourceFile;
use super::token_file::{Document, NO_DOMAIN, NO_EXPERT, Span, TOKEN_BYTES, TokenFile, Tokens};
use crate::config::{FileFormat, RecordShape};
use crate::durable::folder::{self, Writing};
use crate::ffi;

const MAGIC: [u8; 8] = *b"dylotok\x04";
/// The version of the tokens. It is raised when this code, `tokenizers` or `minijinja` makes other
/// tokens of the same input, or finds other records malformed.
const VERSION: u32 = 5;
const CHECKED_FROM: u64 = 40;
const DOCUMENT_BYTES: u64 = 36;

/// A folder of cache files.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Opens the cache in `dir`. If the folder cannot be created, logs a warning and returns
    /// `None`.
    pub fn open(dir: &Path) -> Option<Self> {
        match fs_err::create_dir_all(dir) {
            Ok(()) => {
                folder::clean_dead(dir);
                Some(Self { dir: dir.to_owned() })
            }
            Err(error) => {
                tracing::warn!("tokens are not cached: {error}");
                None
            }
        }
    }

    fn path(&self, key: &blake3::Hash) -> PathBuf {
        self.dir.join(format!("{key}.tokens"))
    }

    /// The file that is stored under `key`, if there is one and it is intact.
    pub fn get(&self, key: &blake3::Hash) -> Option<TokenFile> {
        let path = self.path(key);
        if !path.exists() {
            return None;
        }
        match read(&path, key) {
            Ok(file) => Some(file),
            Err(error) => {
                tracing::warn!("`{}` is made again: {error:#}", path.display());
                None
            }
        }
    }

    /// Stores `file` under `key` and returns the stored copy, whose tokens are mapped, so that the
    /// memory of the original is freed. If the file cannot be stored, logs a warning and returns
    /// `file` itself.
    pub fn put(&self, key: &blake3::Hash, file: TokenFile) -> TokenFile {
        let Tokens::Memory(tokens) = &file.tokens else { return file };
        match self.write(key, &file, tokens) {
            Ok(tokens) => TokenFile { tokens, ..file },
            Err(error) => {
                tracing::warn!("tokens are not cached in `{}`: {error:#}", self.dir.display());
                file
            }
        }
    }

    fn write(&self, key: &blake3::Hash, file: &TokenFile, tokens: &[u32]) -> Result<Tokens> {
        let temporary = Writing::new_in(&self.dir)?;
        let written = temporary.path().join("tokens");
        let mut writer = HashingWriter {
            inner: BufWriter::with_capacity(1 << 16, File::create(&written)?),
            hasher: blake3::Hasher::new(),
        };
        writer.inner.write_all(&MAGIC)?;
        writer.inner.write_all(&[0; 32])?;
        write_index(&mut writer, key, file, tokens.len() as u64)?;
        let mut bytes = Vec::new();
        for chunk in tokens.chunks(1 << 14) {
            bytes.clear();
            chunk.iter().for_each(|token| bytes.extend(token.to_le_bytes()));
            writer.write(&bytes)?;
        }
        let checksum = writer.hasher.finalize();
        writer.inner.seek(SeekFrom::Start(MAGIC.len() as u64))?;
        writer.inner.write_all(checksum.as_bytes())?;
        writer.inner.flush()?;
        drop(writer);
        let path = self.path(key);
        fs_err::rename(written, &path)?;
        Ok(read(&path, key)?.tokens)
    }
}

/// The key under which the tokens of `source` are stored.
pub(super) fn key(source: &SourceFile, reading: Reading) -> Result<blake3::Hash> {
    let Reading { tokenizer, eos_token_id, chat, .. } = reading;
    let records = &source.records;
    let mut content = blake3::Hasher::new();
    content
        .update_reader(File::open(&source.path)?)
        .with_context(|| format!("cannot read `{}`", source.path.display()))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&VERSION.to_le_bytes());
    hasher.update(content.finalize().as_bytes());
    hasher.update(&[source.format as u8, source.packing as u8]);
    hasher.update(&serde_json::to_vec(&(
        records.shape,
        records.style,
        &records.fields,
        &records.template,
    ))?);
    hasher.update(tokenizer.hash().as_bytes());
    hasher.update(&eos_token_id.map_or(-1, i64::from).to_le_bytes());
    // only these files can have conversations
    if source.format != FileFormat::Text {
        if let Some(template) = &chat.template {
            hasher.update(template.hash().as_bytes());
        }
        hasher.update(&[chat.turns as u8]);
    }
    Ok(hasher.finalize())
}

/// Passes what is written on to `inner`, and hashes it.
struct HashingWriter<W> {
    inner: W,
    hasher: blake3::Hasher,
}

impl<W: Write> HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.inner.write_all(bytes)?;
        Ok(())
    }
}

fn write_index<W: Write>(
    writer: &mut HashingWriter<W>,
    key: &blake3::Hash,
    file: &TokenFile,
    num_tokens: u64,
) -> Result<()> {
    writer.write(key.as_bytes())?;
    for count in file.shapes {
        writer.write(&count.to_le_bytes())?;
    }
    let num_domains = file.record_domains.len() as u64;
    for count in [file.num_bad, num_domains, file.documents.len() as u64, num_tokens] {
        writer.write(&count.to_le_bytes())?;
    }
    for name in &file.record_domains {
        writer.write(&u32::try_from(name.len())?.to_le_bytes())?;
        writer.write(name.as_bytes())?;
    }
    for document in &file.documents {
        let Document { num_tokens, prompt_len, record_domain, num_spans, .. } = *document;
        for number in [num_tokens, prompt_len, record_domain, num_spans] {
            writer.write(&number.to_le_bytes())?;
        }
        writer.write(&document.expert.to_le_bytes())?;
        writer.write(&document.content)?;
    }
    for span in &file.learned {
        writer.write(&span.start.to_le_bytes())?;
        writer.write(&span.end.to_le_bytes())?;
    }
    Ok(())
}

/// Reads a cache file. The checksum is verified before anything else in the file is used, and no
/// content of the file leads to a panic.
fn read(path: &Path, key: &blake3::Hash) -> Result<TokenFile> {
    let map = ffi::map_file(path)?;
    let (head, rest) = map.split_at_checked(CHECKED_FROM as usize).context("it ends early")?;
    ensure!(head.starts_with(&MAGIC), "it is no cache of tokens");
    let mut hasher = blake3::Hasher::new();
    hasher.update_rayon(rest);
    ensure!(hasher.finalize().as_bytes() == &head[MAGIC.len()..], "its checksum is wrong");
    let file_bytes = map.len() as u64;
    let mut reader = IndexReader { inner: rest, at: CHECKED_FROM };
    ensure!(reader.array::<32>()? == *key.as_bytes(), "it belongs to another source");
    let mut index = read_index(&mut reader, file_bytes)?;
    let offset = reader.at;
    let num_tokens =
        index.documents.last().map_or(0, |last| last.start + u64::from(last.num_tokens));
    ensure!(
        num_tokens.checked_mul(TOKEN_BYTES).and_then(|bytes| bytes.checked_add(offset))
            == Some(file_bytes),
        "its length is wrong"
    );
    index.tokens = Tokens::Mapped { map, offset: usize::try_from(offset)? };
    Ok(index)
}

/// Reads numbers and keeps track of the position in the file.
struct IndexReader<R> {
    inner: R,
    at: u64,
}

impl<R: Read> IndexReader<R> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn i32(&mut self) -> Result<i32> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn string(&mut self) -> Result<String> {
        let num_bytes = u64::from(self.u32()?);
        let mut bytes = Vec::new();
        (&mut self.inner).take(num_bytes).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == num_bytes, "it ends early");
        self.at += num_bytes;
        String::from_utf8(bytes).map_err(|_| anyhow!("a domain's name is not UTF-8"))
    }
}

fn read_index<R: Read>(reader: &mut IndexReader<R>, file_bytes: u64) -> Result<TokenFile> {
    let mut shapes = [0; RecordShape::ALL.len()];
    for count in &mut shapes {
        *count = reader.u64()?;
    }
    let num_bad = reader.u64()?;
    let [num_domains, num_documents, num_tokens] = [reader.u64()?, reader.u64()?, reader.u64()?];
    ensure!(
        num_documents <= file_bytes / DOCUMENT_BYTES,
        "it has too many documents for its length"
    );
    ensure!(num_tokens <= file_bytes / TOKEN_BYTES, "it has too many tokens for its length");
    let mut file = TokenFile { num_bad, shapes, ..TokenFile::default() };
    for _ in 0..num_domains {
        file.record_domains.push(reader.string()?);
    }
    file.documents.reserve_exact(num_documents as usize);
    let (mut start, mut first_span) = (0_u64, 0_u32);
    for _ in 0..num_documents {
        let document = Document {
            start,
            num_tokens: reader.u32()?,
            prompt_len: reader.u32()?,
            record_domain: reader.u32()?,
            first_span,
            num_spans: reader.u32()?,
            expert: reader.i32()?,
            content: reader.array()?,
        };
        let known = (document.record_domain as usize) < file.record_domains.len();
        ensure!(known || document.record_domain == NO_DOMAIN, "a document's domain is unknown");
        ensure!(document.expert >= NO_EXPERT, "a document's expert is below {NO_EXPERT}");
        ensure!(document.prompt_len <= document.num_tokens, "a prompt is longer than its document");
        start += u64::from(document.num_tokens);
        first_span = first_span.checked_add(document.num_spans).context("it has too many spans")?;
        file.documents.push(document);
    }
    ensure!(start == num_tokens, "its documents do not cover its tokens");
    file.learned = read_spans(reader, &file.documents)?;
    Ok(file)
}

fn read_spans<R: Read>(reader: &mut IndexReader<R>, documents: &[Document]) -> Result<Vec<Span>> {
    let mut spans = Vec::new();
    for document in documents {
        let mut at = 0;
        for _ in 0..document.num_spans {
            let span = Span { start: reader.u32()?, end: reader.u32()? };
            let fits = at <= span.start && span.start < span.end;
            ensure!(fits && span.end <= document.num_tokens, "a span is not within its document");
            at = span.end;
            spans.push(span);
        }
    }
    Ok(spans)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file with one document per item of `lens`: the length of its prompt, the number of tokens
    /// after the prompt, and whether it has a domain. The experts of the documents are -2, -1, 0
    /// and so on.
    fn token_file(lens: &[(u32, u32, bool)], num_bad: u64) -> TokenFile {
        let mut file =
            TokenFile { num_bad, record_domains: vec!["ä".into()], ..Default::default() };
        let mut tokens = Vec::new();
        for (i, (prompt_len, more, has_domain)) in lens.iter().enumerate() {
            let num_tokens = prompt_len + more;
            let first_span = file.learned.len() as u32;
            if *prompt_len > 1 && num_tokens > 3 {
                file.learned.extend([Span { start: 1, end: 2 }, Span { start: 2, end: 4 }]);
            }
            file.documents.push(Document {
                start: tokens.len() as u64,
                num_tokens,
                prompt_len: *prompt_len,
                first_span,
                num_spans: file.learned.len() as u32 - first_span,
                record_domain: if *has_domain { 0 } else { NO_DOMAIN },
                expert: i as i32 + NO_EXPERT,
                content: [i as u8; 16],
            });
            tokens.extend((0..num_tokens).map(|token| token ^ (i as u32) << 20));
        }
        file.tokens = Tokens::Memory(tokens);
        file
    }

    fn all_tokens(file: &TokenFile) -> Vec<u32> {
        let mut tokens = Vec::new();
        for document in &file.documents {
            file.tokens.read(document.start, document.num_tokens as usize, &mut tokens);
        }
        tokens
    }

    proptest! {
        #[test]
        fn what_is_put_is_got(
            lens in prop::collection::vec((0..9_u32, 0..9_u32, any::<bool>()), 0..9),
            num_bad in 0..3_u64,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::open(dir.path()).unwrap();
            let key = blake3::hash(b"key");
            let file = token_file(&lens, num_bad);
            let tokens = all_tokens(&file);
            let (documents, learned) = (file.documents.clone(), file.learned.clone());
            prop_assert_eq!(&all_tokens(&cache.put(&key, file)), &tokens);
            let got = cache.get(&key).expect("it was put");
            prop_assert_eq!(all_tokens(&got), tokens);
            prop_assert_eq!((got.documents, got.num_bad), (documents, num_bad));
            prop_assert_eq!(got.learned, learned);
        }

        #[test]
        fn any_damage_is_noticed(at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::open(dir.path()).unwrap();
            let key = blake3::hash(b"key");
            cache.put(&key, token_file(&[(2, 3, true), (0, 4, false)], 1));
            let path = cache.path(&key);
            let sound = fs_err::read(&path).unwrap();
            let at = at.index(sound.len());
            fs_err::write(&path, &sound[..at]).unwrap();
            prop_assert!(cache.get(&key).is_none(), "cut at {}", at);
            let mut flipped = sound.clone();
            flipped[at] ^= flip;
            fs_err::write(&path, flipped).unwrap();
            prop_assert!(cache.get(&key).is_none(), "flipped at {}", at);
            fs_err::write(&path, &sound).unwrap();
            prop_assert!(cache.get(&key).is_some());
        }
    }

    #[test]
    fn a_file_under_anothers_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let [key, other] = [blake3::hash(b"key"), blake3::hash(b"other")];
        cache.put(&key, token_file(&[(0, 4, false)], 0));
        fs_err::rename(cache.path(&key), cache.path(&other)).unwrap();
        assert!(cache.get(&other).is_none());
    }

    #[test]
    fn cached_files_are_mapped_and_outlive_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let key = blake3::hash(b"key");
        let file = token_file(&[(0, 1 << 20, false), (3, 1 << 10, true)], 0);
        let tokens = all_tokens(&file);
        let file = cache.put(&key, file);
        assert!(matches!(file.tokens, Tokens::Mapped { .. }));
        fs_err::remove_file(cache.path(&key)).unwrap();
        assert_eq!(all_tokens(&file), tokens);
    }

    #[test]
    fn writers_of_the_same_key_do_not_disturb_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let key = blake3::hash(b"key");
        let file = || token_file(&[(2, 5_000, true), (0, 4, false)], 1);
        let tokens = all_tokens(&file());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        cache.put(&key, file());
                        let got = cache.get(&key).expect("a whole file is always there");
                        assert_eq!(all_tokens(&got), tokens);
                    }
                });
            }
        });
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }
}
