//! What is found: the files of a base or of an adapter.

use std::path::PathBuf;

/// The files of a base; all of them exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseFiles {
    /// What to call it: the folder's path, or `repo@revision`.
    pub label: String,
    /// The commit that the revision stood at; absent for a folder.
    pub commit: Option<String>,
    /// `config.json`.
    pub config: PathBuf,
    /// `model.safetensors`, or the shards that `model.safetensors.index.json` names, each once,
    /// sorted.
    pub weights: Vec<PathBuf>,
    /// `tokenizer.json`, if there is one.
    pub tokenizer: Option<PathBuf>,
}

/// The files of an adapter; both exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    /// What to call it: the folder's path, `repo@revision` or `repo@revision/subfolder`.
    pub label: String,
    /// The commit that the revision stood at; absent for a folder.
    pub commit: Option<String>,
    /// `adapter_config.json`.
    pub config: PathBuf,
    /// `adapter_model.safetensors`.
    pub weights: PathBuf,
}
