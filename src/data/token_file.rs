//! The tokens of one source file, in memory or on disk.

use super::kinds::RecordKind;
use crate::config::RecordShape;

/// The [`Document::record_domain`] of a record that names no domain.
pub(super) const NO_DOMAIN: u32 = u32::MAX;

/// The [`Document::expert`] of a record that names no expert.
pub(super) const NO_EXPERT: i32 = -2;

/// The [`Document::expert`] of a record that names the base alone.
pub(super) const BASE_EXPERT: i32 = -1;

/// Size of a token on disk, where it is a little-endian `u32`.
pub(super) const TOKEN_BYTES: u64 = 4;

/// The documents of one source file.
#[derive(Debug, Default)]
pub(super) struct TokenFile {
    /// The tokens of all documents, one document after another.
    pub tokens: Tokens,
    pub documents: Vec<Document>,
    /// The learned tokens of the conversations, one document after another.
    pub learned: Vec<Span>,
    /// The distinct values of the records' `domain` fields.
    pub record_domains: Vec<String>,
    /// Number of malformed records, which were left out.
    pub num_bad: u64,
    /// Number of records of each shape, in the order of [`RecordShape::ALL`], without the malformed
    /// ones. A plain text file has none.
    pub shapes: [u64; RecordShape::ALL.len()],
    /// The same for people; the cache does not keep it.
    pub kinds: Vec<RecordKind>,
}

/// Tokens of a document, by their indices in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub start: u32,
    pub end: u32,
}

impl TokenFile {
    /// The learned tokens of a document, if it is a conversation; there are none for others.
    pub fn learned(&self, document: &Document) -> &[Span] {
        let start = document.first_span as usize;
        &self.learned[start..start + document.num_spans as usize]
    }

    /// Whether a document has a token to learn, whichever tokens the loss counts.
    pub fn has_label(document: &Document) -> bool {
        document.num_spans > 0
            || (document.num_tokens > 1 && document.prompt_len < document.num_tokens)
    }

    /// The `domain` field of a document's record, if it has one.
    pub fn record_domain(&self, document: &Document) -> Option<&str> {
        self.record_domains.get(document.record_domain as usize).map(String::as_str)
    }
}

/// Where the tokens of a document are, and what is known about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Document {
    /// Index of its first token in the file's tokens.
    pub start: u64,
    /// Number of tokens, including the end token.
    pub num_tokens: u32,
    /// Number of tokens in the prompt, which comes first; 0 for a `text`.
    pub prompt_len: u32,
    /// Index of its first span in [`TokenFile::learned`].
    pub first_span: u32,
    /// Number of its spans. It has some if and only if it is a conversation; in other documents,
    /// what follows the prompt is learned.
    pub num_spans: u32,
    /// Index in [`TokenFile::record_domains`], or [`NO_DOMAIN`].
    pub record_domain: u32,
    /// The expert that the record names, from 0, or [`BASE_EXPERT`] or [`NO_EXPERT`].
    pub expert: i32,
    /// The first half of the BLAKE3 hash of the text, prompt and completion joined. Documents with
    /// the same text are equal, whatever the tokenizer is and wherever the prompt ends.
    pub content: [u8; 16],
}

/// Tokens in memory, or in a memory-mapped file.
#[derive(Debug)]
pub(super) enum Tokens {
    Memory(Vec<u32>),
    /// A cache file, whose tokens begin at byte `offset`. Only the pages in use are in memory,
    /// several processes share them, and the file may be deleted or replaced meanwhile.
    Mapped {
        map: memmap2::Mmap,
        offset: usize,
    },
}

impl Default for Tokens {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl Tokens {
    /// Appends `count` tokens, the first of which has index `start`, to `out`.
    pub fn read(&self, start: u64, count: usize, out: &mut Vec<u32>) {
        let start = usize::try_from(start).expect("an index into what is in memory");
        match self {
            Self::Memory(tokens) => out.extend_from_slice(&tokens[start..start + count]),
            Self::Mapped { map, offset } => {
                let bytes = &map[offset + start * TOKEN_BYTES as usize..];
                let chunks =
                    bytes[..count * TOKEN_BYTES as usize].chunks_exact(TOKEN_BYTES as usize);
                out.extend(chunks.map(|chunk| {
                    u32::from_le_bytes(chunk.try_into().expect("chunks have this length"))
                }));
            }
        }
    }
}
