//! The options that say what the records of data files are.

use clap::Args;

use crate::config::{
    DomainConfig, FieldNames, FileFormat, RecordConfig, RecordShape, RecordStyle, RecordTemplate,
};

/// What records are, where their files do not say it.
#[derive(Debug, Default, PartialEq, Args)]
pub struct RecordArgs {
    /// The names that the records' keys or columns have in the data, as in
    /// `prompt=question,completion=answer`.
    #[arg(long, value_name = "KEY=NAME,..")]
    fields: Option<FieldNames>,
    /// What each record consists of [default: its keys decide].
    #[arg(long)]
    shape: Option<RecordShape>,
    /// How records without turns become text: as plain text, or by the base's chat template
    /// [default: plain].
    #[arg(long)]
    style: Option<RecordStyle>,
    /// The text that a prompt is put into, as in `Question: {prompt}` or `Do this: {instruction}`.
    #[arg(long, value_name = "TEXT")]
    prompt_template: Option<String>,
    /// The text that a completion is put into, as in ` {completion}` or ` {output}`.
    #[arg(long, value_name = "TEXT")]
    completion_template: Option<String>,
    /// The format of the files [default: their names decide].
    #[arg(long)]
    data_format: Option<FileFormat>,
}

impl RecordArgs {
    /// Whether one of the options is given.
    pub fn is_given(&self) -> bool {
        *self != Self::default()
    }

    /// What the options say about records. If none is given, it is what `domain` says.
    pub fn records(&self, domain: Option<&DomainConfig>) -> RecordConfig {
        let Self { fields, shape, style, data_format, .. } = self;
        match domain {
            Some(domain) if !self.is_given() => domain.records(),
            _ => RecordConfig {
                format: *data_format,
                shape: *shape,
                style: style.unwrap_or_default(),
                fields: fields.clone().unwrap_or_default(),
                template: RecordTemplate {
                    prompt: self.prompt_template.clone(),
                    completion: self.completion_template.clone(),
                },
            },
        }
    }

    /// A domain without files with what the options say.
    pub fn domain(&self) -> DomainConfig {
        let RecordConfig { format, shape, style, fields, template } = self.records(None);
        DomainConfig { format, shape, style, fields, template, ..DomainConfig::default() }
    }
}
