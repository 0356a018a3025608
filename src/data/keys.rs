//! The keys of a record, under the names that a domain's config gives them, and their values as any
//! format holds them.

use serde_json::Value;

use crate::config::{FieldNames, RecordConfig, RecordShape, RecordStyle, RecordTemplate};

/// What a key of a record means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Messages,
    Conversations,
    Text,
    Prompt,
    Completion,
    Instruction,
    Input,
    Output,
    System,
    Tools,
    ChatTemplateKwargs,
    Domain,
    Expert,
}

impl Key {
    pub const ALL: [Self; 13] = [
        Self::Messages,
        Self::Conversations,
        Self::Text,
        Self::Prompt,
        Self::Completion,
        Self::Instruction,
        Self::Input,
        Self::Output,
        Self::System,
        Self::Tools,
        Self::ChatTemplateKwargs,
        Self::Domain,
        Self::Expert,
    ];

    /// The name that a key has by default, and the one that the config gives it.
    fn names(self, fields: &FieldNames) -> (&'static str, Option<&String>) {
        let (name, given) = match self {
            Self::Messages => ("messages", &fields.messages),
            Self::Conversations => ("conversations", &fields.conversations),
            Self::Text => ("text", &fields.text),
            Self::Prompt => ("prompt", &fields.prompt),
            Self::Completion => ("completion", &fields.completion),
            Self::Instruction => ("instruction", &fields.instruction),
            Self::Input => ("input", &fields.input),
            Self::Output => ("output", &fields.output),
            Self::System => ("system", &None),
            Self::Tools => ("tools", &None),
            Self::ChatTemplateKwargs => ("chat_template_kwargs", &None),
            Self::Domain => ("domain", &fields.domain),
            Self::Expert => ("expert", &fields.expert),
        };
        (name, given.as_ref())
    }

    /// The shape whose records have this key as their content, if it is one's alone.
    fn shape(self) -> Option<RecordShape> {
        match self {
            Self::Messages => Some(RecordShape::Messages),
            Self::Conversations => Some(RecordShape::Sharegpt),
            Self::Text => Some(RecordShape::Text),
            Self::Prompt | Self::Completion => Some(RecordShape::PromptCompletion),
            Self::Instruction | Self::Input | Self::Output => Some(RecordShape::Alpaca),
            Self::System | Self::Tools | Self::ChatTemplateKwargs | Self::Domain | Self::Expert => {
                None
            }
        }
    }
}

/// The names of all keys, and what a domain's config says about its records.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    names: [String; Key::ALL.len()],
    given: [bool; Key::ALL.len()],
    /// The shape of every record, if their keys are not to decide.
    pub shape: Option<RecordShape>,
    pub style: RecordStyle,
    pub template: RecordTemplate,
}

impl Keys {
    /// The keys of `config`, whose names belong to one shape.
    pub fn new(config: &RecordConfig) -> Self {
        let names = Key::ALL.map(|key| key.names(&config.fields));
        Self {
            given: names.map(|(_, given)| given.is_some()),
            names: names.map(|(name, given)| given.map_or_else(|| name.to_owned(), String::clone)),
            shape: config.known_shape().expect("checked where the config enters"),
            style: config.style,
            template: config.template.clone(),
        }
    }

    /// The name of a key in the data.
    pub fn name(&self, key: Key) -> &str {
        &self.names[key as usize]
    }

    /// Whether the config names a key.
    pub fn is_given(&self, key: Key) -> bool {
        self.given[key as usize]
    }

    /// The key of a name, unless it belongs to another shape than that of all records.
    pub fn find(&self, name: &str) -> Option<Key> {
        let fits = |key: &Key| match (self.shape, key.shape()) {
            (Some(shape), Some(own)) => shape == own,
            _ => true,
        };
        Key::ALL.into_iter().filter(fits).find(|key| self.name(*key) == name)
    }

    /// The names of the keys that a record of `shape` has, for messages.
    pub fn of_shape(&self, shape: RecordShape) -> String {
        let keys: &[Key] = match shape {
            RecordShape::Messages => &[Key::Messages],
            RecordShape::Sharegpt => &[Key::Conversations],
            RecordShape::Text => &[Key::Text],
            RecordShape::PromptCompletion => &[Key::Prompt, Key::Completion],
            RecordShape::Alpaca => &[Key::Instruction, Key::Output],
        };
        let names: Vec<String> = keys.iter().map(|key| format!("`{}`", self.name(*key))).collect();
        names.join("/")
    }
}

/// The values of a record's keys. `null` counts as absent.
#[derive(Debug, Default)]
pub(super) struct Raw {
    values: [Option<Value>; Key::ALL.len()],
}

impl Raw {
    pub fn set(&mut self, key: Key, value: Value) {
        self.values[key as usize] = Some(value).filter(|value| !value.is_null());
    }

    pub fn has(&self, key: Key) -> bool {
        self.values[key as usize].is_some()
    }

    pub fn take(&mut self, key: Key) -> Option<Value> {
        self.values[key as usize].take()
    }
}
