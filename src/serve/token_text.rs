//! The text of a single token, for log-probabilities. A token may be a part of a character, which
//! has bytes but no text.

use std::sync::Arc;

use crate::data::Tokenizer;
use crate::generate::text::INCOMPLETE;

/// The text in front of a token when it is decoded, so that the token keeps a leading space.
const GUARD: &str = "x";

/// Decodes single tokens.
#[derive(Debug, Clone)]
pub(crate) struct TokenTexts {
    tokenizer: Arc<Tokenizer>,
    guard: Vec<u32>,
    /// The text of the guard alone.
    guard_text: String,
}

impl TokenTexts {
    /// The texts of this tokenizer's tokens.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let guard = tokenizer.encode(GUARD).unwrap_or_default();
        let guard_text = tokenizer.decode(&guard).unwrap_or_default();
        Self { tokenizer, guard, guard_text }
    }

    /// The bytes of a token. Special tokens have those of their names.
    pub fn bytes(&self, id: i64) -> Vec<u8> {
        let id = id as u32;
        let decoded = self.tokenizer.decode(&[&self.guard[..], &[id]].concat()).unwrap_or_default();
        let text = decoded.strip_prefix(&self.guard_text).unwrap_or(&decoded);
        if !text.contains(INCOMPLETE) {
            return text.as_bytes().to_vec();
        }
        let written = self.tokenizer.id_to_token(id).unwrap_or_default();
        named_byte(&written)
            .map(|byte| vec![byte])
            .or_else(|| written.chars().map(byte_of).collect())
            .unwrap_or_else(|| text.as_bytes().to_vec())
    }
}

/// The byte of a token of SentencePiece, as `<0xF0>`.
fn named_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok()
}

/// The byte that a character stands for in the tokens of byte-level BPE: that of Latin-1 if it is
/// visible there; the others follow from U+0100 on, in their order (GPT-2, `encoder.py`,
/// `bytes_to_unicode`).
fn byte_of(c: char) -> Option<u8> {
    let is_visible = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(c);
    match u8::try_from(code) {
        Ok(byte) => is_visible(byte).then_some(byte),
        Err(_) => (0..=255).filter(|byte| !is_visible(*byte)).nth((code - 256) as usize),
    }
}

/// Bytes as a string. Those that are no complete characters are written as `\xf0`.
pub fn escaped(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::Result;

    use super::*;

    #[test]
    fn the_bytes_of_tokens_are_those_of_their_text() -> Result<()> {
        let tokenizer = Arc::new(Tokenizer::load(Path::new("demo/base/tokenizer.json"))?);
        let texts = TokenTexts::new(tokenizer.clone());
        for text in
            ["The cat.\n It  sleeps.", " a naïve café — 日本語 🦀", "\u{FFFD}", "<|endoftext|>"]
        {
            let ids = tokenizer.encode(text)?;
            let bytes: Vec<u8> = ids.iter().flat_map(|id| texts.bytes(i64::from(*id))).collect();
            assert_eq!(String::from_utf8(bytes)?, text);
        }
        Ok(())
    }

    #[test]
    fn each_byte_has_its_character() {
        let found: Vec<u8> = ('\0'..'\u{200}').filter_map(byte_of).collect();
        assert_eq!(found.len(), 256);
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('A')), (Some(b' '), Some(b'\n'), Some(65)));
        assert_eq!((named_byte("<0x0A>"), named_byte("<0x0>x")), (Some(10), None));
    }
}
