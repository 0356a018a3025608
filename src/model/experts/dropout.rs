//! Dropout of the experts' input.

use tch::Tensor;

use crate::config::DropoutMasks;
use crate::ffi::fused;

/// Dropout of the experts' input in a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct LoraDropout {
    /// Probability that an element becomes zero; 0 outside of training.
    pub probability: f64,
    /// Whether the experts share one mask.
    pub masks: DropoutMasks,
}

impl LoraDropout {
    /// No dropout.
    pub const NONE: Self = Self { probability: 0.0, masks: DropoutMasks::Shared };

    pub(crate) fn is_active(self) -> bool {
        self.probability > 0.0
    }

    pub(crate) fn apply(self, x: &Tensor) -> Tensor {
        match self.is_active() {
            true => fused::dropout(x, self.probability).unwrap_or_else(|e| panic!("{e:#}")),
            false => x.shallow_clone(),
        }
    }
}
