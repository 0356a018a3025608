// What the CUDA part (csrc/cuda.cpp) offers to the fused operations (csrc/block.cpp,
// csrc/head_loss.cpp): dylora's own kernels, and matrix products with chosen algorithms. A function
// that does not apply does nothing and returns false.
//
// Letters of shapes: M tokens, e expert, R columns of a module's rank space, R' the same rounded up
// (src/model/fused/pack.rs).
#pragma once
#include <ATen/ATen.h>

#include <vector>

// How the routing weights of e experts become factors of the columns of a module's rank space.
struct RankColumns {
  at::Tensor expert_of;  // each column's expert, int32 [R']
  at::Tensor scaling;    // each column's scaling, f32 [R']; 0 for the columns that rounding adds
  at::Tensor runs;       // each expert's columns: n runs [first, second), int32 [e, 2n]
  at::Tensor rows;       // the scaling where a column belongs to the expert, otherwise 0, [e, R]
};

// The heads of attention, and what happens to queries and keys before it (csrc/rope.h).
struct Heads {
  int64_t q, k, width;
  // RMSNorm of queries and keys; undefined if there is none
  at::Tensor q_norm, k_norm;
  double eps;
  // cosines and sines of each token's angles, [M, h], in the dtype of activations; undefined
  // without rotation. The halves of a row are equal.
  at::Tensor cos, sin;
  bool has_norms() const { return q_norm.defined(); }
  bool rotates() const { return cos.defined(); }
  bool is_plain() const { return !has_norms() && !rotates(); }
  int64_t queries() const { return q * width; }
  int64_t keys() const { return k * width; }
  int64_t total() const { return queries() + 2 * keys(); }
};

// A linear layer whose experts, A [r, i] and B^T [r, o], are to be written to their places in a
// packed weight [W A^T; B^T 0]: A^T to `packed_a`, [i, R'], and B^T to `packed_b`, [R', o].
struct Refreshed {
  at::Tensor a, b, packed_a, packed_b;
};

// A linear layer with experts whose input goes through dropout.
struct DroppedMember {
  at::Tensor bits;                // its mask (csrc/dropout.h)
  at::Tensor a;                   // A, [R, i]
  int64_t first_rank, num_ranks;  // its columns in the product's rank space
};

enum class Epilogue { None, Bias, GeluAuxBias, DGelu };

// What the experts of a linear layer add to its output, v B^T (csrc/step.cpp).
struct Updates {
  at::Tensor b;                     // B^T, [R', out]
  at::Tensor g;                     // routing weights [M, e]; undefined if all are 1
  const RankColumns *rank_columns;  // null if no experts add to the output
  // the first column and the first rank of each linear layer in the product, and then the ends
  std::vector<int64_t> first_out, first_rank;
};
// The output of a linear layer without its bias, and in some cases without its experts' updates.
struct Unfinished {
  // without the updates, x [W A^T], [M, out + R']; with them or without experts, [M, out]; it may
  // be undefined
  at::Tensor product;
  at::Tensor bias;     // [out]; undefined if none is to be added
  Updates updates;
  int64_t out;
};
// What a thin product multiplies.
struct ThinInput {
  // x; norm(x + y), where the sum is written to `sum`; or the activation of y
  enum Kind { Plain, Normed, Activated } kind;
  at::Tensor x;  // [M, in]; undefined for an activation
  Unfinished y;
  at::Tensor norm_w, norm_b;
  double eps;
  at::Tensor sum;
  int activation;  // as in csrc/mlp.h
};
// The part of a layer's cache that a step uses, for M texts.
struct StepCache {
  at::Tensor keys, values;  // [M, key-value heads, positions, head size]
  at::Tensor places;        // where each text's new position goes in its row, int64 [M]
  at::Tensor positions;     // index of each text's new position in its text, int64 [M]
  Heads heads;              // without cosines and sines
  at::Tensor frequencies;   // of rotation, f32 [head size / 2]; undefined if there is none
  double rope_factor;       // of cosines and sines
  int64_t window;           // 0 means that there is none
  double scale;
};

// Matrices are 2-dim with contiguous columns. Optional tensors may be undefined.
struct Kernels {
  // Compute capability of the device that was current at the first call, times ten.
  int (*capability)();
  // Whether there are kernels for activations of this dtype and width.
  bool (*apply_to)(at::ScalarType kind, int64_t width);
  // sum = x + y and a = LayerNorm(sum), or RMSNorm(sum) if b is undefined; then there is no mean.
  // If y is undefined, sum is x and is not written.
  bool (*add_norm)(const at::Tensor &x, const at::Tensor &y, const at::Tensor &w,
                   const at::Tensor &b, double eps, const at::Tensor &sum, const at::Tensor &a,
                   const at::Tensor &mean, const at::Tensor &rstd);
  // dx = residual + the gradient of the norm at x for the output's gradient da; without `mean`, the
  // norm is RMSNorm
  bool (*norm_backward)(const at::Tensor &da, const at::Tensor &x, const at::Tensor &mean,
                        const at::Tensor &rstd, const at::Tensor &w, const at::Tensor &residual,
                        const at::Tensor &dx);
  bool (*weigh)(const at::Tensor &u, const at::Tensor &g, const RankColumns &rank_columns,
                const at::Tensor &v);
  // With `adds`, the gradient is added to dg, otherwise dg is set; dg is undefined if not wanted.
  bool (*weigh_backward)(const at::Tensor &dv, const at::Tensor &u, const at::Tensor &g,
                         const RankColumns &rank_columns, const at::Tensor &du,
                         const at::Tensor &dg, bool adds);
  // Writes the experts' parts of the packed weights of up to 8 linear layers.
  bool (*refresh)(const std::vector<Refreshed> &layers);
  // x += y where `mask` is set, times `scale`
  bool (*add_masked)(const at::Tensor &x, const at::Tensor &y, const at::Tensor &mask,
                     double scale);
  // Whether the next five kernels apply to an x like this, [.., i].
  bool (*draws_masks)(const at::Tensor &x);
  // The bits of a mask, [rows, columns / 8]. Each element is kept with the probability
  // keep / 65536. `seed` is an int64 on the device.
  at::Tensor (*draw_mask)(const at::Tensor &seed, int64_t rows, int64_t columns, int64_t keep);
  // out = scale (y through the mask), or with `adds` added to it; all [M, i]
  void (*drop_apply)(const at::Tensor &y, const at::Tensor &bits, double scale,
                     const at::Tensor &out, bool adds);
  // The next three are made for few ranks.
  // u = scale (x through each member's mask) A^T, [M, R'], in the members' columns
  void (*drop_down)(const at::Tensor &x, const std::vector<DroppedMember> &members, double scale,
                    const at::Tensor &u);
  // dx += scale (du A, through each member's mask), where `a_t` is A^T of all members, [i, R']
  void (*drop_up)(const at::Tensor &du, const at::Tensor &a_t,
                  const std::vector<DroppedMember> &members, double scale, const at::Tensor &dx);
  // du^T times x through each member's mask, times `scale`: the gradients of A, f32 [R', i]
  at::Tensor (*drop_grad)(const at::Tensor &x, const at::Tensor &du,
                          const std::vector<DroppedMember> &members, double scale);
  // The codes and scales of each row of x (csrc/quantised.h), contiguous.
  bool (*quantise)(const at::Tensor &x, const at::Tensor &codes, const at::Tensor &scales);
  bool (*gelu)(const at::Tensor &z, const at::Tensor &out);
  bool (*gelu_backward)(const at::Tensor &z, const at::Tensor &dout, const at::Tensor &dz);
  // out = silu(gate) * up for z = [gate | up]
  bool (*swiglu)(const at::Tensor &z, const at::Tensor &out);
  // dz = the gradient of z for the output's gradient; `again` = the output
  bool (*swiglu_backward)(const at::Tensor &z, const at::Tensor &dout, const at::Tensor &dz,
                          const at::Tensor &again);
  // Norms and rotation of the queries and keys in qkv, which `out` may be.
  bool (*rotate)(const Heads &heads, const at::Tensor &qkv, const at::Tensor &out);
  // out = [q | k | v], the gradient of `raw`; dq, dk and dv are [b, n, t, h]
  bool (*rotate_backward)(const Heads &heads, const at::Tensor &dq, const at::Tensor &dk,
                          const at::Tensor &dv, const at::Tensor &raw, const at::Tensor &out);
  // If `scale` is defined, the logits are replaced by their gradient.
  bool (*cross_entropy)(const at::Tensor &logits, const at::Tensor &labels, int64_t vocabulary,
                        double smoothing, const at::Tensor &scale, const at::Tensor &losses,
                        const at::Tensor &smoothed);
  // out = a b, transposed where ta and tb say so; a and b are bf16, out is bf16 or f32
  bool (*gemm)(const at::Tensor &out, const at::Tensor &a, bool ta, const at::Tensor &b, bool tb,
               Epilogue epilogue, const at::Tensor &bias, const at::Tensor &aux);
  // The kernels of csrc/kernels/step. out = tokens[ids] + positions[position_ids], where there may
  // be no positions.
  bool (*step_embed)(const at::Tensor &tokens, const at::Tensor &ids, const at::Tensor &positions,
                     const at::Tensor &position_ids, const at::Tensor &out);
  // sum = x + y and a = the norm of it; y has no updates. If `beside`, this may run beside the
  // operation in front.
  bool (*step_norm)(const at::Tensor &x, const Unfinished &y, const at::Tensor &w,
                    const at::Tensor &b, double eps, const at::Tensor &sum, const at::Tensor &a,
                    bool beside);
  // out = y, or with an `activation` of csrc/mlp.h, which is not negative, that of y
  bool (*step_finish)(const Unfinished &y, int activation, const at::Tensor &out);
  bool (*step_attention)(const Unfinished &y, const StepCache &cache, const at::Tensor &out);
  // out = the input times w, and the updates of the layer's experts, which have A^T `a`, [in, R'];
  // applies to at most 16 rows, and to a y without updates. `index` is that of the product in its
  // block.
  bool (*thin_product)(const ThinInput &input, const at::Tensor &w, const at::Tensor &a,
                       const Updates &updates, int index, const at::Tensor &out);
  // With `ids`, [M], the choice becomes the next token of each text, and its position and its place
  // are raised by 1.
  bool (*step_choice)(const at::Tensor &logits, int64_t vocabulary, const at::Tensor &choice,
                      const at::Tensor &ids, const at::Tensor &positions,
                      const at::Tensor &places);
  // Whether there are kernels for a router with weight w and bias b that reads x.
  bool (*routes)(const at::Tensor &x, const at::Tensor &w, const at::Tensor &b);
  // The scores of each row of x, their softmax, and the factor by which the row was normalised.
  void (*route)(const at::Tensor &x, const at::Tensor &w, const at::Tensor &b,
                const at::Tensor &temperature, bool normalizes, double eps,
                const at::Tensor &logits, const at::Tensor &probs, const at::Tensor &rstd);
  // The gradients of w, [e, d], and of b, [e], behind each other in one dimension. Either gradient
  // of the outputs may be undefined.
  at::Tensor (*route_backward)(const at::Tensor &x, const at::Tensor &rstd,
                               const at::Tensor &probs, const at::Tensor &dlogits,
                               const at::Tensor &dprobs, const at::Tensor &temperature);
};

// The kernels of this process, or null if it has none.
const Kernels *kernels();
