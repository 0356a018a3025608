//! Matrices in e4m3 with a scale for each row, and their products, which `csrc/quantised.h`
//! defines.
//!
//! Letters of shapes: `M` tokens, `n` rows, `i` in, `o` out.

use std::ffi::c_int;

use anyhow::Result;
use tch::Tensor;
use torch_sys::C_tensor;

use super::{TensorPtr, owned, pair};

unsafe extern "C" {
    fn dylora_quantise(x: TensorPtr, out: *mut *mut C_tensor) -> c_int;
    fn dylora_quantised_product(
        x: *const TensorPtr,
        w: *const TensorPtr,
        like: TensorPtr,
    ) -> *mut C_tensor;
}

/// A matrix in e4m3: `scales * codes`. The largest number of each row has the code 448.
#[derive(Debug)]
pub struct Quantised {
    /// e4m3, `[n, i]`.
    pub codes: Tensor,
    /// f32, or f64 of a matrix in f64, `[n, 1]`.
    pub scales: Tensor,
}

impl Quantised {
    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self { codes: self.codes.shallow_clone(), scales: self.scales.shallow_clone() }
    }

    fn pointers(&self) -> [TensorPtr; 2] {
        [self.codes.as_ptr(), self.scales.as_ptr()]
    }
}

/// The weights of a product in e4m3: once with a scale for each output, and once for each input.
#[derive(Debug)]
pub struct QuantisedWeights {
    /// `W^T`, `[o, i]`, for the forward pass.
    pub by_output: Quantised,
    /// `W`, `[i, o]`, for the backward pass.
    pub by_input: Quantised,
}

impl QuantisedWeights {
    /// Quantises a weight `W`, `[i, o]`.
    pub fn new(weight: &Tensor) -> Result<Self> {
        let by_output = quantise(&weight.tr().contiguous())?;
        Ok(Self { by_output, by_input: quantise(&weight.contiguous())? })
    }

    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let (by_output, by_input) = (self.by_output.shallow_clone(), self.by_input.shallow_clone());
        Self { by_output, by_input }
    }
}

/// Quantises `x`, `[n, i]`, whose columns are contiguous.
pub fn quantise(x: &Tensor) -> Result<Quantised> {
    // SAFETY: `x` is alive during the call
    let (codes, scales) = pair(|out| unsafe { dylora_quantise(x.as_ptr(), out) })?;
    Ok(Quantised { codes, scales })
}

/// The product `x w^T` of `[M, i]` and `[o, i]`: `[M, o]`, in the dtype of `like`.
pub fn quantised_product(x: &Quantised, w: &Quantised, like: &Tensor) -> Result<Tensor> {
    let (x, w) = (x.pointers(), w.pointers());
    // SAFETY: two tensors each, which are alive during the call
    owned(unsafe { dylora_quantised_product(x.as_ptr(), w.as_ptr(), like.as_ptr()) })
}
