// Launches the kernels of csrc/kernels/step. Included by csrc/cuda.cpp.
#pragma once

// The same structs as in csrc/kernels/step.
struct UnfinishedArgs {
  const void *product;
  int64_t ld;
  const void *bias, *b;
  int64_t ldb;
  const void *g, *expert_of, *scaling;
  int experts, ranks, out;
  int members, first_out[4], first_rank[4];
};
struct StepCacheArgs {
  void *keys, *values;
  int64_t row_stride, head_stride;
  const void *places, *positions;
  int heads, key_heads, window;
  float scale;
  const void *q_norm, *k_norm;
  float eps;
  const void *frequencies;
  float rope_factor;
};
static UnfinishedArgs args_of(const Unfinished &y) {
  UnfinishedArgs args{};
  args.out = (int)y.out;
  if (!y.product.defined()) return args;
  args.product = y.product.data_ptr(), args.ld = ld(y.product), args.bias = at_or_null(y.bias);
  if (!y.rank_columns) return args;
  args.b = y.b.data_ptr(), args.ldb = ld(y.b), args.g = at_or_null(y.g);
  args.expert_of = y.rank_columns->expert_of.data_ptr();
  args.scaling = y.rank_columns->scaling.data_ptr();
  args.experts = (int)y.rank_columns->runs.size(0), args.ranks = (int)y.b.size(0);
  TORCH_CHECK(y.first_out.size() <= 4 && y.first_out.size() == y.first_rank.size());
  args.members = (int)y.first_out.size() - 1;
  for (int m = 0; m <= args.members; ++m)
    args.first_out[m] = (int)y.first_out[m], args.first_rank[m] = (int)y.first_rank[m];
  return args;
}
struct ThinInputArgs {
  int kind;
  const void *x;
  int64_t ldx;
  UnfinishedArgs y;
  const void *norm_w, *norm_b;
  float eps;
  void *sum;
  int activation;
};
static bool fits(const Unfinished &y) {
  return !y.product.defined() || (packs(y.product) && packs(y.b));
}

// A launch that may begin before the kernel in front of it ends; the kernel itself waits for it.
// Its blocks are in clusters.
template <class... Args>
static void run_early_cluster(const KernelModule *module, Name name, const Tensor &like,
                              int64_t blocks, int threads, int64_t shared, int64_t cluster,
                              Args... args) {
  if (blocks == 0) return;
  CUlaunchAttribute attributes[2]{};
  attributes[0].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attributes[0].value.programmaticStreamSerializationAllowed = 1;
  attributes[1] = in_clusters(cluster);
  const int count = capability() < 90 ? 0 : cluster > 1 ? 2 : 1;
  launch_with(module, name, like, blocks, threads, shared, attributes, count, args...);
}
template <class... Args>
static void run_early(const KernelModule *module, Name name, const Tensor &like, int64_t blocks,
                      int threads, int64_t shared, Args... args) {
  run_early_cluster(module, name, like, blocks, threads, shared, 1, args...);
}

constexpr int64_t SHARED_MEMORY = 48 << 10;    // bytes that any kernel may have
constexpr int64_t OF_THIN_PRODUCT = 9 << 10;   // of these, what thin_product itself declares
constexpr int64_t MAX_SPLITS = 16;             // as in csrc/kernels/step/attention.cuh
constexpr int64_t MULTIPROCESSORS = 132;       // of an H100; about as many blocks are wanted
constexpr int64_t COUNTERS = 1 << 14;
static bool has(const KernelModule *module, Name name) {
  return module && module->functions[0][name];
}
static int64_t per_pack(const Tensor &x) { return 16 / x.element_size(); }

static bool step_norm(const Tensor &x, const Unfinished &y, const Tensor &w, const Tensor &b,
                      double eps, const Tensor &sum, const Tensor &a) {
  const int64_t width = x.size(1);
  auto module = module_of(x, width);
  const auto args = args_of(y);
  // many ranks are summed by many threads
  const int threads = args.ranks > 64 ? 1024 : args.ranks ? 256 : 128;
  const int64_t shared = 4 * (std::max(threads * per_pack(x), width) + args.ranks);
  if (!has(module, StepNorm) || !fits(y) || shared > SHARED_MEMORY) return false;
  run_early(module, StepNorm, x, x.size(0), threads, shared, x.data_ptr(), ld(x), args,
            w.data_ptr(), at_or_null(b), (float)eps, sum.data_ptr(), a.data_ptr());
  return true;
}

static bool step_finish(const Unfinished &y, int activation, const Tensor &out) {
  auto module = any_module(out, latest_step);
  const auto args = args_of(y);
  const int64_t n = per_pack(out), all = out.size(1) / n;
  // enough blocks for all multiprocessors, or at least 8 packs in each
  const int64_t even = ceil_div(all * out.size(0), 2 * MULTIPROCESSORS);
  const int64_t packs_of_block = std::min<int64_t>(32, std::max<int64_t>(8, even));
  const int64_t chunks = ceil_div(all, packs_of_block);
  const int64_t shared = 4 * (256 * n + args.ranks);
  if (!module || !fits(y) || !packs(out) || shared > SHARED_MEMORY) return false;
  run_early(module, StepFinish, out, out.size(0) * chunks, 256, shared, args, out.data_ptr(),
            activation, (int)packs_of_block);
  return true;
}

// Counts the blocks that have ended. The kernel leaves zeros, so that all launches on a device
// share them.
static Tensor counters(const Tensor &like) {
  static std::map<int, Tensor> of_device;
  auto &zeros = of_device[like.device().index()];
  if (!zeros.defined()) zeros = at::zeros({COUNTERS}, like.options().dtype(at::kInt));
  return zeros;
}

static bool step_attention(const Unfinished &y, const StepCache &cache, const Tensor &out) {
  auto module = any_module(out, latest_step);
  const int64_t size = cache.keys.size(3), n = per_pack(out), lanes = size / n;
  const bool has_lanes = size % n == 0 && (lanes == 4 || lanes == 8 || lanes == 16 || lanes == 32);
  const auto args = args_of(y);
  const int threads = 256;
  const int64_t shared = 4 * (threads * n + args.ranks);
  const bool is_whole = cache.keys.stride(2) == size && cache.keys.stride(3) == 1 &&
                        cache.keys.strides() == cache.values.strides() && out.is_contiguous();
  if (!module || !has_lanes || !is_whole || !fits(y) || shared > SHARED_MEMORY) return false;
  const int64_t pairs = out.size(0) * cache.heads.q;
  // enough blocks for all multiprocessors, each of which has some positions
  const int64_t wanted = ceil_div(MULTIPROCESSORS, pairs), room = ceil_div(cache.keys.size(2), 128);
  const int64_t splits = std::max<int64_t>(1, std::min(std::min(wanted, room), MAX_SPLITS));
  Tensor partial, arrived;
  if (splits > 1) {
    partial = at::empty({pairs * splits * (size + 2)}, out.options().dtype(at::kFloat));
    arrived = counters(out);
  }
  const StepCacheArgs at{cache.keys.data_ptr(),
                         cache.values.data_ptr(),
                         cache.keys.stride(0),
                         cache.keys.stride(1),
                         cache.places.data_ptr(),
                         cache.positions.data_ptr(),
                         (int)cache.heads.q,
                         (int)cache.heads.k,
                         (int)cache.window,
                         (float)cache.scale,
                         at_or_null(cache.heads.q_norm),
                         at_or_null(cache.heads.k_norm),
                         (float)cache.heads.eps,
                         at_or_null(cache.frequencies),
                         (float)cache.rope_factor};
  run_early(module, StepAttention, out, pairs * splits, threads, shared, args, at, (int)lanes,
            (int)splits, (float *)at_or_null(partial), (int *)at_or_null(arrived), out.data_ptr());
  return true;
}

static bool thin_product(const ThinInput &input, const Tensor &w, const Tensor &out) {
  auto module =
      input.kind == ThinInput::Normed ? module_of(out, w.size(0)) : any_module(out, latest_step);
  const int64_t rows = out.size(0), n = per_pack(out), columns = w.size(1), in = w.size(0);
  const bool is_plain = input.kind == ThinInput::Plain;
  const int64_t shared = is_plain ? 0 : rows * in * out.element_size();
  const auto y = is_plain ? UnfinishedArgs{} : args_of(input.y);
  const bool knows_y = is_plain || (y.product && fits(input.y) && y.ranks <= 32 &&
                                     (input.kind == ThinInput::Activated || y.out == in));
  if (!has(module, ThinProduct) || rows < 1 || rows > 4 || !packs(w) || !packs(input.x) ||
      !knows_y || shared > SHARED_MEMORY - OF_THIN_PRODUCT)
    return false;
  const ThinInputArgs args{(int)input.kind, at_or_null(input.x), ld(input.x), y,
                           at_or_null(input.norm_w), at_or_null(input.norm_b), (float)input.eps,
                           at_or_null(input.sum), input.activation};
  // longer segments where enough blocks remain; the columns of a large matrix are divided among the
  // blocks of a cluster instead
  const bool is_large = in >= 2048 && capability() >= 90;
  const int64_t lanes = is_large || ceil_div(columns, 4 * n) >= 64 ? 4 : 2;
  const int64_t segments = ceil_div(columns, lanes * n);
  const int64_t split = is_large && segments <= MULTIPROCESSORS / 2 ? 2 : 1;
  const int64_t blocks = is_large ? std::min(segments, MULTIPROCESSORS) : segments;
  run_early_cluster(module, is_large ? LargeThinProduct : ThinProduct, out, blocks * split,
                    512, shared, split, args,
                    w.data_ptr(), ld(w), out.data_ptr(), ld(out), (int)rows, (int)in, (int)columns,
                    (int)lanes, (int)split);
  return true;
}

static bool step_choice(const Tensor &logits, int64_t vocabulary, const Tensor &choice,
                        const Tensor &ids, const Tensor &positions, const Tensor &places) {
  auto module = any_module(logits);
  if (!module || !packs(logits)) return false;
  const int64_t per_row = ceil_div(vocabulary, per_pack(logits));
  run_early(module, StepChoice, logits, logits.size(0), 1024, 0, logits.data_ptr(), ld(logits),
            (int)vocabulary, (int)per_row, (double *)choice.data_ptr(), at_or_null(ids),
            at_or_null(positions), at_or_null(places));
  return true;
}
