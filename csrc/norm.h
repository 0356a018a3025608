// LayerNorm of a sum, and its backward pass.
#pragma once
#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include "product.h"

namespace fused {
struct NormConfig : torch::CustomClassHolder {
  Tensor w, b;
  double eps;
  int64_t row_padding_forward, row_padding_backward;
};
// What the backward pass needs: the sum [M, d] and the f32 statistics [M] of its rows.
struct NormKept {
  Tensor sum, mean, rstd;
};

// LayerNorm(x + y), [M, d]; y may be undefined.
inline Tensor add_norm(const NormConfig &c, const Tensor &x, const Tensor &y, NormKept &kept) {
  const int64_t m = x.size(0), d = x.size(1);
  if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), d)) {
    const auto stats = x.options().dtype(at::kFloat);
    Tensor a = empty_padded(m, d, c.row_padding_forward, x.options());
    kept = {y.defined() ? at::empty({m, d}, x.options()) : x.contiguous(), at::empty({m}, stats),
            at::empty({m}, stats)};
    if (kernels()->add_norm(x, y, c.w, c.b, c.eps, kept.sum, a, kept.mean, kept.rstd)) return a;
  }
  kept.sum = y.defined() ? x + y : x;
  Tensor a;
  std::tie(a, kept.mean, kept.rstd) = at::native_layer_norm(kept.sum, {d}, c.w, c.b, c.eps);
  return padded(a, c.row_padding_forward);
}

// The gradient of the sum: that of its LayerNorm for the output's gradient `da`, plus `residual`,
// which may be undefined.
inline Tensor norm_backward(const NormConfig &c, const Tensor &da, const NormKept &kept,
                            const Tensor &residual) {
  const Tensor &x = kept.sum;
  const int64_t m = x.size(0), d = x.size(1);
  const Tensor rows = padded(da, 0);
  if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), d)) {
    Tensor dx = empty_padded(m, d, c.row_padding_backward, x.options());
    if (kernels()->norm_backward(rows, x, kept.mean, kept.rstd, c.w, residual, dx)) return dx;
  }
  Tensor dx = std::get<0>(
      at::native_layer_norm_backward(rows.contiguous(), x, {d}, kept.mean.view({m, 1}),
                                     kept.rstd.view({m, 1}), c.w, c.b, {true, false, false}));
  if (residual.defined()) dx.add_(residual);
  return padded(dx, c.row_padding_backward);
}
}  // namespace fused
