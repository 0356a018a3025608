//! The domains of a run.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::data::{FieldNames, FileFormat, HubDataset, RecordConfig, RecordShape, RecordStyle};
use super::template::RecordTemplate;

/// `[[data.domains]]`: one kind of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DomainConfig {
    /// The domain's name in tables and metrics. It must not contain `/` or `=`.
    pub name: String,
    /// Paths or globs of the training files: `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet`
    /// files of records, and `.txt` and `.md` files, each of which is one plain text document. All
    /// but `.parquet` may be compressed as `.zst` or `.gz`. Needed unless there is `hub`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub train: Vec<String>,
    /// A data set of the Hugging Face Hub, instead of `train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubDataset>,
    /// The format of the files, if their names do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<FileFormat>,
    /// What each record consists of. Without it, the keys of a record decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<RecordShape>,
    /// How records without turns become text, `plain` by default.
    #[serde(default, skip_serializing_if = "is_plain")]
    pub style: RecordStyle,
    /// The names of the records' keys or columns in the data.
    #[serde(default, skip_serializing_if = "FieldNames::is_empty")]
    pub fields: FieldNames,
    /// The texts that the fields of records are put into.
    #[serde(default, skip_serializing_if = "RecordTemplate::is_empty")]
    pub template: RecordTemplate,
    /// What is held out for evaluation. Without it, the domain has no validation set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
    /// How often an epoch passes over the domain, with `data.mixing = "proportional"` and
    /// `data.on_exhausted = "repeat"`: 2 shows each block twice, and 0.5 shows every other block.
    /// In all other cases, a factor of the domain's share. A domain with weight 0 is only
    /// evaluated.
    #[serde(default = "one")]
    pub weight: f64,
    /// Use only the records whose `domain` field has this value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_domain: Option<String>,
    /// The expert of this domain, as `2`, or its experts, as `[2, 3]`, for domain supervision and
    /// for routing by `domain`. Several domains may share an expert. Either every trained domain
    /// has this key or none. Without it, the domains get one expert each, or several if there are
    /// more experts than domains, of which the largest domains get those left over. With fewer
    /// experts than domains, the domains that are most alike by their text share an expert.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<DomainExperts>,
}

impl Default for DomainConfig {
    /// A domain without a name and without files, of weight 1.
    fn default() -> Self {
        Self {
            name: String::new(),
            train: vec![],
            hub: None,
            format: None,
            shape: None,
            style: RecordStyle::default(),
            fields: FieldNames::default(),
            template: RecordTemplate::default(),
            validation: None,
            weight: one(),
            record_domain: None,
            expert: None,
        }
    }
}

impl DomainConfig {
    /// What the domain says about its records.
    pub fn records(&self) -> RecordConfig {
        let Self { format, shape, style, .. } = *self;
        let (fields, template) = (self.fields.clone(), self.template.clone());
        RecordConfig { format, shape, style, fields, template }
    }
}

fn is_plain(style: &RecordStyle) -> bool {
    *style == RecordStyle::Plain
}

/// The expert of a domain, or its experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "must be the number of an expert, as `2`, or a list of such numbers, as `[2, 3]`"
)]
pub enum DomainExperts {
    /// One expert.
    One(i64),
    /// Several experts.
    Several(Vec<i64>),
}

impl From<Vec<i64>> for DomainExperts {
    fn from(experts: Vec<i64>) -> Self {
        match experts[..] {
            [only] => Self::One(only),
            _ => Self::Several(experts),
        }
    }
}

impl DomainExperts {
    /// The experts.
    pub fn experts(&self) -> &[i64] {
        match self {
            Self::One(expert) => std::slice::from_ref(expert),
            Self::Several(experts) => experts,
        }
    }
}

/// The names of `count` experts, each with those of its domains, as `expert_0 (law)`.
pub fn expert_names(domains: &[DomainConfig], count: usize) -> Vec<String> {
    let name = |expert: usize| {
        let is_own = |domain: &&DomainConfig| {
            let experts = domain.expert.as_ref().map_or(&[][..], DomainExperts::experts);
            experts.contains(&(expert as i64))
        };
        let own: Vec<&str> =
            domains.iter().filter(is_own).map(|domain| domain.name.as_str()).collect();
        match own.is_empty() {
            true => format!("expert_{expert}"),
            false => format!("expert_{expert} ({})", own.join(", ")),
        }
    };
    (0..count).map(name).collect()
}

impl JsonSchema for DomainExperts {
    fn schema_name() -> Cow<'static, str> {
        "DomainExperts".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (one, several) = (i64::json_schema(generator), Vec::<i64>::json_schema(generator));
        json_schema!({ "anyOf": [one, several] })
    }
}

fn one() -> f64 {
    1.0
}

/// What is held out for evaluation: `{ files = [..] }`, `{ hub = { .. } }` or `{ fraction = 0.1 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Validation {
    /// Separate files, as paths or globs.
    Files(Vec<String>),
    /// A data set of the Hugging Face Hub, such as another split of the same one.
    Hub(HubDataset),
    /// This share of the documents in the training files. Which documents are held out depends only
    /// on `run.seed` and on their content, so that equal documents are never on both sides.
    Fraction(f64),
}
