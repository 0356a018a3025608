//! Where a domain's records come from and how they are read.
//!
//! A record has one of the shapes of [`RecordShape`]. Which one is decided by its keys, or for a
//! table by its columns; [`RecordConfig`] names what they cannot tell.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, anyhow};
use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::default_revision;
use super::template::RecordTemplate;

/// A data set of the Hugging Face Hub, of which the parquet files are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HubDataset {
    /// The data set's name, such as `openai/gsm8k`.
    pub dataset: String,
    /// The split, such as `train` or `test`.
    #[serde(default = "default_split")]
    pub split: String,
    /// The configuration, which is also called subset, such as `main`. A data set that has only one
    /// needs no name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// A branch, a tag or a commit. The branch `refs/convert/parquet` has the parquet files that
    /// the Hub has made of other files.
    #[serde(default = "default_revision")]
    pub revision: String,
}

impl fmt::Display for HubDataset {
    /// The data set with its configuration, split and revision, as far as they are not the usual
    /// ones.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dataset, split, config, revision } = self;
        f.write_str(dataset)?;
        if *revision != default_revision() {
            write!(f, "@{revision}")?;
        }
        config.iter().try_for_each(|config| write!(f, " {config}"))?;
        write!(f, " {split}")
    }
}

fn default_split() -> String {
    "train".into()
}

/// The format of a file.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum FileFormat {
    /// One JSON object per line: `.jsonl` and `.ndjson`, and a `.json` file of that content.
    Jsonl,
    /// An array of JSON objects: `.json`.
    Json,
    /// Values separated by commas, with the names of the columns in the first row: `.csv`.
    Csv,
    /// Values separated by tabs, with the names of the columns in the first row: `.tsv`.
    Tsv,
    /// Apache Parquet: `.parquet`.
    Parquet,
    /// One plain text, which is one document: `.txt`, `.text`, `.md`, `.markdown` and `.rst`.
    Text,
}

impl FileFormat {
    /// Every format.
    pub const ALL: [Self; 6] =
        [Self::Jsonl, Self::Json, Self::Csv, Self::Tsv, Self::Parquet, Self::Text];

    /// Its name in configs and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Jsonl => "jsonl",
            Self::Json => "json",
            Self::Csv => "csv",
            Self::Tsv => "tsv",
            Self::Parquet => "parquet",
            Self::Text => "text",
        }
    }
}

/// What a record consists of.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    JsonSchema,
    ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum RecordShape {
    /// `messages`, a list of objects with `role` and `content`.
    Messages,
    /// `conversations`, a list of objects with `from` and `value`, as in ShareGPT's data.
    Sharegpt,
    /// `text`, which is learned as a whole.
    Text,
    /// `prompt`, which is read, and `completion`, which is learned.
    PromptCompletion,
    /// `instruction` and `output`, and for some records `input`, as in Stanford Alpaca's data.
    Alpaca,
}

impl RecordShape {
    /// Every shape, in the order of the enum.
    pub const ALL: [Self; 5] =
        [Self::Messages, Self::Sharegpt, Self::Text, Self::PromptCompletion, Self::Alpaca];

    /// Its name in configs and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Text => "text",
            Self::PromptCompletion => "prompt_completion",
            Self::Alpaca => "alpaca",
        }
    }
}

/// How records without turns become text.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum RecordStyle {
    /// A `completion` follows its `prompt` directly. An `output` follows the prompt that Stanford
    /// Alpaca was trained with.
    #[default]
    Plain,
    /// The base's chat template renders a turn of the user and one of the assistant: `prompt` and
    /// `completion`, or `instruction` and `output`. An `input` follows its `instruction` after an
    /// empty line. A `text` is an error.
    Chat,
}

/// The names that the keys or columns of records have in the data, as in `{ prompt = "question",
/// completion = "answer" }`. They also decide the shape of the records, so that other keys that
/// dylora knows are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FieldNames {
    /// The text that is learned as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// What is read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// What is learned after the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<String>,
    /// The list of messages with `role` and `content`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// The list of messages with `from` and `value`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversations: Option<String>,
    /// The instruction of an Alpaca record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// The input of an Alpaca record, which may be empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// The output of an Alpaca record, which is learned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// The record's domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// The record's expert.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert: Option<String>,
}

impl FieldNames {
    /// Whether no name is given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The shape that the given names belong to, if they are not those of `domain` and `expert`.
    ///
    /// # Errors
    /// Names of several shapes; the error names two of the keys.
    pub fn shape(&self) -> Result<Option<RecordShape>, [&'static str; 2]> {
        let mut found: Option<(RecordShape, &'static str)> = None;
        for (shape, key, name) in [
            (RecordShape::Messages, "messages", &self.messages),
            (RecordShape::Sharegpt, "conversations", &self.conversations),
            (RecordShape::Text, "text", &self.text),
            (RecordShape::PromptCompletion, "prompt", &self.prompt),
            (RecordShape::PromptCompletion, "completion", &self.completion),
            (RecordShape::Alpaca, "instruction", &self.instruction),
            (RecordShape::Alpaca, "input", &self.input),
            (RecordShape::Alpaca, "output", &self.output),
        ] {
            match (name, found) {
                (None, _) => {}
                (Some(_), Some((other, first))) if other != shape => return Err([first, key]),
                (Some(_), _) => found = Some((shape, key)),
            }
        }
        Ok(found.map(|(shape, _)| shape))
    }
}

/// Names as an option has them, `prompt=question,completion=answer`.
impl FromStr for FieldNames {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut names = serde_json::Map::new();
        for pair in text.split(',') {
            let (key, name) = pair.split_once('=').with_context(|| {
                format!("`{pair}` is not of the form `KEY=NAME`, as `prompt=question` is")
            })?;
            names.insert(key.trim().to_owned(), name.trim().into());
        }
        serde_json::from_value(names.into()).map_err(|error| anyhow!("{error}"))
    }
}

/// What a domain says about its records and the files that hold them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct RecordConfig {
    /// The files' format, if it is not to be taken from their names.
    pub format: Option<FileFormat>,
    /// The records' shape, if it is not to be taken from their keys.
    pub shape: Option<RecordShape>,
    /// How records without turns become text.
    pub style: RecordStyle,
    /// The names of the records' keys.
    pub fields: FieldNames,
    /// The texts that the records' fields are put into.
    pub template: RecordTemplate,
}

impl RecordConfig {
    /// The shape that all records must have, if the keys are not to decide.
    ///
    /// # Errors
    /// What contradicts itself, and a faulty template: the dotted key, and what is wrong with it.
    pub fn known_shape(&self) -> Result<Option<RecordShape>, (&'static str, String)> {
        self.template.check()?;
        let named = self.fields.shape().map_err(|[first, second]| {
            ("fields", format!("must name keys of one shape, got `{first}` and `{second}`"))
        })?;
        match (self.shape, named) {
            (Some(shape), Some(named)) if shape != named => Err((
                "fields",
                format!("names keys of `{}`, but `shape` is `{}`", named.name(), shape.name()),
            )),
            (shape, named) => Ok(shape.or(named)),
        }
    }
}
