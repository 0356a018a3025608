//! What a base's `generation_config.json` says.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::prompt::end_of_turn;
use super::sampling::Sampling;
use crate::base::Base;
use crate::chat_template::ChatTemplate;
use crate::data::Tokenizer;

/// The name of the file.
pub const FILE: &str = "generation_config.json";

/// How a base wants to be sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationDefaults {
    /// How tokens are chosen: the most probable one, unless the file has `do_sample`.
    pub sampling: Sampling,
    /// Most tokens to generate, if the file says it.
    pub max_new_tokens: Option<usize>,
    /// The tokens that end a text: those of the file and those of the base's `config.json`.
    pub end_tokens: Vec<i64>,
}

impl GenerationDefaults {
    /// The settings of a base. A base without the file is sampled greedily.
    ///
    /// # Errors
    /// A file that cannot be read, and a value of another type than it should have; the message
    /// names the file and the key.
    pub fn of_base(base: &Base) -> Result<Self> {
        let own = base.spec.eos_token_ids.iter().map(|id| i64::from(*id)).collect();
        let none = Self { sampling: Sampling::GREEDY, max_new_tokens: None, end_tokens: own };
        match base.beside.iter().find(|file| file.name == FILE) {
            None => Ok(none),
            Some(file) => none.with_file(&file.path),
        }
    }

    /// The same for conversations, which also end where the base's chat template ends a turn.
    ///
    /// # Errors
    /// Those of [`GenerationDefaults::of_base`].
    pub fn of_chats(base: &Base) -> Result<Self> {
        let settings = Self::of_base(base)?;
        Ok(match (&base.chat_template, &base.tokenizer) {
            (Some(template), Some(tokenizer)) => settings.with_end_of_turn(template, tokenizer),
            _ => settings,
        })
    }

    /// The settings with the token by which a chat template ends a turn, if it has one.
    #[must_use]
    pub fn with_end_of_turn(mut self, template: &ChatTemplate, tokenizer: &Tokenizer) -> Self {
        let end = end_of_turn(template, tokenizer);
        self.end_tokens.extend(end.filter(|end| !self.end_tokens.contains(end)));
        self
    }

    fn with_file(self, path: &Path) -> Result<Self> {
        let text = fs_err::read_to_string(path)?;
        let parsed = serde_json::from_str(&text).map_err(anyhow::Error::from);
        parsed.and_then(|json| self.with(&json)).with_context(|| format!("in `{}`", path.display()))
    }

    /// The settings with what the file's content says.
    ///
    /// # Errors
    /// A value of another type than it should have.
    pub fn with(mut self, json: &Value) -> Result<Self> {
        let number = |key: &str| match json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => bail!("`{key}` must be a number, got {value}"),
            },
        };
        if let Some(penalty) = number("repetition_penalty")? {
            self.sampling.repetition_penalty = penalty;
        }
        if json.get("do_sample") == Some(&Value::Bool(true)) {
            self.sampling.temperature = number("temperature")?.unwrap_or(1.0);
            // transformers' own default
            self.sampling.top_k = number("top_k")?.unwrap_or(50.0) as i64;
            self.sampling.top_p = number("top_p")?.unwrap_or(1.0);
            self.sampling.min_p = number("min_p")?.unwrap_or(0.0);
        }
        self.sampling.check()?;
        self.max_new_tokens = number("max_new_tokens")?.map(|count| count as usize);
        let ids = match json.get("eos_token_id") {
            None | Some(Value::Null) => vec![],
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
        };
        for id in ids {
            let Some(id) = id.as_i64() else { bail!("`eos_token_id` must hold ids, got {id}") };
            if !self.end_tokens.contains(&id) {
                self.end_tokens.push(id);
            }
        }
        Ok(self)
    }
}
