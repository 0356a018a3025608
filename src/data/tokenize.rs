//! Turns text into token ids with the base's own `tokenizer.json`.
//!
//! A tokenizer may put more than the text's own tokens in front of a text:
//!
//! - Start tokens, such as Llama 3's `<|begin_of_text|>`. Its post-processor adds them, and they
//!   belong at the start of a document ([`Tokenizer::start_tokens_for`]).
//! - A prefix, which is a space in front of the first word. SentencePiece's tokenizers (Llama 2,
//!   Mistral) write it as `▁`, and drop it again when they decode. It must not come between a
//!   prompt and its completion ([`Place::Continuation`]).
//!
//! Tokenizing takes microseconds per word. The parts of a file are therefore encoded on all cores,
//! and long texts are cut where no token can cross the cut, so that the ids are those of the whole
//! text ([`CutRule`]). Texts are not cut if the tokenizer is of a kind without such a rule.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use tokenizers::{Encoding, PostProcessorWrapper, Token};

use super::cut::CutRule;

/// A text is cut at the first safe place after this many bytes.
const CUT_AFTER_BYTES: usize = 1 << 16;

/// A continuation is encoded behind one of these texts, so that it gets no prefix. A word begins a
/// new token behind the first text, and white space begins one behind the second.
const GUARDS: [&str; 2] = ["x\n", "x"];

/// Where a text stands in its document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// At the start of the document.
    Start,
    /// Behind another text of the document.
    Continuation,
}

/// A `tokenizer.json` of Hugging Face's `tokenizers`.
///
/// Nothing is truncated or padded, whatever the file says. Text that spells an added token
/// (`<|endoftext|>`) becomes that token, as in `transformers`.
///
/// ```
/// use dylora::data::Tokenizer;
///
/// # fn main() -> anyhow::Result<()> {
/// let tokenizer = Tokenizer::load("demo/base/tokenizer.json".as_ref())?;
/// let ids = tokenizer.encode("A dog is not a cat.")?;
/// assert_eq!(tokenizer.decode(&ids)?, "A dog is not a cat.");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    hash: blake3::Hash,
    vocab_size: usize,
    start_tokens: Vec<u32>,
    /// The usable [`GUARDS`] and their ids. There are none if the tokenizer adds no prefix.
    guards: Vec<(&'static str, Vec<u32>)>,
    cut_rule: Option<CutRule>,
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
        let start_tokens = start_tokens(&inner)?;
        // it adds nothing else, and would take the space before a word out of its token's bytes
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let vocab = inner.get_vocab(true).into_values();
        let largest_id = vocab.chain(start_tokens.iter().copied()).max();
        let mut tokenizer = Self {
            hash: blake3::hash(bytes),
            vocab_size: largest_id.map_or(0, |id| id as usize + 1),
            start_tokens,
            guards: vec![],
            cut_rule: CutRule::of(&inner),
            inner,
        };
        tokenizer.guards = tokenizer.find_guards();
        Ok(tokenizer)
    }

    /// The [`GUARDS`] that survive encoding and decoding, if the tokenizer adds a prefix: a text at
    /// the start then has other ids than the same text behind another one.
    fn find_guards(&self) -> Vec<(&'static str, Vec<u32>)> {
        let encode = |text: &str| self.encode(text).unwrap_or_default();
        if encode("x\nx").ends_with(&encode("x")) {
            return vec![];
        }
        let guards = GUARDS.map(|guard| (guard, encode(guard)));
        let survives = |(guard, ids): &(&str, Vec<u32>)| {
            self.decode(ids).is_ok_and(|decoded| decoded.ends_with(guard))
        };
        guards.into_iter().filter(survives).collect()
    }

    /// The tokens that the tokenizer's post-processor puts in front of a text; there may be none.
    ///
    /// What it appends to a text, such as `</s>`, is not used: a document ends with the base's own
    /// end token.
    pub fn start_tokens(&self) -> &[u32] {
        &self.start_tokens
    }

    /// The start tokens to put in front of a document that begins with `ids`. There are none if
    /// the document is empty, or if its text spells them, as a rendered chat template does.
    pub fn start_tokens_for(&self, ids: &[u32]) -> &[u32] {
        let has_them = ids.is_empty() || ids.starts_with(&self.start_tokens);
        if has_them { &[] } else { &self.start_tokens }
    }

    /// The ids of `text`, without start tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encode = |text: &str| self.inner.encode_fast(text, false);
        let encoding = encode(text).map_err(|error| anyhow!("cannot encode the text: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `text` at `place`.
    ///
    /// A continuation is encoded behind a guard, whose ids are then removed. It thus has the ids
    /// that it has within a longer text. If no guard keeps its own ids, the continuation is encoded
    /// like the start of a document.
    pub(super) fn encode_at(&self, text: &str, place: Place) -> Result<Vec<u32>> {
        if place == Place::Continuation {
            for (guard, guard_ids) in &self.guards {
                let ids = self.encode(&format!("{guard}{text}"))?;
                if let Some(ids) = ids.strip_prefix(guard_ids.as_slice()) {
                    return Ok(ids.to_vec());
                }
            }
        }
        self.encode(text)
    }

    /// The ids of `text`, without start tokens, each with the bytes of the text that the token
    /// stands for. Tokens that stand for parts of one character have its bytes.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let (mut found, mut from) = (Vec::new(), 0);
        loop {
            let to = self.find_cut(&text[from..], 0).map_or(text.len(), |place| from + place);
            let encoding = self.inner.encode(&text[from..to], false);
            let encoding = encoding.map_err(|error| anyhow!("cannot encode the text: {error}"))?;
            let ranges = encoding.get_offsets().iter().map(|(start, end)| from + start..from + end);
            found.extend(encoding.get_ids().iter().copied().zip(ranges));
            if to == text.len() {
                return Ok(found);
            }
            from = to;
        }
    }

    /// The text of `ids`, including special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|error| anyhow!("cannot decode the tokens: {error}"))
    }

    /// The text of `ids` without special tokens.
    pub fn decode_text(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| anyhow!("cannot decode the tokens: {error}"))
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
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(place) = self.find_cut(&text[start..], 0) {
            parts.push(text[start..start + place].to_owned());
            start += place;
        }
        parts.push(if start == 0 { text } else { text[start..].to_owned() });
        parts
    }

    /// The first place where `text` may be cut, from byte `from` on and behind
    /// [`CUT_AFTER_BYTES`].
    pub(super) fn find_cut(&self, text: &str, from: usize) -> Option<usize> {
        let rule = self.cut_rule?;
        let mut places = from.max(CUT_AFTER_BYTES + 1)..text.len();
        places.find(|place| text.is_char_boundary(*place) && rule.allows(text, *place))
    }
}

/// The tokens that the post-processor of `tokenizer` puts in front of a text.
fn start_tokens(tokenizer: &tokenizers::Tokenizer) -> Result<Vec<u32>> {
    // stands for all tokens of a text; no vocabulary is so large
    const TEXT: u32 = u32::MAX;
    let text = Encoding::from_tokens(vec![Token::new(TEXT, "text".into(), (0, 4))], 0);
    let processed = tokenizer
        .post_process(text, None, true)
        .map_err(|error| anyhow!("the post-processor fails: {error}"))?;
    let around: Vec<&[u32]> = processed.get_ids().split(|id| *id == TEXT).collect();
    if let [start, _end] = around.as_slice() {
        return Ok(start.to_vec());
    }
    let processor = serde_json::to_string(&tokenizer.get_post_processor())?;
    let found = around.len() - 1;
    bail!("the post-processor must keep a text once, but keeps it {found} times: `{processor}`");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizer};

    use crate::data::cut::SPLIT_PATTERNS;

    use super::*;

    fn parse(file: &Value) -> Result<Tokenizer> {
        Tokenizer::from_bytes(file.to_string().as_bytes())
    }

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
        parse(&file).expect("a valid tokenizer")
    }

    /// The content of a `tokenizer.json` in `tests/golden/tokenizers`.
    fn golden(kind: &str) -> Value {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tokenizers");
        let file = fs_err::read(format!("{dir}/{kind}.tokenizer.json")).expect("it exists");
        serde_json::from_slice(&file).expect("JSON")
    }

    #[test]
    fn long_texts_are_cut_where_a_line_ends_in_a_word_or_in_front_of_a_space() {
        let filler = "x".repeat(CUT_AFTER_BYTES);
        let text = format!("{filler}\t\n\nab\r\n{filler}c\n");
        let stretches = tokenizer(false, "<s>").cut(text.clone());
        assert_eq!(stretches.concat(), text);
        assert_eq!(stretches[1], format!("\r\n{filler}c"));
        assert_eq!((stretches.len(), stretches[2].as_str()), (3, "\n"));
        let words = tokenizer(false, "<s>").cut(format!("{filler}x ab  c"));
        assert!(words == [format!("{filler}x"), " ab  c".to_owned()]);
    }

    #[test]
    fn texts_of_qwen_are_cut_where_a_line_begins_with_a_word() {
        let filler = "x".repeat(CUT_AFTER_BYTES);
        let text = format!("{filler}.\n\n  ab.\r\n人{filler}\n");
        let stretches = parse(&golden("qwen")).expect("it is valid").cut(text.clone());
        assert_eq!(stretches.concat(), text);
        assert_eq!((stretches.len(), stretches[1].as_str()), (2, &*format!("人{filler}\n")));
    }

    #[test]
    fn texts_stay_whole_where_a_cut_could_change_their_tokens() {
        let text = format!("{}\n", "x".repeat(2 * CUT_AFTER_BYTES));
        assert_eq!(tokenizer(false, "<s>").cut(text.clone()).len(), 2);
        assert_eq!(tokenizer(true, "<s>").cut(text.clone()).len(), 1);
        assert_eq!(tokenizer(false, "<s>\n").cut(text.clone()).len(), 1);
        assert_eq!(tokenizer(false, "a b").cut(text).len(), 1);
    }

    #[test]
    fn the_cut_rule_depends_on_the_kind_of_the_tokenizer() -> Result<()> {
        for (kind, rule) in [
            ("qwen", Some(CutRule::AfterLineEnd)),
            ("llama3", Some(CutRule::AfterLineEnd)),
            ("smollm", Some(CutRule::BeforeLineEnd)),
            ("llama2", None),
            ("mistral", None),
        ] {
            assert_eq!(parse(&golden(kind))?.cut_rule, rule, "{kind}");
        }
        let mut changed = golden("qwen");
        let pattern = &mut changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
        *pattern = json!(SPLIT_PATTERNS[0].replace(r"[\r\n]*", r"[\r\n/]*"));
        assert_eq!(parse(&changed)?.cut_rule, None);
        let mut lowercase = golden("llama3");
        lowercase["normalizer"] = json!({"type": "Lowercase"});
        assert_eq!(parse(&lowercase)?.cut_rule, None);
        Ok(())
    }

    #[test]
    fn a_long_text_has_the_ids_and_offsets_of_its_parts() -> Result<()> {
        let text = "Every word, é and 人, 12 of them.\n\n  It's\r\n<|im_end|>x ".repeat(5000);
        for kind in ["qwen", "llama3", "smollm", "llama2"] {
            let tokenizer = parse(&golden(kind))?;
            let whole = tokenizer.inner.encode(text.as_str(), false).map_err(|e| anyhow!("{e}"))?;
            let ranges = whole.get_offsets().iter().map(|(start, end)| *start..*end);
            let expected: Vec<_> = whole.get_ids().iter().copied().zip(ranges).collect();
            assert_eq!(tokenizer.cut(text.clone()).len() > 1, kind != "llama2");
            assert!(tokenizer.encode_with_offsets(&text)? == expected, "{kind}");
        }
        Ok(())
    }

    /// The pieces of `text` that the model turns into tokens, one at a time.
    fn pieces(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<String> {
        let added = tokenizer.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(tokenizer.get_normalizer(), text);
        let splits = tokenizer.get_pre_tokenizer().expect("it has one");
        splits.pre_tokenize(&mut pieces).expect("any text has pieces");
        let pieces = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
        pieces.into_iter().map(|(piece, ..)| piece.to_owned()).collect()
    }

    #[test]
    fn no_piece_crosses_a_cut() {
        let kinds = ["qwen", "llama3", "smollm"];
        let tokenizers = kinds.map(|kind| parse(&golden(kind)).expect("it is valid"));
        let strings = "a B e 1 23 ! ' s / é \u{301} \u{958} 人 <|im_end|>".split(' ');
        let spaces = [" ", "  ", "\t", "\n", "\n", "\r", "\r\n", "\u{a0}", "\u{2028}"];
        let strings: Vec<&str> = strings.chain(spaces).collect();
        let texts = prop::collection::vec(prop::sample::select(strings), 0..14);
        proptest!(|(text in texts.prop_map(|strings| strings.concat()))| {
            for tokenizer in &tokenizers {
                let pieces = |text| pieces(&tokenizer.inner, text);
                let rule = tokenizer.cut_rule.expect("its texts may be cut");
                let places = (0..text.len()).filter(|place| text.is_char_boundary(*place));
                for place in places.filter(|place| rule.allows(&text, *place)) {
                    let parts = [pieces(&text[..place]), pieces(&text[place..])];
                    prop_assert_eq!(parts.concat(), pieces(&text), "cut at {}", place);
                }
            }
        });
    }

    #[test]
    fn start_tokens_come_from_the_post_processor() -> Result<()> {
        let mut file = golden("llama2");
        let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        let processor = |single: &[&Value]| {
            json!({
                "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {
                    "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
                    "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
                }
            })
        };
        // what stands behind the text is not used
        file["post_processor"] =
            processor(&[&special("</s>"), &special("<s>"), &text, &special("</s>")]);
        let tokenizer = parse(&file)?;
        assert_eq!(tokenizer.start_tokens(), [2, 1]);
        assert_eq!(tokenizer.start_tokens_for(&[1, 9]), [2, 1]);
        for ids in [[2, 1, 9].as_slice(), &[2, 1], &[]] {
            assert!(tokenizer.start_tokens_for(ids).is_empty());
        }
        file["post_processor"] = processor(&[&text, &special("<s>"), &text]);
        let error = format!("{:#}", parse(&file).expect_err("it doubles a text"));
        let start =
            "the post-processor must keep a text once, but keeps it 2 times: `{\"type\":\"Templ";
        assert!(error.starts_with(start), "{error}");
        Ok(())
    }

    #[test]
    fn a_start_token_beyond_the_vocabulary_counts_as_part_of_it() -> Result<()> {
        let mut file = golden("llama2");
        let before = parse(&file)?.vocab_size();
        file["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([before + 5]);
        assert_eq!(parse(&file)?.vocab_size(), before + 6);
        Ok(())
    }

    #[test]
    fn a_continuation_has_no_prefix() -> Result<()> {
        let mut prefix_space = golden("smollm");
        prefix_space["pre_tokenizer"] = json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true
        });
        let mut always = golden("mistral");
        always["pre_tokenizer"]["prepend_scheme"] = json!("always");
        for file in [golden("llama2"), golden("mistral"), always, prefix_space] {
            let tokenizer = parse(&file)?;
            assert_eq!(tokenizer.guards.len(), 2);
            let prompt = tokenizer.encode("Everyone")?;
            for text in ["", "one", " one", "  one", "\n", "\none", "12", "é", "人", "!"] {
                let ids = tokenizer.encode_at(text, Place::Continuation)?;
                let decoded = tokenizer.decode(&[prompt.as_slice(), &ids].concat())?;
                assert_eq!(decoded.trim_start(), format!("Everyone{text}"));
            }
        }
        for kind in ["qwen", "llama3", "smollm"] {
            assert!(parse(&golden(kind))?.guards.is_empty(), "{kind}");
        }
        Ok(())
    }
}
