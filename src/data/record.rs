//! One line of a `.jsonl` file to a record.
//!
//! A record is a JSON object with either `text`, or `prompt` and `completion`, all strings; `domain`
//! may name what it is about. Other keys are ignored, and `null` is as good as absent.

use serde::Deserialize;
use serde_json::Value;

/// A document's text: what is only read, then what is learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Empty for a `text`.
    pub prompt: String,
    /// The `completion`, or all of a `text`.
    pub completion: String,
    pub domain: Option<String>,
}

#[derive(Deserialize)]
struct RawRecord {
    text: Option<Value>,
    prompt: Option<Value>,
    completion: Option<Value>,
    domain: Option<Value>,
}

/// Parses a line. An error is the fault in words, for the caller to put the place before.
pub(super) fn parse(line: &[u8]) -> Result<Record, String> {
    let line = std::str::from_utf8(line)
        .map_err(|error| format!("invalid UTF-8 at byte {}", error.valid_up_to() + 1))?;
    if !line.trim_start().starts_with('{') && serde_json::from_str::<Value>(line).is_ok() {
        return Err("is no JSON object; write `{\"text\": \"...\"}`".into());
    }
    let raw: RawRecord = serde_json::from_str(line).map_err(|error| json_fault(&error))?;
    let text = string("text", raw.text)?;
    let prompt = string("prompt", raw.prompt)?;
    let completion = string("completion", raw.completion)?;
    let domain = string("domain", raw.domain)?;
    match (text, prompt, completion) {
        (Some(text), None, None) => Ok(Record { prompt: String::new(), completion: text, domain }),
        (None, Some(prompt), Some(completion)) => Ok(Record { prompt, completion, domain }),
        (None, None, None) => {
            Err("has neither `text` nor `prompt` and `completion`; one of the two is needed".into())
        }
        (None, Some(_), None) => {
            Err("has a `prompt` but no `completion`; add it, or call the field `text`".into())
        }
        (None, None, Some(_)) => {
            Err("has a `completion` but no `prompt`; add it, or call the field `text`".into())
        }
        (Some(_), _, _) => {
            Err("has `text` as well as `prompt` or `completion`; leave one of the two out".into())
        }
    }
}

fn string(key: &str, value: Option<Value>) -> Result<Option<String>, String> {
    let kind = match value {
        None => return Ok(None),
        Some(Value::String(value)) => return Ok(Some(value)),
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::Array(_)) => "an array",
        Some(Value::Object(_)) => "an object",
    };
    Err(format!("`{key}` must be a string, got {kind}"))
}

/// serde_json's message, whose `at line 1 column 5` counts within the line.
fn json_fault(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    format!("invalid JSON at column {}: {message}", error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(line: &str) -> String {
        parse(line.as_bytes()).expect_err("a faulty line")
    }

    #[test]
    fn both_forms_are_read_and_other_keys_are_ignored() {
        let text = parse(br#"{"id": 7, "text": "a", "domain": "x", "tags": ["b"]}"#).unwrap();
        assert_eq!((text.prompt.as_str(), text.completion.as_str()), ("", "a"));
        assert_eq!(text.domain.as_deref(), Some("x"));
        let pair = parse(br#"{"prompt": "q", "completion": "a", "text": null}"#).unwrap();
        assert_eq!((pair.prompt.as_str(), pair.completion.as_str()), ("q", "a"));
        assert_eq!(pair.domain, None);
    }

    #[test]
    fn each_fault_is_named() {
        assert!(fault(r#"{"text": "#).starts_with("invalid JSON at column 9: EOF"));
        assert!(fault(r#"{"text": "a"} x"#).starts_with("invalid JSON at column 15: trailing"));
        assert!(fault(r#"{"text": "a", "text": "b"}"#).contains("duplicate field `text`"));
        assert!(fault(r#"["a", null, null, null]"#).starts_with("is no JSON object"));
        assert!(fault(r#""a""#).starts_with("is no JSON object"));
        assert!(fault("{}").starts_with("has neither `text` nor"));
        assert!(fault(r#"{"prompt": "a"}"#).contains("no `completion`"));
        assert!(fault(r#"{"completion": "a"}"#).contains("no `prompt`"));
        assert!(fault(r#"{"text": "a", "prompt": "b"}"#).starts_with("has `text` as well as"));
        assert_eq!(fault(r#"{"text": 1}"#), "`text` must be a string, got a number");
        assert_eq!(
            fault(r#"{"text": "a", "domain": []}"#),
            "`domain` must be a string, got an array"
        );
        assert_eq!(parse(b"{\"text\": \"\xff\"}").unwrap_err(), "invalid UTF-8 at byte 11");
    }
}
