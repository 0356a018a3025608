//! Names in the Markdown of model cards.

use crate::data::visible;

/// A name as code, whatever it contains. In Markdown, code is shown as it is, up to as many
/// backticks as it began with (CommonMark 0.31, "code spans").
pub(super) fn code(name: &str) -> String {
    let name = visible(name).replace('\n', "⏎");
    let longest = name.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest + 1);
    // one space at each end belongs to the fence
    let space = if name.starts_with('`') || name.ends_with('`') { " " } else { "" };
    format!("{fence}{space}{name}{space}{fence}")
}

/// A name as code in a cell of a table, where a `|` would begin the next cell.
pub(super) fn code_in_table(name: &str) -> String {
    code(name).replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_within_its_code_and_its_cell() {
        assert_eq!(code("law"), "`law`");
        assert_eq!(code("a\"><script>"), "`a\"><script>`");
        assert_eq!(code("`a` [b](c)"), "`` `a` [b](c) ``");
        assert_eq!(code("a``b"), "```a``b```");
        assert_eq!(code("\u{202e}a\x1b[31m\nb"), "`[U+202E]a␛[31m⏎b`");
        assert_eq!(code_in_table("a|b"), "`a\\|b`");
    }
}
