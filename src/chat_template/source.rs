//! Finds a base's chat templates and special tokens in the files beside its weights, as
//! transformers does:
//!
//! ```text
//! chat_template.jinja                     the template `default`
//! additional_chat_templates/NAME.jinja    the template NAME
//! tokenizer_config.json                   without these files, its `chat_template`: a template,
//!                                         or a list [{"name": .., "template": ..}, ..]; its
//!                                         `bos_token` and so on, "text" or {"content": "text"}
//! special_tokens_map.json                 special tokens too; they count where the other file
//!                                         has no `added_tokens_decoder`
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::hub::SideFile;

/// The template that is used unless another is asked for.
pub(super) const DEFAULT: &str = "default";
/// The file with a base's chat template.
pub const TEMPLATE: &str = "chat_template.jinja";
pub(super) const MORE_TEMPLATES: &str = "additional_chat_templates/";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";

/// The files that templates and special tokens are read from.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// The template files, by the names of the templates.
    pub jinja: BTreeMap<String, File>,
    pub tokenizer_config: Option<File>,
    pub special_tokens: Option<File>,
}

/// A file and its content.
#[derive(Debug)]
pub(super) struct File {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

/// A template and where it is written.
#[derive(Debug)]
pub(super) struct Template {
    pub text: String,
    pub path: PathBuf,
    /// Where it stands in its file, unless it is all of it.
    pub key: Option<String>,
}

impl Template {
    /// The place of one of its lines, for messages.
    pub fn place(&self, line: Option<usize>) -> String {
        let path = self.path.display();
        match (&self.key, line) {
            (None, None) => format!("`{path}`"),
            (None, Some(line)) => format!("`{path}:{line}`"),
            (Some(key), None) => format!("{key} in `{path}`"),
            (Some(key), Some(line)) => format!("line {line} of {key} in `{path}`"),
        }
    }
}

impl File {
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), bytes: fs_err::read(path)? })
    }

    fn text(&self) -> Result<String> {
        String::from_utf8(self.bytes.clone()).map_err(|error| {
            let at = error.utf8_error().valid_up_to() + 1;
            anyhow!("`{}`: invalid UTF-8 at byte {at}", self.path.display())
        })
    }

    fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.bytes)
            .with_context(|| format!("`{}` is not JSON", self.path.display()))
    }
}

impl Source {
    /// Reads those of `files` that hold templates or special tokens.
    pub fn read(files: &[SideFile]) -> Result<Self> {
        let mut source = Self::default();
        for SideFile { name, path } in files {
            let more = name.strip_prefix(MORE_TEMPLATES);
            if let Some(name) = more.and_then(|name| name.strip_suffix(".jinja")) {
                source.jinja.insert(name.to_owned(), File::read(path)?);
                continue;
            }
            match name.as_str() {
                TEMPLATE => {
                    source.jinja.insert(DEFAULT.to_owned(), File::read(path)?);
                }
                TOKENIZER_CONFIG => source.tokenizer_config = Some(File::read(path)?),
                SPECIAL_TOKENS => source.special_tokens = Some(File::read(path)?),
                _ => {}
            }
        }
        Ok(source)
    }

    /// Whether there is a template. A `tokenizer_config.json` that cannot be read counts as one, so
    /// that its fault is reported when the template is needed.
    pub fn has_template(&self) -> bool {
        let in_config =
            |file: &File| file.json().map_or(true, |config| !config["chat_template"].is_null());
        !self.jinja.is_empty() || self.tokenizer_config.as_ref().is_some_and(in_config)
    }

    /// The templates by their names.
    pub fn templates(&self) -> Result<BTreeMap<String, Template>> {
        if !self.jinja.is_empty() {
            let read = |(name, file): (&String, &File)| {
                let path = file.path.clone();
                Ok((name.clone(), Template { text: file.text()?, path, key: None }))
            };
            return self.jinja.iter().map(read).collect();
        }
        let Some(file) = &self.tokenizer_config else { return Ok(BTreeMap::new()) };
        let fault = |what: &str| anyhow!("`chat_template` in `{}` {what}", file.path.display());
        let template = |text: &str, key: String| Template {
            text: text.to_owned(),
            path: file.path.clone(),
            key: Some(key),
        };
        match &file.json()?["chat_template"] {
            Value::Null => Ok(BTreeMap::new()),
            Value::String(text) => {
                let only = template(text, "`chat_template`".into());
                Ok(BTreeMap::from([(DEFAULT.to_owned(), only)]))
            }
            Value::Array(list) => {
                let named = list.iter().map(|entry| {
                    let (name, text) = (entry["name"].as_str(), entry["template"].as_str());
                    let (Some(name), Some(text)) = (name, text) else {
                        return Err(fault("has an entry without a `name` and a `template`"));
                    };
                    let key = format!("the `chat_template` named `{name}`");
                    Ok((name.to_owned(), template(text, key)))
                });
                named.collect()
            }
            _ => Err(fault("must be a template or a list of named ones")),
        }
    }

    /// The special tokens by their names, such as `bos_token`.
    pub fn special_tokens(&self) -> Result<BTreeMap<String, String>> {
        let mut tokens = BTreeMap::new();
        let mut has_added_tokens = false;
        if let Some(file) = &self.tokenizer_config {
            let config = file.json()?;
            has_added_tokens = !config["added_tokens_decoder"].is_null();
            add_tokens(&config, file, &mut tokens)?;
        }
        if let Some(file) = self.special_tokens.as_ref().filter(|_| !has_added_tokens) {
            add_tokens(&file.json()?, file, &mut tokens)?;
        }
        Ok(tokens)
    }
}

/// Adds the special tokens that a JSON object names. Those of transformers' classes stand in the
/// object itself, and those of a single model may stand in one below it.
fn add_tokens(json: &Value, file: &File, tokens: &mut BTreeMap<String, String>) -> Result<()> {
    let Some(object) = json.as_object() else {
        bail!("`{}` is no JSON object", file.path.display());
    };
    let groups = ["extra_special_tokens", "model_specific_special_tokens"];
    let below = groups.iter().filter_map(|group| object.get(*group)?.as_object()).flatten();
    let own = object.iter().filter(|(key, _)| key.ends_with("_token"));
    for (key, value) in own.chain(below) {
        if let Some(text) = value.as_str().or(value["content"].as_str()) {
            tokens.insert(key.clone(), text.to_owned());
        }
    }
    Ok(())
}
