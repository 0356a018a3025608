//! Texts around the fields of a record, with Python's placeholders: `Question: {prompt}\nAnswer:`.
//!
//! `{NAME}` stands for a value; `{{` and `}}` stand for `{` and `}`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The texts that the fields of a record are put into, as in `{ prompt = "Question:
/// {prompt}\nAnswer:", completion = " {completion}" }`. The names in braces are `prompt` and
/// `completion`, or `instruction`, `input` and `output`, also if `fields` gives them other names in
/// the data. `{{` and `}}` stand for braces.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecordTemplate {
    /// What is read. Without it, the prompt itself or Stanford Alpaca's prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// What is learned. Without it, the completion or the output itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<String>,
}

/// The names that the parts of a template may have.
const OF_PROMPT: [&str; 3] = ["prompt", "instruction", "input"];
const OF_COMPLETION: [&str; 2] = ["completion", "output"];

impl RecordTemplate {
    /// Whether there are no texts.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the placeholders.
    ///
    /// # Errors
    /// The key of a faulty text, and what is wrong with it.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for (key, template, known) in [
            ("template.prompt", &self.prompt, &OF_PROMPT[..]),
            ("template.completion", &self.completion, &OF_COMPLETION),
        ] {
            let Some(template) = template else { continue };
            let mut num_fields = 0;
            let value = |name: &str| {
                num_fields += 1;
                known.contains(&name).then_some("")
            };
            fill(template, value).map_err(|fault| (key, fault))?;
            if num_fields == 0 {
                let known: Vec<String> = known.iter().map(|name| format!("`{{{name}}}`")).collect();
                return Err((key, format!("must have {} in it", known.join(" or "))));
            }
        }
        Ok(())
    }
}

/// A template with its values.
///
/// - `value`: the value of a name; `None` if there is no such name
///
/// # Errors
/// A faulty template; the message describes the fault.
pub fn fill<'a>(
    template: &str,
    mut value: impl FnMut(&str) -> Option<&'a str>,
) -> Result<String, String> {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        filled += &rest[..at];
        let brace = &rest[at..=at];
        let behind = &rest[at + 1..];
        if let Some(behind) = behind.strip_prefix(brace) {
            filled += brace;
            rest = behind;
            continue;
        }
        let (name, behind) = match behind.split_once('}') {
            Some(split) if brace == "{" => split,
            _ => return Err(format!("has a single `{brace}`; write `{brace}{brace}` for a brace")),
        };
        filled += value(name).ok_or_else(|| format!("has no value for `{{{name}}}`"))?;
        rest = behind;
    }
    Ok(filled + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_filled_as_by_pythons_format_map() {
        let value = |name: &str| (name == "a").then_some("{x}");
        assert_eq!(fill("{a}: {{{a}}} }}{{", value).unwrap(), "{x}: {{x}} }{");
        assert_eq!(fill("{b}", value).unwrap_err(), "has no value for `{b}`");
        for (template, brace) in [("a}", "}"), ("{a", "{"), ("{{}", "}")] {
            let fault = fill(template, value).unwrap_err();
            assert_eq!(
                fault,
                format!("has a single `{brace}`; write `{brace}{brace}` for a brace")
            );
        }
    }
}
