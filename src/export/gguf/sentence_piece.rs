//! The scores of SentencePiece's tokens.
//!
//! llama.cpp joins the two neighbours whose joined text is the token of the highest score.
//! `tokenizer.json` has merges instead, of which the first in the list goes first. A token's score
//! is minus the place of its first merge, which leads to the same tokens if
//!
//! - the merges that make one token stand together in the list, and
//! - each two tokens whose joined text is a token have a merge.
//!
//! Both hold in a file that was made from SentencePiece's own.

use std::collections::{HashMap, HashSet};

use anyhow::{Result, bail};

/// The score of each token.
///
/// - `is_piece`: whether a token is one of text, and not a byte or special
///
/// # Errors
/// Merges that no scores can say.
pub(super) fn scores(
    tokens: &[String],
    merges: &[(&str, &str)],
    is_piece: &dyn Fn(usize) -> bool,
) -> Result<Vec<f32>> {
    let pieces = tokens.iter().enumerate().filter(|(id, _)| is_piece(*id));
    let ids: HashMap<&str, usize> = pieces.map(|(id, token)| (token.as_str(), id)).collect();
    let known: HashSet<(&str, &str)> = merges.iter().copied().collect();
    for token in ids.keys() {
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        for (a, b) in splits {
            if ids.contains_key(a) && ids.contains_key(b) && !known.contains(&(a, b)) {
                bail!(
                    "`model.merges` lacks `{a} {b}`, but llama.cpp would join them: these are not \
                     the merges of a SentencePiece model"
                );
            }
        }
    }
    let mut scores = vec![0.0; tokens.len()];
    let (mut places, mut last) = (HashMap::new(), None);
    for (place, (a, b)) in merges.iter().enumerate() {
        let joined = format!("{a}{b}");
        let Some(id) = ids.get(joined.as_str()) else {
            bail!("`model.merges` has `{a} {b}`, but `{joined}` is no token");
        };
        if last != Some(*id) && places.insert(*id, place).is_some() {
            bail!(
                "`model.merges` makes `{joined}` at two places of the list: these are not the \
                 merges of a SentencePiece model"
            );
        }
        last = Some(*id);
        scores[*id] = -(places[id] as f32) - 1.0;
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(tokens: &[&str], merges: &[(&str, &str)]) -> Result<Vec<f32>> {
        let tokens: Vec<String> = tokens.iter().map(|token| (*token).to_owned()).collect();
        scores(&tokens, merges, &|id| id > 0)
    }

    #[test]
    fn a_token_scores_by_the_place_of_its_first_merge() -> Result<()> {
        let tokens = ["<unk>", "a", "b", "ab", "aab", "aa"];
        let merges = [("a", "b"), ("a", "a"), ("a", "ab"), ("aa", "b")];
        assert_eq!(scored(&tokens, &merges)?, [0., 0., 0., -1., -3., -2.]);
        Ok(())
    }

    #[test]
    fn merges_that_no_scores_can_say_are_refused() {
        let tokens = ["<unk>", "a", "b", "ab", "aab", "aa"];
        for (merges, words) in [
            (&[("a", "b"), ("a", "a"), ("a", "ab")][..], "lacks `aa b`"),
            (&[("a", "ab"), ("a", "b"), ("aa", "b"), ("a", "a")], "makes `aab` at two places"),
            (&[("a", "b"), ("a", "a"), ("a", "ab"), ("aa", "b"), ("b", "b")], "`bb` is no token"),
        ] {
            let error = scored(&tokens, merges).expect_err("it is refused").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
