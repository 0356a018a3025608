//! Log-probabilities and routing weights of a text's tokens, in the form of each endpoint.
//!
//! They are the model's own, in nats: before temperature, penalty and filters.

use serde_json::{Map, Value, json};

use super::live::TextToken;
use super::token_text::{TokenTexts, escaped};

/// JSON has no infinity; OpenAI writes this for what is next to impossible.
const LEAST: f64 = -9999.0;

fn finite(log_prob: f64) -> f64 {
    log_prob.max(LEAST)
}

/// The form of `/v1/completions`.
///
/// - `start`: number of characters in front of the text, if the prompt is repeated
pub(crate) fn of_completions(tokens: &[TextToken], texts: &TokenTexts, start: usize) -> Value {
    // parts of characters have no text of their own
    let name = |id: i64| {
        let bytes = texts.bytes(id);
        let prefix = if std::str::from_utf8(&bytes).is_ok() { "" } else { "bytes:" };
        format!("{prefix}{}", escaped(&bytes))
    };
    let best = |token: &TextToken| {
        let mut best = Map::new();
        let all = token.token.alternatives.iter().copied();
        for (id, log_prob) in all.chain([(token.token.id, token.token.log_prob)]) {
            // several tokens may have the same text; the first is the most probable
            best.entry(name(id)).or_insert_with(|| finite(log_prob).into());
        }
        best
    };
    let log_prob = |token: &TextToken| finite(token.token.log_prob);
    json!({
        "tokens": tokens.iter().map(|token| name(token.token.id)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(log_prob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(best).collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|token| start + token.offset).collect::<Vec<_>>(),
    })
}

/// The form of `/v1/chat/completions`.
pub(crate) fn of_chat(tokens: &[TextToken], texts: &TokenTexts) -> Value {
    let entry = |id: i64, log_prob: f64| {
        let bytes = texts.bytes(id);
        json!({"token": escaped(&bytes), "logprob": finite(log_prob), "bytes": bytes})
    };
    let content = tokens.iter().map(|TextToken { token, .. }| {
        let best = token.alternatives.iter().map(|(id, log_prob)| entry(*id, *log_prob));
        let best: Vec<Value> = best.collect();
        let mut entry = entry(token.id, token.log_prob);
        entry["top_logprobs"] = best.into();
        entry
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// The routing weights of each token, as means over the sites.
pub fn routing(tokens: &[TextToken], texts: &TokenTexts, experts: &[String]) -> Value {
    let name = |token: &TextToken| escaped(&texts.bytes(token.token.id));
    json!({
        "experts": experts,
        "tokens": tokens.iter().map(name).collect::<Vec<_>>(),
        "weights": tokens.iter().map(|token| &token.token.weights).collect::<Vec<_>>(),
    })
}
