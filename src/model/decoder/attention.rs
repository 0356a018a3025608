//! Attention with query heads and key-value heads.
//!
//! ```text
//! GPT-2     q, k, v = c_attn(x)
//! Llama     q = rotate(norm(q_proj(x))),  k = rotate(norm(k_proj(x))),  v = v_proj(x)
//! y_i = softmax(scale q_i k_j^T) v_j      query head i uses key-value head j = i * J / I
//! ```
//!
//! `I` is the number of query heads and `J` that of key-value heads. Some families have no norms,
//! and some layers rotate nothing.
//!
//! Letters of shapes: `b` batch, `t` position, `d` width, `n` head, `h` width of a head.

use tch::Tensor;

use super::context::{AttentionContext, AttentionMask};
use super::linear::ApplyLinear;
use super::norm::Norm;
use crate::config::TargetModule as Module;

/// The attention of a block.
#[derive(Debug)]
pub struct Attention {
    /// Index of the block.
    pub layer: usize,
    /// Number of query heads.
    pub num_heads: i64,
    /// Number of key-value heads.
    pub num_kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Factor of the scores.
    pub scale: f64,
    /// Whether one linear layer computes queries, keys and values together.
    pub is_packed: bool,
    /// Number of positions that a position attends to; `None` if there is no limit.
    pub window: Option<i64>,
    /// Whether queries and keys are rotated.
    pub rotates: bool,
    /// What normalises each head's queries and keys, if anything does.
    pub qk_norms: Option<(Norm, Norm)>,
}

impl Attention {
    /// Attention with its projections, of `x`, `[b, t, d]`. Returns the same shape.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &AttentionContext,
        linear: &mut ApplyLinear<'_>,
    ) -> Tensor {
        let (b, t, _) = x.size3().expect("activations are [b, t, d]");
        let (q, k, v) = match self.is_packed {
            true => self.split(&linear(Module::AttnCAttn, x)),
            false => self.separate(x, context, linear),
        };
        let mask = context.mask(self.window);
        let y = match &context.mask {
            AttentionMask::Cached(step) => {
                step.write(self.layer, &k, &v);
                match step.is_first() {
                    true => self.attend(&q, k, v, mask),
                    false => self.attend_to_cache(&q, &step.read(self.layer), mask),
                }
            }
            _ => self.attend(&q, k, v, mask),
        };
        let y = y.transpose(1, 2).reshape([b, t, self.num_heads * self.head_dim]);
        linear(if self.is_packed { Module::AttnCProj } else { Module::OProj }, &y)
    }

    /// Attention of queries, `[b, i, t, h]`, to the keys and values of the same positions, `[b, j,
    /// t, h]`. Without a mask, each position attends to all before it.
    fn attend(&self, q: &Tensor, k: Tensor, v: Tensor, mask: Option<&Tensor>) -> Tensor {
        let (k, v) = (self.repeated(k), self.repeated(v));
        let (causal, scale) = (mask.is_none(), Some(self.scale));
        Tensor::scaled_dot_product_attention(q, &k, &v, mask, 0.0, causal, scale, false)
    }

    /// Attention of queries, `[b, i, t, h]`, to the keys and values of a cache, `[b, j, l, h]`.
    /// Without a mask, each position attends to all of them. The query heads that share a key-value
    /// head are put behind each other as further positions, so that the cache is not repeated.
    fn attend_to_cache(&self, q: &Tensor, [k, v]: &[Tensor; 2], mask: Option<&Tensor>) -> Tensor {
        let (b, i, t, h) = q.size4().expect("queries are [b, i, t, h]");
        let group = i / self.num_kv_heads;
        let q = q.reshape([b, self.num_kv_heads, group * t, h]);
        let mask = mask.map(|mask| match group {
            1 => mask.shallow_clone(),
            _ => mask.repeat([1, 1, group, 1]),
        });
        let scale = Some(self.scale);
        let y =
            Tensor::scaled_dot_product_attention(&q, k, v, mask.as_ref(), 0.0, false, scale, false);
        y.reshape([b, i, t, h])
    }

    /// Queries, keys and values, `[b, n, t, h]` each, from `qkv`, `[b, t, 3 n h]`.
    fn split(&self, qkv: &Tensor) -> (Tensor, Tensor, Tensor) {
        let (b, t, _) = qkv.size3().expect("activations are [b, t, 3 n h]");
        let heads = qkv.view([b, t, 3, self.num_heads, self.head_dim]).permute([2, 0, 3, 1, 4]);
        (heads.get(0), heads.get(1), heads.get(2))
    }

    /// Queries, keys and values, `[b, n, t, h]` each, by a linear layer for each.
    fn separate(
        &self,
        x: &Tensor,
        context: &AttentionContext,
        linear: &mut ApplyLinear<'_>,
    ) -> (Tensor, Tensor, Tensor) {
        let (b, t, _) = x.size3().expect("activations are [b, t, d]");
        let mut heads = |module, count: i64| linear(module, x).view([b, t, count, self.head_dim]);
        let q = heads(Module::QProj, self.num_heads);
        let k = heads(Module::KProj, self.num_kv_heads);
        let v = heads(Module::VProj, self.num_kv_heads).transpose(1, 2);
        let (q, k) = match &self.qk_norms {
            Some((query_norm, key_norm)) => (query_norm.forward(&q), key_norm.forward(&k)),
            None => (q, k),
        };
        let (q, k) = (q.transpose(1, 2), k.transpose(1, 2));
        let (q, k) = match &context.rotation {
            Some(rotation) if self.rotates => (rotation.apply(&q), rotation.apply(&k)),
            _ => (q, k),
        };
        (q, k, v)
    }

    /// Repeats key-value heads, `[b, n, t, h]`, so that there is one for each query head.
    fn repeated(&self, x: Tensor) -> Tensor {
        let group = self.num_heads / self.num_kv_heads;
        if group == 1 {
            return x;
        }
        let (b, n, t, h) = x.size4().expect("heads are [b, n, t, h]");
        x.unsqueeze(2).expand([b, n, group, t, h], false).reshape([b, n * group, t, h])
    }

    /// Another handle to the same parameters.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let norms = self.qk_norms.as_ref();
        Self { qk_norms: norms.map(|(q, k)| (q.shallow_clone(), k.shallow_clone())), ..*self }
    }
}
