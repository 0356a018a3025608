//! Whole jobs in a mixture's life, which train or end with a checkpoint of step 0: an expert is added ([`add`]),
//! or one is removed or merged into another ([`shrink`]).

pub mod add;
pub mod shrink;
