//! The tokens of one source file, in memory or on disk.

/// [`Document::record_domain`] of a record that names none.
pub(super) const NO_DOMAIN: u32 = u32::MAX;

/// [`Document::expert`] of a record that names none.
pub(super) const NO_EXPERT: i32 = -2;

/// [`Document::expert`] of a record that names the base alone.
pub(super) const BASE_EXPERT: i32 = -1;

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
    /// The expert that its record names, from 0; or [`BASE_EXPERT`], or [`NO_EXPERT`].
    pub expert: i32,
    /// The first half of BLAKE3 of its text (prompt and completion joined): equal texts are equal
    /// documents, whatever the tokenizer and wherever the prompt ends.
    pub content: [u8; 16],
}

/// Tokens in memory, or in a file that is mapped into it.
#[derive(Debug)]
pub(super) enum Tokens {
    Memory(Vec<u32>),
    /// A cache file, from `offset` on: the page cache holds what is in use, several processes share
    /// it, and the file may be deleted or replaced meanwhile.
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
    /// Appends the `count` tokens from `start` on to `out`.
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
