//! The fields of `POST /v1/chat/completions`.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::limits::Limits;
use super::models::ServedModel;
use super::request::{
    Ask, Common, Endpoint, MAX_ALTERNATIVES, Prompt, check_num_texts, is_empty, max_new_tokens,
};
use crate::chat_template::{ChatTemplate, Conversation};
use crate::data::Tokenizer;
use crate::generate::prompt;

/// Stands for what the assistant says where only the end of its turn matters.
const CONTENT: &str = "Yes";

/// Fields that change nothing without tools, and a hint that only makes OpenAI faster.
const NOTES: [&str; 2] = ["parallel_tool_calls", "prediction"];

/// Reads a request.
///
/// # Errors
/// The first field that is wrong, unknown or not supported, a base without a chat template, and
/// messages that the template refuses.
pub fn parse(body: &[u8], model: &ServedModel, limits: &Limits) -> Result<Ask, ApiError> {
    let mut fields = Fields::parse(body)?;
    let common = Common::take(&mut fields, model, limits)?;
    refuse_others(&mut fields)?;
    let (asked, number) = asked_tokens(&mut fields)?;
    let logprobs = logprobs(&mut fields)?;
    let variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    let messages = messages(fields.take("messages"))?;
    fields.end()?;
    check_num_texts(1, common.n, limits)?;
    let ids = prompt_ids(model, messages, variables)?;
    let usual = model.defaults.max_new_tokens.unwrap_or(usize::MAX);
    let max_new_tokens = max_new_tokens(&ids, asked, usual, limits, ["messages", number])?;
    let prompts = vec![Prompt { ids, max_new_tokens, echo: String::new() }];
    Ok(Ask { endpoint: Endpoint::Chat, prompts, logprobs, common })
}

/// Refuses what would change the answer.
fn refuse_others(fields: &mut Fields) -> Result<(), ApiError> {
    let is = |texts: &'static [&str]| {
        move |value: &Value| value.as_str().is_some_and(|text| texts.contains(&text))
    };
    let is_text = |value: &Value| value["type"] == "text";
    fields.refuse("tools", is_empty)?;
    fields.refuse("tool_choice", is(&["none", "auto"]))?;
    fields.refuse("functions", is_empty)?;
    fields.refuse("function_call", is(&["none", "auto"]))?;
    fields.refuse("response_format", is_text)?;
    fields.refuse("modalities", |value| *value == json!(["text"]))?;
    for name in ["audio", "reasoning_effort", "verbosity", "web_search_options"] {
        fields.refuse(name, |_| false)?;
    }
    fields.ignore(&NOTES);
    Ok(())
}

/// The number of tokens that the request asks for, and the field that says it.
fn asked_tokens(fields: &mut Fields) -> Result<(Option<usize>, &'static str), ApiError> {
    let [new, old] = ["max_completion_tokens", "max_tokens"];
    let number = fields.integer(new, 1..=i64::MAX)?;
    let other = fields.integer(old, 1..=i64::MAX)?;
    match (number, other) {
        (Some(a), Some(b)) if a != b => {
            Err(ApiError::field(old, format!("`{new}` is {a}, but `{old}` is {b}; leave one out")))
        }
        (Some(number), _) => Ok((Some(number as usize), new)),
        (None, number) => Ok((number.map(|number| number as usize), old)),
    }
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?;
    let best = fields.integer("top_logprobs", 0..=MAX_ALTERNATIVES)?;
    match best {
        Some(_) if !wanted => {
            Err(ApiError::field("top_logprobs", "`top_logprobs` needs `\"logprobs\": true`"))
        }
        best => Ok(wanted.then_some(best.unwrap_or(0) as usize)),
    }
}

/// The messages, where a content is a text. The parts of a content are joined by line breaks.
fn messages(value: Option<Value>) -> Result<Vec<Map<String, Value>>, ApiError> {
    let what = "a list of messages, at least one";
    let list = match value {
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(other) => return Err(wrong("messages", what, &other)),
        None => return Err(ApiError::field("messages", "`messages` is missing")),
    };
    let message = |(index, value): (usize, Value)| {
        let name = format!("messages[{index}]");
        let Value::Object(mut message) = value else {
            return Err(wrong(&name, "an object with `role` and `content`", &value));
        };
        if !message.get("role").is_some_and(Value::is_string) {
            let found = message.get("role").unwrap_or(&Value::Null);
            return Err(wrong(&format!("{name}.role"), "a string", found));
        }
        if let Some(content) = message.get_mut("content") {
            *content = text_of(content.take(), &format!("{name}.content"))?;
        }
        Ok(message)
    };
    list.into_iter().enumerate().map(message).collect()
}

fn text_of(content: Value, name: &str) -> Result<Value, ApiError> {
    let parts = match content {
        Value::String(_) | Value::Null => return Ok(content),
        Value::Array(parts) => parts,
        other => return Err(wrong(name, "a string or a list of parts", &other)),
    };
    let texts = parts.iter().enumerate().map(|(index, part)| {
        let text = if part["type"] == "text" { part["text"].as_str() } else { None };
        let what = "a part of the type `text`; others are not supported";
        text.ok_or_else(|| wrong(&format!("{name}[{index}]"), what, part))
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n").into())
}

/// The tokens of a conversation, up to where the assistant begins.
fn prompt_ids(
    model: &ServedModel,
    messages: Vec<Map<String, Value>>,
    variables: Map<String, Value>,
) -> Result<Vec<i64>, ApiError> {
    let Some(template) = &model.template else {
        let message = "the base has no chat template (`chat_template.jinja`, or `chat_template` in \
                       `tokenizer_config.json`); use `/v1/completions`";
        return Err(ApiError { code: Some("no_chat_template"), ..ApiError::invalid(message) });
    };
    let fault = |error: anyhow::Error| ApiError::field("messages", format!("{error:#}"));
    let conversation = Conversation { variables, ..prompt::of_messages(messages) };
    let ids = prompt::chat_ids(&model.tokenizer, template, &conversation).map_err(fault)?;
    if ids.is_empty() {
        return Err(ApiError::field("messages", "the messages give no token"));
    }
    Ok(ids)
}

/// The special token by which a template ends the assistant's turn, such as `<|im_end|>`. A base
/// that was not made for chats does not list it among its end tokens. `None` if the turn ends by
/// other text, or if the template cannot show a turn.
pub fn end_of_turn(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<i64> {
    let messages = ["user", "assistant"].map(|role| prompt::message(role, CONTENT));
    let rendered = template.render(&prompt::of_messages(messages.to_vec()), false).ok()?;
    let (_, end) = rendered.text.rsplit_once(CONTENT)?;
    let first = *tokenizer.encode(end.trim_start()).ok()?.first()?;
    let is_special = tokenizer.decode_text(&[first]).is_ok_and(|text| text.is_empty());
    is_special.then_some(i64::from(first))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::Result;

    use super::*;

    #[test]
    fn a_turn_ends_by_the_special_token_behind_it() -> Result<()> {
        let tokenizer = Tokenizer::load(Path::new("demo/base/tokenizer.json"))?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("chat.jinja");
        for (end, expected) in
            [("<|endoftext|>", Some(0)), (" <|endoftext|>\n", Some(0)), ("\n", None)]
        {
            let turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}";
            fs_err::write(&file, format!("{turn}{end}{{% endfor %}}"))?;
            let template = ChatTemplate::load(&file, &[])?;
            assert_eq!(end_of_turn(&template, &tokenizer), expected, "{end}");
        }
        Ok(())
    }
}
