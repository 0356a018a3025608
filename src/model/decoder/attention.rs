//! Multi-head attention, and which earlier positions a position may attend to.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width.

use std::cell::OnceCell;

use tch::Tensor;

/// Which earlier positions a position may attend to.
#[derive(Debug)]
pub enum AttentionMask {
    /// All of them: each row is one document.
    Causal,
    /// Those of its own document.
    Documents(Documents),
}

impl AttentionMask {
    /// Another handle to the same mask.
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::Causal => Self::Causal,
            Self::Documents(documents) => Self::Documents(documents.shallow_clone()),
        }
    }
}

/// Where the documents of a batch begin and end.
#[derive(Debug)]
pub struct Documents {
    /// `[b, t]`.
    ids: Tensor,
    mask: OnceCell<Tensor>,
    /// Where each begins in the flattened `[b t]`, and where the last ends, int32, `[documents + 1]`. Each run
    /// of padding is a document of its own; those of no length at the end fill up.
    pub cu_seqlens: Tensor,
    /// At least the length of the longest.
    pub max_len: i64,
}

impl Documents {
    /// Of the documents `ids`, `[b, t]`; the others as the fields say.
    pub fn new(ids: Tensor, cu_seqlens: Tensor, max_len: i64) -> Self {
        Self { ids, mask: OnceCell::new(), cu_seqlens, max_len }
    }

    /// True where a position may attend to another: to those of its own document up to itself,
    /// `[b, 1, t, t]`. Made when it is first asked for.
    pub fn mask(&self) -> &Tensor {
        self.mask.get_or_init(|| same_document(&self.ids).unsqueeze(1))
    }

    /// Another handle to the same.
    pub fn shallow_clone(&self) -> Self {
        Self {
            ids: self.ids.shallow_clone(),
            mask: self.mask.get().map_or_else(OnceCell::new, |mask| mask.shallow_clone().into()),
            cu_seqlens: self.cu_seqlens.shallow_clone(),
            max_len: self.max_len,
        }
    }
}

/// True where two positions `[t, t]` of a row are of one document and the second is not after the first.
pub fn same_document(ids_bt: &Tensor) -> Tensor {
    ids_bt.unsqueeze(1).eq_tensor(&ids_bt.unsqueeze(2)).tril(0)
}

/// Multi-head attention of `qkv`, `[b, t, 3d]`, before the output projection: `[b, t, d]`.
pub fn attention(qkv: &Tensor, n_head: i64, scale: f64, mask: &AttentionMask) -> Tensor {
    let (b, t, d3) = qkv.size3().expect("activations are [b, t, 3d]");
    let heads = qkv.view([b, t, 3, n_head, d3 / 3 / n_head]).permute([2, 0, 3, 1, 4]);
    let (q, k, v) = (heads.get(0), heads.get(1), heads.get(2));
    let (mask, is_causal) = match mask {
        AttentionMask::Causal => (None, true),
        AttentionMask::Documents(documents) => (Some(documents.mask()), false),
    };
    let scale = Some(scale);
    let y = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, is_causal, scale, false);
    y.transpose(1, 2).reshape([b, t, d3 / 3])
}
