//! The records of a JSON Lines file.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// One line of a JSON Lines file.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// `DOMAIN-NUMBER`, unique over training and validation.
    pub id: String,
    /// The domain's name.
    pub domain: String,
    /// The text that is learned.
    #[serde(flatten)]
    pub body: Body,
}

/// The text of a record; the fields are keys of the file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum Body {
    /// A completion and the prompt that it follows.
    Pair {
        /// The prompt, which ends with a line break.
        prompt: String,
        /// The completion, which does not start with a space.
        completion: String,
    },
    /// A text that is learned as a whole.
    Text {
        /// The whole text.
        text: String,
    },
}

impl Body {
    /// The whole text as a model reads it.
    pub fn full_text(&self) -> String {
        match self {
            Self::Pair { prompt, completion } => format!("{prompt}{completion}"),
            Self::Text { text } => text.clone(),
        }
    }

    /// The text by which records are compared: the prompt, or the text of a record without one.
    fn key(&self) -> &str {
        match self {
            Self::Pair { prompt, .. } => prompt,
            Self::Text { text } => text,
        }
    }
}

/// Generates `num_records` records of `domain`, all with different prompts (or texts), so that
/// however they are split, no validation prompt is also in the training set.
pub fn distinct_records(
    domain: &str,
    num_records: usize,
    rng: &mut ChaCha8Rng,
    mut generate: impl FnMut(&mut ChaCha8Rng) -> Body,
) -> Result<Vec<Record>> {
    let mut seen = BTreeSet::new();
    let mut records = Vec::with_capacity(num_records);
    for _ in 0..100 * num_records {
        if records.len() == num_records {
            return Ok(records);
        }
        let body = generate(rng);
        if seen.insert(body.key().to_owned()) {
            let id = format!("{domain}-{:04}", records.len());
            records.push(Record { id, domain: domain.to_owned(), body });
        }
    }
    bail!("`{domain}` has only {} distinct records, not {num_records}", records.len())
}

/// Writes one record per line and returns the file's size in bytes.
pub fn write_jsonl(path: &Path, records: &[Record]) -> Result<usize> {
    let mut lines = String::new();
    for record in records {
        lines.push_str(&serde_json::to_string(record).context("cannot write a record as JSON")?);
        lines.push('\n');
    }
    fs_err::write(path, &lines)?;
    Ok(lines.len())
}
