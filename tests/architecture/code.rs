//! Splits Rust source into tokens, as far as the rules about imports and words need them.
//!
//! A token is an identifier or number, `::`, or one other character. Comments are left out. A
//! string literal becomes the token `""` and a character literal `''`, so that no rule reads text
//! between quotes.

/// The token that stands for any string literal.
pub const STRING: &str = "\"\"";
const CHARACTER: &str = "''";

/// A token, and the line on which it begins, counted from 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

impl Token {
    /// Whether this is an identifier or a keyword.
    pub fn is_word(&self) -> bool {
        self.text.starts_with(|first: char| first.is_alphabetic() || first == '_')
    }
}

/// The tokens of `source`, in order.
pub fn tokens(source: &str) -> Vec<Token> {
    let (mut found, mut rest, mut line) = (Vec::new(), source, 1);
    while !rest.is_empty() {
        let (length, text) = first_token(rest);
        found.extend(text.map(|text| Token { text: text.to_owned(), line }));
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    found
}

/// The length in bytes of the first token, comment or blank of `source`, and the token if it is
/// one.
fn first_token(source: &str) -> (usize, Option<&str>) {
    if source.starts_with("//") {
        return (source.find('\n').unwrap_or(source.len()), None);
    }
    if source.starts_with("/*") {
        return (block_comment_length(source), None);
    }
    if let Some(length) = string_length(source) {
        return (length, Some(STRING));
    }
    if let Some(length) = character_length(source) {
        return (length, Some(CHARACTER));
    }
    if let Some(name) = source.strip_prefix("r#") {
        let length = word_length(name);
        return (2 + length, Some(&name[..length]));
    }
    let first = source.chars().next().map_or(0, char::len_utf8);
    let length = match word_length(source) {
        0 if source.starts_with("::") => 2,
        0 => first,
        length => length,
    };
    (length, Some(&source[..length]).filter(|text| !text.trim().is_empty()))
}

fn word_length(source: &str) -> usize {
    source.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(source.len())
}

/// The length of the block comment that `source` begins with. Block comments can be nested.
fn block_comment_length(source: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < source.len() {
        let rest = &source[at..];
        let step = match rest {
            _ if rest.starts_with("/*") => {
                depth += 1;
                2
            }
            _ if rest.starts_with("*/") => {
                depth -= 1;
                2
            }
            _ => rest.chars().next().map_or(1, char::len_utf8),
        };
        at += step;
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of the string literal, raw or not, that `source` begins with.
fn string_length(source: &str) -> Option<usize> {
    let prefix = ["br", "cr", "b", "c", "r", ""].into_iter().find(|&p| source.starts_with(p))?;
    let mut body = &source[prefix.len()..];
    let hashes =
        if prefix.ends_with('r') { body.len() - body.trim_start_matches('#').len() } else { 0 };
    body = body[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = match prefix.ends_with('r') {
        true => body.find(&end).unwrap_or(body.len()),
        false => unescaped_quote(body, '"'),
    };
    Some(source.len() - body.len() + (length + end.len()).min(body.len()))
}

/// The index of the first `quote` in `body` that is not escaped, or the length of `body`.
fn unescaped_quote(body: &str, quote: char) -> usize {
    let mut escaped = false;
    let end = body.find(|c| {
        let ends = c == quote && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    end.unwrap_or(body.len())
}

/// The length of the character literal that `source` begins with; `None` for a lifetime.
fn character_length(source: &str) -> Option<usize> {
    let body = source.strip_prefix('\'')?;
    let first = body.chars().next()?;
    if first == '\\' {
        return Some(1 + unescaped_quote(body, '\'') + 1);
    }
    body[first.len_utf8()..].starts_with('\'').then_some(1 + first.len_utf8() + 1)
}

/// The tokens without the items under `#[cfg(test)]` or `#[cfg(all(test, ..))]`.
pub fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let mut kept = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at < tokens.len() {
        if begins_test(&tokens[at..]) {
            at += item_length(&tokens[at..]);
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

fn begins_test(tokens: &[Token]) -> bool {
    let begins = |start: &[&str]| {
        tokens.len() > start.len()
            && tokens.iter().zip(start).all(|(token, text)| token.text == *text)
    };
    begins(&["#", "[", "cfg", "(", "test", ")"])
        || begins(&["#", "[", "cfg", "(", "all", "(", "test"])
}

/// The number of tokens of an item, from its attributes to its `;` or its last brace.
fn item_length(tokens: &[Token]) -> usize {
    let mut depth = 0;
    let end = tokens.iter().position(|token| {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        depth == 0 && (token.text == ";" || token.text == "}")
    });
    end.map_or(tokens.len(), |end| end + 1)
}

fn texts(source: &str) -> Vec<String> {
    tokens(source).into_iter().map(|token| token.text).collect()
}

#[test]
fn comments_are_no_tokens_and_nest() {
    assert_eq!(texts("a // b\n/* c /* d */ e */ f /// g"), ["a", "f"]);
}

#[test]
fn what_stands_in_quotes_is_not_read() {
    let source = r###"f("a \" // b", r#"c " d"#, b"e", br"\", 'g', '\'', '"', '\u{e9}') h"###;
    let found = texts(source).into_iter().filter(|text| text != "," && text != "\"\"");
    assert_eq!(found.collect::<Vec<_>>(), ["f", "(", "''", "''", "''", "''", ")", "h"]);
    assert_eq!(texts(source).iter().filter(|text| *text == STRING).count(), 4);
}

#[test]
fn lifetimes_and_raw_identifiers_are_no_literals() {
    assert_eq!(texts("&'a str r#type"), ["&", "'", "a", "str", "type"]);
}

#[test]
fn tokens_know_their_lines() {
    let found = tokens("a\n\"x\ny\"\n/*\n*/ b::c");
    let lines: Vec<_> = found.iter().map(|token| (token.text.as_str(), token.line)).collect();
    assert_eq!(lines, [("a", 1), (STRING, 2), ("b", 5), ("::", 5), ("c", 5)]);
}

#[test]
fn items_under_cfg_test_are_left_out() {
    let kept = |source| {
        let kept = without_tests(&tokens(source)).into_iter().map(|token| token.text);
        kept.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(kept("a #[cfg(test)]\nmod tests { fn f() { g() } }\nb"), "a b");
    assert_eq!(kept("#[cfg(test)] #[allow(x)] fn f(x: [u8; 3]) {} b"), "b");
    assert_eq!(kept("#[cfg(test)] mod tests; b"), "b");
    assert_eq!(kept("#[cfg(all(test, unix))] mod tests { } b"), "b");
    assert_eq!(kept("#[cfg(unix)] b"), "# [ cfg ( unix ) ] b");
}
