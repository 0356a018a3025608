//! Chat templates and records with `messages`, through the public interface.

mod bases;
mod golden;
mod records;
mod refusals;
mod templates;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dylora::chat_template::{ChatTemplate, Conversation};
use dylora::hub::SideFile;
use serde_json::{Value, json};

/// The folder with the templates and with what transformers makes of them.
fn golden_dir() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat");
    std::env::var_os("DYLORA_GOLDEN_CHAT").map_or(own, PathBuf::from)
}

/// A folder of a base's small files.
struct BaseFolder(tempfile::TempDir);

impl BaseFolder {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (name, content) in files {
            let path = dir.path().join(name);
            fs_err::create_dir_all(path.parent().expect("it is in the folder")).expect("a folder");
            fs_err::write(path, content).expect("a temporary file");
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn files(&self) -> Vec<SideFile> {
        dylora::hub::side_files(self.0.path()).expect("it can be listed")
    }

    fn template(&self) -> Result<ChatTemplate> {
        ChatTemplate::find(&self.files())?.context("there is no template")
    }
}

/// The template with this text.
fn template(text: &str) -> Result<ChatTemplate> {
    BaseFolder::new(&[("chat_template.jinja", text)]).template()
}

/// A conversation of JSON with `messages` and perhaps `tools` and `variables`.
fn conversation(json: &Value) -> Conversation {
    let list = |value: &Value| value.as_array().cloned();
    let messages = list(&json["messages"]).expect("it has messages").into_iter();
    let messages = messages.map(|message| message.as_object().cloned().expect("an object"));
    Conversation {
        messages: messages.collect(),
        tools: list(&json["tools"]),
        variables: json["variables"].as_object().cloned().unwrap_or_default(),
        now: None,
    }
}

/// A conversation of (role, content).
fn messages(messages: &[(&str, &str)]) -> Conversation {
    let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    let messages: Vec<Value> = messages.iter().map(message).collect();
    conversation(&json!({"messages": messages}))
}
