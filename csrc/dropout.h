// Dropout of the experts' inputs.
//
// A mask says which elements of a matrix are kept. The dropped ones become 0, and the kept ones are
// multiplied by `scale`, so that the mean stays the same. On a GPU with kernels for it, a mask has
// one bit for each element (csrc/kernels/dropout.cuh). Each mask then takes one number from
// libtorch's generator, which becomes the key of its random bits.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "kernels.h"

namespace fused {
struct Mask {
  at::Tensor bits;  // [M, i / 8], uint8; undefined where `draws_masks` says no
  // without bits: bool [M, i] on a GPU; on the CPU, 0 or `scale` for each element
  at::Tensor elements;
  double scale = 1;
  bool defined() const { return bits.defined() || elements.defined(); }
};

// y through a mask: the dropped elements become 0, and the others are scaled.
inline at::Tensor through(const at::Tensor &y, const Mask &mask) {
  if (!y.is_cuda()) return y * mask.elements;
  if (!mask.bits.defined()) return at::native_dropout_backward(y, mask.elements, mask.scale);
  const auto out = at::empty({y.size(0), y.size(1)}, y.options());
  kernels()->drop_apply(y, mask.bits, mask.scale, out, false);
  return out;
}

// The share of elements that masks of bits keep, in 65,536ths: 16 random bits are compared with it.
inline int64_t kept_of_bits(double probability) {
  return std::max<int64_t>(1, std::llround((1 - probability) * 65536));
}
// The scale of masks of bits
inline double scale_of_bits(double probability) {
  return 65536.0 / (double)kept_of_bits(probability);
}
// Draws a mask for the elements of x, each of which is dropped with this probability, by a kernel.
// Only if `draws_masks` says so.
inline Mask draw_mask(const at::Tensor &x, double probability) {
  const auto seed =
      at::randint(std::numeric_limits<int64_t>::max(), {1}, x.options().dtype(at::kLong));
  Mask mask;
  mask.bits = kernels()->draw_mask(seed, x.size(0), x.size(1), kept_of_bits(probability));
  mask.scale = scale_of_bits(probability);
  return mask;
}
inline bool draws_masks(const at::Tensor &x) { return kernels() && kernels()->draws_masks(x); }

// x, [M, i], after dropout, and the mask.
inline at::Tensor dropped(const at::Tensor &x, double probability, Mask &mask) {
  if (draws_masks(x)) {
    mask = draw_mask(x, probability);
    return through(x, mask);
  }
  mask.scale = 1 / (1 - probability);
  if (x.is_cuda()) {
    at::Tensor out;
    std::tie(out, mask.elements) = at::native_dropout(x.contiguous(), probability, true);
    return out;
  }
  // draws the same random numbers as at::dropout
  mask.elements = at::empty_like(x).bernoulli_(1 - probability).div_(1 - probability);
  return x * mask.elements;
}
}  // namespace fused
