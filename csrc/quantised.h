// Products of the frozen base with 8 bits for each number (`train.base_products = "fp8"`). Each row
// of either factor has a scale, so that its largest number becomes the largest of e4m3, 448. Sums
// are computed in f32.
//
// Letters of shapes: M tokens, n rows, i in, o out.
#pragma once
#include <ATen/ATen.h>

#include "kernels.h"

namespace fused {
using at::Tensor;

// A matrix in e4m3 is scales * codes.
struct Quantised {
  Tensor codes;   // e4m3, [n, i]
  Tensor scales;  // f32, or f64 of a matrix in f64, [n, 1]
  bool defined() const { return codes.defined(); }
};

// The largest number of e4m3.
constexpr double LARGEST_CODE = 448;
// A row whose largest number is smaller becomes 0, since 448 / it might overflow.
constexpr double LEAST_LARGEST = 1e-30;

// `x` is [n, i], with contiguous columns.
inline Quantised quantise(const Tensor &x) {
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (kernels() && x.is_cuda() && x.scalar_type() == at::kBFloat16) {
    const Quantised q{at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat8_e4m3fn)),
                      at::empty({x.size(0), 1}, x.options().dtype(wide))};
    if (kernels()->quantise(x, q.codes, q.scales)) return q;
  }
  const Tensor numbers = x.to(wide), largest = numbers.abs().amax(1, true);
  const Tensor is_zero = largest < LEAST_LARGEST;
  const Tensor factors = (LARGEST_CODE / largest).masked_fill_(is_zero, 1);
  const Tensor codes = (numbers * factors).clamp_(-LARGEST_CODE, LARGEST_CODE);
  return {codes.to(at::kFloat8_e4m3fn), (largest / LARGEST_CODE).masked_fill_(is_zero, 1)};
}

// x w^T of [M, i] and [o, i], plus `bias`, [o], which may be undefined; [M, o] in dtype `kind`
inline Tensor quantised_product(const Quantised &x, const Quantised &w, const Tensor &bias,
                                at::ScalarType kind) {
  if (x.codes.is_cuda() && kind == at::kBFloat16)
    return at::_scaled_mm(x.codes, w.codes.t(), x.scales, w.scales.t(),
                          bias.defined() ? std::optional<Tensor>(bias) : std::nullopt,
                          std::nullopt, kind, /*use_fast_accum=*/true);
  const auto wide = x.scales.scalar_type();
  Tensor y = x.codes.to(wide).mm(w.codes.to(wide).t()).mul_(x.scales).mul_(w.scales.t().to(wide));
  if (bias.defined()) y.add_(bias);
  return y.to(kind);
}
}  // namespace fused
