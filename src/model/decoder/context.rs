//! What attention needs besides hidden states: which earlier positions each position attends to,
//! and how queries and keys are rotated. It is the same for all blocks of a forward pass.
//!
//! Letters of shapes: `b` batch, `t` position.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::kv_cache::CachedStep;
use super::rope::Rotation;

/// Which earlier positions each position attends to.
#[derive(Debug)]
pub enum AttentionMask {
    /// All earlier positions of its row: each row is one document.
    Causal,
    /// The earlier positions of its own document.
    Documents(Documents),
    /// All earlier positions of its text, most of which lie in a cache.
    Cached(CachedStep),
}

impl AttentionMask {
    /// Another handle to the same mask.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::Causal => Self::Causal,
            Self::Documents(documents) => Self::Documents(documents.shallow_clone()),
            Self::Cached(step) => Self::Cached(step.shallow_clone()),
        }
    }
}

/// Where the documents of a batch begin and end.
#[derive(Debug)]
pub struct Documents {
    /// Index of each position's document in its row, `[b, t]`.
    ids: Tensor,
    mask: OnceCell<Tensor>,
    /// Where each document begins in the flattened `[b t]`, and then where the last one ends,
    /// int32, `[documents + 1]`. Each run of padding counts as a document. Documents of length 0 at
    /// the end fill the tensor up to its size.
    pub cu_seqlens: Tensor,
    /// At least the length of the longest document.
    pub max_len: i64,
}

impl Documents {
    /// The documents with the indices `ids`, `[b, t]`. The other arguments are the fields of the
    /// same names.
    pub fn new(ids: Tensor, cu_seqlens: Tensor, max_len: i64) -> Self {
        Self { ids, mask: OnceCell::new(), cu_seqlens, max_len }
    }

    /// True where a position may attend to another: to those of its own document up to itself,
    /// `[b, 1, t, t]`. The mask is built at the first call.
    pub fn mask(&self) -> &Tensor {
        self.mask.get_or_init(|| same_document(&self.ids).unsqueeze(1))
    }

    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Self {
            ids: self.ids.shallow_clone(),
            mask: self.mask.get().map_or_else(OnceCell::new, |mask| mask.shallow_clone().into()),
            cu_seqlens: self.cu_seqlens.shallow_clone(),
            max_len: self.max_len,
        }
    }
}

/// True where the second position belongs to the same document as the first and is not after it,
/// `[b, t, t]`.
pub(crate) fn same_document(ids_bt: &Tensor) -> Tensor {
    ids_bt.unsqueeze(1).eq_tensor(&ids_bt.unsqueeze(2)).tril(0)
}

/// What the blocks' attention needs besides hidden states.
#[derive(Debug)]
pub struct AttentionContext {
    /// Which earlier positions each position attends to, windows left aside.
    pub mask: AttentionMask,
    /// How queries and keys are rotated; `None` without RoPE.
    pub rotation: Option<Rotation>,
    /// For each size of a window that matters, true where a position may attend to another, `[b or
    /// 1, 1, t, t]`. Each mask is built when it is first needed.
    windows: BTreeMap<i64, OnceCell<Tensor>>,
    /// Number of positions in a row, and the device.
    rows: (i64, Device),
}

impl AttentionContext {
    /// The context of a batch.
    ///
    /// - `like`: any tensor `[b, t, ..]` on the device
    /// - `windows`: the sizes of all windows; those that reach over whole rows are left out
    pub fn new(
        mask: &AttentionMask,
        rotation: Option<Rotation>,
        like: &Tensor,
        windows: impl IntoIterator<Item = i64>,
    ) -> Self {
        let rows = (like.size()[1], like.device());
        let mask = mask.shallow_clone();
        let windows = windows.into_iter();
        let windows = match &mask {
            AttentionMask::Cached(step) if !step.is_first() => {
                let near = windows.filter_map(|window| Some((window, step.window_mask(window)?)));
                near.map(|(window, mask)| (window, OnceCell::from(mask))).collect()
            }
            _ => {
                let near = windows.filter(|window| *window < rows.0);
                near.map(|window| (window, OnceCell::new())).collect()
            }
        };
        Self { mask, rotation, windows, rows }
    }

    /// Whether a layer with this window attends to fewer positions than one without.
    pub(crate) fn is_windowed(&self, window: Option<i64>) -> bool {
        window.is_some_and(|window| self.windows.contains_key(&window))
    }

    fn window_mask(&self, window: i64) -> Tensor {
        let (t, device) = self.rows;
        let near = Tensor::ones([1, 1, t, t], (Kind::Bool, device)).tril(0).triu(1 - window);
        match &self.mask {
            AttentionMask::Causal | AttentionMask::Cached(_) => near,
            AttentionMask::Documents(documents) => near.logical_and(documents.mask()),
        }
    }

    /// True where a position may attend to another in a layer with this window, `[b or 1, 1, t,
    /// t]`. `None` means all earlier positions of the row. In a later step of generation, the mask
    /// is over the positions of the cache, `[b, 1, t, l]`, and `None` means all of them.
    pub fn mask(&self, window: Option<i64>) -> Option<&Tensor> {
        let near = window.and_then(|window| Some((window, self.windows.get(&window)?)));
        match (near, &self.mask) {
            (Some((window, mask)), _) => Some(mask.get_or_init(|| self.window_mask(window))),
            (None, AttentionMask::Documents(documents)) => Some(documents.mask()),
            (None, AttentionMask::Cached(step)) => step.mask(),
            (None, AttentionMask::Causal) => None,
        }
    }

    /// Another handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let cloned = |mask: &OnceCell<Tensor>| {
            mask.get().map_or_else(OnceCell::new, |mask| mask.shallow_clone().into())
        };
        let windows = self.windows.iter().map(|(&size, mask)| (size, cloned(mask)));
        Self {
            mask: self.mask.shallow_clone(),
            rotation: self.rotation.as_ref().map(Rotation::shallow_clone),
            windows: windows.collect(),
            rows: self.rows,
        }
    }
}
