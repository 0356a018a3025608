//! A text as a strip: each token has the colour and the number of the expert with the largest
//! weight.

use anyhow::Result;

use crate::data::{Tokenizer, visible};
use crate::generate::TextStream;
use crate::generate::text::INCOMPLETE;
use crate::report::palette::{coloured, largest};

/// The strip, and below it a legend with the share of tokens of each expert.
///
/// - `tokens`: the texts of the tokens
/// - `weights`: their routing weights, `[t][e]`
/// - `names`: the names of the experts, `[e]`
/// - `colours`: whether to colour the tokens; the numbers are there in any case
pub fn strip(tokens: &[String], weights: &[Vec<f64>], names: &[String], colours: bool) -> String {
    let paint = |text: &str, expert: usize| match colours {
        true => coloured(text, expert),
        false => text.to_owned(),
    };
    let mut counts = vec![0_usize; names.len()];
    let mut text = String::new();
    for (token, weights) in tokens.iter().zip(weights) {
        let expert = largest(weights);
        counts[expert] += 1;
        let shown = visible(token).replace('\n', "⏎").replace('\t', "⇥");
        text += &paint(&format!("{shown}{}", subscript(expert)), expert);
        if token.contains('\n') {
            text.push('\n');
        }
    }
    let entry = |(expert, (name, count)): (usize, (&String, &usize))| {
        let share = 100.0 * *count as f64 / tokens.len().max(1) as f64;
        let entry = format!("{} {name}: {count} token(s), {share:.0} %", subscript(expert));
        format!("  {}", paint(&entry, expert))
    };
    let legend: Vec<String> = names.iter().zip(&counts).enumerate().map(entry).collect();
    format!("{}\n\n{}", text.trim_end_matches('\n'), legend.join("\n"))
}

/// The text of each token within the whole text. Bytes that are no complete character belong to the
/// next token; a special token is shown as it is written.
///
/// - `alone`: the texts of the tokens when each is decoded by itself
///
/// # Errors
/// A token that cannot be decoded.
pub fn pieces(tokenizer: &Tokenizer, ids: &[i64], alone: &[String]) -> Result<Vec<String>> {
    let mut stream = TextStream::new(tokenizer, &[], &[][..]);
    let mut pieces = vec![];
    for (id, alone) in ids.iter().zip(alone) {
        let piece = stream.push(*id)?.to_owned();
        let is_special = piece.is_empty() && !alone.contains(INCOMPLETE);
        pieces.push(if is_special { alone.clone() } else { piece });
    }
    if let Some(last) = pieces.last_mut() {
        last.push_str(stream.finish()?);
    }
    Ok(pieces)
}

/// A number in subscript digits.
fn subscript(number: usize) -> String {
    let digit = |digit: char| char::from_u32(0x2080 + digit as u32 - '0' as u32);
    number.to_string().chars().filter_map(digit).collect()
}

/// The means of weights over sites.
///
/// - `layers`: the routing weights of each site, `[t][e]`
pub fn mean_weights(layers: &[Vec<Vec<f64>>]) -> Vec<Vec<f64>> {
    let Some(first) = layers.first() else { return vec![] };
    let mean = |t: usize, e: usize| {
        layers.iter().map(|rows| rows[t][e]).sum::<f64>() / layers.len() as f64
    };
    let row = |t: usize| (0..first[t].len()).map(|e| mean(t, e)).collect();
    (0..first.len()).map(row).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn example(colours: bool) -> String {
        let tokens = ["fn", " main", "()\n", "\u{202e}\x1b[2J", "x"].map(str::to_owned);
        let weights = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]];
        let names = ["expert_0 (code)", "expert_1 (verse)"].map(str::to_owned);
        strip(&tokens, &weights.map(|row| row.to_vec()), &names, colours)
    }

    #[test]
    fn each_token_has_the_number_of_its_expert() {
        insta::assert_snapshot!(example(false), @"
        fn₀ main₁()⏎₁
        [U+202E]␛[2J₀x₁

          ₀ expert_0 (code): 2 token(s), 40 %
          ₁ expert_1 (verse): 3 token(s), 60 %
        ");
    }

    #[test]
    fn colours_change_nothing_but_colours() {
        let coloured = example(true);
        assert!(coloured.starts_with("\x1b[36mfn₀\x1b[0m\x1b[33m main₁\x1b[0m"), "{coloured:?}");
        let codes = fancy_regex::Regex::new("\x1b\\[[0-9]+m").expect("it is a pattern");
        assert_eq!(codes.replace_all(&coloured, ""), example(false));
        assert_eq!(subscript(10), "₁₀");
    }

    #[test]
    fn bytes_of_a_character_are_shown_with_its_last_token() -> Result<()> {
        let tokenizer = Tokenizer::load(Path::new("demo/base/tokenizer.json"))?;
        let end = tokenizer.token_to_id("<|endoftext|>").expect("the demo has it");
        let mut ids = tokenizer.encode("a 日é")?;
        let count = ids.len();
        ids.push(end);
        let alone = ids.iter().map(|id| tokenizer.decode(&[*id])).collect::<Result<Vec<_>>>()?;
        assert!(alone.iter().any(|text| text.contains(INCOMPLETE)), "{alone:?}");
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        let found = pieces(&tokenizer, &ids, &alone)?;
        assert_eq!(found.len(), count + 1);
        assert_eq!(found.concat(), "a 日é<|endoftext|>");
        // what never becomes a character stands at the end
        let found = pieces(&tokenizer, &ids[..3], &alone[..3])?;
        assert!(found[2].ends_with(INCOMPLETE), "{found:?}");
        Ok(())
    }

    #[test]
    fn the_strip_of_several_routers_is_their_mean() {
        let layers = [vec![vec![1.0, 0.0]], vec![vec![0.5, 0.5]]];
        assert_eq!(mean_weights(&layers), [[0.75, 0.25]]);
        assert_eq!(mean_weights(&[]), Vec::<Vec<f64>>::new());
    }
}
