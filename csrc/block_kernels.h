// Launches the kernels of csrc/kernels. Included by csrc/cuda.cpp.
#pragma once

// The blocks of 256 threads that compute the rows of a norm; as WARPS_OF_ROW in
// csrc/kernels/norm.cuh.
static int64_t norm_blocks(const Tensor &x) {
  const int64_t width = x.size(1), warps_of_row = width > 3072 ? 4 : width > 1536 ? 2 : 1;
  return ceil_div(x.size(0), 8 / warps_of_row);
}
static bool add_norm(const Tensor &x, const Tensor &y, const Tensor &w, const Tensor &b, double eps,
                     const Tensor &sum, const Tensor &a, const Tensor &mean, const Tensor &rstd) {
  auto module = module_of(x, x.size(1));
  if (!module || !packs(x) || !packs(y) || !packs(a)) return false;
  run(module, AddNorm, x, norm_blocks(x), 256, 0, x.data_ptr(), ld(x), at_or_null(y), ld(y),
      w.data_ptr(), at_or_null(b), (float)eps, y.defined() ? sum.data_ptr() : nullptr,
      a.data_ptr(), ld(a), at_or_null(mean), rstd.data_ptr(), x.size(0));
  return true;
}
static bool norm_backward(const Tensor &da, const Tensor &x, const Tensor &mean, const Tensor &rstd,
                          const Tensor &w, const Tensor &residual, const Tensor &dx) {
  auto module = module_of(x, x.size(1));
  if (!module || !packs(da) || !packs(residual) || !packs(dx) || !x.is_contiguous()) return false;
  run(module, NormBackward, x, norm_blocks(x), 256, 0, da.data_ptr(), ld(da), x.data_ptr(),
      at_or_null(mean), rstd.data_ptr(), w.data_ptr(), at_or_null(residual), ld(residual),
      dx.data_ptr(), ld(dx), x.size(0));
  return true;
}
static bool weigh(const Tensor &u, const Tensor &g, const RankColumns &rank_columns,
                  const Tensor &v) {
  auto module = any_module(u);
  if (!module) return false;
  const bool aligned = packs(u) && packs(v);
  const int64_t total = u.numel() / (aligned ? 16 / u.element_size() : 1);
  run(module, Weigh, u, ceil_div(total, 256), 256, 0, u.data_ptr(), ld(u), at_or_null(g),
      (int)rank_columns.runs.size(0), rank_columns.expert_of.data_ptr(),
      rank_columns.scaling.data_ptr(), v.data_ptr(), ld(v), (int)u.size(1), total,
      (int)aligned);
  return true;
}
static bool weigh_backward(const Tensor &dv, const Tensor &u, const Tensor &g,
                           const RankColumns &rank_columns, const Tensor &du, const Tensor &dg,
                           bool adds) {
  auto module = any_module(u);
  const int columns = (int)u.size(1), warps = columns <= 1024 ? 8 : 2;
  if (!module || columns > 4096) return false;
  run(module, WeighBackward, u, ceil_div(u.size(0), warps), 32 * warps, columns * warps * 4,
      dv.data_ptr(), ld(dv), u.data_ptr(), ld(u), at_or_null(g), (int)rank_columns.runs.size(0),
      rank_columns.expert_of.data_ptr(), rank_columns.scaling.data_ptr(),
      rank_columns.runs.data_ptr(), (int)rank_columns.runs.size(1) / 2, du.data_ptr(), ld(du),
      at_or_null(dg), (int)adds, columns,
      u.size(0), (int)(packs(dv) && packs(u) && packs(du)));
  return true;
}
static bool add_masked(const Tensor &x, const Tensor &y, const Tensor &mask, double scale) {
  auto module = any_module(x);
  if (!module || !packs(x) || !packs(y) || !mask.is_contiguous() ||
      (uint64_t)mask.data_ptr() % 16 || mask.scalar_type() != at::kBool)
    return false;
  const int64_t n = x.size(0) * (x.size(1) * x.element_size() / 16);
  run(module, AddMasked, x, ceil_div(n, 256), 256, 0, x.data_ptr(), ld(x), y.data_ptr(), ld(y),
      mask.data_ptr(), (float)scale, (int)x.size(1), n);
  return true;
}
// As in csrc/kernels/experts.cuh.
struct RefreshedArgs {
  const void *a, *b;
  void *of_a, *of_b;
  int64_t ld;
  int in, out, ranks, first_block;
};
constexpr size_t MOST_REFRESHED = 8;
struct AllRefreshedArgs {
  RefreshedArgs layers[MOST_REFRESHED];
  int count;
};
static bool refresh(const std::vector<Refreshed> &layers) {
  if (layers.empty()) return true;
  auto module = any_module(layers[0].packed_a);
  if (!module || layers.size() > MOST_REFRESHED) return false;
  AllRefreshedArgs all{};
  int64_t blocks = 0;
  for (const auto &layer : layers) {
    const Tensor &a = layer.a, &b = layer.b;
    if (a.scalar_type() != at::kFloat || !a.is_contiguous() || !b.is_contiguous()) return false;
    all.layers[all.count++] = {a.data_ptr(),
                               b.data_ptr(),
                               layer.packed_a.data_ptr(),
                               layer.packed_b.data_ptr(),
                               ld(layer.packed_a),
                               (int)a.size(1),
                               (int)b.size(1),
                               (int)a.size(0),
                               (int)blocks};
    blocks += ceil_div(a.numel() + b.numel(), 256);
  }
  run(module, Refresh, layers[0].packed_a, blocks, 256, 0, all);
  return true;
}
static bool quantise(const Tensor &x, const Tensor &codes, const Tensor &scales) {
  auto module = any_module(x);
  if (!module || x.scalar_type() != at::kBFloat16 || !packs(x) || capability() < 89) return false;
  // as many threads as leave each of them 32 numbers, which it keeps in registers
  const int64_t threads = std::clamp<int64_t>(32 * ceil_div(x.size(1), 32 * 32), 32, 1024);
  run(module, Quantise, x, x.size(0), (int)threads, 0, x.data_ptr(), ld(x), codes.data_ptr(),
      scales.data_ptr(), (int)x.size(1));
  return true;
}
static bool gelu(const Tensor &z, const Tensor &out) {
  auto module = any_module(z);
  if (!module || !packs(z) || !packs(out)) return false;
  const int64_t n = z.size(0) * (z.size(1) * z.element_size() / 16);
  run(module, Gelu, z, ceil_div(n, 256), 256, 0, z.data_ptr(), ld(z), out.data_ptr(), ld(out),
      (int)z.size(1), n);
  return true;
}
static bool gelu_backward(const Tensor &z, const Tensor &dout, const Tensor &dz) {
  auto module = any_module(z);
  if (!module || !packs(z) || !packs(dout) || !packs(dz)) return false;
  const int64_t n = z.size(0) * (z.size(1) * z.element_size() / 16);
  run(module, GeluBackward, z, ceil_div(n, 256), 256, 0, z.data_ptr(), ld(z), dout.data_ptr(),
      ld(dout), dz.data_ptr(), ld(dz), (int)z.size(1), n);
  return true;
}
static bool swiglu(const Tensor &z, const Tensor &out) {
  auto module = any_module(z);
  if (!module || !packs(z) || !packs(out)) return false;
  const int64_t n = out.size(0) * (out.size(1) * out.element_size() / 16);
  run(module, SwiGlu, z, ceil_div(n, 256), 256, 0, z.data_ptr(), ld(z), out.data_ptr(), ld(out),
      (int)out.size(1), n);
  return true;
}
static bool swiglu_backward(const Tensor &z, const Tensor &dout, const Tensor &dz,
                            const Tensor &again) {
  auto module = any_module(z);
  if (!module || !packs(z) || !packs(dout) || !packs(dz) || !packs(again)) return false;
  const int64_t n = dout.size(0) * (dout.size(1) * dout.element_size() / 16);
  run(module, SwiGluBackward, z, ceil_div(n, 256), 256, 0, z.data_ptr(), ld(z), dout.data_ptr(),
      ld(dout), dz.data_ptr(), ld(dz), again.data_ptr(), ld(again), (int)dout.size(1), n);
  return true;
}
// The threads that share a head, each with 16 bytes of either half; 0 if the kernels do not know
// heads of this width.
static int64_t lanes_of(const Heads &heads, const Tensor &like) {
  const int64_t n = 2 * 16 / like.element_size(), lanes = heads.width / n;
  const bool is_power = lanes > 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
  // without norms, threads of a head do not wait for each other
  return heads.width % n == 0 && (is_power || !heads.has_norms()) ? lanes : 0;
}
static bool rotate(const Heads &heads, const Tensor &qkv, const Tensor &out) {
  auto module = any_module(qkv);
  const int64_t lanes = lanes_of(heads, qkv);
  if (!module || !lanes || !packs(qkv) || !packs(out)) return false;
  const int64_t n = qkv.size(0) * (heads.q + 2 * heads.k) * lanes;
  run(module, Rotate, qkv, ceil_div(n, 256), 256, 0, qkv.data_ptr(), ld(qkv), out.data_ptr(),
      ld(out), at_or_null(heads.q_norm), at_or_null(heads.k_norm), (float)heads.eps,
      at_or_null(heads.cos), at_or_null(heads.sin), (int)heads.q, (int)heads.k, (int)lanes, n);
  return true;
}
static bool rotate_backward(const Heads &heads, const Tensor &dq, const Tensor &dk,
                            const Tensor &dv, const Tensor &raw, const Tensor &out) {
  auto module = any_module(out);
  const int64_t lanes = lanes_of(heads, out);
  if (!module || !lanes || !packs(out) || !packs(raw)) return false;
  for (const Tensor *x : {&dq, &dk, &dv})
    if (!x->transpose(1, 2).is_contiguous() || (uint64_t)x->data_ptr() % 16) return false;
  const int64_t n = out.size(0) * (heads.q + 2 * heads.k) * lanes;
  run(module, RotateBackward, out, ceil_div(n, 256), 256, 0, dq.data_ptr(), dk.data_ptr(),
      dv.data_ptr(), at_or_null(raw), ld(raw), out.data_ptr(), ld(out), at_or_null(heads.q_norm),
      at_or_null(heads.k_norm), (float)heads.eps, at_or_null(heads.cos), at_or_null(heads.sin),
      (int)heads.q, (int)heads.k, (int)lanes, n);
  return true;
}
static bool cross_entropy(const Tensor &logits, const Tensor &labels, int64_t vocabulary,
                          double smoothing, const Tensor &scale, const Tensor &losses,
                          const Tensor &smoothed) {
  auto module = any_module(logits);
  if (!module || !packs(logits)) return false;
  // a row that is too long for the shared memory of one block may fit into that of a few
  const int64_t bytes = logits.size(1) * logits.element_size(), most = module->shared_memory;
  const int64_t blocks = ceil_div(ceil_div(bytes, 16), std::max<int64_t>(1, most / 16));
  const int64_t split = scale.defined() && capability() >= 90 && blocks <= 4 ? blocks : 1;
  const int64_t shared = ceil_div(ceil_div(bytes, 16), split) * 16;
  const bool keeps = shared <= most;
  run_cluster(module, CrossEntropy, logits, logits.size(0) * split, 512, keeps ? shared : 0, split,
              logits.data_ptr(), ld(logits), labels.data_ptr(), (int)vocabulary,
              (int)logits.size(1), (float)smoothing, at_or_null(scale), losses.data_ptr(),
              smoothed.data_ptr(), (int)keeps, (int)split);
  return true;
}
