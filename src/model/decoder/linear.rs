//! A frozen linear layer.
//!
//! Letters of shapes: `b` batch, `t` position, `i` in, `o` out.

use tch::Tensor;

use crate::config::TargetModule;

/// Applies a linear layer of a block to its input, `[b, t, i]`, with or without experts.
pub(crate) type ApplyLinear<'a> = dyn FnMut(TargetModule, &Tensor) -> Tensor + 'a;

/// How a family stores the weight of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[i, o]`, as GPT-2's `Conv1D`.
    InOut,
    /// `[o, i]`, as `torch.nn.Linear`.
    OutIn,
}

/// A linear layer.
#[derive(Debug)]
pub struct Linear {
    /// The weight in its family's layout.
    stored: Tensor,
    layout: Layout,
    /// `[o]`, if there is a bias.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// A layer with the weight `stored`, which is laid out as `layout` says.
    pub fn new(stored: Tensor, layout: Layout, bias: Option<Tensor>) -> Self {
        Self { stored, layout, bias }
    }

    /// The weight in its family's layout, as the base's files have it.
    pub fn stored(&self) -> &Tensor {
        &self.stored
    }

    /// The weight `W`, `[i, o]`: a view where the family stores `[o, i]`.
    pub fn weight(&self) -> Tensor {
        match self.layout {
            Layout::InOut => self.stored.shallow_clone(),
            Layout::OutIn => self.stored.tr(),
        }
    }

    /// Makes `weight`, `[i, o]`, the weight. It holds the same numbers elsewhere in memory.
    pub(crate) fn set_weight(&mut self, weight: Tensor) {
        self.stored = match self.layout {
            Layout::InOut => weight,
            Layout::OutIn => weight.tr(),
        };
    }

    /// `x W + b`, computed in the dtype of `x`: `[b, t, i]` to `[b, t, o]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (b, t, i) = x.size3().expect("activations are [b, t, i]");
        let kind = x.kind();
        let (x, weight) = (x.reshape([b * t, i]), self.weight().to_kind(kind));
        let y = match &self.bias {
            Some(bias) => bias.to_kind(kind).addmm(&x, &weight),
            None => x.mm(&weight),
        };
        y.reshape([b, t, -1])
    }

    /// The output `y` of [`Linear::forward`], of any shape `[.., o]`, without the bias.
    pub(crate) fn without_bias(&self, y: &Tensor) -> Tensor {
        match &self.bias {
            Some(bias) => y - bias.to_kind(y.kind()),
            None => y.shallow_clone(),
        }
    }

    /// Another handle to the same parameters.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            stored: self.stored.shallow_clone(),
            layout: self.layout,
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
        }
    }
}
