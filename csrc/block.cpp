// The fused transformer block: operations over a frozen base, with backward passes written by hand.
// Each is defined by libtorch operations, here or in product.h, norm.h and attention.h, for any
// device and dtype. Where csrc/cuda.cpp offers a kernel, the kernel computes the same. Declared to
// Rust in src/ffi/fused.rs.
//
// Letters of shapes: M = b t tokens, d width, e expert.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <vector>

#include "attention.h"
#include "error.h"
#include "kernels.h"
#include "module.h"
#include "product.h"
#include "norm.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using namespace fused;

static const Kernels *installed = nullptr;
const Kernels *kernels() { return installed; }

namespace {
// Computes (x + y, LayerNorm(x + y)), each [M, d]; y may be undefined.
struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext *ctx, c10::intrusive_ptr<NormConfig> config,
                               const Tensor &x, const std::optional<Tensor> &y) {
    NormKept kept;
    const Tensor a = add_norm(*config, x, y.value_or(Tensor()), kept);
    ctx->saved_data["config"] = c10::IValue::make_capsule(config);
    ctx->saved_data["has_y"] = y.has_value();
    ctx->save_for_backward({kept.sum, kept.mean, kept.rstd});
    return {kept.sum, a};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto config =
        c10::static_intrusive_pointer_cast<NormConfig>(ctx->saved_data["config"].toCapsule());
    auto saved = ctx->get_saved_variables();
    const bool has_y = ctx->saved_data["has_y"].toBool();
    const Tensor dx = grads[1].defined() ? norm_backward(*config, grads[1],
                                                         {saved[0], saved[1], saved[2]}, grads[0])
                                         : grads[0];
    return {Tensor(), dx, has_y ? dx : Tensor()};
  }
};

enum { CAttn, AttnProj, Fc, MlpProj, MODULES };

struct BlockConfig : torch::CustomClassHolder {
  Product modules[MODULES];
  c10::intrusive_ptr<NormConfig> norm;  // the second LayerNorm
  Attention attention;
  bool tanh_gelu;
  double dropout;
  bool keeps;  // whether there will be a backward pass
};
// What is kept for the backward pass and has no graph of its own.
struct BlockKept : torch::CustomClassHolder {
  Kept modules[MODULES];
  KeptAttention attention;
  NormKept norm;
  Tensor up;  // input of the activation, [M, inner]
  bool x_has_grad = false, a_has_grad = false;
};

const char *form(const BlockConfig &c) { return c.tanh_gelu ? "tanh" : "none"; }

// gelu(fc(x)), with the row padding of mlp.c_proj behind it. Keeps the input of the activation in
// `up`.
Tensor up_and_gelu(const BlockConfig &c, const Experts &e, const Tensor &x, Kept &kept,
                   Tensor &up) {
  const Product &fc = c.modules[Fc];
  const int64_t row_padding = c.modules[MlpProj].row_padding(), m = x.size(0), inner = fc.out();
  const bool has_kernel = c.tanh_gelu && kernels() && x.is_cuda();
  if (has_kernel && may_be_fast(x) && inner % 8 == 0 && fc.is_one_product()) {
    const auto of = operands(fc, e, x, c.dropout, kept);
    const Tensor out = empty_padded(m, inner, row_padding, x.options());
    up = at::empty({m, inner}, x.options());
    if (kernels()->gemm(out, of.x, false, of.weight, false, Epilogue::GeluAuxBias, fc.bias, up))
      return out;
    up = affine(of.x, of.weight, fc.bias);
  } else {
    up = forward(fc, e, x, c.dropout, kept);
  }
  if (has_kernel) {
    const Tensor out = empty_padded(m, inner, row_padding, x.options());
    if (kernels()->gelu(up, out)) return out;
  }
  return padded(at::gelu(up, form(c)), row_padding);
}

// The gradient of the activation's input, with fc's row padding behind it, from the gradient `dy`
// of the block's output, which has du behind it if packed.
Tensor gelu_and_down_backward(const BlockConfig &c, const Experts &e, const Kept &kept,
                              const Tensor &up, const Tensor &dy, const Tensor &du) {
  const Product &proj = c.modules[MlpProj];
  const int64_t row_padding = c.modules[Fc].row_padding(), m = dy.size(0), inner = proj.in();
  const bool has_kernel = c.tanh_gelu && kernels() && dy.is_cuda();
  if (has_kernel && may_be_fast(dy) && !kept.mask.defined() && inner % 8 == 0 &&
      proj.is_one_product()) {
    const Tensor dz = empty_padded(m, inner, row_padding, dy.options()),
                 full = with_padding(dy, proj.row_padding());
    const Tensor weight = proj.has_experts() ? proj.packed.narrow(0, 0, inner) : proj.weight;
    if (kernels()->gemm(dz, full, false, weight, true, Epilogue::DGelu, {}, up)) return dz;
  }
  const Tensor dgelu = input_backward(proj, e, kept, dy, du, c.dropout);
  if (has_kernel) {
    const Tensor dz = empty_padded(m, inner, row_padding, dy.options());
    if (kernels()->gelu_backward(up, dgelu, dz)) return dz;
  }
  return padded(at::gelu_backward(dgelu, up, form(c)), row_padding);
}

// Maps (x, a) with a = LayerNorm(x), both [M, d], to (x', y), whose sum is the block's output.
// `inputs` are x, a, and then A, B^T and g of each module. They are empty where a module has none,
// since autograd takes no undefined tensors.
struct BlockFunction : torch::autograd::Function<BlockFunction> {
  static Experts experts(const std::vector<Tensor> &inputs, int module) {
    auto input = [&](int at) { return inputs[at].numel() ? inputs[at] : Tensor(); };
    return {input(2 + 3 * module), input(3 + 3 * module), input(4 + 3 * module)};
  }
  static variable_list forward(AutogradContext *ctx, c10::intrusive_ptr<BlockConfig> config,
                               at::TensorList list) {
    const auto &c = *config;
    const std::vector<Tensor> inputs = list.vec();
    const bool keeps = c.keeps;
    auto kept = c10::make_intrusive<BlockKept>();
    const Tensor x = inputs[0], a = inputs[1].variable_data();
    Tensor qkv = fused::forward(c.modules[CAttn], experts(inputs, CAttn), a, c.dropout,
                                kept->modules[CAttn]);
    Tensor attended = attention_forward(c.attention, qkv, keeps, kept->attention);
    qkv = Tensor();
    if (!keeps) kept->modules[CAttn] = {}, kept->attention = {};
    attended = padded(attended, c.modules[AttnProj].row_padding());
    Tensor y = fused::forward(c.modules[AttnProj], experts(inputs, AttnProj), attended, c.dropout,
                              kept->modules[AttnProj]);
    const Tensor normed = add_norm(*c.norm, x, y, kept->norm);
    const Tensor sum = kept->norm.sum;
    // not the output itself, since the output's own graph would hold it
    kept->norm.sum = sum.variable_data();
    y = attended = Tensor();
    if (!keeps) kept->modules[AttnProj] = {}, kept->norm = {};
    Tensor up = up_and_gelu(c, experts(inputs, Fc), normed, kept->modules[Fc], kept->up);
    if (!keeps) kept->modules[Fc] = {}, kept->up = Tensor();
    y = fused::forward(c.modules[MlpProj], experts(inputs, MlpProj), up, c.dropout,
                       kept->modules[MlpProj]);
    if (keeps) {
      auto saved = inputs;
      // of these two, only whether they need gradients is used later
      kept->x_has_grad = saved[0].requires_grad(), kept->a_has_grad = saved[1].requires_grad();
      saved[0] = saved[1] = at::empty({0}, x.options());
      ctx->save_for_backward(saved);
      ctx->saved_data["config"] = c10::IValue::make_capsule(config);
      ctx->saved_data["kept"] = c10::IValue::make_capsule(kept);
    }
    return {sum, y};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto config =
        c10::static_intrusive_pointer_cast<BlockConfig>(ctx->saved_data["config"].toCapsule());
    auto kept = c10::static_intrusive_pointer_cast<BlockKept>(ctx->saved_data["kept"].toCapsule());
    const auto &c = *config;
    auto saved = ctx->get_saved_variables();
    const std::vector<Tensor> inputs(saved.begin(), saved.end());
    // modules that share routing weights have one gradient for them, at the first of these modules
    Tensor dg[MODULES];
    int first[MODULES];
    for (int k = 0; k < MODULES; ++k) {
      first[k] = k;
      for (int j = k - 1; j >= 0; --j)
        if (inputs[4 + 3 * j].numel() &&
            inputs[4 + 3 * j].data_ptr() == inputs[4 + 3 * k].data_ptr())
          first[k] = j;
    }
    Grads of[MODULES];
    auto through = [&](int k, const Tensor &dy) {
      const Product &m = c.modules[k];
      if (!m.has_experts()) return Tensor();
      return experts_backward(m, experts(inputs, k), kept->modules[k], dy, c.dropout, of[k],
                              dg[first[k]]);
    };
    auto grad_or_zeros = [&](const Tensor &x) {
      return x.defined() ? x : at::zeros_like(kept->norm.sum);
    };
    Tensor dy = padded(grad_or_zeros(grads[1]), c.modules[MlpProj].row_padding());
    Tensor du = through(MlpProj, dy);
    Tensor dz = gelu_and_down_backward(c, experts(inputs, MlpProj), kept->modules[MlpProj],
                                       kept->up, dy, du);
    kept->modules[MlpProj] = {}, kept->up = Tensor();
    du = through(Fc, dz);
    Tensor da =
        input_backward(c.modules[Fc], experts(inputs, Fc), kept->modules[Fc], dz, du, c.dropout);
    kept->modules[Fc] = {};
    dz = Tensor();
    Tensor dx = norm_backward(*c.norm, da, kept->norm, grad_or_zeros(grads[0]));
    du = through(AttnProj, dx);
    variable_list result(1 + inputs.size());
    // nothing below the first layer's experts is trained, so the backward pass ends here if neither
    // c_attn nor its input needs a gradient
    const bool into_attention = c.modules[CAttn].has_experts() || kept->a_has_grad;
    if (into_attention) {
      Tensor dattended = input_backward(c.modules[AttnProj], experts(inputs, AttnProj),
                                        kept->modules[AttnProj], dx, du, c.dropout);
      kept->modules[AttnProj] = {};
      Tensor dqkv = attention_backward(c.attention, kept->attention, dattended,
                                       c.modules[CAttn].row_padding());
      kept->attention = {};
      du = through(CAttn, dqkv);
      if (kept->a_has_grad)
        result[2] = input_backward(c.modules[CAttn], experts(inputs, CAttn), kept->modules[CAttn],
                                   dqkv, du, c.dropout);
    }
    if (kept->x_has_grad) result[1] = dx;
    for (int k = 0; k < MODULES; ++k) {
      kept->modules[k] = {};
      if (inputs[2 + 3 * k].requires_grad()) result[3 + 3 * k] = of[k].a;
      if (inputs[3 + 3 * k].requires_grad()) result[4 + 3 * k] = of[k].b;
      result[5 + 3 * k] = dg[k];
    }
    kept->norm = {};
    return result;
  }
};

}  // namespace

extern "C" {
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
  config->row_padding_forward = norm->row_padding_forward,
  config->row_padding_backward = norm->row_padding_backward;
  return config;
}

// out = [x + y, LayerNorm(x + y)]; y may be null
int dylora_fused_norm(const Tensor *x, const Tensor *y, const dylora_norm *norm, Tensor **out) {
  TRY(-1, {
    auto results =
        NormFunction::apply(norm_of(norm), *x, y ? std::optional<Tensor>(*y) : std::nullopt);
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}

int dylora_fused_block(const Tensor *x, const Tensor *a, const dylora_module *modules,
                       const dylora_norm *norm, const dylora_attention *attention, int tanh_gelu,
                       double dropout, Tensor **out) {
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
      config->modules[k] = product_of(m);
      for (auto t : {m.a, m.b, m.g}) inputs.push_back(t ? *t : none);
    }
    config->keeps = false;
    for (const auto &input : inputs)
      config->keeps |= at::GradMode::is_enabled() && input.requires_grad();
    auto results = BlockFunction::apply(config, at::TensorList(inputs));
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}

int dylora_attends_by_length(const Tensor *like, int64_t head_size) {
  TRY(-1, { return has_fused_attention(*like, head_size) ? 1 : 0; })
}

}
