// A linear layer of the frozen base with its experts, and its backward pass.
//
// y = x W + b + v B^T with v = (x A^T) * f and f = g[expert of the column] * scaling. With CUDA
// kernels, a module with experts has a packed weight [W A^T; B^T 0] of (i + R') x (o + R'). Once v
// is written behind x, the forward pass is one product, [x | v] [W; B^T]. Once du is written behind
// dy, so is the backward pass, dx = [dy | du] [W | A^T]^T. So whatever computes x or dy leaves R'
// extra columns behind each row: the row padding.
//
// Letters of shapes: M = b t tokens, i in, o out, e expert, R columns of a module's rank space, R'
// the same rounded up (src/model/fused/pack.rs).
#pragma once
#include <ATen/ATen.h>

#include "kernels.h"

namespace fused {
using at::Tensor;

inline Tensor columns(const Tensor &x, int64_t from, int64_t n) { return x.narrow(1, from, n); }

// The matrix of which `x` is a view: the rows of `x` with the `row_padding` columns behind them.
inline Tensor with_padding(const Tensor &x, int64_t row_padding) {
  return x.variable_data().as_strided({x.size(0), x.size(1) + row_padding}, {x.stride(0), 1});
}
// An [M, n] matrix with `row_padding` extra columns behind each row.
inline Tensor empty_padded(int64_t m, int64_t n, int64_t row_padding,
                           const at::TensorOptions &options) {
  return columns(at::empty({m, n + row_padding}, options), 0, n);
}

// `x` with contiguous columns and `row_padding` extra columns behind each row; a copy if necessary.
inline Tensor padded(const Tensor &x, int64_t row_padding) {
  const bool fits =
      x.stride(1) == 1 && (row_padding == 0 || x.stride(0) == x.size(1) + row_padding);
  return fits ? x : empty_padded(x.size(0), x.size(1), row_padding, x.options()).copy_(x);
}

// Whether cuBLASLt may compute products with `x`.
inline bool may_be_fast(const Tensor &x) {
  return kernels() && x.is_cuda() && x.scalar_type() == at::kBFloat16;
}
// out = a b, transposed where ta and tb say so; returns false if cuBLASLt does not apply.
inline bool fast_product(const Tensor &out, const Tensor &a, bool ta, const Tensor &b, bool tb) {
  return may_be_fast(a) && kernels()->gemm(out, a, ta, b, tb, Epilogue::None, {}, {});
}
// The same, by libtorch where cuBLASLt does not apply; `out` has the dtype of a and b.
inline void product_into(Tensor out, const Tensor &a, bool ta, const Tensor &b, bool tb) {
  if (!fast_product(out, a, ta, b, tb)) at::mm_out(out, ta ? a.t() : a, tb ? b.t() : b);
}
// a b in dtype `kind`, transposed where ta and tb say so
inline Tensor product(const Tensor &a, bool ta, const Tensor &b, bool tb, at::ScalarType kind) {
  const Tensor x = ta ? a.t() : a, y = tb ? b.t() : b;
  if (may_be_fast(a)) {
    const Tensor out = at::empty({x.size(0), y.size(1)}, a.options().dtype(kind));
    if (fast_product(out, a, ta, b, tb)) return out;
  }
  if (a.scalar_type() == kind) return at::mm(x, y);
  return a.is_cuda() ? at::mm(x, y, kind) : at::mm(x, y).to(kind);
}
inline Tensor product(const Tensor &a, bool ta, const Tensor &b, bool tb) {
  return product(a, ta, b, tb, a.scalar_type());
}

// x W + b
inline Tensor affine(const Tensor &x, const Tensor &w, const Tensor &b) {
  if (may_be_fast(x)) {
    Tensor out = at::empty({x.size(0), w.size(1)}, x.options());
    if (kernels()->gemm(out, x, false, w, false, Epilogue::Bias, b, {})) return out;
  }
  return at::addmm(b, x, w);
}

// One of a block's four linear layers.
struct Product {
  Tensor weight, bias;       // [i, o], [o]
  Tensor packed;             // [i + R', o + R']; undefined without kernels
  RankColumns rank_columns;  // undefined without experts
  double scaling;            // of a single expert
  bool has_experts() const { return rank_columns.rows.defined(); }
  bool is_packed() const { return packed.defined(); }
  // Whether the forward pass is one product of `operands`.
  bool is_one_product() const { return !has_experts() || is_packed(); }
  int64_t row_padding() const { return is_packed() ? rank_columns.expert_of.size(0) : 0; }
  int64_t in() const { return weight.size(0); }
  int64_t out() const { return weight.size(1); }
};
// The differentiable inputs of a module: A and B^T in f32 (or f64), and the routing weights [M, e],
// which are undefined if all are 1.
struct Experts {
  Tensor a, b, g;
  Tensor weights() const { return g.defined() ? g.detach() : g; }
};
// What the backward pass of a module needs.
struct Kept {
  Tensor x;     // [M, i], with v behind it if packed
  Tensor u, v;  // u = x A^T and v = u * f, [M, R]; if packed, u is [M, R'] and v lies behind x
  Tensor mask;  // of dropout, [M, i]
};
struct Grads {
  Tensor a, b;
};

// The factors f of a module that is not packed, [M, R], or [1, R] without routing weights
inline Tensor factors(const Product &m, const Experts &e, at::ScalarType kind) {
  const auto f =
      e.g.defined() ? e.weights().matmul(m.rank_columns.rows) : m.rank_columns.rows.sum(0, true);
  return f.to(kind);
}
// Whether there is one expert at weight 1, which is plain LoRA in PEFT's order of operations.
inline bool is_plain(const Product &m, const Experts &e) {
  return !e.g.defined() && m.rank_columns.rows.size(0) == 1;
}

// x after dropout, as the experts read it. Keeps the mask.
inline Tensor dropped(const Tensor &x, double dropout, Kept &kept) {
  if (dropout == 0) return x;
  Tensor out;
  if (x.is_cuda()) {
    std::tie(out, kept.mask) = at::native_dropout(x.contiguous(), dropout, true);
    return out;
  }
  // draws the same random numbers as at::dropout
  kept.mask = at::empty_like(x).bernoulli_(1 - dropout).div_(1 - dropout);
  return x * kept.mask;
}

// The operands of the one product of a packed module, [x | v] and [W; B^T], or of a module without
// experts, x and W.
struct Operands {
  Tensor x, weight;
};
// `x` has the module's row padding behind it. For a module with experts, what the backward pass
// needs is kept.
inline Operands operands(const Product &m, const Experts &e, const Tensor &x, double dropout,
                         Kept &kept) {
  if (!m.has_experts()) return {x, m.weight};
  const int64_t r = m.row_padding(), i = m.in(), o = m.out();
  TORCH_CHECK(kernels()->refresh(e.a.detach(), e.b.detach(), m.packed));
  kept.x = x;
  kept.u =
      product(dropped(x, dropout, kept), false, columns(m.packed.narrow(0, 0, i), o, r), false);
  const Tensor full = with_padding(x, r);
  TORCH_CHECK(kernels()->weigh(kept.u, e.weights(), m.rank_columns, columns(full, i, r)));
  return {full, columns(m.packed, 0, o)};
}

// The forward pass of a module. The same holds for `x` and `kept` as in `operands`.
inline Tensor forward(const Product &m, const Experts &e, const Tensor &x, double dropout,
                      Kept &kept) {
  if (m.is_one_product()) {
    const auto of = operands(m, e, x, dropout, kept);
    return affine(of.x, of.weight, m.bias);
  }
  const auto kind = x.scalar_type();
  const Tensor a = e.a.detach().to(kind), b = e.b.detach().to(kind);
  kept.x = x;
  kept.u = dropped(x, dropout, kept).mm(a.t());
  if (is_plain(m, e)) {
    kept.v = kept.u;
    return affine(x, m.weight, m.bias).add_(kept.u.mm(b).mul_(m.scaling));
  }
  kept.v = kept.u * factors(m, e, kind);
  return affine(x, m.weight, m.bias).addmm_(kept.v, b);
}

inline Tensor dropped_again(const Kept &kept, double dropout) {
  if (!kept.mask.defined()) return kept.x;
  return kept.x.is_cuda() ? at::native_dropout_backward(kept.x, kept.mask, 1 / (1 - dropout))
                          : kept.x * kept.mask;
}

// The gradients of A and B^T and, added to `dg`, of the routing weights. Returns du, which lies
// behind dy if packed.
inline Tensor experts_backward(const Product &m, const Experts &e, const Kept &kept,
                               const Tensor &dy, double dropout, Grads &grads, Tensor &dg) {
  const auto kind = dy.scalar_type(), wide = e.a.scalar_type();
  const bool wants_g = e.g.defined() && e.g.requires_grad();
  const Tensor x = dropped_again(kept, dropout);
  if (m.is_packed()) {
    const int64_t r = m.row_padding(), i = m.in(), o = m.out(), ranks = e.a.size(0);
    const Tensor dv = product(dy, false, columns(m.packed.narrow(0, i, r), 0, o), true);
    const Tensor du = columns(with_padding(dy, r), o, r),
                 v = columns(with_padding(kept.x, r), i, r);
    const bool adds = dg.defined();
    if (wants_g && !adds) dg = at::empty_like(e.weights());
    TORCH_CHECK(kernels()->weigh_backward(dv, kept.u, e.weights(), m.rank_columns, du,
                                          wants_g ? dg : Tensor(), adds));
    grads.b = product(v, true, dy, false, wide).narrow(0, 0, ranks);
    grads.a = product(du, true, x, false, wide).narrow(0, 0, ranks);
    return du;
  }
  const Tensor b = e.b.detach().to(kind);
  Tensor dv = dy.mm(b.t());
  if (wants_g) {
    const Tensor new_dg = (dv * kept.u).to(wide).mm(m.rank_columns.rows.t());
    dg = dg.defined() ? dg + new_dg : new_dg;
  }
  grads.b = product(kept.v, true, dy, false, wide);
  if (is_plain(m, e)) grads.b.mul_(m.scaling);
  const Tensor du = dv.mul_(factors(m, e, kind));
  grads.a = product(du, true, x, false, wide);
  return du;
}

// dx = dy W^T + du A, the latter through dropout's mask. `dy` has du behind it if packed.
inline Tensor input_backward(const Product &m, const Experts &e, const Kept &kept, const Tensor &dy,
                             const Tensor &du, double dropout) {
  if (!m.has_experts()) return product(dy, false, m.weight, true);
  const int64_t r = m.row_padding(), i = m.in(), o = m.out();
  if (m.is_packed() && !kept.mask.defined())
    return product(with_padding(dy, r), false, m.packed.narrow(0, 0, i), true);
  Tensor dx = product(dy, false, m.weight, true);
  if (!kept.mask.defined()) return dx.addmm_(du, e.a.detach().to(dy.scalar_type()));
  const Tensor through = m.is_packed()
                             ? product(du, false, columns(m.packed.narrow(0, 0, i), o, r), true)
                             : du.mm(e.a.detach().to(dy.scalar_type()));
  return dx.is_cuda() ? dx.add_(at::native_dropout_backward(through, kept.mask, 1 / (1 - dropout)))
                      : dx.addcmul_(through, kept.mask);
}
}  // namespace fused
