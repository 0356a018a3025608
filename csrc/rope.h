// What happens to queries and keys between their product and attention: RMSNorm of each head, and
// rotation (RoPE), and the backward pass of both. Without either, these functions only move data.
//
// Letters of shapes: M = b t tokens, n head, h width of a head; q heads of queries, k heads of keys
// and as many of values.
#pragma once
#include <ATen/ATen.h>

#include "norm.h"

namespace fused {
// The heads of some columns, [M, n, h], a view
inline Tensor heads_of(const Tensor &x, int64_t from, int64_t n, int64_t width) {
  return columns(x, from, n * width).view({x.size(0), n, width});
}
// (-x2, x1) of the halves x1, x2 of each head
inline Tensor turned(const Tensor &x) {
  const int64_t half = x.size(-1) / 2;
  return at::cat({x.narrow(-1, half, half).neg(), x.narrow(-1, 0, half)}, -1);
}

// [M, q + 2k heads] with norms and rotation applied. It may be `qkv` itself, changed in place,
// unless there are norms, whose input the backward pass needs.
inline Tensor prepare_heads(const Heads &of, const Tensor &qkv) {
  if (of.is_plain()) return qkv;
  const Tensor out = of.has_norms() ? at::empty({qkv.size(0), of.total()}, qkv.options()) : qkv;
  if (kernels() && qkv.is_cuda() && kernels()->rotate(of, qkv, out)) return out;
  if (of.has_norms()) columns(out, of.queries() + of.keys(), of.keys())
      .copy_(columns(qkv, of.queries() + of.keys(), of.keys()));
  auto apply = [&](int64_t from, int64_t n, const Tensor &norm) {
    Tensor x = heads_of(qkv, from, n, of.width);
    if (norm.defined())
      x = rms(x, rms_rstd(x.to(wide(x.scalar_type())), of.eps), norm);
    if (of.rotates()) x = x * of.cos.unsqueeze(1) + turned(x) * of.sin.unsqueeze(1);
    heads_of(out, from, n, of.width).copy_(x);
  };
  apply(0, of.q, of.q_norm);
  apply(of.queries(), of.k, of.k_norm);
  return out;
}

// The gradient of prepare_heads' input, [M, q + 2k heads] with `row_padding` extra columns behind
// each row. `dq`, `dk` and `dv` are [b, n, t, h]; `raw` is the input, which only norms need.
inline Tensor heads_backward(const Heads &of, const Tensor &dq, const Tensor &dk, const Tensor &dv,
                             const Tensor &raw, int64_t row_padding) {
  const int64_t m = dq.size(0) * dq.size(2);
  const Tensor out = empty_padded(m, of.total(), row_padding, dq.options());
  if (kernels() && out.is_cuda() && kernels()->rotate_backward(of, dq, dk, dv, raw, out))
    return out;
  auto apply = [&](const Tensor &grad, int64_t from, int64_t n, const Tensor &norm, bool turns) {
    Tensor x = grad.transpose(1, 2).reshape({m, n, of.width});
    if (turns && of.rotates())
      x = x * of.cos.unsqueeze(1) - turned(x * of.sin.unsqueeze(1));
    if (norm.defined()) {
      const Tensor input = heads_of(raw, from, n, of.width);
      x = rms_backward(x, input, rms_rstd(input.to(wide(x.scalar_type())), of.eps), norm);
    }
    heads_of(out, from, n, of.width).copy_(x);
  };
  apply(dq, 0, of.q, of.q_norm, true);
  apply(dk, of.queries(), of.k, of.k_norm, true);
  apply(dv, of.queries() + of.keys(), of.k, {}, false);
  return out;
}
}  // namespace fused
