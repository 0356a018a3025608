// How Rust describes the parts of a block (src/ffi/fused.rs).
#pragma once
#include "product.h"

extern "C" {
// A linear layer with or without experts. A pointer may be null where Member says "undefined".
struct dylora_member {
  const at::Tensor *weight, *bias, *expert_of, *scaling, *runs, *rows;
  const at::Tensor *a, *b, *g;
  double single_scaling;
  int64_t first_rank;
};
// The linear layers that read the same input. With a packed weight, the pointers after it belong to
// all of them; they are null without experts. The last four are null where a product is not to be
// computed with quantised weights.
struct dylora_product {
  const dylora_member *members;
  int64_t num_members;
  const at::Tensor *packed, *bias, *expert_of, *scaling, *runs;
  const at::Tensor *output_codes, *output_scales, *input_codes, *input_scales;
};
struct dylora_norm {
  const at::Tensor *weight, *bias;
  double eps;
  int64_t row_padding_forward, row_padding_backward;
};
}

inline at::Tensor or_none(const at::Tensor *t) { return t ? *t : at::Tensor(); }

inline fused::Product product_of(const dylora_product &p) {
  fused::Product product{{}, or_none(p.bias), or_none(p.packed),
                         {or_none(p.expert_of), or_none(p.scaling), or_none(p.runs), {}},
                         {or_none(p.output_codes), or_none(p.output_scales)},
                         {or_none(p.input_codes), or_none(p.input_scales)}};
  int64_t first_out = 0;
  for (int64_t k = 0; k < p.num_members; ++k) {
    const auto &m = p.members[k];
    product.members.push_back(
        {*m.weight,
         or_none(m.bias),
         {or_none(m.expert_of), or_none(m.scaling), or_none(m.runs), or_none(m.rows)},
         m.single_scaling,
         first_out,
         m.first_rank});
    first_out += m.weight->size(1);
  }
  return product;
}
