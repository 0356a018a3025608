//! A context-free grammar with bound names, read from a text file.
//!
//! A rule is a line `name = one alternative | another`. Lines that start with a space continue the
//! rule, and lines that start with `#` are comments. In an alternative
//!
//! | written     | stands for                                                           |
//! |-------------|----------------------------------------------------------------------|
//! | `<noun>`    | a random alternative of the rule `noun`, or the value bound to it     |
//! | `<x:noun>`  | the value bound to `x`, at first drawn anew, unlike all bound values  |
//! | `<x>`       | the value bound to `x`                                               |
//! | `<oath@x>`  | the rule `oath VALUE`, where `VALUE` is bound to `x`                  |
//! | `<x.s>`     | the plural of `<x>`                                                  |
//! | `@ <noun>`  | `a` or `an` and the noun, depending on its first letter               |
//! | `^<noun>`   | the next letter as a capital                                         |
//! | `\n`        | a line break                                                         |
//! | `~`         | an empty alternative                                                 |
//!
//! A `<` before a space or at the end of an alternative stands for itself.

use std::collections::BTreeMap;

use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// The values that are bound to names.
pub type Bindings = BTreeMap<String, String>;

/// How often a value is drawn again if another name is already bound to it.
const MAX_REDRAWS: usize = 100;

/// The rules of one grammar. Its text is compiled in, so a fault in the text causes a panic.
#[derive(Debug)]
pub struct Grammar {
    rules: BTreeMap<String, Vec<String>>,
    /// Whether `<oath@x>` depends on the value of `x`.
    knows_facts: bool,
}

impl Grammar {
    /// Reads the rules in `source`.
    pub fn parse(source: &str) -> Self {
        let mut joined: Vec<String> = Vec::new();
        for line in source.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        {
            if line.starts_with(' ') {
                let rule = joined.last_mut().expect("a grammar starts with a rule's name");
                rule.push(' ');
                rule.push_str(line.trim());
            } else {
                joined.push(line.trim_end().to_owned());
            }
        }
        let rules = joined.iter().map(|line| parse_rule(line)).collect();
        Self { rules, knows_facts: true }
    }

    /// The same grammar without its facts: `<oath@x>` is a random one of the rules `oath VALUE`.
    pub fn without_facts(self) -> Self {
        Self { knows_facts: false, ..self }
    }

    /// A random text from `template`, with its references replaced and its marks resolved.
    pub fn expand(&self, template: &str, bound: &mut Bindings, rng: &mut ChaCha8Rng) -> String {
        resolve_marks(&self.substitute(template, bound, rng))
    }

    /// Replaces every `<reference>` in `template`.
    fn substitute(&self, template: &str, bound: &mut Bindings, rng: &mut ChaCha8Rng) -> String {
        let mut text = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('<') {
            text.push_str(before);
            if after.is_empty() || after.starts_with(' ') {
                text.push('<');
                rest = after;
                continue;
            }
            let (reference, after) = after.split_once('>').expect("each `<` has its `>`");
            text.push_str(&self.resolve(reference, bound, rng));
            rest = after;
        }
        text + rest
    }

    /// The text that replaces one reference, such as `x:noun.s`.
    fn resolve(&self, reference: &str, bound: &mut Bindings, rng: &mut ChaCha8Rng) -> String {
        if let Some(singular) = reference.strip_suffix(".s") {
            return plural(&self.resolve(singular, bound, rng));
        }
        let (key, rule) = match reference.split_once(':') {
            Some((key, rule)) => (Some(key), rule),
            None => (None, reference),
        };
        if let Some(value) = bound.get(key.unwrap_or(rule)) {
            return value.clone();
        }
        let Some(key) = key else { return self.draw(rule, bound, rng) };
        let mut value = self.draw(rule, bound, rng);
        for _ in 0..MAX_REDRAWS {
            if !bound.values().any(|other| *other == value) {
                break;
            }
            value = self.draw(rule, bound, rng);
        }
        bound.insert(key.to_owned(), value.clone());
        value
    }

    /// A random alternative of `rule`, with its references replaced.
    fn draw(&self, rule: &str, bound: &mut Bindings, rng: &mut ChaCha8Rng) -> String {
        let name = match rule.split_once('@') {
            Some((rule, key)) if self.knows_facts => format!("{rule} {}", bound[key]),
            Some((rule, _)) => self.any_fact(rule, rng),
            None => rule.to_owned(),
        };
        let alternatives =
            self.rules.get(&name).unwrap_or_else(|| panic!("the grammar has no rule `{name}`"));
        let alternative = alternatives.choose(rng).expect("a rule has an alternative");
        self.substitute(alternative, bound, rng)
    }

    /// The name of a random rule among those called `rule VALUE`.
    fn any_fact(&self, rule: &str, rng: &mut ChaCha8Rng) -> String {
        let facts: Vec<&String> = self
            .rules
            .keys()
            .filter(|name| name.split_once(' ').is_some_and(|(first, _)| first == rule))
            .collect();
        (*facts.choose(rng).expect("a fact has a rule")).clone()
    }
}

/// Splits `name = one | two` into the name and the alternatives.
fn parse_rule(line: &str) -> (String, Vec<String>) {
    let (name, body) =
        line.split_once(" = ").unwrap_or_else(|| panic!("`{line}` is no rule of a grammar"));
    let alternatives = body.split(" | ").map(str::trim).map(|alternative| match alternative {
        "~" => String::new(),
        _ => alternative.replace("\\n", "\n"),
    });
    (name.to_owned(), alternatives.collect())
}

/// The regular plural of an English noun.
pub fn plural(noun: &str) -> String {
    let before_y = noun.strip_suffix('y').filter(|stem| !stem.ends_with(['a', 'e', 'o', 'u']));
    if let Some(stem) = before_y {
        return format!("{stem}ies");
    }
    if noun.ends_with(['s', 'x', 'z']) || noun.ends_with("ch") || noun.ends_with("sh") {
        return format!("{noun}es");
    }
    format!("{noun}s")
}

/// Replaces `@` by an article, and removes `^` and capitalizes the letter after it.
fn resolve_marks(text: &str) -> String {
    let mut resolved = String::with_capacity(text.len());
    let mut capital = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '^' => capital = true,
            '@' => {
                let next = chars.clone().find(|c| c.is_alphabetic());
                resolved.push(if capital { 'A' } else { 'a' });
                resolved.push_str(if next.is_some_and(is_vowel) { "n" } else { "" });
                capital = false;
            }
            _ if capital && c.is_alphabetic() => {
                resolved.extend(c.to_uppercase());
                capital = false;
            }
            _ => resolved.push(c),
        }
    }
    resolved
}

/// Whether the article before a word that starts with `c` is `an`. The grammars avoid words such as
/// `hour` and `uniform`, for which the letter does not decide it.
fn is_vowel(c: char) -> bool {
    matches!(c.to_ascii_lowercase(), 'a' | 'e' | 'i' | 'o' | 'u')
}
