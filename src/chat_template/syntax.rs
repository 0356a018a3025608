//! The syntax of Jinja, as far as templates are rewritten before minijinja parses them: where tags
//! and expressions stand, and the string literals in them.

use std::ops::Range;

/// The tags and expressions of a template, with their delimiters. Comments and what stands in
/// `{% raw %}` are left out.
pub(super) fn tags(template: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(tag) = next_tag(template, at) {
        at = after(template, &tag);
        if !template[tag.start..].starts_with("{#") {
            found.push(tag);
        }
    }
    found
}

/// The next comment, expression or tag of a template from byte `from` on. Its end is the template's
/// if it is not closed.
fn next_tag(template: &str, from: usize) -> Option<Range<usize>> {
    let opens = |place: &usize| {
        matches!(template.as_bytes().get(place + 1), Some(b'{' | b'%' | b'#'))
            && template.as_bytes()[*place] == b'{'
    };
    let start = (from..template.len()).find(opens)?;
    let inner = start + 2;
    let length = match template.as_bytes()[start + 1] {
        b'#' => template[inner..].find("#}"),
        b'{' => find_outside_of_strings(&template[inner..], "}}"),
        _ => find_outside_of_strings(&template[inner..], "%}"),
    };
    Some(start..length.map_or(template.len(), |length| inner + length + 2))
}

fn find_outside_of_strings(text: &str, end: &str) -> Option<usize> {
    let mut quote = None;
    let mut is_escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match (quote, byte) {
            (Some(_), _) if is_escaped => is_escaped = false,
            (Some(_), b'\\') => is_escaped = true,
            (Some(open), _) if byte == open => quote = None,
            (None, b'\'' | b'"') => quote = Some(byte),
            (None, _) if text.as_bytes()[at..].starts_with(end.as_bytes()) => return Some(at),
            _ => {}
        }
    }
    None
}

/// The name of a tag and its white space control in front and behind; `None` if it is no tag.
pub(super) fn name_of(tag: &str) -> Option<(&str, &str, &str)> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let control = |sign: bool| usize::from(sign);
    let is_sign = |sign: char| matches!(sign, '-' | '+');
    let (front, inner) = inner.split_at(control(inner.starts_with(is_sign)));
    let (inner, back) = inner.split_at(inner.len() - control(inner.ends_with(is_sign)));
    Some((inner.trim(), front, back))
}

/// Where the search for tags goes on behind `tag`. What stands in `{% raw %}` is text.
fn after(template: &str, tag: &Range<usize>) -> usize {
    if name_of(&template[tag.clone()]).is_none_or(|(name, ..)| name != "raw") {
        return tag.end;
    }
    let is_end = |place: &usize| {
        let rest = template[*place..]
            .strip_prefix("{%")
            .map(|rest| rest.trim_start_matches(['-', '+']).trim_start().starts_with("endraw"));
        rest == Some(true)
    };
    let places = template[tag.end..].match_indices("{%").map(|(place, _)| tag.end + place);
    places.into_iter().find(is_end).unwrap_or(template.len())
}

/// The template with the escapes in its string literals as minijinja has them. Both follow Python,
/// but minijinja takes `\/` for a slash, as JSON has it, keeps a line end behind a backslash, and
/// does not know `\a`, `\v` and `\U0001f600`.
pub(super) fn with_known_escapes(template: &str) -> String {
    let mut rewritten = String::new();
    let mut copied = 0;
    for tag in tags(template) {
        rewritten.push_str(&template[copied..tag.start]);
        push_tag(&template[tag.clone()], &mut rewritten);
        copied = tag.end;
    }
    rewritten + &template[copied..]
}

fn push_tag(tag: &str, out: &mut String) {
    let mut quote = None;
    // line ends that are left out of a literal go behind it, so that lines keep their numbers
    let mut left_out = 0;
    let mut characters = tag.chars();
    while let Some(character) = characters.next() {
        if quote.is_some() && character == '\\' {
            match characters.next() {
                Some('\n') => left_out += 1,
                Some('/') => out.push_str("\\\\/"),
                Some('a') => out.push_str("\\x07"),
                Some('v') => out.push_str("\\x0b"),
                Some('U') => {
                    let digits = characters.as_str().get(..8);
                    let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
                    match code.and_then(char::from_u32) {
                        Some(named) => {
                            // neither a quote nor a backslash is to end the literal
                            match u8::try_from(named).ok().filter(u8::is_ascii) {
                                Some(byte) => out.push_str(&format!("\\x{byte:02x}")),
                                None => out.push(named),
                            }
                            characters.nth(7);
                        }
                        None => out.push_str("\\U"),
                    }
                }
                escaped => out.extend(['\\'].into_iter().chain(escaped)),
            }
            continue;
        }
        out.push(character);
        match quote {
            Some(open) if character == open => {
                quote = None;
                out.extend(std::iter::repeat_n('\n', std::mem::take(&mut left_out)));
            }
            None if matches!(character, '\'' | '"') => quote = Some(character),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_and_expressions_are_found() {
        let found = |template| -> Vec<String> {
            tags(template).into_iter().map(|tag| template[tag].to_owned()).collect()
        };
        assert_eq!(found("a{# {{ b }} #}{{ '}}' }}{%- c -%}"), ["{{ '}}' }}", "{%- c -%}"]);
        assert_eq!(
            found("{% raw %}{{ a }}{%- endraw %}{{ b"),
            ["{% raw %}", "{%- endraw %}", "{{ b"]
        );
        assert_eq!(found(r"{{ 'a\'}}' }}"), [r"{{ 'a\'}}' }}"]);
    }

    #[test]
    fn escapes_are_rewritten_in_literals_only() {
        for (template, expected) in [
            ("a\\/ {# '\\/' #} {{ '\\/' ~ x }}", "a\\/ {# '\\/' #} {{ '\\\\/' ~ x }}"),
            ("{{ \"a\\\nb\\\nc\" }}", "{{ \"abc\"\n\n }}"),
            (r"{{ '\\/\'\n\q\a\v' }}", r"{{ '\\/\'\n\q\x07\x0b' }}"),
            (r"{{ '\U0001f600\U00000027\Ux' }}", r"{{ '😀\x27\Ux' }}"),
        ] {
            assert_eq!(with_known_escapes(template), expected);
        }
    }
}
