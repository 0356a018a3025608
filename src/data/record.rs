//! Parses one line of a `.jsonl` file into a record.
//!
//! A record is a JSON object with either `text`, or `prompt` and `completion`, which are strings,
//! or `messages`. These are a conversation, a list of objects with a string `role` and whatever
//! else the base's chat template reads. With them, a record may have `tools`, a list of JSON
//! schemas, and `chat_template_kwargs`, an object of further variables for the template, as in
//! Hugging Face's TRL.
//!
//! A record may have a string `domain`, which names its domain. It may have an `expert`, which
//! names the expert that the record is for: by the expert's index, a number from 0; by its exported
//! name, `expert_N`; or by `__base__`, which is PEFT's name for no adapter. Other keys are ignored,
//! and `null` counts as absent.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::token_file::BASE_EXPERT;
use crate::chat_template::Conversation;

/// The variables of a template that `chat_template_kwargs` cannot set.
const RESERVED: [&str; 4] = ["messages", "tools", "add_generation_prompt", "strftime_now"];

/// A line of a file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    pub content: Content,
    pub domain: Option<String>,
    /// An index that fits into an `i32`, or [`BASE_EXPERT`].
    pub expert: Option<i64>,
}

/// What becomes a document.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    /// The prompt, which is only read, and the completion, which is learned. A `text` is a
    /// completion without a prompt.
    Text { prompt: String, completion: String },
    /// A conversation, of which the assistant's turns are learned.
    Chat(Conversation),
}

#[derive(Deserialize)]
struct RawRecord {
    text: Option<Value>,
    prompt: Option<Value>,
    completion: Option<Value>,
    messages: Option<Value>,
    tools: Option<Value>,
    chat_template_kwargs: Option<Value>,
    domain: Option<Value>,
    expert: Option<Value>,
}

/// Parses a line. The error describes the fault; the caller puts the file and the line before it.
pub(super) fn parse(line: &[u8]) -> Result<Record, String> {
    let line = std::str::from_utf8(line)
        .map_err(|error| format!("invalid UTF-8 at byte {}", error.valid_up_to() + 1))?;
    if !line.trim_start().starts_with('{') && serde_json::from_str::<Value>(line).is_ok() {
        return Err("is no JSON object; write `{\"text\": \"...\"}`".into());
    }
    let raw: RawRecord = serde_json::from_str(line).map_err(|error| json_fault(&error))?;
    let domain = string("domain", raw.domain)?;
    let expert = expert(raw.expert)?;
    let text = string("text", raw.text)?;
    let content = match raw.messages {
        None => text_content(text, raw.prompt, raw.completion)?,
        Some(messages) => {
            if text.is_some() || raw.prompt.is_some() || raw.completion.is_some() {
                return Err(
                    "has `messages` as well as `text`, `prompt` or `completion`; leave one \
                            of the two out"
                        .into(),
                );
            }
            Content::Chat(conversation(messages, raw.tools, raw.chat_template_kwargs)?)
        }
    };
    Ok(Record { content, domain, expert })
}

fn text_content(
    text: Option<String>,
    prompt: Option<Value>,
    completion: Option<Value>,
) -> Result<Content, String> {
    let prompt = string("prompt", prompt)?;
    let completion = string("completion", completion)?;
    match (text, prompt, completion) {
        (Some(completion), None, None) => Ok(Content::Text { prompt: String::new(), completion }),
        (None, Some(prompt), Some(completion)) => Ok(Content::Text { prompt, completion }),
        (None, None, None) => {
            Err("has neither `text`, `prompt` and `completion`, nor `messages`; one of the three \
                 is needed"
                .into())
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

fn conversation(
    messages: Value,
    tools: Option<Value>,
    variables: Option<Value>,
) -> Result<Conversation, String> {
    let messages = match messages {
        Value::Array(messages) if !messages.is_empty() => messages,
        Value::Array(_) => return Err("`messages` must have at least one message, got none".into()),
        other => {
            return Err(format!("`messages` must be a list of messages, got {}", kind(&other)));
        }
    };
    let message = |(at, value): (usize, Value)| {
        let fault = |what: String| format!("message {} {what}", at + 1);
        let Value::Object(message) = value else {
            let right = "`{\"role\": \"user\", \"content\": \"..\"}`";
            return Err(fault(format!("must be an object, as {right}, got {}", kind(&value))));
        };
        match message.get("role") {
            Some(Value::String(_)) => Ok(message),
            None => Err(fault("has no `role`".into())),
            Some(other) => {
                Err(fault(format!("must have a string as its `role`, got {}", kind(other))))
            }
        }
    };
    let messages = messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    let tools = tools.map(tool_list).transpose()?.filter(|tools| !tools.is_empty());
    let variables = variables.map(variables_of).transpose()?.unwrap_or_default();
    Ok(Conversation { messages, tools, variables, now: None })
}

/// The tools as a list, which some data sets hold as a text of JSON.
fn tool_list(tools: Value) -> Result<Vec<Value>, String> {
    let parsed = match &tools {
        Value::String(text) => serde_json::from_str(text).ok(),
        _ => None,
    };
    match parsed.unwrap_or(tools) {
        Value::Array(tools) => Ok(tools),
        other => Err(format!("`tools` must be a list of JSON schemas, got {}", kind(&other))),
    }
}

fn variables_of(variables: Value) -> Result<Map<String, Value>, String> {
    let Value::Object(variables) = variables else {
        let found = kind(&variables);
        return Err(format!("`chat_template_kwargs` must be an object, got {found}"));
    };
    match RESERVED.into_iter().find(|name| variables.contains_key(*name)) {
        None => Ok(variables),
        Some(name) => Err(format!("`chat_template_kwargs` cannot set `{name}`")),
    }
}

fn string(key: &str, value: Option<Value>) -> Result<Option<String>, String> {
    match value {
        None => Ok(None),
        Some(Value::String(value)) => Ok(Some(value)),
        Some(value) => Err(format!("`{key}` must be a string, got {}", kind(&value))),
    }
}

fn expert(value: Option<Value>) -> Result<Option<i64>, String> {
    let Some(value) = value else { return Ok(None) };
    let index = match &value {
        Value::Number(index) => index.as_i64().filter(|index| *index >= 0),
        Value::String(name) if name == "__base__" => Some(i64::from(BASE_EXPERT)),
        Value::String(name) => {
            let index = name.strip_prefix("expert_").and_then(|index| index.parse::<u32>().ok());
            // `expert_+1` and `expert_01` are refused: no expert is exported under such a name
            index.filter(|index| *name == format!("expert_{index}")).map(i64::from)
        }
        _ => None,
    };
    if let Some(index) = index.filter(|index| i32::try_from(*index).is_ok()) {
        return Ok(Some(index));
    }
    let found = match &value {
        Value::Number(number) => format!("`{number}`"),
        Value::String(name) => format!("the string `{name}`"),
        other => kind(other).into(),
    };
    let right = format!("a whole number from 0 to {}, `expert_N` or `__base__`", i32::MAX);
    Err(format!("`expert` must be {right}, got {found}"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// serde_json's message, with the column at the front. Its `at line 1 column 5` is dropped, since
/// it counts lines within this one line.
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
        let content = |prompt: &str, completion: &str| Content::Text {
            prompt: prompt.into(),
            completion: completion.into(),
        };
        let text = parse(br#"{"id": 7, "text": "a", "domain": "x", "tags": ["b"]}"#).unwrap();
        assert_eq!(text.content, content("", "a"));
        assert_eq!(text.domain.as_deref(), Some("x"));
        let pair = parse(br#"{"prompt": "q", "completion": "a", "text": null}"#).unwrap();
        assert_eq!(pair.content, content("q", "a"));
        assert_eq!(pair.domain, None);
    }

    #[test]
    fn messages_keep_all_their_keys_in_order() {
        let line = r#"{"messages": [{"role": "user", "z": 1, "content": null, "a": [2]}],
                       "tools": "[{\"name\": \"f\"}]", "chat_template_kwargs": {"b": true},
                       "domain": "x", "text": null}"#;
        let record = parse(line.as_bytes()).unwrap();
        let Content::Chat(chat) = record.content else { panic!("it is a conversation") };
        let message = serde_json::to_string(&chat.messages[0]).unwrap();
        assert_eq!(message, r#"{"role":"user","z":1,"content":null,"a":[2]}"#);
        assert_eq!(chat.tools, Some(vec![serde_json::json!({"name": "f"})]));
        assert_eq!(chat.variables["b"], true);
        let no_tools = parse(br#"{"messages": [{"role": "user"}], "tools": []}"#).unwrap();
        assert!(matches!(no_tools.content, Content::Chat(chat) if chat.tools.is_none()));
    }

    #[test]
    fn an_expert_is_named_by_number_or_by_name() {
        let expert = |value: &str| {
            let line = format!(r#"{{"text": "a", "expert": {value}}}"#);
            parse(line.as_bytes()).map(|record| record.expert)
        };
        assert_eq!(parse(br#"{"text": "a"}"#).unwrap().expert, None);
        let pair = parse(br#"{"prompt": "q", "completion": "a", "expert": 3}"#).unwrap();
        assert_eq!(pair.expert, Some(3));
        for (value, index) in [
            ("null", None),
            ("0", Some(0)),
            ("2147483647", Some(2_147_483_647)),
            (r#""expert_0""#, Some(0)),
            (r#""expert_12""#, Some(12)),
            (r#""__base__""#, Some(-1)),
        ] {
            assert_eq!(expert(value), Ok(index), "{value}");
        }
        let right = "a whole number from 0 to 2147483647, `expert_N` or `__base__`";
        for (value, found) in [
            ("-1", "`-1`"),
            ("1.0", "`1.0`"),
            ("2147483648", "`2147483648`"),
            ("1e300", "`1e+300`"),
            (r#""3""#, "the string `3`"),
            (r#""expert_""#, "the string `expert_`"),
            (r#""expert_+1""#, "the string `expert_+1`"),
            (r#""expert_01""#, "the string `expert_01`"),
            (r#""expert_2147483648""#, "the string `expert_2147483648`"),
            ("true", "a boolean"),
            ("[0]", "an array"),
        ] {
            assert_eq!(expert(value), Err(format!("`expert` must be {right}, got {found}")));
        }
    }

    #[test]
    fn each_fault_is_named() {
        assert!(fault(r#"{"text": "#).starts_with("invalid JSON at column 9: EOF"));
        assert!(fault(r#"{"text": "a"} x"#).starts_with("invalid JSON at column 15: trailing"));
        assert!(fault(r#"{"text": "a", "text": "b"}"#).contains("duplicate field `text`"));
        assert!(fault(r#"["a", null, null, null]"#).starts_with("is no JSON object"));
        assert!(fault(r#""a""#).starts_with("is no JSON object"));
        assert!(fault("{}").starts_with("has neither `text`, `prompt` and `completion`, nor"));
        assert!(fault(r#"{"prompt": "a"}"#).contains("no `completion`"));
        assert!(fault(r#"{"completion": "a"}"#).contains("no `prompt`"));
        assert!(fault(r#"{"text": "a", "prompt": "b"}"#).starts_with("has `text` as well as"));
        assert_eq!(fault(r#"{"text": 1}"#), "`text` must be a string, got a number");
        assert_eq!(
            fault(r#"{"text": "a", "domain": []}"#),
            "`domain` must be a string, got an array"
        );
        for (record, found) in [
            (r#""messages": {}"#, "`messages` must be a list of messages, got an object"),
            (r#""messages": []"#, "`messages` must have at least one message, got none"),
            (r#""messages": [{"role": "user"}, "a"]"#, "message 2 must be an object, as"),
            (r#""messages": [{"from": "human", "value": "a"}]"#, "message 1 has no `role`"),
            (r#""messages": [{"role": 1}]"#, "message 1 must have a string as its `role`, got a"),
            (r#""messages": [{"role": "user"}], "text": "a""#, "has `messages` as well as `text`"),
            (r#""messages": [{"role": "user"}], "tools": "f""#, "`tools` must be a list of JSON"),
            (
                r#""messages": [{"role": "user"}], "chat_template_kwargs": {"tools": 1}"#,
                "`chat_template_kwargs` cannot set `tools`",
            ),
        ] {
            let fault = fault(&format!("{{{record}}}"));
            assert!(fault.starts_with(found), "{fault}");
        }
        assert_eq!(parse(b"{\"text\": \"\xff\"}").unwrap_err(), "invalid UTF-8 at byte 11");
    }
}
