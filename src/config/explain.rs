//! `dylora config explain` and `dylora config reference`: the keys of a config as text.

use anyhow::{Result, bail};

use super::document::KeyPath;
use super::guesses;
use super::keys::{self, Key};
use super::schema::{description, one_line, schema};

/// The description of a key, of a section with its keys, or of every key of this name.
///
/// - `key`: as in `--set`, `lora.rank`, or without a section, `rank`
/// - `width`: the number of columns
///
/// # Errors
/// A key that does not exist; the message says which one may be meant.
pub fn explain(key: &str, width: usize) -> Result<String> {
    let wanted = plain(key);
    let all = keys::all();
    let exact = all.iter().find(|known| plain(&known.path) == wanted);
    // a value such as `train.duration.steps` is described with its key
    let holder = || {
        let (above, _) = wanted.rsplit_once('.')?;
        all.iter().find(|known| plain(&known.path) == above && !known.values.is_empty())
    };
    if let Some(found) = exact.or_else(holder) {
        let below: Vec<&Key> = match found.is_section {
            true => all.iter().filter(|key| is_below(&key.path, &found.path)).collect(),
            false => vec![],
        };
        let texts = std::iter::once(found).chain(below).map(|key| entry(key, width));
        return Ok(texts.collect::<Vec<_>>().join("\n\n"));
    }
    let named: Vec<String> =
        all.iter().filter(|known| known.name() == wanted).map(|key| entry(key, width)).collect();
    if !named.is_empty() {
        return Ok(named.join("\n\n"));
    }
    let (section, name) = wanted.rsplit_once('.').unwrap_or(("", &wanted));
    let above = section.split('.').filter(|part| !part.is_empty());
    let path = above.fold(KeyPath::default(), |path, part| path.key(part));
    let in_section = all.iter().filter(|known| {
        plain(&known.path).rsplit_once('.').map_or("", |(above, _)| above) == section
    });
    let value = toml::Value::Table(toml::Table::new());
    let meant = guesses::suggestion(&path, name, &value, in_section.map(Key::name));
    match meant {
        Some(right) => {
            let right = right.strip_suffix(" = ..").unwrap_or(&right);
            bail!("there is no key `{key}`; did you mean `{right}`?")
        }
        None => bail!("there is no key `{key}`\nhint: `dylora config reference` prints them all"),
    }
}

/// Every key.
pub fn reference(width: usize) -> String {
    let head = wrapped(&one_line(description(schema())), "", width);
    let entries = keys::all().iter().map(|key| entry(key, width));
    std::iter::once(head).chain(entries).collect::<Vec<_>>().join("\n\n")
}

/// A path without the marks of lists and without indices, in which `data.domains.0.weight`,
/// `data.domains[0].weight` and `[[data.domains]]` are the same as `data.domains.weight`.
fn plain(path: &str) -> String {
    let path = path.trim().trim_matches(['[', ']']).replace('[', ".").replace(']', "");
    let is_index = |part: &&str| part.is_empty() || part.parse::<usize>().is_ok();
    path.split('.').filter(|part| !is_index(part)).collect::<Vec<_>>().join(".")
}

/// Whether the key at `path` is one of the section at `section`, but not of a section in it.
fn is_below(path: &str, section: &str) -> bool {
    let below = path.strip_prefix(section).and_then(|rest| rest.strip_prefix('.'));
    below.is_some_and(|rest| !rest.contains('.'))
}

/// A key with its type, its default, its meaning and its values.
fn entry(key: &Key, width: usize) -> String {
    let default = match key.default.as_deref() {
        Some("required") => "required".to_owned(),
        Some(default) => format!("default {}", default.trim_matches('`')),
        None => "may be left out".to_owned(),
    };
    let mut text = match key.is_section {
        true if key.kind.starts_with("list") => format!("[[{}]]", key.path.trim_end_matches("[]")),
        true => format!("[{}]", key.path),
        false => key.path.clone(),
    };
    let facts = match key.is_section {
        true => key.kind.clone(),
        false => format!("{}, {default}", key.kind.replace('`', "")),
    };
    text += &format!("\n  {facts}\n{}", wrapped(&key.meaning, "  ", width));
    for (value, meaning) in &key.values {
        text += &format!("\n    {value}\n{}", wrapped(meaning, "      ", width));
    }
    text
}

/// A text in lines of at most `width` characters, each after `indent`. Longer words stay whole.
fn wrapped(text: &str, indent: &str, width: usize) -> String {
    let mut lines: Vec<String> = vec![];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(format!("{indent}{word}")),
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_each_way_to_write_it() {
        for key in ["data.domains.0.weight", "data.domains[].weight", "data.domains[2].weight"] {
            let text = explain(key, 80).expect("the key exists");
            assert!(text.starts_with("data.domains[].weight\n  number, default 1.0\n"), "{text}");
        }
        let text = explain("[lora]", 80).expect("the section exists");
        assert!(text.starts_with("[lora]\n  table\n") && text.contains("\nlora.rank\n"), "{text}");
        assert!(!text.contains("lora.experts[].rank"), "{text}");
        let both = explain("rank", 80).expect("the key exists");
        assert!(both.contains("lora.rank\n") && both.contains("lora.experts[].rank\n"), "{both}");
    }

    #[test]
    fn a_key_that_does_not_exist_is_answered_with_one_that_does() {
        let fault = |key: &str| explain(key, 80).expect_err("there is none").to_string();
        assert!(fault("lora.rnak").ends_with("did you mean `lora.rank`?"));
        assert!(fault("train.steps").contains("`train.duration = { steps = .. }`"));
        assert!(fault("something").contains("`dylora config reference` prints them all"));
    }

    #[test]
    fn no_line_of_the_reference_is_longer_than_the_terminal() {
        let text = reference(80);
        let has_long_word = |line: &&str| line.split_whitespace().count() > 1;
        let mut long = text.lines().filter(|line| line.chars().count() > 80);
        assert_eq!(long.find(has_long_word), None);
        assert!(keys::all().iter().all(|key| !key.meaning.is_empty()));
    }
}
