//! A report: one HTML page about runs, which needs no network and no script.
//!
//! ```text
//! folders -> run: what their files say -> sections -> charts, tables -> page
//!              |
//!              +- samples: answers of the base and of the model, if both can be opened
//! ```
//!
//! Each number of a chart stands in a table as well. A table names the line of `metrics.jsonl` that
//! its numbers come from, by which `scripts/check_report` compares them:
//!
//! - `data-source`: the kind of the line and the keys of the value, as a JSON list
//! - `data-run`: the index of the run
//! - `data-step`: the step of the line, where it is not in the row's first cell

pub mod chart;
pub mod page;
pub(crate) mod palette;
pub mod run;
pub mod samples;
mod sections;
pub mod text;

pub use run::{Moved, Run};
pub use samples::Sample;

/// What a report shows of a run.
#[derive(Debug)]
pub struct Reported {
    /// What its folder says.
    pub run: Run,
    /// How far its experts have moved, if a model said it.
    pub moved: Option<Vec<Moved>>,
    /// Answers of the base and of the model, or why there are none.
    pub samples: Result<Vec<Sample>, String>,
}
