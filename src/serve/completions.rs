//! The fields of `POST /v1/completions`.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::limits::Limits;
use super::models::ServedModel;
use super::request::{
    Ask, Common, Endpoint, MAX_ALTERNATIVES, Prompt, check_num_texts, is_empty, max_new_tokens,
};
use crate::generate::prompt::text_ids;

/// Most new tokens if neither the request nor the base says a number; OpenAI's default.
const MAX_NEW_TOKENS: usize = 16;

const KINDS: &str = "a string, a list of strings, a list of token ids or a list of such lists";

/// Reads a request.
///
/// # Errors
/// The first field that is wrong, unknown or not supported.
pub fn parse(body: &[u8], model: &ServedModel, limits: &Limits) -> Result<Ask, ApiError> {
    let mut fields = Fields::parse(body)?;
    let common = Common::take(&mut fields, model, limits)?;
    let asked = fields.integer("max_tokens", 1..=i64::MAX)?.map(|count| count as usize);
    let logprobs = fields.integer("logprobs", 0..=MAX_ALTERNATIVES)?.map(|count| count as usize);
    let echo = fields.boolean("echo")?;
    if echo && logprobs.is_some() {
        let message = "`echo` with `logprobs` is not supported: the log-probabilities of prompts \
                       are not computed";
        return Err(ApiError::unsupported("echo", message));
    }
    let n = common.n;
    fields.refuse("best_of", |best| best.as_u64().is_some_and(|best| best <= n as u64))?;
    fields.refuse("suffix", is_empty)?;
    let Some(prompt) = fields.take("prompt") else {
        return Err(ApiError::field("prompt", "`prompt` is missing"));
    };
    fields.end()?;
    let parts = parts(prompt)?;
    check_num_texts(parts.len(), n, limits)?;
    let usual = model.defaults.max_new_tokens.unwrap_or(MAX_NEW_TOKENS);
    let prompts = parts.into_iter().map(|part| {
        let (ids, text) = read(part, model, echo)?;
        let names = ["prompt", "max_tokens"];
        let max_new_tokens = max_new_tokens(&ids, asked, usual, limits, names)?;
        Ok(Prompt { ids, max_new_tokens, echo: text })
    });
    let prompts = prompts.collect::<Result<_, ApiError>>()?;
    Ok(Ask { endpoint: Endpoint::Completions, prompts, logprobs, common })
}

/// The prompts: strings, or lists of ids.
fn parts(prompt: Value) -> Result<Vec<Value>, ApiError> {
    match prompt {
        Value::Array(list) if list.is_empty() => {
            Err(ApiError::field("prompt", "`prompt` must not be an empty list"))
        }
        Value::Array(list) if list.iter().all(Value::is_number) => Ok(vec![Value::Array(list)]),
        Value::Array(list) => Ok(list),
        text => Ok(vec![text]),
    }
}

/// The tokens of a prompt and, if it is to be repeated, its text.
fn read(part: Value, model: &ServedModel, echo: bool) -> Result<(Vec<i64>, String), ApiError> {
    let fault = |error: anyhow::Error| ApiError::field("prompt", format!("`prompt`: {error}"));
    let list = match part {
        Value::String(text) => {
            let ids = text_ids(&model.tokenizer, &text).map_err(fault)?;
            return Ok((ids, if echo { text } else { String::new() }));
        }
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(wrong("prompt", KINDS, &other)),
    };
    let vocab_size = model.vocab_size;
    let what = format!("{KINDS}, where a token id is a number from 0 to {}", vocab_size - 1);
    let id = |value: &Value| {
        let id = value.as_i64().filter(|id| (0..vocab_size).contains(id));
        id.ok_or_else(|| wrong("prompt", &what, value))
    };
    let ids = list.iter().map(id).collect::<Result<Vec<i64>, ApiError>>()?;
    let text = match echo {
        true => {
            let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
            model.tokenizer.decode_text(&ids).map_err(fault)?
        }
        false => String::new(),
    };
    Ok((ids, text))
}
