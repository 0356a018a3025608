//! Whole jobs that change a mixture: [`add`] adds an expert, and [`shrink`] removes an expert or
//! merges it into another. Both make the run of the next stage. After [`add`] it is trained; after
//! [`shrink`] it only saves a checkpoint of step 0.

pub mod add;
pub mod shrink;
