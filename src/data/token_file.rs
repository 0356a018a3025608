//! The tokens of one source file, in memory or on disk.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// [`Document::record_domain`] of a record that names none.
pub(super) const NO_DOMAIN: u32 = u32::MAX;

/// Bytes of a token on disk, where it is a little-endian `u32`.
pub(super) const TOKEN_BYTES: u64 = 4;

/// The documents of one source file.
#[derive(Debug, Default)]
pub(super) struct TokenFile {
    /// All documents' tokens, one document after another.
    pub tokens: Tokens,
    pub documents: Vec<Document>,
    /// The values of the records' `domain` fields.
    pub record_domains: Vec<String>,
    /// Records that were malformed and left out.
    pub num_bad: u64,
}

impl TokenFile {
    /// The `domain` field of a document's record.
    pub fn record_domain(&self, document: &Document) -> Option<&str> {
        self.record_domains.get(document.record_domain as usize).map(String::as_str)
    }
}

/// Where a document's tokens are and what is known about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Document {
    /// Index of its first token in the file's tokens.
    pub start: u64,
    /// Its tokens, with the end token.
    pub num_tokens: u32,
    /// Tokens of its prompt, which comes first; 0 for a `text`.
    pub prompt_len: u32,
    /// Index in [`TokenFile::record_domains`], or [`NO_DOMAIN`].
    pub record_domain: u32,
    /// The first half of BLAKE3 of its text (prompt and completion joined): equal texts are equal
    /// documents, whatever the tokenizer and wherever the prompt ends.
    pub content: [u8; 16],
}

/// Tokens in memory, or in a file that is read where needed.
#[derive(Debug)]
pub(super) enum Tokens {
    Memory(Vec<u32>),
    /// The page cache holds what is in use, and several processes share it. The file stays open:
    /// it may be deleted or replaced meanwhile.
    File {
        path: PathBuf,
        file: std::fs::File,
        offset: u64,
    },
}

impl Default for Tokens {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl Tokens {
    /// Appends the `count` tokens from `start` on to `out`.
    pub fn read(&self, start: u64, count: usize, out: &mut Vec<u32>) -> Result<()> {
        match self {
            Self::Memory(tokens) => {
                let start = usize::try_from(start).expect("an index into a vector");
                out.extend_from_slice(&tokens[start..start + count]);
            }
            Self::File { path, file, offset } => {
                let mut bytes = vec![0; count * TOKEN_BYTES as usize];
                file.read_exact_at(&mut bytes, offset + start * TOKEN_BYTES)
                    .with_context(|| format!("cannot read tokens from `{}`", path.display()))?;
                let chunks = bytes.chunks_exact(TOKEN_BYTES as usize);
                out.extend(chunks.map(|chunk| {
                    u32::from_le_bytes(chunk.try_into().expect("chunks have this length"))
                }));
            }
        }
        Ok(())
    }
}
