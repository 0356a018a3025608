//! The paths that a Rust file names in its code and in its `use` declarations, whose braces are
//! expanded.

use crate::code::Token;

/// How a file names a path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// `use a::b;`
    Use,
    /// `pub use a::b;`, or `pub(..) use`
    Reexport,
    /// `a::b` in code
    Inline,
}

/// A path that a file names.
#[derive(Debug, Clone, PartialEq)]
pub struct Import {
    /// The path's segments; the last one is `*` for a glob.
    pub path: Vec<String>,
    /// The name that a `use` declaration brings into scope, unless that is a glob or `_`.
    pub name: Option<String>,
    pub kind: Kind,
    pub line: usize,
}

/// The paths that `tokens` name, and the tokens outside of `use` declarations.
pub fn imports(tokens: &[Token]) -> (Vec<Import>, Vec<Token>) {
    let (mut found, mut code) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < tokens.len() {
        if begins_use(tokens, at) {
            let end = declaration_end(tokens, at);
            let reexported = at > 0 && matches!(tokens[at - 1].text.as_str(), "pub" | ")");
            let kind = if reexported { Kind::Reexport } else { Kind::Use };
            use_tree(&tokens[at + 1..end], &[], kind, &mut found);
            at = end;
        } else {
            found.extend(inline_path(tokens, at));
            code.push(tokens[at].clone());
            at += 1;
        }
    }
    (found, code)
}

/// Whether a `use` declaration begins at `at`, rather than `+ use<'a>` in a type.
fn begins_use(tokens: &[Token], at: usize) -> bool {
    let before = at.checked_sub(1).map_or(";", |before| &tokens[before].text);
    tokens[at].text == "use" && matches!(before, ";" | "{" | "}" | "]" | ")" | "pub")
}

fn declaration_end(tokens: &[Token], at: usize) -> usize {
    let length = tokens[at..].iter().position(|token| token.text == ";");
    length.map_or(tokens.len(), |length| at + length)
}

/// Adds the paths of a use tree to `found`, each with `prefix` before it.
fn use_tree(tokens: &[Token], prefix: &[String], kind: Kind, found: &mut Vec<Import>) {
    let Some(first) = tokens.first() else { return };
    let mut path = prefix.to_vec();
    let mut alias = None;
    for (at, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "::" => {}
            "{" => {
                for branch in branches(&tokens[at + 1..]) {
                    use_tree(branch, &path, kind, found);
                }
                return;
            }
            "as" => {
                alias = tokens.get(at + 1).map(|token| token.text.clone());
                break;
            }
            segment => path.push(segment.to_owned()),
        }
    }
    if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
        path.pop();
    }
    let name = alias.or_else(|| path.last().cloned()).filter(|name| name != "*" && name != "_");
    found.push(Import { path, name, kind, line: first.line });
}

/// Splits the inside of a group at its commas, up to its closing brace.
fn branches(tokens: &[Token]) -> Vec<&[Token]> {
    let (mut found, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" if depth == 0 => {
                found.push(&tokens[start..at]);
                break;
            }
            "}" => depth -= 1,
            "," if depth == 0 => {
                found.push(&tokens[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    found
}

/// The path in code that begins at `at`, if its first segment can be a module: a keyword, or a name
/// in lower case.
fn inline_path(tokens: &[Token], at: usize) -> Option<Import> {
    let before = at.checked_sub(1).map_or("", |before| &tokens[before].text);
    let is_module = tokens[at].text.starts_with(|first: char| first.is_lowercase() || first == '_');
    // `pub(in crate::a)` says who may use an item, but uses nothing itself
    if !is_module || matches!(before, "::" | "in") {
        return None;
    }
    let mut path = vec![tokens[at].text.clone()];
    for pair in tokens[at + 1..].chunks_exact(2) {
        if pair[0].text != "::" || !pair[1].is_word() {
            break;
        }
        path.push(pair[1].text.clone());
    }
    let line = tokens[at].line;
    (path.len() > 1).then_some(Import { path, name: None, kind: Kind::Inline, line })
}

/// The imports of `source` in the form `kind path as name`.
fn listed(source: &str) -> Vec<String> {
    let (found, _) = imports(&crate::code::tokens(source));
    let line = |import: &Import| {
        let name = import.name.as_ref().filter(|name| import.path.last() != Some(*name));
        let name = name.map_or(String::new(), |name| format!(" as {name}"));
        format!("{:?} {}{name}", import.kind, import.path.join("::"))
    };
    found.iter().map(line).collect()
}

#[test]
fn braces_are_expanded_at_any_depth() {
    let source = "use crate::a::{self, b::{C, d::*}, E as F};\npub(crate) use super::g::H as _;";
    assert_eq!(
        listed(source),
        [
            "Use crate::a",
            "Use crate::a::b::C",
            "Use crate::a::b::d::*",
            "Use crate::a::E as F",
            "Reexport super::g::H",
        ]
    );
}

#[test]
fn paths_in_code_are_found_once() {
    let source = "fn f(x: &super::A) -> crate::b::C<self::d::E> { std::fs::read::<u8>(x); F::g() }";
    let found =
        ["Inline super::A", "Inline crate::b::C", "Inline self::d::E", "Inline std::fs::read"];
    assert_eq!(listed(source), found);
}

#[test]
fn comments_strings_visibilities_and_captures_are_no_paths() {
    let source =
        "// use crate::a::B;\npub(in crate::c) fn f() -> impl D + use<'_> { \"crate::e\" }";
    assert_eq!(listed(source), Vec::<String>::new());
}

#[test]
fn code_is_what_stands_outside_of_use_declarations() {
    let (_, code) = imports(&crate::code::tokens("pub use a::B; fn f() { use c::D; e }"));
    let words: Vec<_> = code.iter().filter(|token| token.is_word()).collect();
    assert_eq!(words.iter().map(|token| &token.text).collect::<Vec<_>>(), ["pub", "fn", "f", "e"]);
}
