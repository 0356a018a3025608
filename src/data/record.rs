//! Makes a record of the values of its keys: the one place where a record of any shape becomes a
//! text or a conversation.
//!
//! | shape | keys | becomes |
//! |---|---|---|
//! | `text` | `text` | a text, which is learned as a whole |
//! | `prompt_completion` | `prompt`, `completion` | a text, or with `style = "chat"` two turns |
//! | `alpaca` | `instruction`, `output`, `input` | the same, with Stanford Alpaca's prompt |
//! | `messages` | `messages` | a conversation of objects with a string `role` |
//! | `sharegpt` | `conversations`, `system` | a conversation of objects with `from` and `value` |
//!
//! With a conversation, a record may have `tools`, a list of JSON schemas, and
//! `chat_template_kwargs`, an object of further variables for the template, as in Hugging Face's
//! TRL. Lists may also be texts of JSON, as in tables.
//!
//! A record may have a string `domain`, which names its domain. It may have an `expert`, which
//! names the expert that the record is for: by the expert's index, a number from 0; by its exported
//! name, `expert_N`; or by `__base__`, which is PEFT's name for no adapter. Other keys are ignored,
//! and `null` counts as absent.

use serde_json::{Map, Value};

use super::keys::{Key, Keys, Raw};
use super::pairs::Pair;
use super::token_file::BASE_EXPERT;
use crate::chat_template::Conversation;
use crate::config::{RecordShape, RecordStyle};

/// The variables of a template that `chat_template_kwargs` cannot set.
const RESERVED: [&str; 4] = ["messages", "tools", "add_generation_prompt", "strftime_now"];

/// A record of a file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    pub content: Content,
    pub domain: Option<String>,
    /// An index that fits into an `i32`, or [`BASE_EXPERT`].
    pub expert: Option<i64>,
    pub shape: RecordShape,
}

/// What becomes a document.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    /// The prompt, which is only read, and the completion, which is learned. A `text` is a
    /// completion without a prompt. If the completion is empty, there is nothing to learn.
    Text { prompt: String, completion: String },
    /// A conversation, of which the assistant's turns are learned.
    Chat(Conversation),
}

/// Whether a fault is that of a record that lacks keys.
pub(super) fn is_lack_of_keys(fault: &str) -> bool {
    fault.starts_with("has neither `") || fault.starts_with("has no `")
}

/// Makes a record of its values. The error describes the fault; the caller puts the file and the
/// line before it.
pub(super) fn convert(mut raw: Raw, keys: &Keys) -> Result<Record, String> {
    let domain = string(keys.name(Key::Domain), raw.take(Key::Domain))?;
    let expert = expert(raw.take(Key::Expert))?;
    let shape = shape(&raw, keys)?;
    check_keys(&raw, keys, shape)?;
    let is_pair = matches!(shape, RecordShape::PromptCompletion | RecordShape::Alpaca);
    if !is_pair && !keys.template.is_empty() {
        return Err(format!("has {}, which no `template` goes with", keys.of_shape(shape)));
    }
    let content = match (shape, keys.style) {
        (RecordShape::Messages, _) => {
            let messages = raw.take(Key::Messages).unwrap_or_default();
            Content::Chat(conversation(keys.name(Key::Messages), messages, &mut raw)?)
        }
        (RecordShape::Sharegpt, _) => Content::Chat(sharegpt(raw, keys)?),
        (RecordShape::Text, RecordStyle::Plain) => {
            Content::Text { prompt: String::new(), completion: text(&mut raw, keys, Key::Text)? }
        }
        (RecordShape::Text, RecordStyle::Chat) => {
            let name = keys.name(Key::Text);
            return Err(format!("`{name}` has no turns, which `style = \"chat\"` needs"));
        }
        (RecordShape::PromptCompletion, _) => {
            let prompt = text(&mut raw, keys, Key::Prompt)?;
            pair(Pair::Prompt { prompt, completion: text(&mut raw, keys, Key::Completion)? }, keys)?
        }
        (RecordShape::Alpaca, _) => {
            let instruction = text(&mut raw, keys, Key::Instruction)?;
            let input = text(&mut raw, keys, Key::Input)?;
            let output = text(&mut raw, keys, Key::Output)?;
            pair(Pair::Alpaca { instruction, input, output }, keys)?
        }
    };
    Ok(Record { content, domain, expert, shape })
}

/// The shape of a record: the known one, or the one that its keys belong to. A key of which there
/// is only `true` counts too.
///
/// # Errors
/// Keys of no shape, or of several.
pub(super) fn shape(raw: &Raw, keys: &Keys) -> Result<RecordShape, String> {
    if let Some(shape) = keys.shape {
        return Ok(shape);
    }
    let mut found = RecordShape::ALL.into_iter().filter(|shape| match shape {
        RecordShape::Messages => raw.has(Key::Messages),
        RecordShape::Sharegpt => raw.has(Key::Conversations),
        RecordShape::Text => raw.has(Key::Text),
        RecordShape::PromptCompletion => raw.has(Key::Prompt) || raw.has(Key::Completion),
        // other data have an `input` or an `output` too
        RecordShape::Alpaca => raw.has(Key::Instruction) && raw.has(Key::Output),
    });
    let name = |shape: RecordShape| match shape {
        RecordShape::PromptCompletion => "`prompt` or `completion`".to_owned(),
        shape => keys.of_shape(shape),
    };
    match (found.next(), found.next()) {
        (None, _) => Err("has neither `text`, `prompt` and `completion`, `messages`, \
                          `conversations`, nor `instruction` and `output`"
            .into()),
        (Some(shape), None) => Ok(shape),
        (Some(first), Some(second)) => Err(format!(
            "has {} as well as {}; leave one of the two out, or name the `shape` of the domain's \
             records, as `{}`",
            name(first),
            name(second),
            first.name()
        )),
    }
}

/// Checks that a record has the keys of its shape.
pub(super) fn check_keys(raw: &Raw, keys: &Keys, shape: RecordShape) -> Result<(), String> {
    let needed: &[Key] = match shape {
        RecordShape::Messages => &[Key::Messages],
        RecordShape::Sharegpt => &[Key::Conversations],
        RecordShape::Text => &[Key::Text],
        RecordShape::PromptCompletion => &[Key::Prompt, Key::Completion],
        RecordShape::Alpaca => &[Key::Instruction, Key::Output],
    };
    let (there, missing): (Vec<&Key>, Vec<&Key>) = needed.iter().partition(|key| raw.has(**key));
    let name = |key: &Key| format!("`{}`", keys.name(*key));
    match (there.first(), missing.first()) {
        (_, None) => Ok(()),
        (Some(there), Some(missing)) => {
            let more = match shape {
                RecordShape::PromptCompletion => "; add it, or call the field `text`",
                _ => "",
            };
            Err(format!("has {} but no {}{more}", with_article(&name(there)), name(missing)))
        }
        (None, Some(missing)) => Err(format!("has no {}", name(missing))),
    }
}

fn with_article(name: &str) -> String {
    let is_vowel = |c: char| "aeio".contains(c);
    let article = if name.trim_start_matches('`').starts_with(is_vowel) { "an" } else { "a" };
    format!("{article} {name}")
}

/// The string of a key, which is empty if the record does not have it.
fn text(raw: &mut Raw, keys: &Keys, key: Key) -> Result<String, String> {
    Ok(string(keys.name(key), raw.take(key))?.unwrap_or_default())
}

/// A text of two parts, or two turns.
fn pair(pair: Pair, keys: &Keys) -> Result<Content, String> {
    let [prompt, completion] = pair.texts(keys.style, &keys.template)?;
    match keys.style {
        RecordStyle::Plain => Ok(Content::Text { prompt, completion }),
        // a turn without content would be learned as its end-of-turn token
        RecordStyle::Chat if completion.is_empty() => {
            Err("has nothing to learn: the assistant's turn is empty".into())
        }
        RecordStyle::Chat if prompt.is_empty() => Err("has an empty turn of the user".into()),
        RecordStyle::Chat => Ok(turns(prompt, completion)),
    }
}

/// A turn of the user and one of the assistant.
fn turns(user: String, assistant: String) -> Content {
    let messages = vec![message("user", user), message("assistant", assistant)];
    Content::Chat(Conversation { messages, ..Conversation::default() })
}

fn message(role: &str, content: String) -> Map<String, Value> {
    let entries = [("role", role.into()), ("content", Value::String(content))];
    entries.map(|(key, value): (_, Value)| (key.to_owned(), value)).into_iter().collect()
}

/// A conversation as in ShareGPT's data, whose messages have `from` and `value`. Messages with
/// `role` and `content` are taken as they are.
fn sharegpt(mut raw: Raw, keys: &Keys) -> Result<Conversation, String> {
    let name = keys.name(Key::Conversations);
    let messages = match parsed(raw.take(Key::Conversations).unwrap_or_default()) {
        Value::Array(messages) => messages,
        other => {
            return Err(format!("`{name}` must be a list of messages, got {}", kind(&other)));
        }
    };
    let renamed = (1..).zip(messages).map(|(number, message)| match message {
        Value::Object(message) if !message.contains_key("role") => {
            renamed(message).map_err(|fault| format!("message {number} {fault}"))
        }
        message => Ok(message),
    });
    let mut messages = renamed.collect::<Result<Vec<Value>, String>>()?;
    let system = string(keys.name(Key::System), raw.take(Key::System))?;
    if let Some(system) = system.filter(|system| !system.is_empty()) {
        messages.insert(0, Value::Object(message("system", system)));
    }
    conversation(name, messages.into(), &mut raw)
}

/// The roles of ShareGPT's data and what chat templates call them.
const SHAREGPT_ROLES: [(&str, &str); 7] = [
    ("system", "system"),
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("tool", "tool"),
];

fn renamed(message: Map<String, Value>) -> Result<Value, String> {
    if !message.contains_key("from") {
        return Err("has neither `from` nor `role`".into());
    }
    let mut renamed = Map::new();
    for (key, value) in message {
        match (key.as_str(), value) {
            ("from", Value::String(from)) => {
                let role = SHAREGPT_ROLES.into_iter().find(|(name, _)| *name == from);
                let (_, role) = role.ok_or_else(|| {
                    let known = SHAREGPT_ROLES.map(|(name, _)| format!("`{name}`"));
                    format!("is from `{from}`; it must be one of {}", known.join(", "))
                })?;
                renamed.insert("role".into(), role.into());
            }
            ("from", other) => {
                return Err(format!("must have a string as its `from`, got {}", kind(&other)));
            }
            ("value", value) => {
                renamed.insert("content".into(), value);
            }
            (_, value) => {
                renamed.insert(key, value);
            }
        }
    }
    match renamed.contains_key("content") {
        true => Ok(Value::Object(renamed)),
        false => Err("has no `value`".into()),
    }
}

/// A value that some data sets hold as a text of JSON.
fn parsed(value: Value) -> Value {
    let parsed = match &value {
        Value::String(text) => serde_json::from_str(text).ok(),
        _ => None,
    };
    parsed.unwrap_or(value)
}

/// The conversation of `messages` and what else `raw` says about it.
///
/// - `name`: the key of the messages
fn conversation(name: &str, messages: Value, raw: &mut Raw) -> Result<Conversation, String> {
    let messages = match parsed(messages) {
        Value::Array(messages) if !messages.is_empty() => messages,
        Value::Array(_) => {
            return Err(format!("`{name}` must have at least one message, got none"));
        }
        other => {
            return Err(format!("`{name}` must be a list of messages, got {}", kind(&other)));
        }
    };
    let (tools, variables) = (raw.take(Key::Tools), raw.take(Key::ChatTemplateKwargs));
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

fn tool_list(tools: Value) -> Result<Vec<Value>, String> {
    match parsed(tools) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RecordConfig;

    fn parse(line: &[u8]) -> Result<Record, String> {
        let keys = Keys::new(&RecordConfig::default());
        crate::data::json::parse(line, &keys).and_then(|raw| convert(raw, &keys))
    }

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
        assert!(fault("{}").starts_with("has neither `text`, `prompt` and `completion`, `m"));
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
