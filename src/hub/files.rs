//! The files of a base, of an adapter or of a data set that were found.

use std::path::PathBuf;

/// The files of a base. All of them exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseFiles {
    /// The name for messages: the folder's path, or `repo@revision`.
    pub label: String,
    /// The commit that the revision pointed to; `None` for a local folder.
    pub commit: Option<String>,
    /// `config.json`.
    pub config: PathBuf,
    /// `model.safetensors`, or the shards that `model.safetensors.index.json` names, sorted and
    /// without duplicates.
    pub weights: Vec<PathBuf>,
    /// `tokenizer.json`, if there is one.
    pub tokenizer: Option<PathBuf>,
    /// The small files beside the weights, as far as there are any: the settings of the tokenizer
    /// and of generation, the chat templates and the license. They are copied to a base that is
    /// written.
    pub beside: Vec<SideFile>,
}

/// A small file that goes with a base wherever it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideFile {
    /// Its path in the base's folder, such as `chat_template.jinja`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// The files of an adapter. Both exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    /// The name for messages: the folder's path, `repo@revision` or `repo@revision/subfolder`.
    pub label: String,
    /// The commit that the revision pointed to; `None` for a local folder.
    pub commit: Option<String>,
    /// `adapter_config.json`.
    pub config: PathBuf,
    /// `adapter_model.safetensors`.
    pub weights: PathBuf,
}

/// The files of a data set's split. All of them exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFiles {
    /// The name for messages: `repo@revision`.
    pub label: String,
    /// The commit that the revision pointed to.
    pub commit: Option<String>,
    /// The parquet files, in the order of their records.
    pub files: Vec<PathBuf>,
}
