//! The tags `{% generation %}` and `{% endgeneration %}`, by which a template marks the text that
//! the model is to write.
//!
//! minijinja has no tags of its own users' making. The tags are therefore rewritten before the
//! template is parsed, so that they emit marks, and the marks are cut out of the rendered text:
//!
//! ```text
//! {%- generation %}   ->  {%- if true %}{{ "<start mark>" }}{% endif %}{% with %}
//! {% endgeneration -%}  ->  {% endwith %}{{ "<end mark>" }}{% if true %}{% endif -%}
//! ```
//!
//! The first and the last tag of each have the white space control of the original, and lines keep
//! their numbers. As in transformers, where the block is a macro, a variable that is set in it is
//! unknown behind it.

use std::ops::Range;

use super::syntax::{name_of, tags};

// noncharacters of Unicode, so that no text that is meant for people contains a mark
const START: &str = "\u{fdd0}generation\u{fdd0}";
const END: &str = "\u{fdd1}generation\u{fdd1}";

/// The template with its tags rewritten; `None` if it has none.
pub(super) fn rewrite(template: &str) -> Option<String> {
    let mut rewritten = String::new();
    let mut copied = 0;
    for tag in tags(template) {
        if let Some(text) = marks_for(&template[tag.clone()]) {
            rewritten.push_str(&template[copied..tag.start]);
            rewritten.push_str(&text);
            copied = tag.end;
        }
    }
    (copied > 0).then(|| rewritten + &template[copied..])
}

/// What replaces a tag, if it is one of the two.
fn marks_for(tag: &str) -> Option<String> {
    match name_of(tag)? {
        ("generation", front, back) => Some(format!(
            "{{%{front} if true %}}{{{{ \"{START}\" }}}}{{% endif %}}{{% with {back}%}}"
        )),
        ("endgeneration", front, back) => Some(format!(
            "{{%{front} endwith %}}{{{{ \"{END}\" }}}}{{% if true %}}{{% endif {back}%}}"
        )),
        _ => None,
    }
}

/// Cuts the marks out of a rendered text. Returns the text and what was between the marks, as
/// ranges of bytes in it; of nested ranges, the outer one.
///
/// # Errors
/// A mark without its other half.
pub(super) fn cut_out(rendered: &str) -> Result<(String, Vec<Range<usize>>), String> {
    let mut text = String::new();
    let mut ranges = Vec::new();
    let mut starts = Vec::new();
    let mut rest = rendered;
    while let Some(place) = rest.find(['\u{fdd0}', '\u{fdd1}']) {
        let (before, mark) = rest.split_at(place);
        text.push_str(before);
        if let Some(behind) = mark.strip_prefix(START) {
            starts.push(text.len());
            rest = behind;
        } else if let Some(behind) = mark.strip_prefix(END) {
            let start = starts.pop().ok_or("`{% endgeneration %}` without `{% generation %}`")?;
            if starts.is_empty() {
                ranges.push(start..text.len());
            }
            rest = behind;
        } else {
            let other = mark.chars().next().map_or(0, char::len_utf8);
            text.push_str(&mark[..other]);
            rest = &mark[other..];
        }
    }
    if !starts.is_empty() {
        return Err("`{% generation %}` without `{% endgeneration %}`".into());
    }
    text.push_str(rest);
    Ok((text, ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_are_rewritten() {
        for template in [
            "{{ messages }}",
            "{# {% generation %} #}{#- {%- generation -%} -#}",
            "{{ '{% generation %}' }}{% set x = \"{% generation %}\" %}",
            r"{{ 'a\'{% generation %}' }}",
            "{% raw %}{% generation %}{%- endraw -%}",
            "{% generations %}{% set generation = 1 %}{ % generation %}",
            "{% generation",
        ] {
            assert_eq!(rewrite(template), None, "{template}");
        }
        let found = rewrite("{% raw %}{%\n{%- endraw %}{%-generation+%}a").expect("it has a tag");
        assert!(found.starts_with("{% raw %}{%\n{%- endraw %}{%- if true %}{{"), "{found}");
        assert!(found.ends_with("{% with +%}a"), "{found}");
    }

    #[test]
    fn marks_become_ranges() {
        let marked = |text: &str| cut_out(&text.replace('[', START).replace(']', END));
        assert_eq!(marked("a[bé]c[]"), Ok(("abéc".into(), vec![1..4, 5..5])));
        assert_eq!(marked("[a[b]]c[d]"), Ok(("abcd".into(), vec![0..2, 3..4])));
        assert!(marked("a]").is_err() && marked("[a").is_err());
        assert_eq!(cut_out("\u{fdd0}a\u{fdd1}"), Ok(("\u{fdd0}a\u{fdd1}".into(), vec![])));
    }
}
