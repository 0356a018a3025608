// Causal attention over tokens [M, q + 2k heads] with query heads and key-value heads, after what
// rope.h does to them, and its backward pass, by the fastest of libtorch's kernels that applies:
// cuDNN's where each row is one document, FlashAttention by lengths where documents are packed or
// positions attend to a window, otherwise scaled_dot_product_attention, which autograd
// differentiates.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <set>
#include <utility>
#include <vector>

#include "product.h"
#include "rope.h"

namespace fused {
struct Attention {
  int64_t batch, seq;
  Heads heads;
  double scale;
  // true where attention is allowed, [b or 1, 1, t, t]; undefined where no mask is needed
  Tensor mask;
  // where documents begin in the flattened tokens, then M, int32; undefined if each row is one
  // document and there is no window
  Tensor cu_seqlens;
  int64_t max_len;  // at least the tokens of the longest document
  int64_t window;   // number of positions that a position attends to; 0 if there is no limit
};
enum class Way { Generic, CuDnn, Variable };

// What the backward pass of attention needs. With Way::Generic, `inputs` and `output` are a graph
// of their own.
struct KeptAttention {
  Way way = Way::Generic;
  Tensor raw;       // before norms and rotation, if there are norms
  Tensor prepared;  // after them; undefined if it is computed again
  std::vector<Tensor> inputs;
  Tensor output, lse, seed, offset;
};

// Whether libtorch has a fused attention kernel for activations like `x` and heads of this size.
inline bool has_fused_attention(const Tensor &x, int64_t head_size) {
  return x.is_cuda() && kernels() && x.scalar_type() == at::kBFloat16 && head_size % 8 == 0 &&
         head_size <= 128 && kernels()->capability() >= 80;
}
// Sequence length, head size and numbers of heads that cuDNN has refused on this GPU.
typedef std::array<int64_t, 4> Refused;
inline std::set<Refused> &refused() {
  static thread_local std::set<Refused> shapes;
  return shapes;
}
inline Refused shape_of(const Attention &at_) {
  return {at_.seq, at_.heads.width, at_.heads.q, at_.heads.k};
}
inline Way way_of(const Attention &at_, const Tensor &qkv) {
  if (!has_fused_attention(qkv, at_.heads.width)) return Way::Generic;
  if (at_.cu_seqlens.defined()) return Way::Variable;
  return at_.seq < 2 || at_.mask.defined() || refused().count(shape_of(at_)) ? Way::Generic
                                                                             : Way::CuDnn;
}
// Queries, keys and values of all tokens, [M, n, h], views
inline std::vector<Tensor> parts_of(const Heads &of, const Tensor &x) {
  return {heads_of(x, 0, of.q, of.width), heads_of(x, of.queries(), of.k, of.width),
          heads_of(x, of.queries() + of.keys(), of.k, of.width)};
}
// The same by rows, [b, n, t, h]
inline std::vector<Tensor> batched(const Attention &at_, const Tensor &x) {
  auto parts = parts_of(at_.heads, x);
  for (auto &part : parts)
    part = part.view({at_.batch, at_.seq, part.size(1), at_.heads.width}).transpose(1, 2);
  return parts;
}
// Key-value heads [b, k, t, h], each repeated for the query heads that use it
inline Tensor repeated(const Heads &of, const Tensor &x) {
  if (of.q == of.k) return x;
  const int64_t b = x.size(0), t = x.size(2);
  return x.unsqueeze(2).expand({b, of.k, of.q / of.k, t, of.width}).reshape({b, of.q, t, of.width});
}
inline std::optional<int64_t> left(const Attention &at_) {
  return at_.window ? std::optional<int64_t>(at_.window - 1) : std::nullopt;
}
inline std::optional<int64_t> right(const Attention &at_) {
  return at_.window ? std::optional<int64_t>(0) : std::nullopt;
}

// The output of attention, [M, q heads]
inline Tensor attended(const Attention &at_, const KeptAttention &kept) {
  const int64_t m = at_.batch * at_.seq;
  if (kept.way == Way::Variable) return kept.output.view({m, at_.heads.queries()});
  return kept.output.detach().transpose(1, 2).reshape({m, at_.heads.queries()});
}

// Multi-head attention of qkv [M, q + 2k heads] to [M, q heads]. `qkv` may be changed in place.
inline Tensor attention_forward(const Attention &at_, const Tensor &qkv, bool keeps,
                                KeptAttention &kept) {
  const Heads &of = at_.heads;
  kept.way = way_of(at_, qkv);
  const Tensor prepared = prepare_heads(of, qkv);
  if (of.has_norms()) kept.raw = qkv;
  // what a kernel gives again in the backward pass is not kept
  if (!of.has_norms()) kept.prepared = prepared;
  if (kept.way == Way::Variable) {
    const auto parts = parts_of(of, prepared);
    auto out = at::_flash_attention_forward(parts[0], parts[1], parts[2], at_.cu_seqlens,
                                            at_.cu_seqlens, at_.max_len, at_.max_len, 0.0, true,
                                            false, at_.scale, left(at_), right(at_));
    kept.output = std::get<0>(out), kept.lse = std::get<1>(out);
    kept.seed = std::get<2>(out), kept.offset = std::get<3>(out);
    return attended(at_, kept);
  }
  const auto heads = batched(at_, prepared);
  if (kept.way == Way::CuDnn) {
    try {
      auto out = at::_scaled_dot_product_cudnn_attention(heads[0], heads[1], heads[2], {}, keeps,
                                                         0.0, true, false, at_.scale);
      kept.output = std::get<0>(out), kept.lse = std::get<1>(out);
      kept.seed = std::get<6>(out), kept.offset = std::get<7>(out);
      return attended(at_, kept);
    } catch (const c10::Error &error) {
      TORCH_WARN_ONCE("cuDNN has no attention for this GPU or shape, another is used: ",
                      error.what_without_backtrace());
      refused().insert(shape_of(at_));
      kept.way = Way::Generic;
    }
  }
  at::AutoGradMode graph(keeps);
  for (const auto &x : heads) kept.inputs.push_back(x.detach().set_requires_grad(keeps));
  const std::optional<Tensor> mask =
      at_.mask.defined() ? std::optional<Tensor>(at_.mask) : std::nullopt;
  kept.output = at::scaled_dot_product_attention(
      kept.inputs[0], repeated(of, kept.inputs[1]), repeated(of, kept.inputs[2]), mask, 0.0,
      !mask.has_value(), at_.scale);
  return attended(at_, kept);
}

// The gradient of qkv, [M, q + 2k heads], with `row_padding` extra columns behind each row.
inline Tensor attention_backward(const Attention &at_, const KeptAttention &kept,
                                 const Tensor &dout, int64_t row_padding) {
  const int64_t m = dout.size(0);
  const Heads &of = at_.heads;
  const Tensor rows = dout.contiguous();
  Tensor q, k, v;
  if (kept.way == Way::Generic) {
    const Tensor of_heads = rows.view({at_.batch, at_.seq, of.q, of.width}).transpose(1, 2);
    auto grads = torch::autograd::grad({kept.output}, kept.inputs, {of_heads});
    q = grads[0], k = grads[1], v = grads[2];
  } else {
    const Tensor prepared = kept.prepared.defined() ? kept.prepared : prepare_heads(of, kept.raw);
    if (kept.way == Way::Variable) {
      const auto parts = parts_of(of, prepared);
      auto grads = at::_flash_attention_backward(
          rows.view({m, of.q, of.width}), parts[0], parts[1], parts[2], kept.output, kept.lse,
          at_.cu_seqlens, at_.cu_seqlens, at_.max_len, at_.max_len, 0.0, true, kept.seed,
          kept.offset, at_.scale, left(at_), right(at_));
      auto of_batch = [&](const Tensor &x) {
        return x.view({1, m, x.size(1), of.width}).transpose(1, 2);
      };
      q = of_batch(std::get<0>(grads)), k = of_batch(std::get<1>(grads)),
      v = of_batch(std::get<2>(grads));
    } else {
      const Tensor of_heads = rows.view({at_.batch, at_.seq, of.q, of.width}).transpose(1, 2);
      const auto heads = batched(at_, prepared);
      auto grads = at::_scaled_dot_product_cudnn_attention_backward(
          of_heads, heads[0], heads[1], heads[2], kept.output, kept.lse, kept.seed, kept.offset, {},
          {}, {}, at_.seq, at_.seq, 0.0, true, at_.scale);
      q = std::get<0>(grads), k = std::get<1>(grads), v = std::get<2>(grads);
    }
  }
  return heads_backward(of, q, k, v, kept.raw, row_padding);
}
}  // namespace fused
