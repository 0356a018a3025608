//! The fused way (`train.kernels = "auto"`) against the reference, over the shapes that a mixture can have.
//! On the CPU in f64 by default; `DYLORA_TEST_DEVICE=cuda` takes a GPU instead, in f32 and bf16.

#[path = "../common/mod.rs"]
mod common;
mod curve;
mod shapes;
