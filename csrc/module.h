// How Rust describes the parts of a block (src/ffi/fused.rs).
#pragma once
#include "product.h"

extern "C" {
// A linear layer with or without experts. A pointer may be null where kernels.h or Product says
// "undefined".
struct dylora_module {
  const at::Tensor *weight, *bias, *packed, *expert_of, *scaling, *runs, *rows;
  const at::Tensor *a, *b, *g;
  double single_scaling;
};
struct dylora_norm {
  const at::Tensor *weight, *bias;
  double eps;
  int64_t row_padding_forward, row_padding_backward;
};
}

inline at::Tensor or_none(const at::Tensor *t) { return t ? *t : at::Tensor(); }

inline fused::Product product_of(const dylora_module &m) {
  return {*m.weight,
          *m.bias,
          or_none(m.packed),
          {or_none(m.expert_of), or_none(m.scaling), or_none(m.runs), or_none(m.rows)},
          m.single_scaling};
}
