//! What of a rendered conversation the assistant wrote.
//!
//! If the template has `{% generation %}` blocks, they say it. Otherwise a turn of the assistant is
//! what its message adds to the text of the messages before it and the generation prompt, as
//! Hugging Face's TRL has it for prompts and completions. With the messages m_0 .. m_n and
//! `r(.., prompt)` for the rendering of some of them, the turn of m_i begins behind
//! `r(m_0 .. m_i-1, true)` and ends where `r(m_0 .. m_i, false)` does. It contains its own
//! end-of-turn token.
//!
//! This supposes that the whole text begins with these two. Not every template has it so: Qwen3's
//! shows the thinking of the last turns only, and Mistral's puts the tools in front of the last
//! question. Where the whole text begins otherwise, the message's content is exchanged for
//! [`OTHER`], and what changes in the text is the content:
//!
//! ```text
//! the whole text          .. <|im_start|>assistant\n|Yes|<|im_end|>\n<|im_start|>user\n ..
//! m_0 .. m_i alone        .. <|im_start|>assistant\n<think>\n\n</think>\n\n|Yes|<|im_end|>\n
//! ```
//!
//! The messages up to m_i alone show what the turn has behind its content, here `<|im_end|>\n`, and
//! between the generation prompt and its content, here the empty thinking. In the whole text, the
//! turn contains the former, which must be there, and the latter if it is there. If a template
//! shows a call of a tool without a content, the tool's name takes the place of the content.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use minijinja::Value as Jinja;
use minijinja::value::Serde;
use serde_json::{Map, Value};

use super::{ChatTemplate, Conversation, Renderer};
use crate::config::LossOnTurns;

/// Stands for the content of a message where that is exchanged. It is a noncharacter of Unicode, so
/// that it differs from each character of the content.
const OTHER: &str = "\u{fdd2}";

const HINT: &str = "hint: `data.loss_on_turns = \"last\"` learns the last turn only, and \
                    `base.chat_template = \"FILE.jinja\"` takes a template that marks the \
                    assistant's text by `{% generation %}`";

/// The role of the messages that the model is to write.
const ASSISTANT: &str = "assistant";

/// The roles that every template is expected to show.
const KNOWN_ROLES: [&str; 4] = ["system", "user", ASSISTANT, "tool"];

/// A rendered conversation and the assistant's turns in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssistantTurns {
    /// The whole text.
    pub text: String,
    /// Where the first turn begins, in bytes. The text in front of it is the prompt.
    pub prompt_end: usize,
    /// The turns that were asked for, as ranges of bytes, in ascending order.
    pub turns: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Renders a conversation and finds the assistant's turns, all of them or the last one.
    ///
    /// # Errors
    /// Those of [`Self::render`], a conversation without a message of the assistant, a message that
    /// the template leaves out because of its role, and a turn that cannot be found in the text.
    pub fn assistant_turns(
        &self,
        conversation: &Conversation,
        which: LossOnTurns,
    ) -> Result<AssistantTurns> {
        let roles: Vec<&str> =
            conversation.messages.iter().map(|message| role(message.get("role"))).collect();
        let of_assistant = || (0..roles.len()).filter(|at| roles[*at] == ASSISTANT);
        let (Some(first), Some(last)) = (of_assistant().next(), of_assistant().next_back()) else {
            bail!("no message has the role `{ASSISTANT}`, only {}", listed(&roles));
        };
        let renderer = Renderer::new(self.parsed()?, conversation)?;
        let whole = renderer.render(&renderer.messages, false)?;
        renderer.check_roles(&roles, &whole.text)?;
        let text = whole.text;
        if renderer.has_marks {
            let Some(prompt_end) = whole.generated.first().map(|range| range.start) else {
                bail!("the chat template marks no text of the assistant");
            };
            let mut turns = whole.generated;
            if which == LossOnTurns::Last && first < last {
                let before = renderer.render(&renderer.messages[..last], false)?;
                turns.drain(..before.generated.len().min(turns.len()));
            }
            return Ok(AssistantTurns { text, prompt_end, turns });
        }
        let turn = |at| renderer.turn(at, &text).with_context(|| format!("in message {}", at + 1));
        let turns = match which {
            LossOnTurns::All => of_assistant().map(turn).collect::<Result<Vec<_>>>()?,
            LossOnTurns::Last => vec![turn(last)?],
        };
        if turns.windows(2).any(|pair| pair[0].end > pair[1].start) {
            bail!("the chat template shows the assistant's turns in another order\n{HINT}");
        }
        let prompt_end = renderer.start(first, &text)?;
        Ok(AssistantTurns { text, prompt_end, turns })
    }
}

impl Renderer<'_> {
    /// The bytes of the turn of message `at` in the whole `text`.
    fn turn(&self, at: usize, text: &str) -> Result<Range<usize>> {
        let (start, end) = (self.start(at, text)?, self.end(at, text)?);
        if end < start {
            bail!("the chat template ends it before it begins\n{HINT}");
        }
        Ok(start..end)
    }

    /// Where the turn of message `at` begins in the whole `text`.
    fn start(&self, at: usize, text: &str) -> Result<usize> {
        // many templates render no conversation without messages
        let before = self.render(&self.messages[..at], true).ok().map(|rendered| rendered.text);
        if let Some(before) = before.as_ref().filter(|before| text.starts_with(before.as_str())) {
            return Ok(before.len());
        }
        let (part, place) = self.place(at, text)?;
        let alone = self.render(&self.messages[..=at], false)?.text;
        let place_alone = self.place_of(part, at + 1, at, &alone)?.unwrap_or_default();
        let lead = before
            .filter(|before| alone.starts_with(before.as_str()))
            .and_then(|before| alone.get(before.len()..place_alone.start))
            .filter(|lead| text[..place.start].ends_with(lead));
        match (lead, part) {
            (Some(lead), _) => Ok(place.start - lead.len()),
            (None, Part::Content) => Ok(place.start),
            (None, Part::Call) => bail!("the chat template begins it in different ways\n{HINT}"),
        }
    }

    /// Where the turn of message `at` ends in the whole `text`.
    fn end(&self, at: usize, text: &str) -> Result<usize> {
        let alone = self.render(&self.messages[..=at], false)?.text;
        if text.starts_with(&alone) {
            return Ok(alone.len());
        }
        let (part, place) = self.place(at, text)?;
        let place_alone = self.place_of(part, at + 1, at, &alone)?.unwrap_or_default();
        let tail = &alone[place_alone.end..];
        if !text[place.end..].starts_with(tail) {
            bail!(
                "the chat template ends it by `{}` if nothing follows, and otherwise in another \
                 way\n{HINT}",
                tail.escape_debug()
            );
        }
        Ok(place.end + tail.len())
    }

    /// A part of message `at` that the whole `text` shows, and where.
    fn place(&self, at: usize, text: &str) -> Result<(Part, Range<usize>)> {
        for part in [Part::Content, Part::Call] {
            if let Some(place) = self.place_of(part, self.messages.len(), at, text)? {
                return Ok((part, place));
            }
        }
        bail!("the chat template does not show its content\n{HINT}");
    }

    /// Where a part of message `at` stands in `text`, the rendering of the first `count` messages:
    /// what changes there if the part is exchanged; `None` if nothing does. If the part is empty,
    /// the end can lie before the start, in a line end that separates it from what follows.
    fn place_of(
        &self,
        part: Part,
        count: usize,
        at: usize,
        text: &str,
    ) -> Result<Option<Range<usize>>> {
        let Some(message) = exchanged(&self.conversation.messages[at], part) else {
            return Ok(None);
        };
        let mut messages = self.messages[..count].to_vec();
        messages[at] = Jinja::from(Serde(message));
        let other = self.render(&messages, false)?.text;
        if other == *text {
            return Ok(None);
        }
        let from_start = text.chars().zip(other.chars()).take_while(|(one, other)| one == other);
        let start = from_start.map(|(character, _)| character.len_utf8()).sum();
        let from_end = text.chars().rev().zip(other.chars().rev());
        let from_end = from_end.take_while(|(one, other)| one == other);
        let behind: usize = from_end.map(|(character, _)| character.len_utf8()).sum();
        Ok(Some(start..text.len() - behind))
    }

    /// Checks that the template shows the messages whose role it may not know.
    fn check_roles(&self, roles: &[&str], text: &str) -> Result<()> {
        for (at, role) in roles.iter().enumerate().filter(|(_, role)| !KNOWN_ROLES.contains(role)) {
            let mut others = self.messages.clone();
            others.remove(at);
            let without = self.render(&others, false);
            if without.is_ok_and(|without| without.text == text) {
                bail!("the chat template leaves out message {}, whose role is `{role}`", at + 1);
            }
        }
        Ok(())
    }
}

/// A part of a message that can be exchanged.
#[derive(Clone, Copy)]
enum Part {
    Content,
    /// The name of the first tool that the message calls.
    Call,
}

/// The message with [`OTHER`] in the place of a part; `None` if it has no such part.
fn exchanged(message: &Map<String, Value>, part: Part) -> Option<Map<String, Value>> {
    let mut message = message.clone();
    match part {
        Part::Content => {
            message.insert("content".into(), OTHER.into());
        }
        Part::Call => {
            let mut call = message.get_mut("tool_calls")?.get_mut(0)?;
            if call.get("function").is_some() {
                call = call.get_mut("function")?;
            }
            *call.get_mut("name")? = OTHER.into();
        }
    }
    Some(message)
}

fn role(role: Option<&Value>) -> &str {
    role.and_then(Value::as_str).unwrap_or_default()
}

/// The distinct roles, for messages.
fn listed(roles: &[&str]) -> String {
    let mut distinct: Vec<String> = Vec::new();
    for role in roles {
        let role = format!("`{role}`");
        if !distinct.contains(&role) {
            distinct.push(role);
        }
    }
    distinct.join(", ")
}
