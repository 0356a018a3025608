// The fused transformer block: operations over a frozen base, with backward passes written by hand.
// Each is defined by libtorch operations, here or in product.h, norm.h, rope.h, attention.h and
// mlp.h, for any device and dtype. Where csrc/cuda.cpp offers a kernel, the kernel computes the
// same. Declared to Rust in src/ffi/fused.rs.
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
#include "mlp.h"
#include "module.h"
#include "norm.h"
#include "product.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using namespace fused;

static const Kernels *installed = nullptr;
const Kernels *kernels() { return installed; }

namespace {
// Computes (x + y, norm(x + y)), each [M, d]; y may be undefined.
struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext *ctx, c10::intrusive_ptr<NormConfig> config,
                               const Tensor &x, const std::optional<Tensor> &y) {
    NormKept kept;
    const Tensor a = add_norm(*config, x, y.value_or(Tensor()), kept);
    ctx->saved_data["config"] = c10::IValue::make_capsule(config);
    ctx->saved_data["has_y"] = y.has_value();
    const Tensor none = at::empty({0}, x.options());
    ctx->save_for_backward({kept.sum, kept.mean.defined() ? kept.mean : none, kept.rstd});
    return {kept.sum, a};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto config =
        c10::static_intrusive_pointer_cast<NormConfig>(ctx->saved_data["config"].toCapsule());
    auto saved = ctx->get_saved_variables();
    const bool has_y = ctx->saved_data["has_y"].toBool();
    const NormKept kept{saved[0], config->is_rms() ? Tensor() : saved[1], saved[2]};
    const Tensor dx = grads[1].defined() ? norm_backward(*config, grads[1], kept, grads[0])
                                         : grads[0];
    return {Tensor(), dx, has_y ? dx : Tensor()};
  }
};

// Dropout of x, [.., i], by a mask of bits.
struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static Tensor forward(AutogradContext *ctx, const Tensor &x, double probability) {
    Mask mask;
    const Tensor out = dropped(x.flatten(0, -2), probability, mask);
    ctx->save_for_backward({mask.bits});
    ctx->saved_data["scale"] = mask.scale;
    return out.view(x.sizes());
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    Mask mask;
    mask.bits = ctx->get_saved_variables()[0];
    mask.scale = ctx->saved_data["scale"].toDouble();
    const Tensor &dy = grads[0];
    return {through(dy.flatten(0, -2), mask).view(dy.sizes()), Tensor()};
  }
};

struct BlockConfig : torch::CustomClassHolder {
  Product products[PRODUCTS];
  c10::intrusive_ptr<NormConfig> first, second;
  Attention attention;
  Activation activation;
  double dropout;
  bool keeps;  // whether there will be a backward pass
  // Whether the backward pass computes the norms' outputs and the activation again.
  bool recomputes;
  // The index of the first input of a product's members in BlockFunction's inputs.
  int64_t first_input(int product) const {
    int64_t at = 2;
    for (int k = 0; k < product; ++k) at += 3 * (int64_t)products[k].members.size();
    return at;
  }
};
// What is kept for the backward pass and has no graph of its own.
struct BlockKept : torch::CustomClassHolder {
  Kept products[PRODUCTS];
  KeptAttention attention;
  NormKept norm;
  Tensor x;   // the residual stream, [M, d], if the first norm is computed again
  Tensor up;  // input of the activation, [M, inner] or [M, 2 inner]
  bool x_has_grad = false, a_has_grad = false;
};

// The activation of mlp_in(x), with the row padding of mlp_out behind it. Keeps the input of the
// activation in `up`.
Tensor up_and_activate(const BlockConfig &c, const AllExperts &e, const Tensor &x, Kept &kept,
                       Tensor &up) {
  const Product &in = c.products[MlpIn];
  const int64_t row_padding = c.products[MlpOut].row_padding(), m = x.size(0), inner = in.out();
  if (c.activation == Activation::TanhGelu && may_be_fast(x) && inner % 8 == 0 &&
      in.is_one_product() && !in.is_quantised() && in.members[0].bias.defined()) {
    const auto of = operands(in, e, x, c.dropout, kept);
    const Tensor out = empty_padded(m, inner, row_padding, x.options()), bias = in.members[0].bias;
    up = at::empty({m, inner}, x.options());
    if (kernels()->gemm(out, of.x, false, of.weight, false, Epilogue::GeluAuxBias, bias, up))
      return out;
    up = affine(of.x, of.weight, bias);
  } else {
    up = forward(in, e, x, c.dropout, kept);
  }
  return activate(c.activation, up, row_padding);
}

// The gradient of the activation's input, with mlp_in's row padding behind it, from the gradient
// `dy` of the block's output, which has du behind it if packed. SwiGLU's output is computed
// `again`.
Tensor activate_and_down_backward(const BlockConfig &c, const AllExperts &e, const Kept &kept,
                                  const Tensor &up, const Tensor &dy, const Tensor &du,
                                  const std::vector<Tensor> &dus, Tensor &again) {
  const Product &out = c.products[MlpOut];
  const int64_t row_padding = c.products[MlpIn].row_padding(), m = dy.size(0), inner = out.in();
  const bool drops = c.dropout != 0 && out.has_experts();
  if (c.activation == Activation::TanhGelu && may_be_fast(dy) && !drops && inner % 8 == 0 &&
      out.is_one_product() && !out.is_quantised()) {
    const int64_t r = out.row_padding();
    const Tensor dz = empty_padded(m, inner, row_padding, dy.options()), full = with_padding(dy, r);
    const Tensor weight =
        out.is_packed() ? columns(rows(out.packed, 0, inner), 0, out.out() + r) : out.weight();
    if (kernels()->gemm(dz, full, false, weight, true, Epilogue::DGelu, {}, up)) return dz;
  }
  const Tensor dout = input_backward(out, e, kept, dy, du, dus, c.dropout);
  return activate_backward(c.activation, up, dout, row_padding, again);
}

// Maps (x, a) with a = norm(x), both [M, d], to (x', y), whose sum is the block's output. `inputs`
// are x, a, and then A, B^T and g of each member of each product. They are empty where a member has
// none, since autograd takes no undefined tensors.
struct BlockFunction : torch::autograd::Function<BlockFunction> {
  static AllExperts experts(const BlockConfig &c, const std::vector<Tensor> &inputs, int product) {
    auto input = [&](int64_t at) { return inputs[at].numel() ? inputs[at] : Tensor(); };
    AllExperts all;
    int64_t at = c.first_input(product);
    for (size_t k = 0; k < c.products[product].members.size(); ++k, at += 3)
      all.push_back({input(at), input(at + 1), input(at + 2)});
    return all;
  }
  static variable_list forward(AutogradContext *ctx, c10::intrusive_ptr<BlockConfig> config,
                               at::TensorList list) {
    const auto &c = *config;
    const std::vector<Tensor> inputs = list.vec();
    const bool keeps = c.keeps;
    auto kept = c10::make_intrusive<BlockKept>();
    auto of = [&](int product, const Tensor &x) {
      return fused::forward(c.products[product], experts(c, inputs, product), x, c.dropout,
                            kept->products[product]);
    };
    std::vector<Refreshed> layers;
    for (int k = 0; k < PRODUCTS; ++k) add_refreshed(c.products[k], experts(c, inputs, k), layers);
    TORCH_CHECK(layers.empty() || kernels()->refresh(layers));
    const Tensor x = inputs[0];
    Tensor a = inputs[1].variable_data();
    Tensor qkv = of(Qkv, a);
    if (c.recomputes) kept->x = x.variable_data(), kept->products[Qkv].x = Tensor();
    a = Tensor();
    Tensor attended = attention_forward(c.attention, qkv, keeps, kept->attention);
    qkv = Tensor();
    if (!keeps) kept->products[Qkv] = {}, kept->attention = {};
    attended = padded(attended, c.products[AttnOut].row_padding());
    Tensor y = of(AttnOut, attended);
    Tensor normed = add_norm(*c.second, x, y, kept->norm);
    const Tensor sum = kept->norm.sum;
    // not the output itself, since the output's own graph would hold it
    kept->norm.sum = sum.variable_data();
    y = attended = Tensor();
    if (c.recomputes) kept->products[AttnOut].x = Tensor();
    if (!keeps) kept->products[AttnOut] = {}, kept->norm = {};
    Tensor act = up_and_activate(c, experts(c, inputs, MlpIn), normed, kept->products[MlpIn],
                                 kept->up);
    normed = Tensor();
    if (c.recomputes) kept->products[MlpIn].x = Tensor();
    if (!keeps) kept->products[MlpIn] = {}, kept->up = Tensor();
    y = of(MlpOut, act);
    if (c.recomputes) kept->products[MlpOut].x = Tensor();
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
    auto saved = ctx->get_saved_variables();
    const std::vector<Tensor> inputs(saved.begin(), saved.end());
    return Backward{*config, *kept, inputs}.run(grads);
  }

  struct Backward {
    const BlockConfig &c;
    BlockKept &kept;
    const std::vector<Tensor> &inputs;
    // the gradients of the routing weights; members that share weights share the first one's entry
    std::vector<Tensor> dg{};
    std::vector<Grads> of[PRODUCTS]{};
    // of the product at work, what through_experts returned
    Tensor du{};
    std::vector<Tensor> dus{};

    AllExperts experts_of(int product) const { return experts(c, inputs, product); }
    // Where the gradients of the routing weights of a product's members belong.
    std::vector<Tensor *> places(int product) {
      std::vector<Tensor *> found;
      const int64_t first = c.first_input(product);
      for (size_t k = 0; k < c.products[product].members.size(); ++k) {
        const int64_t at = first + 3 * (int64_t)k + 2;
        int64_t same = 4;
        while (inputs[same].numel() == 0 || inputs[same].data_ptr() != inputs[at].data_ptr()) {
          if (same == at) break;
          same += 3;
        }
        found.push_back(&dg[(same - 4) / 3]);
      }
      return found;
    }
    void through(int product, const Tensor &dy) {
      const Product &p = c.products[product];
      dus.clear(), du = Tensor();
      if (p.has_experts())
        du = through_experts(p, experts_of(product), kept.products[product], dy, places(product),
                             dus);
    }
    void experts_backward_of(int product, const Tensor &x, const Tensor &dy) {
      fused::experts_backward(c.products[product], experts_of(product), kept.products[product], x,
                              dy, du, dus, c.dropout, of[product]);
    }
    Tensor input_backward_of(int product, const Tensor &dy) {
      return fused::input_backward(c.products[product], experts_of(product),
                                   kept.products[product], dy, du, dus, c.dropout);
    }
    // The input of a product, which is the output of a norm of `x`.
    Tensor normed(int product, NormConfig norm, const Tensor &x) {
      if (!c.recomputes || !c.products[product].has_experts()) return kept.products[product].x;
      norm.row_padding_forward = 0;
      NormKept again;
      return add_norm(norm, x, {}, again);
    }

    variable_list run(const variable_list &grads) {
      dg.resize((inputs.size() - 2) / 3);
      auto grad_or_zeros = [&](const Tensor &x) {
        return x.defined() ? x : at::zeros_like(kept.norm.sum);
      };
      Tensor dy = padded(grad_or_zeros(grads[1]), c.products[MlpOut].row_padding());
      through(MlpOut, dy);
      Tensor again;
      Tensor dz = activate_and_down_backward(c, experts_of(MlpOut), kept.products[MlpOut], kept.up,
                                             dy, du, dus, again);
      experts_backward_of(MlpOut, c.recomputes ? again : kept.products[MlpOut].x, dy);
      kept.products[MlpOut] = {}, kept.up = again = dy = Tensor();
      through(MlpIn, dz);
      Tensor da = input_backward_of(MlpIn, dz);
      experts_backward_of(MlpIn, normed(MlpIn, *c.second, kept.norm.sum), dz);
      kept.products[MlpIn] = {};
      dz = Tensor();
      Tensor dx = norm_backward(*c.second, da, kept.norm, grad_or_zeros(grads[0]));
      kept.norm = {};
      da = Tensor();
      through(AttnOut, dx);
      experts_backward_of(
          AttnOut, c.recomputes ? attended(c.attention, kept.attention) : kept.products[AttnOut].x,
          dx);
      variable_list result(1 + inputs.size());
      // nothing below the first layer's experts is trained, so the backward pass ends here if
      // neither the first product nor its input needs a gradient
      if (c.products[Qkv].has_experts() || kept.a_has_grad) {
        Tensor dattended = input_backward_of(AttnOut, dx);
        kept.products[AttnOut] = {};
        Tensor dqkv = attention_backward(c.attention, kept.attention, dattended,
                                         c.products[Qkv].row_padding());
        kept.attention = {};
        dattended = Tensor();
        through(Qkv, dqkv);
        if (kept.a_has_grad) result[2] = input_backward_of(Qkv, dqkv);
        experts_backward_of(Qkv, normed(Qkv, *c.first, kept.x), dqkv);
      }
      if (kept.x_has_grad) result[1] = dx;
      for (int product = 0; product < PRODUCTS; ++product) {
        kept.products[product] = {};
        int64_t at = c.first_input(product);
        for (size_t k = 0; k < c.products[product].members.size(); ++k, at += 3) {
          if (k < of[product].size()) {
            if (inputs[at].requires_grad()) result[at + 1] = of[product][k].a;
            if (inputs[at + 1].requires_grad()) result[at + 2] = of[product][k].b;
          }
          result[at + 3] = dg[(at - 2) / 3];
        }
      }
      return result;
    }
  };
};

}  // namespace

extern "C" {
struct dylora_attention {
  int64_t batch, seq, query_heads, key_heads, head_size;
  double scale;
  const Tensor *mask, *cu_seqlens;
  int64_t max_len, window;
  const Tensor *q_norm, *k_norm;
  double norm_eps;
  const Tensor *cos, *sin;
};

void dylora_set_kernels(const Kernels *table) { installed = table; }

static c10::intrusive_ptr<NormConfig> norm_of(const dylora_norm &norm) {
  auto config = c10::make_intrusive<NormConfig>();
  config->w = *norm.weight, config->b = or_none(norm.bias), config->eps = norm.eps;
  config->row_padding_forward = norm.row_padding_forward,
  config->row_padding_backward = norm.row_padding_backward;
  return config;
}
static Attention attention_of(const dylora_attention &a) {
  Heads heads{a.query_heads,     a.key_heads, a.head_size,    or_none(a.q_norm),
              or_none(a.k_norm), a.norm_eps,  or_none(a.cos), or_none(a.sin)};
  return {a.batch,   a.seq,    std::move(heads), a.scale, or_none(a.mask), or_none(a.cu_seqlens),
          a.max_len, a.window};
}

// out = [x + y, norm(x + y)]; y may be null
int dylora_fused_norm(const Tensor *x, const Tensor *y, const dylora_norm *norm, Tensor **out) {
  TRY(-1, {
    auto results =
        NormFunction::apply(norm_of(*norm), *x, y ? std::optional<Tensor>(*y) : std::nullopt);
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}

// `products` are four, and `norms` are the block's two.
int dylora_fused_block(const Tensor *x, const Tensor *a, const dylora_product *products,
                       const dylora_norm *norms, const dylora_attention *attention, int activation,
                       double dropout, int recomputes, Tensor **out) {
  TRY(-1, {
    auto config = c10::make_intrusive<BlockConfig>();
    config->first = norm_of(norms[0]), config->second = norm_of(norms[1]);
    config->activation = (Activation)activation, config->dropout = dropout;
    config->recomputes = recomputes != 0;
    config->attention = attention_of(*attention);
    std::vector<Tensor> inputs{*x, *a};
    const Tensor none = at::empty({0}, x->options());
    for (int k = 0; k < PRODUCTS; ++k) {
      config->products[k] = product_of(products[k]);
      for (int64_t j = 0; j < products[k].num_members; ++j) {
        const auto &m = products[k].members[j];
        for (auto t : {m.a, m.b, m.g}) inputs.push_back(t ? *t : none);
      }
    }
    config->keeps = false;
    for (const auto &input : inputs)
      config->keeps |= at::GradMode::is_enabled() && input.requires_grad();
    auto results = BlockFunction::apply(config, at::TensorList(inputs));
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}

// x, [.., i], after dropout. Draws the same random numbers as the block.
Tensor *dylora_dropout(const Tensor *x, double probability) {
  TRY(nullptr, {
    if (!draws_masks(*x)) return new Tensor(at::dropout(*x, probability, true));
    return new Tensor(DropoutFunction::apply(*x, probability));
  })
}

// out = [codes, scales] of x, [n, i]
int dylora_quantise(const Tensor *x, Tensor **out) {
  TRY(-1, {
    const auto q = quantise(*x);
    out[0] = new Tensor(q.codes), out[1] = new Tensor(q.scales);
    return 0;
  })
}
// x w^T of [M, i] and [o, i], which are [codes, scales], in the dtype of `like`
Tensor *dylora_quantised_product(const Tensor *const *x, const Tensor *const *w,
                                 const Tensor *like) {
  TRY(nullptr, {
    return new Tensor(
        quantised_product({*x[0], *x[1]}, {*w[0], *w[1]}, {}, like->scalar_type()));
  })
}

int dylora_attends_by_length(const Tensor *like, int64_t head_size) {
  TRY(-1, { return has_fused_attention(*like, head_size) ? 1 : 0; })
}

}
