// A product: one or more linear layers of the frozen base that read the same input, with their
// experts, and its backward pass. The linear layers are its members, such as q_proj, k_proj and
// v_proj. Their outputs stand beside each other in the columns of y.
//
// y = x W + b + v B^T with v = (x A^T) * f and f = g[expert of the column] * scaling. The experts
// of a member add to its columns only. With CUDA kernels, a product has a packed weight
// [W A^T; B^T 0] of (i + R') x (o + R'), where the rows of B^T are 0 outside of their member's
// columns. Once v is written behind x, the forward pass is one product, [x | v] [W; B^T]. Once du
// is written behind dy, so is the backward pass, dx = [dy | du] [W | A^T]^T. So whatever computes x
// or dy leaves R' extra columns behind each row: the row padding.
//
// Letters of shapes: M = b t tokens, i in, o out, e expert, R columns of a member's rank space, R'
// the same rounded up, or the sum of these over the members (src/model/fused/pack.rs).
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "dropout.h"
#include "kernels.h"
#include "quantised.h"

namespace fused {
// The products of a block, in the order of src/model/block.rs.
enum Place { Qkv, AttnOut, MlpIn, MlpOut, PRODUCTS };

using at::Tensor;

inline Tensor columns(const Tensor &x, int64_t from, int64_t n) { return x.narrow(1, from, n); }
inline Tensor rows(const Tensor &x, int64_t from, int64_t n) { return x.narrow(0, from, n); }

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
inline bool fast_product(const Tensor &out, Tensor a, bool ta, Tensor b, bool tb) {
  if (!may_be_fast(a)) return false;
  // a weight may be a transposed view
  for (auto [x, t] : {std::pair(&a, &ta), std::pair(&b, &tb)}) {
    if (x->stride(1) != 1 && x->stride(0) == 1) *x = x->t(), *t = !*t;
    if (x->stride(1) != 1) return false;
  }
  return kernels()->gemm(out, a, ta, b, tb, Epilogue::None, {}, {});
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

// x W + b; b may be undefined
inline Tensor affine(const Tensor &x, const Tensor &w, const Tensor &b) {
  if (!b.defined()) return product(x, false, w, false);
  if (may_be_fast(x) && x.stride(1) == 1 && w.stride(1) == 1) {
    Tensor out = at::empty({x.size(0), w.size(1)}, x.options());
    if (kernels()->gemm(out, x, false, w, false, Epilogue::Bias, b, {})) return out;
  }
  return at::addmm(b, x, w);
}

// A linear layer of the base.
struct Member {
  Tensor weight, bias;       // [i, o], [o]; the bias may be undefined
  RankColumns rank_columns;  // undefined without experts
  double scaling;            // of a single expert
  int64_t first_out;         // first of its columns in the product's output
  int64_t first_rank;        // first of its columns in the product's rank space
  bool has_experts() const { return rank_columns.rows.defined(); }
  int64_t num_ranks() const { return rank_columns.expert_of.size(0); }  // R'
  int64_t out() const { return weight.size(1); }
};
struct Product {
  std::vector<Member> members;
  Tensor bias;    // [o], of all members; undefined if they have none or there is no packed weight
  Tensor packed;  // [i + R', o + R']; undefined without kernels
  // the columns of all members with experts, without `rows`; undefined unless packed
  RankColumns rank_columns;
  // W^T and W of all members, [o, i] and [i, o]; undefined unless they are to be multiplied with
  Quantised by_output, by_input;
  bool has_experts() const {
    for (const auto &m : members)
      if (m.has_experts()) return true;
    return false;
  }
  bool is_packed() const { return packed.defined(); }
  bool is_quantised() const { return by_output.defined(); }
  // Whether the forward pass is one product of `operands`.
  bool is_one_product() const { return is_packed() || (members.size() == 1 && !has_experts()); }
  int64_t row_padding() const {
    return is_packed() && has_experts() ? rank_columns.expert_of.size(0) : 0;
  }
  int64_t in() const { return members[0].weight.size(0); }
  int64_t out() const { return members.back().first_out + members.back().out(); }
  // W, [i, o]
  Tensor weight() const {
    return is_packed() ? columns(rows(packed, 0, in()), 0, out()) : members[0].weight;
  }
  // A^T and B^T in the packed weight, [i, R'] and [R', o]
  Tensor packed_a() const { return columns(rows(packed, 0, in()), out(), row_padding()); }
  Tensor packed_b() const { return columns(rows(packed, in(), row_padding()), 0, out()); }
};
// The differentiable inputs of a member: A and B^T in f32 (or f64), and the routing weights [M, e],
// which are undefined if all are 1.
struct Experts {
  Tensor a, b, g;
  Tensor weights() const { return g.defined() ? g.detach() : g; }
};
// The experts of each member of a product.
typedef std::vector<Experts> AllExperts;

// What the backward pass of a member needs.
struct KeptMember {
  Tensor u, v;  // u = x A^T and v = u * f, [M, R]; undefined if packed
  Mask mask;    // of dropout, [M, i]
};
// What the backward pass of a product needs.
struct Kept {
  Tensor x;  // [M, i], with v behind it if packed; undefined if it is computed again
  Tensor u;  // of all members, [M, R'], if packed
  std::vector<KeptMember> members;
};
// The gradients of A and B^T.
struct Grads {
  Tensor a, b;
};

// The factors f of a member that is not packed, [M, R], or [1, R] without routing weights
inline Tensor factors(const Member &m, const Experts &e, at::ScalarType kind) {
  const auto f =
      e.g.defined() ? e.weights().matmul(m.rank_columns.rows) : m.rank_columns.rows.sum(0, true);
  return f.to(kind);
}
// Whether there is one expert at weight 1, which is plain LoRA in PEFT's order of operations.
inline bool is_plain(const Member &m, const Experts &e) {
  return !e.g.defined() && m.rank_columns.rows.size(0) == 1;
}

// Up to so many ranks of a linear layer, products with masks inside of them are faster than copies
// of the input without its dropped elements.
constexpr int64_t MOST_MASKED_RANKS = 32;
// Whether the kernels of a product apply the masks, for an input or its gradient like `x`. If one
// member has more ranks, they do not.
inline bool are_masked(const Product &p, const Tensor &x, double dropout) {
  for (const auto &m : p.members)
    if (m.has_experts() && m.num_ranks() > MOST_MASKED_RANKS) return false;
  return dropout != 0 && p.is_packed() && draws_masks(x);
}
// The members with experts, as those products need them.
inline std::vector<DroppedMember> dropped_members(const Product &p, const Kept &kept,
                                                  const AllExperts &e) {
  std::vector<DroppedMember> members;
  for (size_t k = 0; k < p.members.size(); ++k) {
    const auto &m = p.members[k];
    if (!m.has_experts()) continue;
    members.push_back({kept.members[k].mask.bits, e[k].a.detach(), m.first_rank, m.num_ranks()});
  }
  return members;
}

// Whether the members with experts have the same routing weights.
inline bool share_weights(const Product &p, const AllExperts &e) {
  const Tensor *first = nullptr;
  for (size_t k = 0; k < p.members.size(); ++k) {
    if (!p.members[k].has_experts()) continue;
    if (!first) first = &e[k].g;
    if (!e[k].g.is_same(*first) &&
        (!first->defined() || !e[k].g.defined() || e[k].g.data_ptr() != first->data_ptr()))
      return false;
  }
  return true;
}
// Routing weights that the members with experts share.
inline const Experts &any_experts(const Product &p, const AllExperts &e) {
  for (size_t k = 0; k < p.members.size(); ++k)
    if (p.members[k].has_experts()) return e[k];
  return e[0];
}

// v = u * f for a packed product, [M, R']
inline void weigh(const Product &p, const AllExperts &e, const Tensor &u, const Tensor &v) {
  if (share_weights(p, e)) {
    TORCH_CHECK(kernels()->weigh(u, any_experts(p, e).weights(), p.rank_columns, v));
    return;
  }
  for (size_t k = 0; k < p.members.size(); ++k) {
    const auto &m = p.members[k];
    if (!m.has_experts()) continue;
    TORCH_CHECK(kernels()->weigh(columns(u, m.first_rank, m.num_ranks()), e[k].weights(),
                                 m.rank_columns, columns(v, m.first_rank, m.num_ranks())));
  }
}

// The experts of a packed product's members, and their places in the packed weight
inline void add_refreshed(const Product &p, const AllExperts &e, std::vector<Refreshed> &layers) {
  for (size_t k = 0; k < p.members.size(); ++k) {
    const auto &m = p.members[k];
    if (!p.is_packed() || !m.has_experts()) continue;
    layers.push_back(
        {e[k].a.detach(), e[k].b.detach(), columns(p.packed_a(), m.first_rank, m.num_ranks()),
         columns(rows(p.packed_b(), m.first_rank, m.num_ranks()), m.first_out, m.out())});
  }
}

// The operands of the one product of a packed product, [x | v] and [W; B^T], or of one without
// experts, x and W.
struct Operands {
  Tensor x, weight;
};
// `x` has the product's row padding behind it, and the experts are in the packed weight. With
// experts, what the backward pass needs is kept.
inline Operands operands(const Product &p, const AllExperts &e, const Tensor &x, double dropout,
                         Kept &kept) {
  if (!p.has_experts()) return {x, p.weight()};
  const int64_t r = p.row_padding(), i = p.in(), o = p.out();
  kept.members.resize(p.members.size());
  kept.x = x;
  if (dropout == 0) {
    kept.u = product(x, false, p.packed_a(), false);
  } else if (are_masked(p, x, dropout)) {
    kept.u = at::empty({x.size(0), r}, x.options());
    for (size_t k = 0; k < p.members.size(); ++k)
      if (p.members[k].has_experts()) kept.members[k].mask = draw_mask(x, dropout);
    kernels()->drop_down(x, dropped_members(p, kept, e), scale_of_bits(dropout), kept.u);
  } else {
    kept.u = at::empty({x.size(0), r}, x.options());
    const Tensor read = draws_masks(x) ? x : x.contiguous();
    for (size_t k = 0; k < p.members.size(); ++k) {
      const auto &m = p.members[k];
      if (!m.has_experts()) continue;
      product_into(columns(kept.u, m.first_rank, m.num_ranks()),
                   dropped(read, dropout, kept.members[k].mask), false,
                   columns(p.packed_a(), m.first_rank, m.num_ranks()), false);
    }
  }
  const Tensor full = with_padding(x, r);
  weigh(p, e, kept.u, columns(full, i, r));
  return {full, columns(p.packed, 0, o)};
}

// The forward pass of a member that is not packed, of which `base` is x W + b.
inline Tensor add_experts(const Member &m, const Experts &e, const Tensor &x, Tensor base,
                          double dropout, KeptMember &kept) {
  const auto kind = x.scalar_type();
  const Tensor a = e.a.detach().to(kind), b = e.b.detach().to(kind);
  kept.u = (dropout == 0 ? x : dropped(x, dropout, kept.mask)).mm(a.t());
  if (is_plain(m, e)) {
    kept.v = kept.u;
    return base.add_(kept.u.mm(b).mul_(m.scaling));
  }
  kept.v = kept.u * factors(m, e, kind);
  return base.addmm_(kept.v, b);
}

// The forward pass of a product whose weights are quantised.
inline Tensor quantised_forward(const Product &p, const AllExperts &e, const Tensor &x,
                                double dropout, Kept &kept) {
  const Tensor y = quantised_product(quantise(x), p.by_output, p.bias, x.scalar_type());
  if (p.is_packed()) {
    if (p.has_experts()) {
      const auto of = operands(p, e, x, dropout, kept);
      y.addmm_(columns(of.x, p.in(), p.row_padding()), p.packed_b());
    }
    return y;
  }
  kept.members.resize(p.members.size());
  if (p.has_experts()) kept.x = x;
  for (size_t k = 0; k < p.members.size(); ++k) {
    const auto &m = p.members[k];
    const Tensor own = columns(y, m.first_out, m.out());
    if (m.bias.defined()) own.add_(m.bias);
    if (m.has_experts()) add_experts(m, e[k], x, own, dropout, kept.members[k]);
  }
  return y;
}

// The forward pass of a product. The same holds for `x` and `kept` as in `operands`.
inline Tensor forward(const Product &p, const AllExperts &e, const Tensor &x, double dropout,
                      Kept &kept) {
  if (p.is_quantised()) return quantised_forward(p, e, x, dropout, kept);
  if (p.is_one_product()) {
    const auto of = operands(p, e, x, dropout, kept);
    return affine(of.x, of.weight, p.is_packed() ? p.bias : p.members[0].bias);
  }
  kept.members.resize(p.members.size());
  if (p.has_experts()) kept.x = x;
  std::vector<Tensor> outputs;
  for (size_t k = 0; k < p.members.size(); ++k) {
    const auto &m = p.members[k];
    const Tensor base = affine(x, m.weight, m.bias);
    outputs.push_back(m.has_experts() ? add_experts(m, e[k], x, base, dropout, kept.members[k])
                                      : base);
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs, 1);
}

// du = dv * f and the gradients of the routing weights, which are added to those in `dg`: for each
// member, the place where its gradient belongs. Returns du of all members, [M, R'], which lies
// behind dy, if packed; otherwise each member's du replaces its entry in `dus`.
inline Tensor through_experts(const Product &p, const AllExperts &e, const Kept &kept,
                              const Tensor &dy, const std::vector<Tensor *> &dg,
                              std::vector<Tensor> &dus) {
  auto wants_g = [&](size_t k) { return e[k].g.defined() && e[k].g.requires_grad(); };
  dus.resize(p.members.size());
  if (!p.is_packed()) {
    for (size_t k = 0; k < p.members.size(); ++k) {
      const auto &m = p.members[k];
      if (!m.has_experts()) continue;
      const Tensor own = columns(dy, m.first_out, m.out());
      Tensor dv = own.mm(e[k].b.detach().to(dy.scalar_type()).t());
      if (wants_g(k)) {
        const auto wide = e[k].a.scalar_type();
        // not rounded before they are summed
        const Tensor terms = dv.to(wide) * kept.members[k].u.to(wide);
        const Tensor new_dg = terms.mm(m.rank_columns.rows.t());
        *dg[k] = dg[k]->defined() ? *dg[k] + new_dg : new_dg;
      }
      dus[k] = dv.mul_(factors(m, e[k], dy.scalar_type()));
    }
    return {};
  }
  const int64_t r = p.row_padding();
  const Tensor dv = at::empty({dy.size(0), r}, dy.options());
  for (const auto &m : p.members) {
    if (!m.has_experts()) continue;
    product_into(columns(dv, m.first_rank, m.num_ranks()), columns(dy, m.first_out, m.out()), false,
                 columns(rows(p.packed_b(), m.first_rank, m.num_ranks()), m.first_out, m.out()),
                 true);
  }
  const Tensor du = columns(with_padding(dy, r), p.out(), r);
  auto weigh_back = [&](const RankColumns &rank_columns, size_t k, auto &&part) {
    const bool adds = dg[k] && dg[k]->defined();
    if (wants_g(k) && !adds) *dg[k] = at::empty_like(e[k].weights());
    TORCH_CHECK(kernels()->weigh_backward(part(dv), part(kept.u), e[k].weights(), rank_columns,
                                          part(du), wants_g(k) ? *dg[k] : Tensor(), adds));
  };
  if (share_weights(p, e)) {
    const size_t k = &any_experts(p, e) - e.data();
    weigh_back(p.rank_columns, k, [](const Tensor &x) { return x; });
  } else {
    for (size_t k = 0; k < p.members.size(); ++k) {
      const auto &m = p.members[k];
      if (m.has_experts())
        weigh_back(m.rank_columns, k,
                   [&](const Tensor &x) { return columns(x, m.first_rank, m.num_ranks()); });
    }
  }
  return du;
}

// The gradients of each member's A and B^T. `x` is the product's input; `du` and `dus` are what
// through_experts returned.
inline void experts_backward(const Product &p, const AllExperts &e, const Kept &kept,
                             const Tensor &x, const Tensor &dy, const Tensor &du,
                             const std::vector<Tensor> &dus, double dropout,
                             std::vector<Grads> &grads) {
  grads.resize(p.members.size());
  if (!p.has_experts()) return;
  const bool masked = are_masked(p, x, dropout), drops = dropout != 0 && !masked;
  Tensor v, da;
  if (p.is_packed()) {
    const int64_t r = p.row_padding();
    if (kept.x.defined()) {
      v = columns(with_padding(kept.x, r), p.in(), r);
    } else {
      v = at::empty_like(kept.u);
      weigh(p, e, kept.u, v);
    }
    if (masked)
      da = kernels()->drop_grad(x, du, dropped_members(p, kept, e), scale_of_bits(dropout));
    else if (!drops)
      da = product(du, true, x, false, any_experts(p, e).a.scalar_type());
  }
  for (size_t k = 0; k < p.members.size(); ++k) {
    const auto &m = p.members[k];
    if (!m.has_experts()) continue;
    const auto wide = e[k].a.scalar_type();
    const Tensor own = columns(dy, m.first_out, m.out());
    auto part = [&](const Tensor &x) { return columns(x, m.first_rank, m.num_ranks()); };
    const Tensor read = drops ? through(x, kept.members[k].mask) : Tensor();
    if (p.is_packed()) {
      const int64_t ranks = e[k].a.size(0);
      grads[k].b = rows(product(part(v), true, own, false, wide), 0, ranks);
      grads[k].a = drops ? rows(product(part(du), true, read, false, wide), 0, ranks)
                         : rows(da, m.first_rank, ranks);
    } else {
      grads[k].b = product(kept.members[k].v, true, own, false, wide);
      if (is_plain(m, e[k])) grads[k].b.mul_(m.scaling);
      grads[k].a = product(dus[k], true, drops ? read : x, false, wide);
    }
  }
}

// dx = dy W^T + du A, the latter through dropout's masks. `dy` has du behind it if packed.
inline Tensor input_backward(const Product &p, const AllExperts &e, const Kept &kept,
                             const Tensor &dy, const Tensor &du, const std::vector<Tensor> &dus,
                             double dropout) {
  const bool drops = dropout != 0 && p.has_experts();
  if (p.is_packed() && !drops && !p.is_quantised()) {
    const int64_t r = p.row_padding();
    return product(with_padding(dy, r), false, columns(rows(p.packed, 0, p.in()), 0, p.out() + r),
                   true);
  }
  Tensor dx;
  if (p.is_quantised()) {
    dx = quantised_product(quantise(dy), p.by_input, {}, dy.scalar_type());
    if (p.is_packed() && !drops) return p.has_experts() ? dx.addmm_(du, p.packed_a().t()) : dx;
  } else if (p.is_packed()) {
    dx = product(dy, false, p.weight(), true);
  } else {
    for (const auto &m : p.members) {
      const Tensor own = columns(dy, m.first_out, m.out());
      dx = dx.defined() ? dx.addmm_(own, m.weight.t()) : product(own, false, m.weight, true);
    }
  }
  if (are_masked(p, dx, dropout)) {
    kernels()->drop_up(du, p.packed_a(), dropped_members(p, kept, e), scale_of_bits(dropout), dx);
    return dx;
  }
  for (size_t k = 0; k < p.members.size(); ++k) {
    const auto &m = p.members[k];
    if (!m.has_experts()) continue;
    const Tensor a = p.is_packed() ? Tensor() : e[k].a.detach().to(dy.scalar_type());
    const Mask &mask = kept.members[k].mask;
    if (!mask.defined()) {
      dx.addmm_(dus[k], a);
      continue;
    }
    const Tensor update =
        p.is_packed() ? product(columns(du, m.first_rank, m.num_ranks()), false,
                                columns(p.packed_a(), m.first_rank, m.num_ranks()), true)
                      : dus[k].mm(a);
    if (!dx.is_cuda())
      dx.addcmul_(update, mask.elements);
    else if (mask.bits.defined())
      kernels()->drop_apply(update, mask.bits, mask.scale, dx, true);
    else if (!kernels() || !kernels()->add_masked(dx, update, mask.elements, mask.scale))
      dx.add_(through(update, mask));
  }
  return dx;
}
}  // namespace fused
