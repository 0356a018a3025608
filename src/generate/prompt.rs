//! The tokens of a prompt: of a text, or of a conversation by the base's chat template.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};

use crate::base::Base;
use crate::chat_template::{ChatTemplate, Conversation};
use crate::data::Tokenizer;

/// Stands for what the assistant says where only the end of its turn matters.
const CONTENT: &str = "Yes";

/// The tokens of a text that is to be continued, with the start tokens of a document.
///
/// # Errors
/// An empty text, if the tokenizer has no start tokens.
pub fn text_ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i64>> {
    let ids = tokenizer.encode(text)?;
    let start = match ids.is_empty() {
        true => tokenizer.start_tokens(),
        false => tokenizer.start_tokens_for(&ids),
    };
    let ids: Vec<i64> = start.iter().chain(&ids).map(|id| i64::from(*id)).collect();
    if ids.is_empty() {
        bail!("the prompt is empty, and this tokenizer has no token for the start of a text");
    }
    Ok(ids)
}

/// The tokens of a conversation that the assistant is to continue. The template writes all special
/// tokens.
///
/// # Errors
/// A template that cannot render the conversation.
pub fn chat_ids(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    conversation: &Conversation,
) -> Result<Vec<i64>> {
    let text = template.render(conversation, true)?.text;
    Ok(tokenizer.encode(&text)?.into_iter().map(i64::from).collect())
}

/// The chat template of a base.
///
/// # Errors
/// A base without one.
pub fn template_of(base: &Base) -> Result<&ChatTemplate> {
    base.chat_template.as_deref().ok_or_else(|| {
        anyhow!(
            "the base `{}` has no chat template\nhint: `--chat-template FILE.jinja` names one, or \
             `dylora generate` continues plain text",
            base.label
        )
    })
}

/// A message of a conversation.
pub fn message(role: &str, content: &str) -> Map<String, Value> {
    Map::from_iter([("role".to_owned(), json!(role)), ("content".to_owned(), json!(content))])
}

/// A conversation of messages and, if there are any, tools, as training data has them.
///
/// # Errors
/// Messages that are not a list of objects.
pub fn conversation(messages: &Value, tools: Option<&Value>) -> Result<Conversation> {
    let list = messages.as_array().context("`messages` must be a list")?;
    let object = |message: &Value| {
        message.as_object().cloned().with_context(|| {
            format!("each of `messages` must be an object with `role` and `content`, got {message}")
        })
    };
    let messages = list.iter().map(object).collect::<Result<Vec<_>>>()?;
    if messages.is_empty() {
        bail!("`messages` has no message");
    }
    let tools = match tools {
        None | Some(Value::Null) => None,
        Some(Value::Array(tools)) => Some(tools.clone()),
        Some(other) => bail!("`tools` must be a list, got {other}"),
    };
    Ok(Conversation { tools, ..of_messages(messages) })
}

/// A conversation that takes place now: templates may tell the model the date.
pub fn of_messages(messages: Vec<Map<String, Value>>) -> Conversation {
    let now = Some(jiff::Zoned::now().datetime());
    Conversation { messages, now, ..Conversation::default() }
}

/// The special token by which a template ends the assistant's turn, such as `<|im_end|>`. A base
/// that was not made for chats does not list it among its end tokens. `None` if the turn ends by
/// other text, or if the template cannot show a turn.
pub(super) fn end_of_turn(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<i64> {
    let messages = vec![message("user", CONTENT), message("assistant", CONTENT)];
    let conversation = Conversation { messages, ..Conversation::default() };
    let rendered = template.render(&conversation, false).ok()?;
    let (_, end) = rendered.text.rsplit_once(CONTENT)?;
    let first = *tokenizer.encode(end.trim_start()).ok()?.first()?;
    let is_special = tokenizer.decode_text(&[first]).is_ok_and(|text| text.is_empty());
    is_special.then_some(i64::from(first))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
