// A step of generation in a frozen base with experts, in which each text gets one new position. It
// is defined by Block::forward with a cache (src/model/decoder/block.rs), and only CUDA kernels
// compute it here: a function returns 1 where they do not apply. Declared to Rust in
// src/ffi/step.rs.
//
// With few rows every operation is short, so what counts is that there are few operations. A linear
// layer is one product with [W A^T], and a kernel behind it adds v B^T: one of its own, or that of
// the activation. With few rows, a product adds v B^T itself, and with very few, it computes its
// input as well, the norm or the activation of an output (csrc/kernels/step/thin.cuh). Whatever
// reads an output adds the bias to it, and attention also few ranks of updates (struct Unfinished).
//
// Letters of shapes: M texts, d width, e expert, R' columns of a module's rank space.
#include "error.h"
#include "kernels.h"
#include "module.h"
#include "product.h"

using at::Tensor;
using namespace fused;

namespace {
// Most ranks of a linear layer for which attention itself finishes its input.
constexpr int64_t FEW_RANKS = 32;

// A linear layer as a step reads it.
struct Layer {
  Product product;
  Place place;
  Tensor g;
  Layer(const dylora_product &p, Place place) : product(product_of(p)), place(place) {
    for (int64_t k = 0; k < p.num_members && !g.defined(); ++k) g = or_none(p.members[k].g);
  }

  // The updates of the experts; A^T is `product.packed_a()`.
  Updates updates() const {
    Updates updates{};
    if (!product.has_experts()) return updates;
    updates.b = product.packed_b(), updates.g = g, updates.rank_columns = &product.rank_columns;
    int64_t first_rank = 0;
    for (const auto &m : product.members) {
      updates.first_out.push_back(m.first_out), updates.first_rank.push_back(first_rank);
      if (m.has_experts()) first_rank += m.num_ranks();
    }
    updates.first_out.push_back(product.out()), updates.first_rank.push_back(first_rank);
    return updates;
  }
  Tensor empty_output(int64_t rows, int64_t columns) const {
    return at::empty({rows, columns}, product.weight().options());
  }
  // Whether attention, which reads this layer's output, adds the updates of the experts if there
  // are few texts: it takes less time to add few ranks in each head than to wait for u in the
  // product.
  bool leaves_updates() const {
    int64_t most = 0;
    for (const auto &m : product.members)
      if (m.has_experts()) most = std::max(most, m.num_ranks());
    return place == Qkv && most > 0 && most <= FEW_RANKS;
  }
  // [W A^T], or W without experts
  Tensor with_a() const {
    return product.has_experts() ? rows(product.packed, 0, product.in()) : product.weight();
  }
  // The layer's output but for its bias, [M, out], or x [W A^T], [M, out + R'], if the layer leaves
  // its updates to attention; undefined if no kernel applies
  Tensor thin(const ThinInput &input, int64_t num_rows) const {
    const bool adds = product.has_experts() && !leaves_updates();
    const Tensor weight = adds ? product.weight() : with_a();
    const Tensor out = empty_output(num_rows, weight.size(1));
    const bool applies = adds ? kernels()->thin_product(input, weight, product.packed_a(),
                                                        updates(), place, out)
                              : kernels()->thin_product(input, weight, {}, {}, place, out);
    return applies ? out : Tensor();
  }
  // The same, or else the product of a GEMM, with the updates unless the kernel of the activation
  // adds them; undefined if no kernel applies
  Tensor times(const Tensor &x) const {
    ThinInput input{};
    input.x = x;
    const Tensor thin_out = thin(input, x.size(0));
    if (thin_out.defined()) return thin_out;
    const Tensor all = empty_output(x.size(0), with_a().size(1));
    product_into(all, x, false, with_a(), false);
    if (!product.has_experts() || place == MlpIn) return all;
    const Tensor out = empty_output(x.size(0), product.out());
    const Unfinished without_bias{all, {}, updates(), product.out()};
    return kernels()->step_finish(without_bias, -1, out) ? out : Tensor();
  }
  // The same for norm(x + y), and x + y in `sum`; undefined if no kernel applies. If `beside`, the
  // norm may run beside the kernel in front.
  Tensor times_norm(const Tensor &x, const Unfinished &y, const dylora_norm &norm, Tensor &sum,
                    bool beside) const {
    sum = at::empty(x.sizes(), x.options());
    const ThinInput input{ThinInput::Normed,  x,        y,   *norm.weight,
                          or_none(norm.bias), norm.eps, sum, 0};
    if (y.product.defined()) {
      const Tensor out = thin(input, x.size(0));
      if (out.defined()) return out;
    }
    const Tensor normed = at::empty_like(sum);
    if (!kernels()->step_norm(x, y, *norm.weight, or_none(norm.bias), norm.eps, sum, normed,
                              beside))
      return {};
    return times(normed);
  }
  // The same for the activation of y; undefined if no kernel applies
  Tensor times_activated(const Unfinished &y, int activation) const {
    const ThinInput input{ThinInput::Activated, {}, y, {}, {}, 0, {}, activation};
    const Tensor out = thin(input, y.product.size(0));
    if (out.defined()) return out;
    const Tensor up = at::empty({y.product.size(0), product.in()}, y.product.options());
    return kernels()->step_finish(y, activation, up) ? times(up) : Tensor();
  }
  // What is missing in a product of this layer, which is finished if it has no columns of u.
  Unfinished unfinished(const Tensor &product_of_input) const {
    const Tensor bias = product.is_packed() ? product.bias : product.members[0].bias;
    const bool is_finished = product_of_input.size(1) == product.out();
    return {product_of_input, bias, is_finished ? Updates{} : updates(), product.out()};
  }
};
}  // namespace

extern "C" {
struct dylora_step_cache {
  const Tensor *keys, *values, *places, *positions;
  int64_t query_heads, key_heads, head_size, window;
  double scale;
  const Tensor *q_norm, *k_norm;
  double norm_eps;
  const Tensor *frequencies;
  double rope_factor;
};

// Writes the experts' parts of a packed weight.
int dylora_step_pack(const Tensor *a, const Tensor *b, const Tensor *packed_a,
                     const Tensor *packed_b) {
  TRY(-1, { return kernels() && kernels()->refresh({{*a, *b, *packed_a, *packed_b}}) ? 0 : 1; })
}

// The embeddings of tokens, [M, d], plus those of their positions if there are any.
int dylora_step_embed(const Tensor *tokens, const Tensor *ids, const Tensor *positions,
                      const Tensor *position_ids, Tensor **out) {
  TRY(-1, {
    const Tensor x = at::empty({ids->numel(), tokens->size(1)}, tokens->options());
    if (!kernels() ||
        !kernels()->step_embed(*tokens, *ids, or_none(positions), *position_ids, x))
      return 1;
    out[0] = new Tensor(x);
    return 0;
  })
}

// out = [x + y, norm(x + y)], where y = product + bias. There may be no y, or no bias.
int dylora_step_norm(const Tensor *x, const Tensor *product, const Tensor *bias,
                     const dylora_norm *norm, Tensor **out) {
  TRY(-1, {
    const Unfinished y{or_none(product), or_none(bias), {}, x->size(1)};
    const Tensor sum = at::empty(x->sizes(), x->options()), a = at::empty_like(sum);
    if (!kernels() ||
        !kernels()->step_norm(*x, y, *norm->weight, or_none(norm->bias), norm->eps, sum, a, false))
      return 1;
    out[0] = new Tensor(sum), out[1] = new Tensor(a);
    return 0;
  })
}

// A block of the residual stream x + y, where y = product + bias. There may be no y, or no bias. If
// `a` is not null, there is no y, and a is the block's first norm. If `beside`, there is no y, and
// the operation in front does not write x, and lets this one start only when x is complete.
// out = [x', product], where product and the last linear layer's bias are to be added to x'.
int dylora_step_block(const Tensor *x, const Tensor *a, const Tensor *product,
                      const Tensor *bias, int beside, const dylora_norm *norms,
                      const dylora_product *products, const dylora_step_cache *cache,
                      int activation, Tensor **out) {
  TRY(-1, {
    if (!kernels()) return 1;
    const Unfinished y{or_none(product), or_none(bias), {}, x->size(1)};
    const Layer qkv_layer(products[Qkv], Qkv), out_layer(products[AttnOut], AttnOut),
        mlp_in(products[MlpIn], MlpIn), mlp_out(products[MlpOut], MlpOut);
    Heads heads{cache->query_heads,     cache->key_heads,
                cache->head_size,       or_none(cache->q_norm),
                or_none(cache->k_norm), cache->norm_eps,
                Tensor(),               Tensor()};
    const StepCache at{*cache->keys,
                       *cache->values,
                       *cache->places,
                       *cache->positions,
                       heads,
                       or_none(cache->frequencies),
                       cache->rope_factor,
                       cache->window,
                       cache->scale};
    Tensor sum = *x;
    const Tensor qkv =
        a ? qkv_layer.times(*a) : qkv_layer.times_norm(*x, y, norms[0], sum, beside != 0);
    if (!qkv.defined()) return 1;
    const Tensor attended = at::empty({x->size(0), heads.queries()}, x->options());
    if (!kernels()->step_attention(qkv_layer.unfinished(qkv), at, attended)) return 1;
    const Tensor of_attention = out_layer.times(attended);
    if (!of_attention.defined()) return 1;
    Tensor next;
    const Tensor up =
        mlp_in.times_norm(sum, out_layer.unfinished(of_attention), norms[1], next, false);
    if (!up.defined()) return 1;
    const Tensor down = mlp_out.times_activated(mlp_in.unfinished(up), activation);
    if (!down.defined()) return 1;
    out[0] = new Tensor(next), out[1] = new Tensor(down);
    return 0;
  })
}

// The most probable token of each row of logits and the logarithm of its probability,
// f64 [1, 2, n]. The first `vocabulary` columns are tokens.
//
// If `ids` is not null, the choices are also written to it. The results then go to `choices`, f64
// [2, 2, n], whose second half is for rows at odd positions, so that the results of a step can be
// read while the next one runs. Then `positions` and `places` are raised by 1.
int dylora_step_choice(const Tensor *logits, int64_t vocabulary, const Tensor *ids,
                       const Tensor *positions, const Tensor *places, const Tensor *choices,
                       Tensor **out) {
  TRY(-1, {
    const auto f64 = logits->options().dtype(at::kDouble);
    const Tensor choice = ids ? *choices : at::empty({1, 2, logits->size(0)}, f64);
    if (!kernels() || !kernels()->step_choice(*logits, vocabulary, choice, or_none(ids),
                                              or_none(positions), or_none(places)))
      return 1;
    out[0] = new Tensor(choice);
    return 0;
  })
}
}
