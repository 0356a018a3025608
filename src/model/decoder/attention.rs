//! Multi-head attention, and which earlier positions each position attends to.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width.

use std::cell::OnceCell;

use tch::Tensor;

/// Which earlier positions each position attends to.
#[derive(Debug)]
pub enum AttentionMask {
    /// All earlier positions of its row: each row is one document.
    Causal,
    /// The earlier positions of its own document.
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
pub fn same_document(ids_bt: &Tensor) -> Tensor {
    ids_bt.unsqueeze(1).eq_tensor(&ids_bt.unsqueeze(2)).tril(0)
}

/// Multi-head attention of `qkv`, `[b, t, 3d]`, without the output projection: `[b, t, d]`. `scale`
/// multiplies the scores.
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
