//! Compares the fused operations (`train.kernels = "auto"`) with the reference, over the shapes
//! that a mixture can have. They run on the CPU by default, and on a GPU with
//! `DYLORA_TEST_DEVICE=cuda`.

#[path = "../common/mod.rs"]
mod common;
mod curve;
mod generation;
mod packing;
mod quantised;
mod shapes;
mod written;
