//! Where a text may be cut so that the ids of the parts, joined, are those of the text. That
//! depends on the pattern by which the tokenizer splits a text into pieces.

use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

/// The patterns by which Qwen2 and Qwen3, and Llama 3 and SmolLM3, split a text into pieces. No
/// token crosses the border of a piece.
pub const SPLIT_PATTERNS: [&str; 2] = [
    concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

/// Where a text may be cut without a change to its tokens.
///
/// A rule holds if no match of the pattern crosses the cut, and if the matches in front of it are
/// the same whether or not anything follows. The matches behind it never depend on what precedes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CutRule {
    /// In front of a line end or a space that follows a character other than white space, for
    /// GPT-2's pattern,
    /// `'s|..| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. No alternative matches white
    /// space behind another character, and one that ends in another character looks no further.
    /// `Digits` changes nothing, since it looks at single characters.
    BeforeLineEnd,
    /// Behind a line end that precedes a character other than white space, for
    /// [`SPLIT_PATTERNS`]. In each alternative, only white space can follow a line end. White space
    /// in front of the cut is matched up to the cut by `\s*[\r\n]+`, before `\s+(?!\S)` could look
    /// at what follows. NFC changes nothing, since no composition contains a line end.
    ///
    /// Also in front of a space that follows a character other than white space: of these patterns,
    /// too, no alternative matches a space behind another character, none that ends in another
    /// character looks further, and NFC composes no character with a space.
    AfterLineEnd,
}

impl CutRule {
    /// The rule for a tokenizer, if one is known.
    pub fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let added = tokenizer.get_added_tokens_decoder();
        let keeps_cuts = added.values().all(|token| {
            !token.lstrip && !token.rstrip && !token.content.contains(['\n', '\r', ' '])
        });
        let pre_tokenizers = match tokenizer.get_pre_tokenizer()? {
            PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
            single => std::slice::from_ref(single),
        };
        let rule = match pre_tokenizers {
            [PreTokenizerWrapper::ByteLevel(level)]
            | [PreTokenizerWrapper::Digits(_), PreTokenizerWrapper::ByteLevel(level)]
                if level.use_regex && !level.add_prefix_space =>
            {
                Self::BeforeLineEnd
            }
            [PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(level)]
                if matches!(&split.pattern, SplitPattern::Regex(pattern)
                    if SPLIT_PATTERNS.contains(&pattern.as_str()))
                    && split.behavior == SplitDelimiterBehavior::Isolated
                    && !split.invert
                    && !level.use_regex
                    && !level.add_prefix_space =>
            {
                Self::AfterLineEnd
            }
            _ => return None,
        };
        let is_safe_normalizer = match tokenizer.get_normalizer() {
            None => true,
            Some(NormalizerWrapper::NFC(_)) => rule == Self::AfterLineEnd,
            Some(_) => false,
        };
        (keeps_cuts && is_safe_normalizer).then_some(rule)
    }

    /// Whether `text` may be cut at `place`.
    pub(crate) fn allows(self, text: &str, place: usize) -> bool {
        let (before, after) = text.split_at(place);
        let (Some(previous), Some(next)) = (before.chars().next_back(), after.chars().next())
        else {
            return false;
        };
        let is_line_end = |character| matches!(character, '\n' | '\r');
        let ends_word = !previous.is_whitespace();
        match self {
            Self::BeforeLineEnd => ends_word && (next == ' ' || is_line_end(next)),
            Self::AfterLineEnd => {
                (ends_word && next == ' ') || (is_line_end(previous) && !next.is_whitespace())
            }
        }
    }
}
