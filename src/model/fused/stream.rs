//! The residual stream between fused blocks: `x`, and what the last block adds to it.
//!
//! Letters of shapes: `b` batch, `t` position, `M = b t`, `d` width.

use tch::Tensor;

use crate::ffi;
use crate::model::decoder::norm::Norm;

/// A norm as the fused operations take it.
pub(crate) fn fused_norm(
    norm: &Norm,
    row_padding_forward: i64,
    row_padding_backward: i64,
) -> ffi::fused::Norm<'_> {
    let (weight, bias) = norm.parameters();
    ffi::fused::Norm { weight, bias, eps: norm.eps(), row_padding_forward, row_padding_backward }
}

/// The residual stream between blocks.
#[derive(Debug)]
pub(crate) struct Stream {
    /// The stream without the pending part, `[M, d]`.
    pub x: Tensor,
    /// What the last block adds to `x`, `[M, d]`; `None` if it has been added.
    pub pending: Option<Tensor>,
    /// Shape of the activations, `[b, t, d]`.
    pub shape: [i64; 3],
}

impl Stream {
    /// The stream `x`, `[b, t, d]`, without a pending part.
    pub fn new(x_btd: &Tensor) -> Self {
        let (b, t, d) = x_btd.size3().expect("activations are [b, t, d]");
        Self { x: x_btd.reshape([b * t, d]), pending: None, shape: [b, t, d] }
    }

    /// Both parts.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        std::iter::once(&mut self.x).chain(&mut self.pending)
    }

    /// The sum of both parts, `[b, t, d]`.
    pub fn whole(&self) -> Tensor {
        match &self.pending {
            None => self.x.view(self.shape),
            Some(pending) => (&self.x + pending).view(self.shape),
        }
    }

    /// Adds the pending part, and returns the stream and its norm, `[M, d]`.
    ///
    /// - `row_padding_forward`: extra columns behind each row of the norm
    /// - `row_padding_backward`: extra columns behind each row of the pending part's gradient
    pub(crate) fn normed(
        &self,
        norm: &Norm,
        row_padding_forward: i64,
        row_padding_backward: i64,
    ) -> (Self, Tensor) {
        let norm = fused_norm(norm, row_padding_forward, row_padding_backward);
        let (x, normed) = ffi::fused::norm(&self.x, self.pending.as_ref(), &norm)
            .unwrap_or_else(|error| panic!("{error:#}"));
        (Self { x, pending: None, shape: self.shape }, normed)
    }

    /// `x`, `[M, d]`, as `[b, t, d]`.
    pub(crate) fn shaped(&self, x: &Tensor) -> Tensor {
        x.view(self.shape)
    }
}
