//! The router of `csrc/route.cpp`, which needs CUDA kernels.
//!
//! Letters of shapes: `M` tokens, `d` width, `e` expert.

use std::ffi::c_int;

use anyhow::Result;
use tch::Tensor;
use torch_sys::C_tensor;

use super::TensorPtr;
use super::step::outputs;

unsafe extern "C" {
    fn dylora_route(
        x: TensorPtr,
        weight: TensorPtr,
        bias: TensorPtr,
        temperature: TensorPtr,
        normalizes: c_int,
        eps: f64,
        out: *mut *mut C_tensor,
    ) -> c_int;
}

/// A router of one linear layer, and how its scores become probabilities.
#[derive(Debug, Clone, Copy)]
pub struct LinearRouter<'a> {
    /// The weight, f32 `[e, d]`.
    pub weight: &'a Tensor,
    /// The bias, f32 `[e]`.
    pub bias: &'a Tensor,
    /// Divides the scores before the softmax, f64, 0-dim.
    pub temperature: &'a Tensor,
    /// What is added to the mean square of a row of the input before the row is divided by its
    /// root; `None` if it is not divided.
    pub norm_eps: Option<f64>,
}

/// The scores of the rows of `x`, `[M, d]`, and their softmax, f32 `[M, e]` each. `None` if no
/// kernel applies.
pub(crate) fn route(x: &Tensor, router: LinearRouter<'_>) -> Result<Option<[Tensor; 2]>> {
    let LinearRouter { weight, bias, temperature, norm_eps } = router;
    // SAFETY: live tensors, to which the shim keeps its own references
    outputs(|out| unsafe {
        dylora_route(
            x.as_ptr(),
            weight.as_ptr(),
            bias.as_ptr(),
            temperature.as_ptr(),
            c_int::from(norm_eps.is_some()),
            norm_eps.unwrap_or(0.0),
            out,
        )
    })
}
