// The activation of a feed-forward network, and its backward pass.
//
//   GELU     gelu(z)                          z is [M, inner]
//   SwiGLU   silu(gate) * up                  z = [gate | up] is [M, 2 inner]
#pragma once
#include <ATen/ATen.h>

#include "product.h"

namespace fused {
// As in src/ffi/fused.rs.
enum class Activation { TanhGelu = 0, Gelu = 1, SwiGlu = 2 };

inline const char *form(Activation a) { return a == Activation::TanhGelu ? "tanh" : "none"; }

// The activation of z with `row_padding` extra columns behind each row.
inline Tensor activate(Activation a, const Tensor &z, int64_t row_padding) {
  const int64_t m = z.size(0), inner = a == Activation::SwiGlu ? z.size(1) / 2 : z.size(1);
  if (kernels() && z.is_cuda() && a != Activation::Gelu) {
    const Tensor out = empty_padded(m, inner, row_padding, z.options());
    if (a == Activation::SwiGlu ? kernels()->swiglu(z, out) : kernels()->gelu(z, out)) return out;
  }
  if (a == Activation::SwiGlu)
    return padded(at::silu(columns(z, 0, inner)).mul_(columns(z, inner, inner)), row_padding);
  return padded(at::gelu(z, form(a)), row_padding);
}

// The gradient of z from that of the activation, with `row_padding` extra columns behind each row.
// Of SwiGLU, the activation itself is computed again, into `again`.
inline Tensor activate_backward(Activation a, const Tensor &z, const Tensor &dout,
                                int64_t row_padding, Tensor &again) {
  const int64_t m = z.size(0);
  const bool has_kernel = kernels() && z.is_cuda();
  if (a == Activation::SwiGlu) {
    const int64_t inner = z.size(1) / 2;
    const Tensor dz = empty_padded(m, 2 * inner, row_padding, z.options());
    again = at::empty({m, inner}, z.options());
    if (has_kernel && kernels()->swiglu_backward(z, dout, dz, again)) return dz;
    const Tensor gate = columns(z, 0, inner), up = columns(z, inner, inner),
                 silu = at::silu(gate);
    at::mul_out(again, silu, up);
    columns(dz, 0, inner).copy_(at::silu_backward(dout * up, gate));
    columns(dz, inner, inner).copy_(dout * silu);
    return dz;
  }
  if (has_kernel && a == Activation::TanhGelu) {
    const Tensor dz = empty_padded(m, z.size(1), row_padding, dout.options());
    if (kernels()->gelu_backward(z, dout, dz)) return dz;
  }
  return padded(at::gelu_backward(dout, z, form(a)), row_padding);
}
}  // namespace fused
