//! Runs by other sources of routing weights, from imported experts, and what an export gives back.
