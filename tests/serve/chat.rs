//! `POST /v1/chat/completions`.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::client::{assert_close, text_of};
use crate::server::{NAME, Reference, Settings, TestServer};

const PATH: &str = "/v1/chat/completions";

#[test]
fn a_chat_continues_what_the_template_makes_of_it() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let prompt = "system: Be brief.\nuser: How much\nremains?\nfineassistant:";
    let expected = reference.greedy(prompt, 10)?;
    let parts = json!([{"type": "text", "text": "How much"}, {"type": "text", "text": "remains?"}]);
    let mut ask = json!({
        "model": NAME,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
        ],
        "chat_template_kwargs": {"mood": "fine"},
        "max_completion_tokens": 10,
        "temperature": 0,
        "tools": [],
        "response_format": {"type": "text"},
    });
    let answer = server.client.ask(PATH, &ask)?;
    assert_eq!(answer["object"], "chat.completion");
    let message = json!({"role": "assistant", "content": expected.text, "refusal": null});
    assert_eq!(answer["choices"][0]["message"], message);
    assert_eq!(answer["usage"]["prompt_tokens"], reference.prompt_ids(prompt)?.len());

    ask["stream"] = true.into();
    let chunks = server.client.stream(PATH, &ask)?;
    assert_eq!(text_of(&chunks, 0), expected.text);
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
    let first = &chunks[0]["choices"][0]["delta"];
    assert_eq!((&first["role"], &first["content"]), (&json!("assistant"), &json!("")));
    let last = &chunks.last().context("chunks")?["choices"][0];
    assert_eq!((&last["delta"], last["finish_reason"].is_string()), (&json!({}), true));
    Ok(())
}

#[test]
fn log_probabilities_have_the_form_of_chats() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let expected = reference.greedy("user: x\nassistant:", 8)?;
    let mut ask = json!({
        "model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 8,
        "temperature": 0, "logprobs": true, "top_logprobs": 3, "n": 2,
    });
    let answer = server.client.ask(PATH, &ask)?;
    let content = &answer["choices"][1]["logprobs"]["content"];
    let entries = content.as_array().context("a list")?;
    assert_eq!(entries.len(), expected.tokens.len());
    let mut bytes: Vec<u8> = vec![];
    for (entry, token) in entries.iter().zip(&expected.tokens) {
        let found = entry["logprob"].as_f64().context("a number")?;
        assert!((found - token.log_prob).abs() < 1e-5);
        bytes.extend(serde_json::from_value::<Vec<u8>>(entry["bytes"].clone())?);
        let best = entry["top_logprobs"].as_array().context("a list")?;
        assert_eq!(best.len(), 3);
        // greedy: the chosen token is the most probable
        assert_eq!((&best[0]["bytes"], &best[0]["logprob"]), (&entry["bytes"], &entry["logprob"]));
    }
    // the text stands for bytes that are no characters by U+FFFD
    let ids: Vec<i64> = expected.tokens.iter().map(|token| token.id).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), reference.decode(&ids)?);
    ask["stream"] = true.into();
    let chunks = server.client.stream(PATH, &ask)?;
    let choices = chunks.iter().filter_map(|chunk| chunk["choices"][0].as_object());
    let own = choices.filter(|choice| choice["index"] == 1);
    let all: Vec<Value> = own
        .filter_map(|choice| choice["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_close(&json!(all), content);
    Ok(())
}

#[test]
fn without_a_number_of_tokens_a_chat_goes_on_to_the_end_of_the_context() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let ask = json!({
        "model": NAME, "messages": [{"role": "user", "content": "x"}], "temperature": 0,
    });
    let answer = server.client.ask(PATH, &ask)?;
    let usage = &answer["usage"];
    let is_full = usage["total_tokens"] == 64;
    assert_eq!(answer["choices"][0]["finish_reason"], if is_full { "length" } else { "stop" });
    Ok(())
}

#[test]
fn chats_that_cannot_be_answered_are_refused() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let user = json!([{"role": "user", "content": "x"}]);
    let image = json!([{"type": "image_url", "image_url": {"url": "data:"}}]);
    let cases = [
        (json!({}), "messages", "`messages` is missing"),
        (json!({"messages": []}), "messages", "a list of messages, at least one, got []"),
        (json!({"messages": ["x"]}), "messages[0]", "an object with `role` and `content`"),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role", "must be a string, got null"),
        (
            json!({"messages": [{"role": "user", "content": image}]}),
            "messages[0].content[0]",
            "must be a part of the type `text`",
        ),
        (json!({"messages": [{"role": "robot"}]}), "messages", "there are no robots"),
        (json!({"messages": user, "tools": [{"type": "function"}]}), "tools", "is not supported"),
        (
            json!({"messages": user, "response_format": {"type": "json_object"}}),
            "response_format",
            "is not supported",
        ),
        (
            json!({"messages": user, "top_logprobs": 2}),
            "top_logprobs",
            "needs `\"logprobs\": true`",
        ),
        (
            json!({"messages": user, "max_tokens": 3, "max_completion_tokens": 4}),
            "max_tokens",
            "leave one out",
        ),
        (json!({"messages": user, "max_tokens": 999}), "max_tokens", "must be at most"),
    ];
    for (mut ask, param, message) in cases {
        ask["model"] = NAME.into();
        let answer = server.client.post(PATH, &ask)?;
        let error = answer.json()?["error"].clone();
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{error}");
        assert!(error["message"].as_str().context("a text")?.contains(message), "{error}");
    }
    Ok(())
}

#[test]
fn a_base_without_a_template_cannot_chat() -> Result<()> {
    let server = TestServer::start(Settings { has_template: false, ..Settings::default() })?;
    let ask = json!({"model": NAME, "messages": [{"role": "user", "content": "x"}]});
    let answer = server.client.post(PATH, &ask)?;
    let error = &answer.json()?["error"];
    assert_eq!((answer.status, &error["code"]), (400, &json!("no_chat_template")));
    assert!(error["message"].as_str().context("a text")?.contains("has no chat template"));
    Ok(())
}
