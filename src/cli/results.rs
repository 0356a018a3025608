//! Results as JSON. Each object of `--json` begins with `schema`, the name of its form and its
//! version: a program that reads it can tell whether it knows the form. The version rises when a
//! key is renamed, removed or gets another meaning; new keys alone do not raise it.
//!
//! ```text
//! {"schema": "eval/2", ...}
//! ```

use serde_json::{Map, Value};

/// The forms, as `docs/reference/json.md` describes them.
#[derive(Debug, Clone, Copy)]
pub enum Schema {
    AddExpert,
    Bench,
    Demo,
    Doctor,
    DryRun,
    Eval,
    ExportAdapters,
    Generate,
    Merge,
    Push,
    /// `remove-expert` and `merge-experts`.
    Shrink,
    Study,
    StudyPlan,
    Trace,
    Train,
}

impl Schema {
    fn name(self) -> &'static str {
        match self {
            Self::AddExpert => "add-expert/1",
            Self::Bench => "bench/1",
            Self::Demo => "demo/1",
            Self::Doctor => "doctor/1",
            Self::DryRun => "dry-run/1",
            // 1 had `perplexity` for what is now `token_perplexity`
            Self::Eval => "eval/2",
            Self::ExportAdapters => "export-adapters/1",
            Self::Generate => "generate/1",
            Self::Merge => "merge/1",
            Self::Push => "push/1",
            // as the reports of `eval` in it
            Self::Shrink => "shrink/2",
            Self::Study => "study/1",
            Self::StudyPlan => "study-plan/1",
            Self::Trace => "trace/1",
            Self::Train => "train/1",
        }
    }

    /// The object `json` with the name and version of its form.
    pub fn mark(self, json: Value) -> Value {
        let mut marked = Map::from_iter([("schema".to_owned(), self.name().into())]);
        match json {
            Value::Object(entries) => marked.extend(entries),
            other => unreachable!("a result is an object, not {other}"),
        }
        Value::Object(marked)
    }

    /// The same as text of several lines.
    pub fn text(self, json: Value) -> String {
        format!("{:#}", self.mark(json))
    }
}
