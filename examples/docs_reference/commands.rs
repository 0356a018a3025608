//! The page of the commands: the usage and options of each, from clap's description of [`Cli`].

use clap::{Arg, ArgAction, Command, CommandFactory};
use dylora::cli::Cli;

const HEAD: &str = "\
# The commands

<!-- Made by `cargo run --example docs_reference` from the doc comments of `src/cli`. Edit those. \
-->

`dylora COMMAND --help` prints what follows for one command. Results go to standard output; \
messages and
progress bars go to standard error. With `--json` a command prints JSON instead of tables. The \
exit codes
are listed under [troubleshooting](../troubleshooting.md#exit-codes), and the keys of the JSON under
[results as JSON](json.md).
";

/// The text of the page.
pub fn page() -> String {
    let mut cli = Cli::command();
    cli.build();
    let mut text = HEAD.to_owned();
    let is_listed = |command: &&Command| command.get_name() != "help" && !command.is_hide_set();
    let commands = || cli.get_subcommands().filter(is_listed);
    text += "\n| command | what it does |\n|---|---|\n";
    for command in commands() {
        let (name, about) = (command.get_name(), about(command));
        text += &format!("| [`{name}`](#dylora-{name}) | {about} |\n");
    }
    text += "\n## Options of every command\n\n";
    text += &options(&cli, Arg::is_global_set);
    text += "\n## Without a command\n\n";
    text += &options(&cli, |option| !option.is_global_set());
    for command in commands() {
        let name = command.get_name();
        text += &section(command, 2, &format!("dylora {name}"));
    }
    text
}

/// The section of a command, with those of its subcommands.
fn section(command: &Command, level: usize, name: &str) -> String {
    let (hashes, about) = ("#".repeat(level), about(command));
    let mut text = format!("\n{hashes} `{name}`\n\n{about}\n\n");
    text += &format!("```text\n{}\n```\n", usage(command));
    let options = options(command, |option| !option.is_global_set());
    if !options.is_empty() {
        text += &format!("\n{options}");
    }
    for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
        text += &section(inner, level + 1, &format!("{name} {}", inner.get_name()));
    }
    text
}

fn about(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    if about.ends_with('.') { about } else { about + "." }
}

/// A command's usage without the word `Usage:`.
fn usage(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    usage.trim_start_matches("Usage: ").lines().map(str::trim).collect::<Vec<_>>().join("\n")
}

/// A list of the options for which `is_wanted` holds, without `--help`.
fn options(command: &Command, is_wanted: impl Fn(&Arg) -> bool) -> String {
    let is_help = |option: &&Arg| matches!(option.get_action(), ArgAction::Help);
    let options = command.get_arguments().filter(|option| !is_help(option) && is_wanted(option));
    options.map(|option| format!("- {}: {}\n", names(option), help(option))).collect()
}

/// The names of an option and of its values, such as `-v, --verbose` or `--steps <N>`.
fn names(option: &Arg) -> String {
    let short = option.get_short().map(|short| format!("-{short}"));
    let long = option.get_long().map(|long| format!("--{long}"));
    let names: Vec<String> = short.into_iter().chain(long).collect();
    let mut text = names.join(", ");
    if option.get_action().takes_values() {
        let least = option.get_num_args().map_or(1, |range| range.min_values());
        let values: Vec<String> = match option.get_value_names() {
            Some(values) => values.iter().map(ToString::to_string).collect(),
            None => vec![option.get_id().as_str().to_uppercase()],
        };
        let values = values.iter().map(|value| format!("<{value}>")).collect::<Vec<_>>().join(" ");
        text += &if least == 0 { format!(" [{values}]") } else { format!(" {values}") };
    }
    // an argument that is no option has its value alone, which may be repeated
    if option.is_positional() && option.get_num_args().is_some_and(|range| range.max_values() > 1) {
        text += "...";
    }
    format!("`{}`", text.trim_start())
}

/// An option's help in one line, with its choices, its default and whether it is required.
fn help(option: &Arg) -> String {
    let help = option.get_long_help().or(option.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let mut text = help.split_whitespace().collect::<Vec<_>>().join(" ");
    if !text.ends_with('.') {
        text.push('.');
    }
    let defaults: Vec<_> =
        option.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    if option.get_action().takes_values() {
        let possible = option.get_possible_values();
        let names: Vec<_> =
            possible.iter().map(|value| format!("`{}`", value.get_name())).collect();
        if !names.is_empty() {
            text += &format!(" One of {}.", names.join(", "));
        }
        if !defaults.is_empty() {
            text += &format!(" Default: `{}`.", defaults.join(","));
        }
    }
    if option.is_required_set() {
        text += " Required.";
    }
    text
}
