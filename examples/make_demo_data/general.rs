//! The general corpus, on which the base is trained. It teaches the language and the vocabulary,
//! but none of the domains' conventions and facts.
//!
//! Most documents come from one grammar of stories, descriptions, letters, lists, tables and
//! Python-like code. The others are of three kinds:
//!
//! - sums
//! - notebooks, which list words of the domains out of context, so that the base has seen every
//!   token
//! - smudged copies of the domains' records, which show the base their form; their facts are drawn
//!   at random and many of their words are replaced by others

use std::collections::BTreeSet;

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::grammar::{Bindings, Grammar};
use crate::record::{Body, Record};
use crate::{arithmetic, code, data2text, verse};

/// The share of a smudged copy's words that are replaced.
const SMUDGED_SHARE: f64 = 0.4;

/// The generator of the general corpus: the grammars and the words that it draws from.
#[derive(Debug)]
pub struct General {
    grammar: Grammar,
    problems: Grammar,
    houses: Grammar,
    scenes: Grammar,
    words: Vec<String>,
}

impl General {
    /// A generator that takes the words of its notebooks and smudged copies from `records`.
    pub fn new<'a>(records: impl Iterator<Item = &'a Record>) -> Self {
        let mut words = BTreeSet::new();
        for record in records {
            let text = record.body.full_text();
            words.extend(text.split_whitespace().flat_map(split_word).map(str::to_owned));
        }
        let words = words.into_iter().collect();
        Self {
            grammar: Grammar::parse(include_str!("grammars/general.txt")),
            problems: arithmetic::grammar().without_facts(),
            houses: data2text::grammar().without_facts(),
            scenes: verse::grammar().without_facts(),
            words,
        }
    }

    /// One document of a random kind.
    pub fn generate(&self, rng: &mut ChaCha8Rng) -> Body {
        let num_paragraphs = rng.random_range(3..=6);
        let text = match rng.random_range(0..100) {
            0..12 => sums(4 * num_paragraphs, rng),
            12..22 => self.notebook(8 * num_paragraphs, rng),
            22..32 => self.smudged_copy(rng),
            _ => self.document(num_paragraphs, rng),
        };
        Body::Text { text }
    }

    /// Paragraphs of one kind that share the persons' names.
    fn document(&self, num_paragraphs: usize, rng: &mut ChaCha8Rng) -> String {
        let mut names = Bindings::new();
        let kind = self.grammar.expand("<kind>", &mut names, rng);
        let paragraph = format!("<{kind}>");
        let paragraphs: Vec<String> = (0..num_paragraphs)
            .map(|_| {
                names.retain(|name, _| name.starts_with("who"));
                self.grammar.expand(&paragraph, &mut names, rng)
            })
            .collect();
        paragraphs.join("\n")
    }

    /// A text in the form of a random domain, with random facts and with words replaced by others.
    fn smudged_copy(&self, rng: &mut ChaCha8Rng) -> String {
        let body = match rng.random_range(0..4) {
            0 => arithmetic::generate(&self.problems, rng),
            1 => code::generate(rng),
            2 => data2text::generate(&self.houses, rng),
            _ => verse::generate(&self.scenes, rng),
        };
        let text = body.full_text();
        let mut smudged = String::with_capacity(text.len());
        for part in split_word(&text) {
            let is_word = part.chars().all(char::is_alphanumeric);
            smudged.push_str(if is_word && rng.random_bool(SMUDGED_SHARE) {
                self.words.choose(rng).expect("the domains have words")
            } else {
                part
            });
        }
        smudged
    }

    /// A list of words out of context.
    fn notebook(&self, num_words: usize, rng: &mut ChaCha8Rng) -> String {
        let words: Vec<&str> = (0..num_words)
            .map(|_| self.words.choose(rng).expect("the domains have words").as_str())
            .collect();
        let separator = *[" ", ", ", " - ", "\n"].choose(rng).expect("there are separators");
        let title = self.grammar.expand("<notebook>", &mut Bindings::new(), rng);
        format!("{title}\n{}", words.join(separator))
    }
}

/// Splits a text into runs of letters (with `'` and `-`), runs of digits and runs of other
/// characters.
fn split_word(word: &str) -> Vec<&str> {
    let kind = |c: char| match c {
        '\'' | '-' => 0,
        _ if c.is_alphabetic() => 0,
        _ if c.is_numeric() => 1,
        _ => 2,
    };
    let mut parts = Vec::new();
    let mut start = 0;
    for ((_, before), (index, after)) in word.char_indices().zip(word.char_indices().skip(1)) {
        if kind(before) != kind(after) {
            parts.push(&word[start..index]);
            start = index;
        }
    }
    parts.push(&word[start..]);
    parts
}

/// Lines of sums of one random kind, such as `7 + 5 = 12`.
fn sums(num_lines: usize, rng: &mut ChaCha8Rng) -> String {
    let kind = rng.random_range(0..6);
    let start: i64 = rng.random_range(0..150);
    let lines = (0..num_lines as i64).map(|line| {
        let (a, b) = (rng.random_range(1..=20_i64), rng.random_range(1..=20_i64));
        match kind {
            0 => format!("{} {} {} {}", a * b, a + b, a, b),
            1 => format!("{a} + {b} = {}", a + b),
            2 => format!("{a} * {b} = {}", a * b),
            3 => format!("{} - {a} = {b}", a + b),
            4 => format!("{} / {a} = {b}", a * b),
            _ => {
                format!("{}, {}, {}", start + 3 * line, start + 3 * line + 1, start + 3 * line + 2)
            }
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}
