//! A study: whether routing helps on given data.
//!
//! Arms that differ in their routing, or have none, are trained with the same data, steps and
//! batches, the same number of trial rates, and the same seeds. Rates are chosen on one half of the
//! validation documents, and losses are reported on the other.
//!
//! ```text
//! config -> arms -> plan: trials, finals -> runs (each a process of its own) -> report -> verdict
//! ```
//!
//! Nothing here knows of processes: `cli` makes the runs.

pub mod arms;
pub mod plan;
pub mod report;
pub mod run;
pub mod statistics;
pub mod verdict;
