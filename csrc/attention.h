// Causal multi-head attention over tokens [M, 3d] and its backward pass, by the fastest of
// libtorch's kernels that applies: cuDNN's where each row is one document, FlashAttention by
// lengths where documents are packed, otherwise scaled_dot_product_attention, which autograd
// differentiates.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <set>
#include <utility>
#include <vector>

#include "product.h"

namespace fused {
struct Attention {
  int64_t batch, seq, heads;
  double scale;
  // true where attention is allowed, [b, 1, t, t]; undefined where no mask is needed
  Tensor mask;
  // where documents begin in the flattened tokens, then M, int32; undefined if each row is one
  // document
  Tensor cu_seqlens;
  int64_t max_len;  // at least the tokens of the longest document
};
enum class Way { Generic, CuDnn, Variable };

// What the backward pass of attention needs. With Way::Generic, `inputs` and `output` are a graph
// of their own.
struct KeptAttention {
  Way way = Way::Generic;
  std::vector<Tensor> inputs;
  Tensor output, lse, seed, offset;
};

// Whether libtorch has a fused attention kernel for activations like `x` and heads of this size.
inline bool has_fused_attention(const Tensor &x, int64_t head_size) {
  return x.is_cuda() && kernels() && x.scalar_type() == at::kBFloat16 && head_size % 8 == 0 &&
         head_size <= 128 && kernels()->capability() >= 80;
}
// Pairs of sequence length and head size that cuDNN has refused on this GPU.
inline std::set<std::pair<int64_t, int64_t>> &refused() {
  static thread_local std::set<std::pair<int64_t, int64_t>> shapes;
  return shapes;
}
inline Way way_of(const Attention &at_, const Tensor &qkv) {
  const int64_t head_size = qkv.size(1) / 3 / at_.heads;
  if (!has_fused_attention(qkv, head_size)) return Way::Generic;
  if (at_.cu_seqlens.defined()) return Way::Variable;
  return at_.seq < 2 || refused().count({at_.seq, head_size}) ? Way::Generic : Way::CuDnn;
}

// Multi-head attention of qkv [M, 3d] to [M, d].
inline Tensor attention_forward(const Attention &at_, const Tensor &qkv, bool keeps,
                                KeptAttention &kept) {
  const int64_t m = qkv.size(0), d = qkv.size(1) / 3, c = d / at_.heads;
  kept.way = way_of(at_, qkv);
  if (kept.way == Way::Variable) {
    const auto parts = qkv.view({m, 3, at_.heads, c}).unbind(1);
    auto out =
        at::_flash_attention_forward(parts[0], parts[1], parts[2], at_.cu_seqlens, at_.cu_seqlens,
                                     at_.max_len, at_.max_len, 0.0, true, false, at_.scale);
    kept.inputs = {qkv}, kept.output = std::get<0>(out), kept.lse = std::get<1>(out);
    kept.seed = std::get<2>(out), kept.offset = std::get<3>(out);
    return kept.output.view({m, d});
  }
  const auto heads =
      qkv.view({at_.batch, at_.seq, 3, at_.heads, c}).permute({2, 0, 3, 1, 4}).unbind(0);
  if (kept.way == Way::CuDnn) {
    try {
      auto out = at::_scaled_dot_product_cudnn_attention(heads[0], heads[1], heads[2], {}, keeps,
                                                         0.0, true, false, at_.scale);
      kept.inputs = {qkv}, kept.output = std::get<0>(out), kept.lse = std::get<1>(out);
      kept.seed = std::get<6>(out), kept.offset = std::get<7>(out);
      return kept.output.transpose(1, 2).reshape({m, d});
    } catch (const c10::Error &error) {
      TORCH_WARN_ONCE("cuDNN has no attention for this GPU or shape, another is used: ",
                      error.what_without_backtrace());
      refused().insert({at_.seq, c});
      kept = {};
    }
  }
  at::AutoGradMode graph(keeps);
  for (const auto &x : heads) kept.inputs.push_back(x.detach().set_requires_grad(keeps));
  const std::optional<Tensor> mask =
      at_.mask.defined() ? std::optional<Tensor>(at_.mask) : std::nullopt;
  kept.output = at::scaled_dot_product_attention(kept.inputs[0], kept.inputs[1], kept.inputs[2],
                                                 mask, 0.0, !mask.has_value(), at_.scale);
  return kept.output.detach().transpose(1, 2).reshape({m, d});
}

// The gradient of qkv, [M, 3d], with `row_padding` extra columns behind each row.
inline Tensor attention_backward(const Attention &at_, const KeptAttention &kept,
                                 const Tensor &dout, int64_t row_padding) {
  const int64_t m = dout.size(0), d = dout.size(1), c = d / at_.heads;
  Tensor out = empty_padded(m, 3 * d, row_padding, dout.options());
  const Tensor rows = dout.contiguous();
  Tensor q, k, v;
  if (kept.way == Way::Variable) {
    const auto parts = kept.inputs[0].view({m, 3, at_.heads, c}).unbind(1);
    auto grads = at::_flash_attention_backward(rows.view({m, at_.heads, c}), parts[0], parts[1],
                                               parts[2], kept.output, kept.lse, at_.cu_seqlens,
                                               at_.cu_seqlens, at_.max_len, at_.max_len, 0.0, true,
                                               kept.seed, kept.offset, at_.scale);
    auto of_batch = [&](const Tensor &x) { return x.view({1, m, at_.heads, c}).transpose(1, 2); };
    q = of_batch(std::get<0>(grads)), k = of_batch(std::get<1>(grads)),
    v = of_batch(std::get<2>(grads));
  } else {
    const Tensor of_heads = rows.view({at_.batch, at_.seq, at_.heads, c}).transpose(1, 2);
    if (kept.way == Way::CuDnn) {
      const auto heads = kept.inputs[0]
                             .view({at_.batch, at_.seq, 3, at_.heads, c})
                             .permute({2, 0, 3, 1, 4})
                             .unbind(0);
      auto grads = at::_scaled_dot_product_cudnn_attention_backward(
          of_heads, heads[0], heads[1], heads[2], kept.output, kept.lse, kept.seed, kept.offset, {},
          {}, {}, at_.seq, at_.seq, 0.0, true, at_.scale);
      q = std::get<0>(grads), k = std::get<1>(grads), v = std::get<2>(grads);
    } else {
      auto grads = torch::autograd::grad({kept.output}, kept.inputs, {of_heads});
      q = grads[0], k = grads[1], v = grads[2];
    }
  }
  if (kernels() && out.is_cuda() && kernels()->pack_qkv(q, k, v, out)) return out;
  const Tensor parts[] = {q, k, v};
  for (int j = 0; j < 3; ++j)
    columns(out, j * d, d).copy_(parts[j].transpose(1, 2).reshape({m, d}));
  return out;
}
}  // namespace fused
