//! What the terminal can show: its width, and whether to use colours.
//!
//! `NO_COLOR` (any value but an empty one) turns colours off, `CLICOLOR_FORCE` turns them on even
//! where there is no terminal, and `TERM=dumb` is a terminal without colours and without bars
//! (<https://no-color.org>, <https://bixense.com/clicolors>).

use std::io::IsTerminal;

use super::variable;

/// The columns of a text where there is no terminal.
const DEFAULT_WIDTH: usize = 80;

/// Whether a stream gets colours.
///
/// - `is_terminal`: whether it is a terminal
pub fn has_colours(is_terminal: bool) -> bool {
    wants_colours(is_terminal, &|name| variable(name))
}

fn wants_colours(is_terminal: bool, variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let forced = variable("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    let refused = variable("NO_COLOR").is_some();
    match (refused, forced) {
        (true, _) => false,
        (false, true) => true,
        (false, false) => is_terminal && !is_dumb(variable),
    }
}

/// Whether standard error is a terminal on which a line can be drawn again.
pub fn has_bars() -> bool {
    std::io::stderr().is_terminal() && !is_dumb(&|name| variable(name))
}

fn is_dumb(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    variable("TERM").is_some_and(|term| term == "dumb")
}

/// The number of columns of standard output. If it is no terminal, the environment variable
/// `COLUMNS` says the number, and otherwise it is 80.
pub fn width() -> usize {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok()).flatten();
    let of_terminal = size.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
    let asked = || variable("COLUMNS")?.parse().ok().filter(|columns| *columns > 0);
    of_terminal.or_else(asked).unwrap_or(DEFAULT_WIDTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_decides_about_colours() {
        let with = |set: &'static [(&str, &str)], is_terminal: bool| {
            wants_colours(is_terminal, &|name| {
                let value = set.iter().find(|(known, _)| *known == name);
                value.map(|(_, value)| (*value).to_owned())
            })
        };
        assert!(with(&[], true) && !with(&[], false));
        assert!(!with(&[("NO_COLOR", "1")], true));
        assert!(!with(&[("TERM", "dumb")], true));
        assert!(with(&[("CLICOLOR_FORCE", "1")], false));
        assert!(with(&[("CLICOLOR_FORCE", "1"), ("TERM", "dumb")], true));
        assert!(!with(&[("CLICOLOR_FORCE", "0")], false));
        assert!(!with(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], true));
    }
}
