// LayerNorm or RMSNorm of a sum, and its backward pass.
#pragma once
#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include "product.h"

namespace fused {
struct NormConfig : torch::CustomClassHolder {
  Tensor w, b;  // without b it is RMSNorm
  double eps;
  int64_t row_padding_forward, row_padding_backward;
  bool is_rms() const { return !b.defined(); }
};
// What the backward pass needs: the sum [M, d] and the f32 statistics [M] of its rows. RMSNorm has
// no mean.
struct NormKept {
  Tensor sum, mean, rstd;
};

inline at::ScalarType wide(at::ScalarType kind) {
  return kind == at::kDouble ? at::kDouble : at::kFloat;
}

// 1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept
inline Tensor rms_rstd(const Tensor &x, double eps) {
  return x.square().mean(-1, true).add_(eps).rsqrt_();
}
// RMSNorm over the last dimension, rounded before the weight is applied, as transformers does.
// `rstd` is in f32 or f64.
inline Tensor rms(const Tensor &x, const Tensor &rstd, const Tensor &w) {
  return (x.to(rstd.scalar_type()) * rstd).to(x.scalar_type()) * w;
}
// The gradient of x through RMSNorm, from the output's gradient.
inline Tensor rms_backward(const Tensor &dout, const Tensor &x, const Tensor &rstd,
                           const Tensor &w) {
  const auto kind = rstd.scalar_type();
  const Tensor h = x.to(kind) * rstd, g = dout.to(kind) * w.to(kind);
  return ((g - h * (g * h).mean(-1, true)) * rstd).to(x.scalar_type());
}

// The normalised x + y, [M, d]; y may be undefined.
inline Tensor add_norm(const NormConfig &c, const Tensor &x, const Tensor &y, NormKept &kept) {
  const int64_t m = x.size(0), d = x.size(1);
  if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), d)) {
    const auto stats = x.options().dtype(at::kFloat);
    Tensor a = empty_padded(m, d, c.row_padding_forward, x.options());
    kept = {y.defined() ? at::empty({m, d}, x.options()) : x.contiguous(),
            c.is_rms() ? Tensor() : at::empty({m}, stats), at::empty({m}, stats)};
    if (kernels()->add_norm(x, y, c.w, c.b, c.eps, kept.sum, a, kept.mean, kept.rstd)) return a;
  }
  kept.sum = y.defined() ? x + y : x;
  Tensor a;
  if (c.is_rms()) {
    kept.rstd = rms_rstd(kept.sum.to(wide(x.scalar_type())), c.eps);
    a = rms(kept.sum, kept.rstd, c.w);
  } else {
    std::tie(a, kept.mean, kept.rstd) = at::native_layer_norm(kept.sum, {d}, c.w, c.b, c.eps);
  }
  return padded(a, c.row_padding_forward);
}

// The gradient of the sum: that of its norm for the output's gradient `da`, plus `residual`, which
// may be undefined.
inline Tensor norm_backward(const NormConfig &c, const Tensor &da, const NormKept &kept,
                            const Tensor &residual) {
  const Tensor &x = kept.sum;
  const int64_t m = x.size(0), d = x.size(1);
  const Tensor rows = padded(da, 0);
  if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), d)) {
    Tensor dx = empty_padded(m, d, c.row_padding_backward, x.options());
    if (kernels()->norm_backward(rows, x, kept.mean, kept.rstd, c.w, residual, dx)) return dx;
  }
  Tensor dx;
  if (c.is_rms())
    dx = rms_backward(rows, x, kept.rstd.view({m, 1}), c.w);
  else
    dx = std::get<0>(
        at::native_layer_norm_backward(rows.contiguous(), x, {d}, kept.mean.view({m, 1}),
                                       kept.rstd.view({m, 1}), c.w, c.b, {true, false, false}));
  if (residual.defined()) dx.add_(residual);
  return padded(dx, c.row_padding_backward);
}
}  // namespace fused
