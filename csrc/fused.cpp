// The fused transformer block and loss: operations with backward passes written by hand, over a frozen base. Each is
// defined here in libtorch operations, on any device and in any dtype; where csrc/cuda.cpp offers a kernel, that does
// the same. Declared to Rust in src/ffi/fused.rs.
//
// Letters of shapes: M = b t tokens, d width, i in, o out, e expert, R columns of a module's rank space.
//
// A module with experts, y = x W + b + ((x A^T) * f) B^T with f = g[expert of the column] * scaling, has on CUDA a packed
// weight [W A^T; B^T 0] of (i + R) x (o + R). With v = (x A^T) * f written behind x, forward is one product
// [x | v] [W; B^T], and with du behind dy, so is backward: dx = [dy | du] [W | A^T]^T. For this the producers of x and dy
// leave room for R columns in each row.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <vector>

#include "error.h"
#include "kernels.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

static const Kernels *installed = nullptr;
const Kernels *kernels() { return installed; }

namespace {

Tensor columns(const Tensor &x, int64_t from, int64_t n) { return x.narrow(1, from, n); }

// The matrix with `room` more columns in each row than `x`, its view, which has them.
Tensor with_room(const Tensor &x, int64_t room) {
  return x.variable_data().as_strided({x.size(0), x.size(1) + room}, {x.stride(0), 1});
}
// An [M, n] matrix whose rows have `room` columns behind them.
Tensor roomy(int64_t m, int64_t n, int64_t room, const at::TensorOptions &options) {
  return columns(at::empty({m, n + room}, options), 0, n);
}

// out = a b (each transposed if it says so), in the dtype of `out`.
Tensor product(const Tensor &a, bool ta, const Tensor &b, bool tb, Tensor out = {}, at::ScalarType kind = at::kFloat,
               bool wide = false) {
  const Tensor x = ta ? a.t() : a, y = tb ? b.t() : b;
  const bool narrow_cuda = a.is_cuda() && a.scalar_type() == at::kBFloat16;
  if (narrow_cuda && kernels()) {
    if (!out.defined())
      out = at::empty({x.size(0), y.size(1)}, a.options().dtype(wide ? kind : a.scalar_type()));
    if (kernels()->gemm(out, a, ta, b, tb, Epilogue::None, {}, {})) return out;
  }
  if (wide && a.scalar_type() != kind) {
    const Tensor result = a.is_cuda() ? at::mm(x, y, kind) : at::mm(x, y).to(kind);
    return result;
  }
  if (out.defined()) {
    if (out.is_contiguous()) return at::mm_out(out, x, y);
    return out.copy_(at::mm(x, y));
  }
  return at::mm(x, y);
}

// x W + b
Tensor affine(const Tensor &x, const Tensor &w, const Tensor &b) {
  if (x.is_cuda() && kernels()) {
    Tensor out = at::empty({x.size(0), w.size(1)}, x.options());
    if (kernels()->gemm(out, x, false, w, false, Epilogue::Bias, b, {})) return out;
  }
  return at::addmm(b, x, w);
}

// One of a block's four linear layers.
struct Module {
  Tensor weight, bias;  // [i, o], [o]
  Tensor packed;        // [i + R, o + R]; undefined without kernels
  Mixing mixing;        // undefined without experts
  int64_t ranks;        // columns that are not there to fill up
  double scaling;       // of a single expert
  bool has_experts() const { return mixing.rows.defined(); }
  bool is_packed() const { return packed.defined(); }
  int64_t room() const { return is_packed() ? mixing.expert_of.size(0) : 0; }
  int64_t in() const { return weight.size(0); }
  int64_t out() const { return weight.size(1); }
};
// Its differentiable inputs: A, B^T in f32 (or f64) and the routing weights [M, e], undefined if all are 1.
struct Experts {
  Tensor a, b, g;
};
// What the backward pass of a module needs.
struct Kept {
  Tensor x;        // [M, i], with v behind it if packed
  Tensor u, v;     // [M, R]; v only if it is not behind x
  Tensor mask;     // of dropout, [M, i]
};
struct Grads {
  Tensor a, b;
};

Tensor factors(const Tensor &g, const Module &m, at::ScalarType kind) {
  const auto f = g.defined() ? g.matmul(m.mixing.rows) : m.mixing.rows.sum(0, true);
  return f.to(kind);
}

// The forward pass of a module; `x` has the module's room behind it. A module with experts keeps what it must.
Tensor forward(const Module &m, const Experts &e, const Tensor &x, double dropout, Kept &kept) {
  if (!m.has_experts()) return affine(x, m.weight, m.bias);
  const auto kind = x.scalar_type();
  Tensor dropped = x;
  if (dropout > 0) {
    if (x.is_cuda()) {
      std::tie(dropped, kept.mask) = at::native_dropout(x.contiguous(), dropout, true);
    } else {
      // the random numbers of at::dropout
      kept.mask = at::empty_like(x).bernoulli_(1 - dropout).div_(1 - dropout);
      dropped = x * kept.mask;
    }
  }
  kept.x = x;
  if (m.is_packed()) {
    const int64_t r = m.room(), i = m.in(), o = m.out();
    const Tensor packed = m.packed;
    TORCH_CHECK(kernels()->refresh(e.a.detach(), e.b.detach(), packed));
    kept.u = product(dropped, false, columns(packed.narrow(0, 0, i), o, r), false);
    const Tensor full = with_room(x, r);
    TORCH_CHECK(kernels()->weigh(kept.u, e.g.defined() ? e.g.detach() : e.g, m.mixing, columns(full, i, r)));
    return affine(full, columns(packed, 0, o), m.bias);
  }
  const Tensor a = e.a.detach().to(kind), b = e.b.detach().to(kind);
  kept.u = dropped.mm(a.t());
  if (!e.g.defined() && m.mixing.rows.size(0) == 1) {
    // one expert, plain LoRA in PEFT's order of operations
    kept.v = kept.u;
    return affine(x, m.weight, m.bias).add_(kept.u.mm(b).mul_(m.scaling));
  }
  kept.v = kept.u * factors(e.g.defined() ? e.g.detach() : e.g, m, kind);
  return affine(x, m.weight, m.bias).addmm_(kept.v, b);
}

Tensor dropped_again(const Kept &kept, double dropout) {
  if (!kept.mask.defined()) return kept.x;
  return kept.x.is_cuda() ? at::native_dropout_backward(kept.x, kept.mask, 1 / (1 - dropout)) : kept.x * kept.mask;
}

// The gradients of A, B^T and, added to `dg`, of the routing weights. du is left behind dy if packed, else returned.
Tensor experts_backward(const Module &m, const Experts &e, const Kept &kept, const Tensor &dy, double dropout, Grads &grads,
                        Tensor &dg) {
  const auto kind = dy.scalar_type(), wide = e.a.scalar_type();
  const bool wants_g = e.g.defined() && e.g.requires_grad();
  const Tensor g = e.g.defined() ? e.g.detach() : e.g;
  const Tensor x = dropped_again(kept, dropout);
  if (m.is_packed()) {
    const int64_t r = m.room(), i = m.in(), o = m.out();
    const Tensor dv = product(dy, false, columns(m.packed.narrow(0, i, r), 0, o), true);
    const Tensor du = columns(with_room(dy, r), o, r), v = columns(with_room(kept.x, r), i, r);
    const bool adds = dg.defined();
    if (wants_g && !adds) dg = at::empty_like(g);
    TORCH_CHECK(kernels()->weigh_backward(dv, kept.u, g, m.mixing, du, wants_g ? dg : Tensor(), adds));
    grads.b = product(v, true, dy, false, {}, wide, true).narrow(0, 0, m.ranks);
    grads.a = product(du, true, x, false, {}, wide, true).narrow(0, 0, m.ranks);
    return du;
  }
  const Tensor b = e.b.detach().to(kind);
  Tensor dv = dy.mm(b.t());
  if (wants_g) {
    const Tensor new_dg = (dv * kept.u).to(wide).mm(m.mixing.rows.t());
    dg = dg.defined() ? dg + new_dg : new_dg;
  }
  const bool single = !e.g.defined() && m.mixing.rows.size(0) == 1;
  const Tensor f = factors(g, m, kind);
  grads.b = product(kept.v, true, dy, false, {}, wide, true);
  if (single) grads.b.mul_(m.scaling);
  const Tensor du = dv.mul_(f);
  grads.a = product(du, true, x, false, {}, wide, true);
  return du;
}

// dx = dy W^T + du A (with dropout's mask); `dy` has du behind it if packed.
Tensor input_backward(const Module &m, const Experts &e, const Kept &kept, const Tensor &dy, const Tensor &du,
                      double dropout) {
  if (!m.has_experts()) return product(dy, false, m.weight, true);
  const int64_t r = m.room(), i = m.in(), o = m.out();
  if (m.is_packed() && !kept.mask.defined()) return product(with_room(dy, r), false, m.packed.narrow(0, 0, i), true);
  Tensor dx = product(dy, false, m.weight, true);
  if (!kept.mask.defined()) return dx.addmm_(du, e.a.detach().to(dy.scalar_type()));
  const Tensor through = m.is_packed() ? product(du, false, columns(m.packed.narrow(0, 0, i), o, r), true)
                                       : du.mm(e.a.detach().to(dy.scalar_type()));
  return dx.is_cuda() ? dx.add_(at::native_dropout_backward(through, kept.mask, 1 / (1 - dropout)))
                      : dx.addcmul_(through, kept.mask);
}

// ---- LayerNorm of a sum

struct NormConfig : torch::CustomClassHolder {
  Tensor w, b;
  double eps;
  int64_t room_forward, room_backward;
};

// (x + y, LayerNorm(x + y)); y may be undefined. All are [M, d].
struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext *ctx, c10::intrusive_ptr<NormConfig> config, const Tensor &x,
                               const std::optional<Tensor> &other) {
    const auto &c = *config;
    const Tensor y = other.value_or(Tensor());
    const int64_t m = x.size(0), d = x.size(1);
    const auto stats = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    Tensor sum, a, mean, rstd;
    if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), d)) {
      sum = y.defined() ? at::empty({m, d}, x.options()) : x.contiguous();
      a = roomy(m, d, c.room_forward, x.options());
      mean = at::empty({m}, stats), rstd = at::empty({m}, stats);
      if (!kernels()->add_norm(x, y, c.w, c.b, c.eps, sum, a, mean, rstd)) a = Tensor();
    }
    if (!a.defined()) {
      sum = y.defined() ? x + y : x;
      std::tie(a, mean, rstd) = at::native_layer_norm(sum, {d}, c.w, c.b, c.eps);
      mean = mean.view({m, 1}), rstd = rstd.view({m, 1});
      if (c.room_forward > 0) a = roomy(m, d, c.room_forward, x.options()).copy_(a);
    }
    ctx->saved_data["config"] = c10::IValue::make_capsule(config);
    ctx->saved_data["has_y"] = y.defined();
    ctx->save_for_backward({sum, mean, rstd});
    return {sum, a};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto config = c10::static_intrusive_pointer_cast<NormConfig>(ctx->saved_data["config"].toCapsule());
    const auto &c = *config;
    auto saved = ctx->get_saved_variables();
    const Tensor x = saved[0];
    Tensor dx;
    if (!grads[1].defined()) {
      dx = grads[0];
    } else {
      const Tensor da = grads[1].stride(1) == 1 ? grads[1] : grads[1].contiguous(), residual = grads[0];
      if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), x.size(1))) {
        dx = roomy(x.size(0), x.size(1), c.room_backward, x.options());
        if (!kernels()->norm_backward(da, x, saved[1], saved[2], c.w, residual, dx)) dx = Tensor();
      }
      if (!dx.defined()) {
        const int64_t m = x.size(0);
        dx = std::get<0>(at::native_layer_norm_backward(da.contiguous(), x, {x.size(1)}, saved[1].view({m, 1}),
                                                        saved[2].view({m, 1}), c.w, c.b, {true, false, false}));
        if (residual.defined()) dx.add_(residual);
        if (c.room_backward > 0) dx = roomy(m, x.size(1), c.room_backward, x.options()).copy_(dx);
      }
    }
    return {Tensor(), dx, ctx->saved_data["has_y"].toBool() ? dx : Tensor()};
  }
};

// ---- Attention

struct Attention {
  int64_t batch, seq, heads;
  double scale;
  Tensor mask;        // true where attention is allowed, [b, 1, t, t]; undefined where it is not needed
  Tensor cu_seqlens;  // where documents begin in the flattened tokens, then M, int32; undefined if rows are documents
  int64_t max_len;    // tokens of the longest document, at most
};
enum class Way { Generic, CuDnn, Variable };

// What the backward pass of attention needs; `inputs` and `output` are a graph of their own on the generic way.
struct KeptAttention {
  Way way = Way::Generic;
  std::vector<Tensor> inputs;
  Tensor output, lse, seed, offset;
};

// Whether there is a fused kernel of libtorch's for activations like `x` and heads of this size.
bool has_fused_attention(const Tensor &x, int64_t head_size) {
  return x.is_cuda() && kernels() && x.scalar_type() == at::kBFloat16 && head_size % 8 == 0 && head_size <= 128 &&
         kernels()->capability() >= 80;
}
Way way_of(const Attention &at_, const Tensor &qkv) {
  if (!has_fused_attention(qkv, qkv.size(1) / 3 / at_.heads)) return Way::Generic;
  if (at_.cu_seqlens.defined()) return Way::Variable;
  return at_.seq < 2 ? Way::Generic : Way::CuDnn;
}

// Multi-head attention of qkv [M, 3d] to [M, d].
Tensor attention_forward(const Attention &at_, const Tensor &qkv, bool keeps, KeptAttention &kept) {
  const int64_t m = qkv.size(0), d = qkv.size(1) / 3, c = d / at_.heads;
  kept.way = way_of(at_, qkv);
  if (kept.way == Way::Variable) {
    const auto parts = qkv.view({m, 3, at_.heads, c}).unbind(1);
    auto out = at::_flash_attention_forward(parts[0], parts[1], parts[2], at_.cu_seqlens, at_.cu_seqlens, at_.max_len,
                                            at_.max_len, 0.0, true, false, at_.scale);
    kept.inputs = {qkv}, kept.output = std::get<0>(out), kept.lse = std::get<1>(out);
    kept.seed = std::get<2>(out), kept.offset = std::get<3>(out);
    return kept.output.view({m, d});
  }
  const auto heads = qkv.view({at_.batch, at_.seq, 3, at_.heads, c}).permute({2, 0, 3, 1, 4}).unbind(0);
  if (kept.way == Way::CuDnn) {
    try {
      auto out = at::_scaled_dot_product_cudnn_attention(heads[0], heads[1], heads[2], {}, keeps, 0.0, true, false,
                                                         at_.scale);
      kept.inputs = {qkv}, kept.output = std::get<0>(out), kept.lse = std::get<1>(out);
      kept.seed = std::get<6>(out), kept.offset = std::get<7>(out);
      return kept.output.transpose(1, 2).reshape({m, d});
    } catch (const c10::Error &) {
      kept = {};  // this GPU or shape is not cuDNN's
    }
  }
  at::AutoGradMode graph(keeps);
  for (const auto &x : heads) kept.inputs.push_back(x.detach().set_requires_grad(keeps));
  const std::optional<Tensor> mask = at_.mask.defined() ? std::optional<Tensor>(at_.mask) : std::nullopt;
  kept.output = at::scaled_dot_product_attention(kept.inputs[0], kept.inputs[1], kept.inputs[2], mask, 0.0,
                                                 !mask.has_value(), at_.scale);
  return kept.output.detach().transpose(1, 2).reshape({m, d});
}

// The gradient of qkv, [M, 3d], with `room` behind it.
Tensor attention_backward(const Attention &at_, const KeptAttention &kept, const Tensor &dout, int64_t room) {
  const int64_t m = dout.size(0), d = dout.size(1), c = d / at_.heads;
  Tensor out = roomy(m, 3 * d, room, dout.options());
  const Tensor rows = dout.contiguous();
  Tensor q, k, v;
  if (kept.way == Way::Variable) {
    const auto parts = kept.inputs[0].view({m, 3, at_.heads, c}).unbind(1);
    auto grads = at::_flash_attention_backward(rows.view({m, at_.heads, c}), parts[0], parts[1], parts[2], kept.output,
                                               kept.lse, at_.cu_seqlens, at_.cu_seqlens, at_.max_len, at_.max_len, 0.0,
                                               true, kept.seed, kept.offset, at_.scale);
    auto of_batch = [&](const Tensor &x) { return x.view({1, m, at_.heads, c}).transpose(1, 2); };
    q = of_batch(std::get<0>(grads)), k = of_batch(std::get<1>(grads)), v = of_batch(std::get<2>(grads));
  } else {
    const Tensor of_heads = rows.view({at_.batch, at_.seq, at_.heads, c}).transpose(1, 2);
    if (kept.way == Way::CuDnn) {
      const auto heads = kept.inputs[0].view({at_.batch, at_.seq, 3, at_.heads, c}).permute({2, 0, 3, 1, 4}).unbind(0);
      auto grads = at::_scaled_dot_product_cudnn_attention_backward(
          of_heads, heads[0], heads[1], heads[2], kept.output, kept.lse, kept.seed, kept.offset, {}, {}, {}, at_.seq,
          at_.seq, 0.0, true, at_.scale);
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

// ---- The block

enum { CAttn, AttnProj, Fc, MlpProj, MODULES };

struct BlockConfig : torch::CustomClassHolder {
  Module modules[MODULES];
  c10::intrusive_ptr<NormConfig> norm;  // the second LayerNorm
  Attention attention;
  bool tanh_gelu;
  double dropout;
  bool keeps;  // whether there will be a backward pass
};
// What stays for the backward pass and has no graph of its own.
struct BlockKept : torch::CustomClassHolder {
  Kept modules[MODULES];
  KeptAttention attention;
  Tensor mean, rstd;
  Tensor up;  // before the activation, [M, inner]
  bool x_has_grad = false, a_has_grad = false;
};

// gelu(fc(x)), with the second module's room behind it; keeps what is before the activation.
Tensor up_and_gelu(const BlockConfig &c, const Experts &e, const Tensor &x, Kept &kept, Tensor &up) {
  const Module &fc = c.modules[Fc];
  const int64_t room = c.modules[MlpProj].room(), m = x.size(0), inner = fc.out();
  const char *form = c.tanh_gelu ? "tanh" : "none";
  const bool direct = !fc.has_experts() || fc.is_packed();
  if (c.tanh_gelu && kernels() && x.is_cuda() && x.scalar_type() == at::kBFloat16 && direct) {
    Tensor input = x, weight = fc.weight;
    if (fc.has_experts()) {
      // as `forward`, up to the product
      Tensor dropped = x;
      if (c.dropout > 0) std::tie(dropped, kept.mask) = at::native_dropout(x.contiguous(), c.dropout, true);
      kept.x = x;
      const int64_t r = fc.room(), i = fc.in();
      TORCH_CHECK(kernels()->refresh(e.a.detach(), e.b.detach(), fc.packed));
      kept.u = product(dropped, false, columns(fc.packed.narrow(0, 0, i), inner, r), false);
      input = with_room(x, r), weight = columns(fc.packed, 0, inner);
      TORCH_CHECK(kernels()->weigh(kept.u, e.g.defined() ? e.g.detach() : e.g, fc.mixing, columns(input, i, r)));
    }
    Tensor out = roomy(m, inner, room, x.options());
    up = at::empty({m, inner}, x.options());
    if (inner % 8 == 0 && kernels()->gemm(out, input, false, weight, false, Epilogue::GeluAuxBias, fc.bias, up)) return out;
    up = affine(input, weight, fc.bias);
    if (kernels()->gelu(up, out)) return out;
    return out.copy_(at::gelu(up, form));
  }
  up = forward(fc, e, x, c.dropout, kept);
  if (room == 0) return at::gelu(up, form);
  Tensor out = roomy(m, inner, room, x.options());
  if (c.tanh_gelu && kernels()->gelu(up, out)) return out;
  return out.copy_(at::gelu(up, form));
}

// The gradient before the activation, with fc's room behind it, from that of the block's output `dy` (with du behind
// it if packed).
Tensor gelu_and_down_backward(const BlockConfig &c, const Experts &e, const Kept &kept, const Tensor &up,
                              const Tensor &dy, const Tensor &du) {
  const Module &proj = c.modules[MlpProj];
  const int64_t room = c.modules[Fc].room(), m = dy.size(0), inner = proj.in();
  if (c.tanh_gelu && kernels() && dy.is_cuda() && dy.scalar_type() == at::kBFloat16 && !kept.mask.defined() &&
      inner % 8 == 0 && (!proj.has_experts() || proj.is_packed())) {
    Tensor dz = roomy(m, inner, room, dy.options());
    const Tensor full = with_room(dy, proj.room());
    const Tensor weight = proj.has_experts() ? proj.packed.narrow(0, 0, inner) : proj.weight;
    if (kernels()->gemm(dz, full, false, weight, true, Epilogue::DGelu, {}, up)) return dz;
  }
  const Tensor dgelu = input_backward(proj, e, kept, dy, du, c.dropout);
  if (room > 0 || (kernels() && dy.is_cuda())) {
    Tensor dz = roomy(m, inner, room, dy.options());
    if (c.tanh_gelu && kernels()->gelu_backward(up, dgelu, dz)) return dz;
    return dz.copy_(at::gelu_backward(dgelu, up, c.tanh_gelu ? "tanh" : "none"));
  }
  return at::gelu_backward(dgelu, up, c.tanh_gelu ? "tanh" : "none");
}

// A gradient with contiguous columns and `room` behind each row.
Tensor in_room(const Tensor &x, int64_t room) {
  const bool fits = x.stride(1) == 1 && (room == 0 || x.stride(0) == x.size(1) + room);
  return fits ? x : roomy(x.size(0), x.size(1), room, x.options()).copy_(x);
}

// From (x, a) with a = LayerNorm(x), both [M, d], to (x', y): the block's output is x' + y. `inputs` are x, a, then A,
// B^T and g of each module, empty where there are none, since autograd takes no undefined tensors.
struct BlockFunction : torch::autograd::Function<BlockFunction> {
  static Experts experts(const std::vector<Tensor> &inputs, int module) {
    auto input = [&](int at) { return inputs[at].numel() ? inputs[at] : Tensor(); };
    return {input(2 + 3 * module), input(3 + 3 * module), input(4 + 3 * module)};
  }
  static variable_list forward(AutogradContext *ctx, c10::intrusive_ptr<BlockConfig> config, at::TensorList list) {
    const auto &c = *config;
    const std::vector<Tensor> inputs = list.vec();
    const bool keeps = c.keeps;
    auto kept = c10::make_intrusive<BlockKept>();
    const Tensor x = inputs[0], a = inputs[1].variable_data();
    const int64_t m = x.size(0), d = x.size(1);
    Tensor qkv = ::forward(c.modules[CAttn], experts(inputs, CAttn), a, c.dropout, kept->modules[CAttn]);
    Tensor attended = attention_forward(c.attention, qkv, keeps, kept->attention);
    qkv = Tensor();
    const int64_t room = c.modules[AttnProj].room();
    if (room > 0) attended = roomy(m, d, room, x.options()).copy_(attended);
    Tensor y = ::forward(c.modules[AttnProj], experts(inputs, AttnProj), attended, c.dropout, kept->modules[AttnProj]);
    Tensor sum, normed;
    norm(*c.norm, x, y, sum, normed, *kept);
    y = Tensor();
    Tensor up = up_and_gelu(c, experts(inputs, Fc), normed, kept->modules[Fc], kept->up);
    y = ::forward(c.modules[MlpProj], experts(inputs, MlpProj), up, c.dropout, kept->modules[MlpProj]);
    if (keeps) {
      auto saved = inputs;
      // of these two only whether they have gradients counts
      kept->x_has_grad = saved[0].requires_grad(), kept->a_has_grad = saved[1].requires_grad();
      saved[0] = saved[1] = at::empty({0}, x.options());
      saved.push_back(sum);
      ctx->save_for_backward(saved);
      ctx->saved_data["config"] = c10::IValue::make_capsule(config);
      ctx->saved_data["kept"] = c10::IValue::make_capsule(kept);
    }
    return {sum, y};
  }
  static void norm(const NormConfig &c, const Tensor &x, const Tensor &y, Tensor &sum, Tensor &a, BlockKept &kept) {
    const int64_t m = x.size(0), d = x.size(1);
    if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), d)) {
      sum = at::empty({m, d}, x.options()), a = roomy(m, d, c.room_forward, x.options());
      kept.mean = at::empty({m}, x.options().dtype(at::kFloat)), kept.rstd = at::empty_like(kept.mean);
      if (kernels()->add_norm(x, y, c.w, c.b, c.eps, sum, a, kept.mean, kept.rstd)) return;
    }
    sum = x + y;
    std::tie(a, kept.mean, kept.rstd) = at::native_layer_norm(sum, {d}, c.w, c.b, c.eps);
    if (c.room_forward > 0) a = roomy(m, d, c.room_forward, x.options()).copy_(a);
  }
  static Tensor norm_backward(const NormConfig &c, const Tensor &da, const Tensor &x, const BlockKept &kept,
                              const Tensor &residual) {
    const int64_t m = x.size(0), d = x.size(1);
    if (kernels() && x.is_cuda() && kernels()->apply_to(x.scalar_type(), d)) {
      Tensor dx = roomy(m, d, c.room_backward, x.options());
      if (kernels()->norm_backward(da, x, kept.mean, kept.rstd, c.w, residual, dx)) return dx;
    }
    Tensor dx = std::get<0>(at::native_layer_norm_backward(da.contiguous(), x, {d}, kept.mean.view({m, 1}),
                                                           kept.rstd.view({m, 1}), c.w, c.b, {true, false, false}));
    dx.add_(residual);
    return in_room(dx, c.room_backward);
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto config = c10::static_intrusive_pointer_cast<BlockConfig>(ctx->saved_data["config"].toCapsule());
    auto kept = c10::static_intrusive_pointer_cast<BlockKept>(ctx->saved_data["kept"].toCapsule());
    const auto &c = *config;
    auto saved = ctx->get_saved_variables();
    const std::vector<Tensor> inputs(saved.begin(), saved.end() - 1);
    const Tensor sum = saved.back();
    // the routing weights of modules that share them have one gradient, in the first one's place
    Tensor dg[MODULES];
    int first[MODULES];
    for (int k = 0; k < MODULES; ++k) {
      first[k] = k;
      for (int j = k - 1; j >= 0; --j)
        if (inputs[4 + 3 * j].numel() && inputs[4 + 3 * j].data_ptr() == inputs[4 + 3 * k].data_ptr()) first[k] = j;
    }
    Grads of[MODULES];
    auto through = [&](int k, const Tensor &dy) {
      const Module &m = c.modules[k];
      if (!m.has_experts()) return Tensor();
      return experts_backward(m, experts(inputs, k), kept->modules[k], dy, c.dropout, of[k], dg[first[k]]);
    };
    auto grad_or_zeros = [&](const Tensor &x) { return x.defined() ? x : at::zeros_like(sum); };
    Tensor dy = in_room(grad_or_zeros(grads[1]), c.modules[MlpProj].room());
    Tensor du = through(MlpProj, dy);
    Tensor dz = gelu_and_down_backward(c, experts(inputs, MlpProj), kept->modules[MlpProj], kept->up, dy, du);
    kept->modules[MlpProj] = {}, kept->up = Tensor();
    du = through(Fc, dz);
    Tensor da = input_backward(c.modules[Fc], experts(inputs, Fc), kept->modules[Fc], dz, du, c.dropout);
    kept->modules[Fc] = {};
    dz = Tensor();
    Tensor dx = norm_backward(*c.norm, da, sum, *kept, grad_or_zeros(grads[0]));
    du = through(AttnProj, dx);
    variable_list result(1 + inputs.size());
    // below the first layer's experts nothing is trained: where neither c_attn nor its input is, it ends here
    const bool into_attention = c.modules[CAttn].has_experts() || kept->a_has_grad;
    if (into_attention) {
      Tensor dattended =
          input_backward(c.modules[AttnProj], experts(inputs, AttnProj), kept->modules[AttnProj], dx, du, c.dropout);
      kept->modules[AttnProj] = {};
      Tensor dqkv = attention_backward(c.attention, kept->attention, dattended, c.modules[CAttn].room());
      kept->attention = {};
      du = through(CAttn, dqkv);
      if (kept->a_has_grad)
        result[2] = input_backward(c.modules[CAttn], experts(inputs, CAttn), kept->modules[CAttn], dqkv, du, c.dropout);
    }
    if (kept->x_has_grad) result[1] = dx;
    for (int k = 0; k < MODULES; ++k) {
      kept->modules[k] = {};
      if (inputs[2 + 3 * k].requires_grad()) result[3 + 3 * k] = of[k].a;
      if (inputs[3 + 3 * k].requires_grad()) result[4 + 3 * k] = of[k].b;
      result[5 + 3 * k] = dg[k];
    }
    kept->mean = kept->rstd = Tensor();
    return result;
  }
};

// ---- The loss

// Sums over positions of the cross entropy of hidden [n, d] under the head [v', d] of which the first `vocabulary` rows
// count, times `scale`; a label below 0 does not count. The second output is each position's loss without smoothing.
struct HeadLoss : torch::autograd::Function<HeadLoss> {
  static variable_list forward(AutogradContext *ctx, const Tensor &hidden, const Tensor &head, const Tensor &labels,
                               const Tensor &scale, int64_t vocabulary, double smoothing, int64_t chunk) {
    const int64_t n = hidden.size(0);
    const auto wide = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const bool with_grad = hidden.requires_grad();
    const auto options = hidden.options().dtype(wide);
    Tensor losses = at::empty({n}, options), smoothed = at::empty({n}, options);
    Tensor dhidden = with_grad ? at::empty_like(hidden) : Tensor();
    const Tensor factor = scale.to(wide);
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t len = std::min(chunk, n - start);
      const Tensor h = hidden.detach().narrow(0, start, len), y = labels.narrow(0, start, len);
      Tensor of_losses = losses.narrow(0, start, len), of_smoothed = smoothed.narrow(0, start, len);
      Tensor logits = product(h, false, head, true);
      if (!(logits.is_cuda() && kernels() &&
            kernels()->cross_entropy(logits, y, vocabulary, smoothing, with_grad ? factor : Tensor(), of_losses,
                                     of_smoothed)))
        logits = plain(logits, y, vocabulary, smoothing, with_grad, factor, of_losses, of_smoothed);
      if (with_grad) product(logits, false, head, false, dhidden.narrow(0, start, len));
    }
    if (with_grad) ctx->save_for_backward({dhidden});
    ctx->mark_non_differentiable({losses});
    return {smoothed.sum() * factor, losses};
  }
  // The same in libtorch operations; returns the gradient of the logits.
  static Tensor plain(Tensor logits, const Tensor &labels, int64_t vocabulary, double smoothing, bool with_grad,
                      const Tensor &factor, Tensor &losses, Tensor &smoothed) {
    const auto kind = logits.scalar_type();
    Tensor z = logits.to(factor.scalar_type());
    if (vocabulary < z.size(1)) columns(z, vocabulary, z.size(1) - vocabulary).fill_(-INFINITY);
    const Tensor counts = labels.ge(0), at_ = labels.clamp_min(0).unsqueeze(-1);
    const Tensor lse = z.logsumexp(-1, true), at_label = z.gather(-1, at_);
    losses.copy_(at::where(counts, (lse - at_label).squeeze(-1), 0.0));
    Tensor loss = lse - at_label * (1 - smoothing);
    if (smoothing > 0) loss = loss - columns(z, 0, vocabulary).mean(-1, true) * smoothing;
    smoothed.copy_(at::where(counts, loss.squeeze(-1), 0.0));
    if (!with_grad) return logits;
    z.sub_(lse).exp_();
    if (smoothing > 0) columns(z, 0, vocabulary).sub_(smoothing / vocabulary);
    z.scatter_add_(-1, at_, at::full_like(lse, smoothing - 1));
    z.mul_(at::where(counts.unsqueeze(-1), factor, 0.0));
    return z.to(kind);
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    variable_list result(7);
    result[0] = saved[0] * grads[0].to(saved[0].scalar_type());
    return result;
  }
};

Tensor or_none(const Tensor *t) { return t ? *t : Tensor(); }

}  // namespace

extern "C" {
// A linear layer with or without experts; pointers may be null where kernels.h and Module say "undefined".
struct dylora_module {
  const Tensor *weight, *bias, *packed, *expert_of, *scaling, *runs, *rows;
  const Tensor *a, *b, *g;
  int64_t ranks;
  double single_scaling;
};
struct dylora_norm {
  const Tensor *weight, *bias;
  double eps;
  int64_t room_forward, room_backward;
};
struct dylora_attention {
  int64_t batch, seq, heads;
  double scale;
  const Tensor *mask, *cu_seqlens;
  int64_t max_len;
};

void dylora_set_kernels(const Kernels *table) { installed = table; }

static c10::intrusive_ptr<NormConfig> norm_of(const dylora_norm *norm) {
  auto config = c10::make_intrusive<NormConfig>();
  config->w = *norm->weight, config->b = *norm->bias, config->eps = norm->eps;
  config->room_forward = norm->room_forward, config->room_backward = norm->room_backward;
  return config;
}

// out = [x + y, LayerNorm(x + y)]; y may be null
int dylora_fused_norm(const Tensor *x, const Tensor *y, const dylora_norm *norm, Tensor **out) {
  TRY(-1, {
    auto results = NormFunction::apply(norm_of(norm), *x, y ? std::optional<Tensor>(*y) : std::nullopt);
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}

int dylora_fused_block(const Tensor *x, const Tensor *a, const dylora_module *modules, const dylora_norm *norm,
                       const dylora_attention *attention, int tanh_gelu, double dropout, Tensor **out) {
  TRY(-1, {
    auto config = c10::make_intrusive<BlockConfig>();
    config->norm = norm_of(norm);
    config->tanh_gelu = tanh_gelu != 0, config->dropout = dropout;
    config->attention = {attention->batch, attention->seq,           attention->heads,
                         attention->scale, or_none(attention->mask), or_none(attention->cu_seqlens),
                         attention->max_len};
    std::vector<Tensor> inputs{*x, *a};
    const Tensor none = at::empty({0}, x->options());
    for (int k = 0; k < MODULES; ++k) {
      const auto &m = modules[k];
      config->modules[k] = {*m.weight, *m.bias, or_none(m.packed),
                            {or_none(m.expert_of), or_none(m.scaling), or_none(m.runs), or_none(m.rows)}, m.ranks, m.single_scaling};
      for (auto t : {m.a, m.b, m.g}) inputs.push_back(t ? *t : none);
    }
    config->keeps = false;
    for (const auto &input : inputs) config->keeps |= at::GradMode::is_enabled() && input.requires_grad();
    auto results = BlockFunction::apply(config, at::TensorList(inputs));
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}

int dylora_attends_by_length(const Tensor *like, int64_t head_size) { return has_fused_attention(*like, head_size); }

// out = [loss, token losses]
int dylora_head_loss(const Tensor *hidden, const Tensor *head, const Tensor *labels, const Tensor *scale,
                     int64_t vocabulary, double smoothing, int64_t chunk, Tensor **out) {
  TRY(-1, {
    auto results = HeadLoss::apply(*hidden, *head, *labels, *scale, vocabulary, smoothing, chunk);
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}
}
