// A step of generation in a frozen GPT-2 with experts, in which each text gets one new position. It
// is defined by Block::forward with a cache (src/model/decoder/block.rs), and only CUDA kernels
// compute it here: a function returns 1 where they do not apply. Declared to Rust in
// src/ffi/step.rs.
//
// With few rows every operation is short, so what counts is that there are few operations. A linear
// layer is one product with [W A^T]; whatever reads its output adds the bias and v B^T to it
// (struct Unfinished).
//
// Letters of shapes: M texts, d width, e expert, R' columns of a module's rank space.
#include "error.h"
#include "kernels.h"
#include "module.h"
#include "product.h"

using at::Tensor;
using namespace fused;

namespace {
// A linear layer as a step reads it.
struct Layer {
  Product product;
  Tensor g;
  explicit Layer(const dylora_module &m) : product(product_of(m)), g(or_none(m.g)) {}

  // The matrix with which the layer's input is multiplied.
  Tensor weight() const {
    return product.has_experts() ? product.packed.narrow(0, 0, product.in()) : product.weight;
  }
  // x [W A^T]
  Tensor times(const Tensor &x) const {
    const Tensor w = weight(), out = at::empty({x.size(0), w.size(1)}, x.options());
    if (!kernels()->thin_product(x, w, out)) product_into(out, x, false, w, false);
    return out;
  }
  Unfinished unfinished(const Tensor &product_of_input) const {
    Unfinished y{product_of_input, product.bias, {}, {}, nullptr, product.out()};
    if (product.has_experts()) {
      const Tensor rows = product.packed.narrow(0, product.in(), product.row_padding());
      y.b = columns(rows, 0, product.out());
      y.g = g, y.rank_columns = &product.rank_columns;
    }
    return y;
  }
};
}  // namespace

extern "C" {
struct dylora_step_cache {
  const Tensor *keys, *values, *places, *positions;
  int64_t heads, window;
  double scale;
};

// Writes the experts' parts of a packed weight.
int dylora_step_pack(const Tensor *a, const Tensor *b, const Tensor *packed) {
  TRY(-1, { return kernels() && kernels()->refresh(*a, *b, *packed) ? 0 : 1; })
}

// out = [x + y, LayerNorm(x + y)], where y is the output of `module`, of which `product` is known.
// Both are null if there is no y.
int dylora_step_norm(const Tensor *x, const Tensor *product, const dylora_module *module,
                     const dylora_norm *norm, Tensor **out) {
  TRY(-1, {
    const auto layer = module ? std::make_unique<Layer>(*module) : nullptr;
    const Unfinished y = layer ? layer->unfinished(*product) : Unfinished{};
    const Tensor sum = at::empty(x->sizes(), x->options()), a = at::empty_like(sum);
    if (!kernels() ||
        !kernels()->step_norm(*x, y, *norm->weight, *norm->bias, norm->eps, sum, a))
      return 1;
    out[0] = new Tensor(sum), out[1] = new Tensor(a);
    return 0;
  })
}

// The block from after its first LayerNorm, a, of the residual stream x. out = [x', product], where
// product is that of mlp.c_proj, whose output is to be added to x'.
int dylora_step_block(const Tensor *x, const Tensor *a, const dylora_module *modules,
                      const dylora_norm *norm, const dylora_step_cache *cache, int tanh_gelu,
                      Tensor **out) {
  TRY(-1, {
    if (!kernels()) return 1;
    const Layer attn(modules[0]), attn_proj(modules[1]), fc(modules[2]), mlp_proj(modules[3]);
    const StepCache at{*cache->keys, *cache->values, *cache->places, *cache->positions,
                       cache->heads, cache->window, cache->scale};
    const Tensor attended = at::empty(x->sizes(), x->options());
    if (!kernels()->step_attention(attn.unfinished(attn.times(*a)), at, attended)) return 1;
    const Tensor sum = at::empty(x->sizes(), x->options()), normed = at::empty_like(sum);
    if (!kernels()->step_norm(*x, attn_proj.unfinished(attn_proj.times(attended)), *norm->weight,
                              *norm->bias, norm->eps, sum, normed))
      return 1;
    const Tensor up = at::empty({x->size(0), fc.product.out()}, x->options());
    if (!kernels()->step_gelu(fc.unfinished(fc.times(normed)), tanh_gelu != 0, up)) return 1;
    out[0] = new Tensor(sum), out[1] = new Tensor(mlp_proj.times(up));
    return 0;
  })
}

// The most probable token of each row of logits and the logarithm of its probability, f64 [2, n].
// The first `vocabulary` columns are tokens.
int dylora_step_choice(const Tensor *logits, int64_t vocabulary, Tensor **out) {
  TRY(-1, {
    const Tensor choice = at::empty({2, logits->size(0)}, logits->options().dtype(at::kDouble));
    if (!kernels() || !kernels()->step_choice(*logits, vocabulary, choice)) return 1;
    out[0] = new Tensor(choice);
    return 0;
  })
}
}
