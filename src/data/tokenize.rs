//! Turns text into token ids with the base's own `tokenizer.json`.
//!
//! Tokenizing takes microseconds per word. The parts of a file are therefore encoded on all cores,
//! and long texts are cut at the end of a line that does not end in white space. GPT-2's pattern
//! (`ByteLevel`) always ends a word there, so that no token crosses the cut and the ids are those
//! of the whole text. With any other kind of tokenizer, texts are not cut.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow};
use tokenizers::PreTokenizerWrapper;

/// A text is cut at the first safe place after this many bytes.
const CUT_AFTER_BYTES: usize = 1 << 16;

/// A `tokenizer.json` of Hugging Face's `tokenizers`.
///
/// Only the text itself becomes ids: whatever the file says, no start or end token is added, and
/// nothing is truncated or padded. Text that spells an added token (`<|endoftext|>`) becomes that
/// token, as in `transformers`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    hash: blake3::Hash,
    vocab_size: usize,
    can_cut: bool,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs_err::read(path).context("cannot read the tokenizer")?;
        Self::from_bytes(&bytes).with_context(|| format!("in `{}`", path.display()))
    }

    /// Parses the content of a `tokenizer.json`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| {
            anyhow!(
                "not a tokenizer: {error}\nhint: the file is called `tokenizer.json`; \
                 `transformers` makes it from `vocab.json` and `merges.txt` by `save_pretrained`"
            )
        })?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| anyhow!("cannot turn off truncation: {error}"))?;
        let largest_id = inner.get_vocab(true).into_values().max();
        let vocab_size = largest_id.map_or(0, |id| id as usize + 1);
        let can_cut = can_cut(&inner);
        Ok(Self { inner, hash: blake3::hash(bytes), vocab_size, can_cut })
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encode = |text: &str| self.inner.encode_fast(text, false);
        let encoding = encode(text).map_err(|error| anyhow!("cannot encode the text: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of each text, in order, computed on up to `num_threads` threads.
    ///
    /// # Errors
    /// The index of the first text that cannot be encoded, and the reason.
    pub(super) fn encode_all(
        &self,
        texts: &[&str],
        num_threads: usize,
    ) -> Result<Vec<Vec<u32>>, (usize, anyhow::Error)> {
        let encode = |index: usize| self.encode(texts[index]).map_err(|error| (index, error));
        let num_threads = num_threads.min(texts.len());
        if num_threads <= 1 {
            return (0..texts.len()).map(encode).collect();
        }
        let next = AtomicUsize::new(0);
        let work = || -> Vec<(usize, Result<Vec<u32>, _>)> {
            let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < texts.len());
            std::iter::from_fn(take).map(|index| (index, encode(index))).collect()
        };
        let mut all: Vec<_> = (0..texts.len()).map(|_| Ok(Vec::new())).collect();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(work)).collect();
            for thread in threads {
                for (index, ids) in thread.join().expect("encoding returns its errors") {
                    all[index] = ids;
                }
            }
        });
        all.into_iter().collect()
    }

    /// The text of `ids`, including special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|error| anyhow!("cannot decode the tokens: {error}"))
    }

    /// The id of a token that is written as in `tokenizer.json`, for example `<|endoftext|>`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as it is written in `tokenizer.json`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the largest id, including added tokens. An embedding must have this many rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The BLAKE3 hash of the file's content.
    pub fn hash(&self) -> blake3::Hash {
        self.hash
    }

    /// Cuts `text` into parts whose ids, joined, are the ids of `text`.
    pub(super) fn cut(&self, text: String) -> Vec<String> {
        let mut stretches = Vec::new();
        let mut start = 0;
        if self.can_cut && text.len() > CUT_AFTER_BYTES {
            for (place, byte) in text.bytes().enumerate() {
                let is_line_end = matches!(byte, b'\n' | b'\r');
                if is_line_end && self.may_cut(&text[start..], place - start) {
                    stretches.push(text[start..place].to_owned());
                    start = place;
                }
            }
        }
        stretches.push(if start == 0 { text } else { text[start..].to_owned() });
        stretches
    }

    /// Whether `text` is long enough to be cut and may be cut at `place`, the end of a line,
    /// because no token crosses it.
    pub(super) fn may_cut(&self, text: &str, place: usize) -> bool {
        self.can_cut
            && place > CUT_AFTER_BYTES
            && text[..place].chars().next_back().is_some_and(|previous| !previous.is_whitespace())
    }
}

/// Whether a word always ends at the end of a line that does not end in white space.
fn can_cut(tokenizer: &tokenizers::Tokenizer) -> bool {
    let splits_by_gpt2_pattern = matches!(
        tokenizer.get_pre_tokenizer(),
        Some(PreTokenizerWrapper::ByteLevel(level)) if level.use_regex && !level.add_prefix_space
    );
    let added = tokenizer.get_added_tokens_decoder();
    splits_by_gpt2_pattern
        && tokenizer.get_normalizer().is_none()
        && added
            .values()
            .all(|token| !token.lstrip && !token.rstrip && !token.content.contains(['\n', '\r']))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokenizer(add_prefix_space: bool, added: &str) -> Tokenizer {
        let file = json!({
            "added_tokens": [{
                "id": 0, "content": added, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            }],
            "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true
            },
            "model": {"type": "BPE", "vocab": {}, "merges": []}
        });
        Tokenizer::from_bytes(file.to_string().as_bytes()).expect("a valid tokenizer")
    }

    #[test]
    fn long_texts_are_cut_where_a_line_ends_in_a_word() {
        let filler = "x".repeat(CUT_AFTER_BYTES);
        let text = format!("{filler} \n\nab\r\n{filler}c\n");
        let stretches = tokenizer(false, "<s>").cut(text.clone());
        assert_eq!(stretches.concat(), text);
        assert_eq!(stretches[1], format!("\r\n{filler}c"));
        assert_eq!((stretches.len(), stretches[2].as_str()), (3, "\n"));
    }

    #[test]
    fn texts_stay_whole_where_a_cut_could_change_their_tokens() {
        let text = format!("{}\n", "x".repeat(2 * CUT_AFTER_BYTES));
        assert_eq!(tokenizer(false, "<s>").cut(text.clone()).len(), 2);
        assert_eq!(tokenizer(true, "<s>").cut(text.clone()).len(), 1);
        assert_eq!(tokenizer(false, "<s>\n").cut(text).len(), 1);
    }
}
