//! What transformers makes of conversations (scripts/make_golden_chat.py).

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result};
use dylora::chat_template::{ChatTemplate, Conversation};
use dylora::config::LossOnTurns;
use dylora::data::Tokenizer;
use serde::Deserialize;
use serde_json::Value;

use crate::{BaseFolder, conversation, golden_dir};

#[derive(Deserialize)]
struct Golden {
    special_tokens: BTreeMap<String, Value>,
    conversations: BTreeMap<String, Value>,
    renderings: Vec<Rendering>,
}

#[derive(Deserialize)]
struct Rendering {
    template: String,
    tokenizer: String,
    conversation: String,
    add_generation_prompt: bool,
    text: Option<String>,
    ids: Option<Vec<u32>>,
    generated: Option<Vec<u32>>,
    turns: Option<Vec<[usize; 2]>>,
}

impl Rendering {
    fn name(&self) -> String {
        let prompt = if self.add_generation_prompt { " + prompt" } else { "" };
        format!("{}, {}{prompt}", self.template, self.conversation)
    }
}

/// Calls `check` with each rendering.
fn each(
    mut check: impl FnMut(&Rendering, &ChatTemplate, &Conversation, &Tokenizer) -> Result<()>,
) -> Result<()> {
    let dir = golden_dir();
    let golden: Golden = serde_json::from_slice(&fs_err::read(dir.join("golden.json"))?)?;
    let mut templates = BTreeMap::new();
    let mut tokenizers = BTreeMap::new();
    for rendering in &golden.renderings {
        let Rendering { template, tokenizer, .. } = rendering;
        if !templates.contains_key(template) {
            let config = golden.special_tokens[tokenizer].to_string();
            let text = fs_err::read_to_string(dir.join(format!("{template}.jinja")))?;
            let files =
                [("chat_template.jinja", text.as_str()), ("tokenizer_config.json", &config)];
            templates.insert(template.clone(), BaseFolder::new(&files).template()?);
        }
        if !tokenizers.contains_key(tokenizer) {
            let tokenizers_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tokenizers");
            let path = format!("{tokenizers_dir}/{tokenizer}.tokenizer.json");
            tokenizers.insert(tokenizer.clone(), Tokenizer::load(path.as_ref())?);
        }
        let conversation = conversation(&golden.conversations[&rendering.conversation]);
        check(rendering, &templates[template], &conversation, &tokenizers[tokenizer])
            .with_context(|| rendering.name())?;
    }
    Ok(())
}

#[test]
fn texts_are_those_of_transformers() -> Result<()> {
    let mut wrong = Vec::new();
    each(|rendering, template, conversation, _| {
        let found = template.render(conversation, rendering.add_generation_prompt);
        let found = found.map(|rendered| rendered.text);
        if found.as_ref().ok() != rendering.text.as_ref() {
            let expected = &rendering.text;
            wrong.push(format!("{}\n  {expected:?}\n  {found:?}", rendering.name()));
        }
        Ok(())
    })?;
    assert!(wrong.is_empty(), "{} are wrong\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

#[test]
fn ids_are_those_of_transformers() -> Result<()> {
    each(|rendering, _, _, tokenizer| {
        let (Some(text), Some(expected)) = (&rendering.text, &rendering.ids) else {
            return Ok(());
        };
        assert_eq!(&tokenizer.encode(text)?, expected, "{}", rendering.name());
        let encoded = tokenizer.encode_with_offsets(text)?;
        let ids: Vec<u32> = encoded.iter().map(|(id, _)| *id).collect();
        assert_eq!(&ids, expected, "{}", rendering.name());
        Ok(())
    })
}

/// Of each token, whether it lies within one of the ranges of bytes.
fn mask(encoded: &[(u32, Range<usize>)], ranges: &[Range<usize>]) -> Vec<u32> {
    let is_in = |bytes: &Range<usize>| {
        ranges.iter().any(|range| range.start <= bytes.start && bytes.end <= range.end)
    };
    encoded.iter().map(|(_, bytes)| u32::from(is_in(bytes))).collect()
}

#[test]
fn generated_tokens_are_those_of_transformers() -> Result<()> {
    each(|rendering, template, conversation, tokenizer| {
        let (Some(generated), Some(text)) = (&rendering.generated, &rendering.text) else {
            return Ok(());
        };
        let rendered = template.render(conversation, rendering.add_generation_prompt)?;
        let found = mask(&tokenizer.encode_with_offsets(text)?, &rendered.generated);
        assert_eq!(&found, generated, "{} {:?}", rendering.name(), rendered.generated);
        Ok(())
    })
}

#[test]
fn turns_are_what_a_message_adds_to_the_text() -> Result<()> {
    let mut num_turns = 0;
    each(|rendering, template, conversation, _| {
        let (Some(expected), Some(text)) = (&rendering.turns, &rendering.text) else {
            return Ok(());
        };
        let bytes = |characters: usize| {
            text.char_indices().nth(characters).map_or(text.len(), |(place, _)| place)
        };
        let expected: Vec<Range<usize>> =
            expected.iter().map(|[start, end]| bytes(*start)..bytes(*end)).collect();
        // dylora refuses it where a template leaves the other role out
        let Some(last) = expected.last().filter(|_| rendering.conversation != "another role")
        else {
            return Ok(());
        };
        num_turns += expected.len();
        let found = template.assistant_turns(conversation, LossOnTurns::All)?;
        assert_eq!((&found.text, &found.turns), (text, &expected), "{}", rendering.name());
        assert_eq!(found.prompt_end, expected[0].start);
        let found = template.assistant_turns(conversation, LossOnTurns::Last)?;
        assert_eq!((found.prompt_end, found.turns), (expected[0].start, vec![last.clone()]));
        Ok(())
    })?;
    assert!(num_turns > 40, "{num_turns}");
    Ok(())
}
