// Launches the kernels of csrc/kernels/step. Included by csrc/cuda.cpp.
#pragma once

// The same structs as in csrc/kernels/step.
struct UpdatesArgs {
  const void *b;
  int64_t ldb;
  const void *g, *expert_of, *scaling;
  int experts, ranks;
  int members, first_out[4], first_rank[4];
};
struct UnfinishedArgs {
  const void *product;
  int64_t ld;
  const void *bias;
  UpdatesArgs updates;
  int out;
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
static UpdatesArgs args_of(const Updates &updates) {
  UpdatesArgs args{};
  const RankColumns *columns = updates.rank_columns;
  if (!columns) return args;
  const auto &[b, g, _, first_out, first_rank] = updates;
  args.b = b.data_ptr(), args.ldb = ld(b), args.g = at_or_null(g);
  args.expert_of = columns->expert_of.data_ptr(), args.scaling = columns->scaling.data_ptr();
  args.experts = (int)columns->runs.size(0), args.ranks = (int)b.size(0);
  TORCH_CHECK(first_out.size() <= 4 && first_out.size() == first_rank.size());
  args.members = (int)first_out.size() - 1;
  for (int m = 0; m <= args.members; ++m)
    args.first_out[m] = (int)first_out[m], args.first_rank[m] = (int)first_rank[m];
  return args;
}
static UnfinishedArgs args_of(const Unfinished &y) {
  if (!y.product.defined()) return {nullptr, 0, nullptr, {}, (int)y.out};
  return {y.product.data_ptr(), ld(y.product), at_or_null(y.bias), args_of(y.updates), (int)y.out};
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
struct ThinExpertsArgs {
  const void *a;
  UpdatesArgs updates;
  void *v;
  const void *turn;
  int index, segments, v_terms;
};
static bool fits(const Unfinished &y) {
  return !y.product.defined() || (packs(y.product) && packs(y.updates.b));
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

constexpr int64_t SHARED_MEMORY = 47 << 10;    // bytes that any kernel may have beside its own
constexpr int64_t MAX_SPLITS = 16;             // as in csrc/kernels/step/attention.cuh
constexpr int64_t MAX_CLUSTER = 8;             // blocks
constexpr int64_t SHARED_OF_MANY = 56 << 10;   // two ManyShared of csrc/kernels/step/many.cuh
constexpr int64_t SHARED_OF_THIN = 100 << 10;  // so that two blocks run at once
constexpr int64_t MULTIPROCESSORS = 132;       // of an H100; about as many blocks are wanted
constexpr int64_t THIN_PADDING = 16;           // as in csrc/kernels/step/thin.cuh
constexpr int64_t COUNTERS = 1 << 14;
constexpr int64_t SMALL_MATRIX = 1 << 22;      // has fewer elements
constexpr int MLP_IN = 2;                      // as in csrc/product.h
constexpr int64_t MOST_MARKED = 1 << 16;       // numbers of a thin product's v
static bool has(const KernelModule *module, Name name) {
  return module && module->functions[0][name];
}
// Bytes of shared memory that a block of a thin product may have.
static int64_t shared_of_thin(const KernelModule &module) {
  return std::max(SHARED_MEMORY, std::min<int64_t>(SHARED_OF_THIN, module.shared_memory));
}
static int64_t per_pack(const Tensor &x) { return 16 / x.element_size(); }

static bool step_embed(const Tensor &tokens, const Tensor &ids, const Tensor &positions,
                       const Tensor &position_ids, const Tensor &out) {
  auto module = module_of(out, out.size(1));
  const bool are_alike = tokens.scalar_type() == out.scalar_type() &&
                         (!positions.defined() || positions.scalar_type() == out.scalar_type());
  if (!has(module, StepEmbed) || !are_alike || !packs(tokens) || !packs(positions) ||
      !ids.is_contiguous() || !position_ids.is_contiguous())
    return false;
  run_early(module, StepEmbed, out, out.size(0), 128, 0, tokens.data_ptr(), ld(tokens),
            ids.data_ptr(), at_or_null(positions), ld(positions), position_ids.data_ptr(),
            out.data_ptr());
  return true;
}

static bool step_norm(const Tensor &x, const Unfinished &y, const Tensor &w, const Tensor &b,
                      double eps, const Tensor &sum, const Tensor &a, bool beside) {
  const int64_t width = x.size(1);
  auto module = module_of(x, width);
  const auto args = args_of(y);
  if (!has(module, StepNorm) || !fits(y) || args.updates.ranks > 0) return false;
  run_early(module, StepNorm, x, x.size(0), 128, 0, x.data_ptr(), ld(x), args, w.data_ptr(),
            at_or_null(b), (float)eps, sum.data_ptr(), a.data_ptr(), (int)beside);
  return true;
}

// As step_finish, for a y with updates that tensor cores can compute.
static bool finish_many(const Unfinished &y, int activation, const Tensor &out) {
  auto module = any_module(out, latest_step);
  const auto args = args_of(y);
  const bool is_gated = activation == 2;  // SWIGLU
  const int64_t rows = out.size(0), columns = out.size(1), n = per_pack(out);
  if (out.scalar_type() != at::kBFloat16 || !has(module, FinishMany) || capability() < 80 ||
      args.updates.ranks == 0 || args.updates.ranks % n != 0 || columns % n != 0 || !fits(y) ||
      !packs(out))
    return false;
  const int64_t tiles = ceil_div(columns, is_gated ? 32 : 64);  // as in csrc/kernels/step/many.cuh
  run_early(module, FinishMany, out, tiles * ceil_div(rows, 64), 256, SHARED_OF_MANY, args,
            out.data_ptr(), ld(out), activation, (int)rows);
  return true;
}

static bool step_finish(const Unfinished &y, int activation, const Tensor &out) {
  if (finish_many(y, activation, out)) return true;
  auto module = any_module(out, latest_step);
  const auto args = args_of(y);
  const int64_t n = per_pack(out), all = out.size(1) / n;
  // enough blocks for all multiprocessors, or at least 8 packs in each
  const int64_t even = ceil_div(all * out.size(0), 2 * MULTIPROCESSORS);
  const int64_t packs_of_block = std::min<int64_t>(32, std::max<int64_t>(8, even));
  const int64_t chunks = ceil_div(all, packs_of_block);
  const int64_t shared = 4 * (256 * n + args.updates.ranks);
  if (!module || !fits(y) || !packs(out) || shared > SHARED_MEMORY) return false;
  run_early(module, StepFinish, out, out.size(0) * chunks, 256, shared, args, out.data_ptr(),
            activation, (int)packs_of_block);
  return true;
}

// What the blocks of a kernel tell each other, for all launches on a device: counters of blocks
// that have ended, of which the kernels leave zeros, the turn of attention, and the v of a thin
// product with its marks.
struct Shared {
  int *counters;
  void *turn, *v;
};
static Shared shared_numbers(const Tensor &like) {
  static std::map<int, Tensor> of_device;
  auto &numbers = of_device[like.device().index()];
  const int64_t before_v = COUNTERS + 4;  // a multiple of 16 bytes
  if (!numbers.defined())
    numbers = at::zeros({before_v + 2 * MOST_MARKED}, like.options().dtype(at::kInt));
  int *const first = (int *)numbers.data_ptr();
  return {first, first + COUNTERS, first + before_v};
}

static bool step_attention(const Unfinished &y, const StepCache &cache, const Tensor &out) {
  auto module = any_module(out, latest_step);
  const int64_t size = cache.keys.size(3), n = per_pack(out), lanes = size / n;
  const bool has_lanes = size % n == 0 && (lanes == 4 || lanes == 8 || lanes == 16 || lanes == 32);
  const auto args = args_of(y);
  const int threads = 256;
  const bool is_whole = cache.keys.stride(2) == size && cache.keys.stride(3) == 1 &&
                        cache.keys.strides() == cache.values.strides() && out.is_contiguous();
  if (!module || !has_lanes || !is_whole || !fits(y)) return false;
  const int64_t pairs = out.size(0) * cache.heads.q;
  // enough blocks for all multiprocessors, each of which has some positions
  const bool has_clusters = capability() >= 90;
  const int64_t most = has_clusters ? MAX_CLUSTER : MAX_SPLITS;
  const int64_t wanted = ceil_div(MULTIPROCESSORS, pairs), room = ceil_div(cache.keys.size(2), 128);
  const int64_t splits = std::max<int64_t>(1, std::min(std::min(wanted, room), most));
  const int64_t of_parts = splits > 1 ? splits * (size + 2) : 0;
  const int64_t shared = 4 * (threads * n + args.updates.ranks + of_parts);
  if (shared > SHARED_MEMORY) return false;
  Tensor partial;
  if (splits > 1 && !has_clusters)
    partial = at::empty({pairs * of_parts}, out.options().dtype(at::kFloat));
  const Shared numbers = shared_numbers(out);
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
  run_early_cluster(module, StepAttention, out, pairs * splits, threads, shared,
                    has_clusters ? splits : 1, args, at, (int)lanes, (int)splits,
                    (float *)at_or_null(partial), numbers.counters, numbers.turn, out.data_ptr());
  return true;
}

// How a thin product is computed: by which kernel, and how its blocks share the work.
struct ThinShape {
  Name kernel;
  int64_t threads;     // of a block
  int64_t lanes;       // threads that read a row of a segment of columns
  int64_t lanes_of_a;  // the same for A^T
  int64_t segments;    // of columns
  int64_t split;       // blocks of a cluster, which have some rows of the matrix each
  int64_t rows;        // that the kernel has room for
};
// Whether tensor cores multiply. Two rows of a small matrix are left to CUDA cores, whose kernels
// also compute norms and activations.
static bool by_tensor_cores(const Tensor &w, int64_t rows) {
  return w.scalar_type() == at::kBFloat16 && capability() >= 90 &&
         rows > (w.numel() < SMALL_MATRIX ? 2 : 1);
}
// Most rows of a thin product; with more of them, other kernels take less time.
static int64_t most_thin_rows(const ThinInput &input, const Tensor &w, int64_t rows,
                              bool has_experts, int index) {
  const bool is_small = w.numel() < SMALL_MATRIX;
  if (!by_tensor_cores(w, rows)) return w.scalar_type() == at::kFloat && is_small ? 4 : 2;
  if (input.kind != ThinInput::Plain) return 0;
  // behind this layer, the kernel of the activation adds the updates of the experts as well
  return has_experts && index == MLP_IN && !is_small ? 8 : 16;
}
// With tensor cores, or if it has many rows, a matrix is divided among clusters. `ranks` is the
// number of columns of A^T. These are the shapes of least time on an H200.
static ThinShape thin_shape(const Tensor &w, int64_t rows, int64_t ranks) {
  const int64_t in = w.size(0), columns = w.size(1), n = per_pack(w);
  const bool has_clusters = capability() >= 90, of_tensor = by_tensor_cores(w, rows);
  ThinShape shape{ThinProduct, 256, 8, 8, 0, 1, 8};
  if (!of_tensor) {
    shape.kernel = rows == 1 ? ThinProductOfOne : rows == 2 ? ThinProductOfTwo : ThinProduct;
    shape.rows = rows <= 2 ? rows : 4;
    shape.lanes = rows == 1 ? 8 : 16, shape.lanes_of_a = 4;
    if (in < 2048 || !has_clusters) {
      shape.threads = 512;
      shape.lanes = ceil_div(columns, 4 * n) >= 64 ? 4 : 2, shape.lanes_of_a = 2;
    }
  }
  if (of_tensor && rows > 8) shape.kernel = ThinProductOf16, shape.rows = 16;
  shape.segments = ceil_div(columns, shape.lanes * n);
  if (!has_clusters || shape.threads == 512) return shape;
  const int64_t at_once = shape.threads / shape.lanes * 4;  // rows, as in THIN_UNROLL
  // with several rows, smaller clusters take no less time
  const int64_t segments_of_a = rows == 1 ? ceil_div(ranks, shape.lanes_of_a * n) : 0;
  const auto fits = [&](int64_t split) {
    // a multiprocessor runs four blocks at once, or three with more than eight rows, or two by CUDA
    // cores with several rows; clusters of eight with experts do not always have room for four
    const bool is_tight = segments_of_a > 0 && split == MAX_CLUSTER;
    const int64_t blocks = rows > 1 && !of_tensor ? 2 : is_tight || rows > 8 ? 3 : 4;
    return split * (shape.segments + segments_of_a) <= blocks * multiprocessors() &&
           in >= split * at_once;
  };
  while (shape.split < MAX_CLUSTER && fits(2 * shape.split)) shape.split *= 2;
  return shape;
}

static bool thin_product(const ThinInput &input, const Tensor &w, const Tensor &a,
                         const Updates &updates, int index, const Tensor &out) {
  auto module =
      input.kind == ThinInput::Normed ? module_of(out, w.size(0)) : any_module(out, latest_step);
  const int64_t rows = out.size(0), n = per_pack(out), in = w.size(0);
  const bool is_plain = input.kind == ThinInput::Plain;
  const auto y = is_plain ? UnfinishedArgs{} : args_of(input.y);
  const bool knows_y = is_plain || (y.product && fits(input.y) && y.updates.ranks == 0 &&
                                    (input.kind == ThinInput::Activated || y.out == in));
  if (!has(module, ThinProduct) || rows < 1 || in % n != 0 || !packs(w) || !packs(input.x) ||
      !packs(a) || !packs(updates.b) || !knows_y)
    return false;
  if (rows > most_thin_rows(input, w, rows, a.defined(), index)) return false;
  ThinExpertsArgs experts{at_or_null(a), args_of(updates), nullptr, nullptr, index, 0, 1};
  const int64_t ranks = experts.updates.ranks;
  const auto shape = thin_shape(w, rows, ranks);
  int64_t split = shape.split;
  int64_t ranks_of_block = 0;
  if (ranks > 0) {
    // A block waits for those that write v. All of these run by then: there are no more of them
    // than multiprocessors, and blocks start in the order of their numbers.
    experts.segments = (int)ceil_div(ranks, shape.lanes_of_a * n);
    while (split > 1 && experts.segments * split > multiprocessors()) split /= 2;
    if (experts.segments * split > multiprocessors() || rows * ranks > MOST_MARKED) return false;
    // with several rows, v is there earlier if more blocks compute it
    const int64_t at_once_of_a = shape.threads / shape.lanes_of_a * 4;
    if (rows > 1 && in >= 2 * split * at_once_of_a &&
        2 * experts.segments * split <= multiprocessors() && 2 * rows * ranks <= MOST_MARKED)
      experts.v_terms = 2;
    const Shared numbers = shared_numbers(out);
    experts.turn = numbers.turn, experts.v = numbers.v;
    // those of a layer, or all where a segment has columns of several layers
    for (int m = 0; m < experts.updates.members; ++m) {
      const int *first_rank = experts.updates.first_rank + m;
      const bool is_apart = experts.updates.first_out[m] % (shape.lanes * n) == 0;
      const int64_t of_layer = is_apart ? first_rank[1] - first_rank[0] : ranks;
      ranks_of_block = std::max(ranks_of_block, of_layer);
    }
    ranks_of_block = ceil_div(ceil_div(ranks_of_block, split), 8) * 8;
  }
  // as in csrc/kernels/step/thin.cuh
  const int64_t columns = std::max(shape.lanes_of_a, shape.lanes) * n;
  int64_t terms = 0;  // from each block of a cluster
  if (split > 1)
    for (terms = 32; terms * split < rows * columns;) terms *= 2;
  const int64_t of_parts = shape.threads / 32 * shape.rows * columns;
  const int64_t length = ceil_div(ceil_div(in, split), n) * n;
  const int64_t of_input = is_plain ? 0 : rows * (length + THIN_PADDING);
  const int64_t shared =
      4 * (terms * split + of_parts + std::max(2 * columns, ranks_of_block) * rows) +
      (of_input + ranks_of_block * shape.lanes * n) * out.element_size();
  if (shared > shared_of_thin(*module)) return false;
  const ThinInputArgs args{(int)input.kind, at_or_null(input.x), ld(input.x), y,
                           at_or_null(input.norm_w), at_or_null(input.norm_b), (float)input.eps,
                           at_or_null(input.sum), input.activation};
  run_early_cluster(module, shape.kernel, out,
                    (experts.segments * experts.v_terms + shape.segments) * split,
                    (int)shape.threads, shared, split, args, w.data_ptr(), ld(w), experts,
                    out.data_ptr(), ld(out), (int)rows, (int)in, (int)w.size(1), (int)shape.lanes,
                    (int)split);
  return true;
}

static bool step_choice(const Tensor &logits, int64_t vocabulary, const Tensor &choice,
                        const Tensor &ids, const Tensor &positions, const Tensor &places) {
  auto module = any_module(logits);
  if (!module || !packs(logits)) return false;
  const int64_t per_row = ceil_div(vocabulary, per_pack(logits));
  int64_t split = 1;
  while (capability() >= 90 && split < MAX_CLUSTER && per_row >= 2 * split * 1024 &&
         2 * split * logits.size(0) <= multiprocessors())
    split *= 2;
  run_early_cluster(module, StepChoice, logits, logits.size(0) * split, 1024, 0, split,
                    logits.data_ptr(), ld(logits), (int)vocabulary, (int)per_row,
                    (double *)choice.data_ptr(), at_or_null(ids), at_or_null(positions),
                    at_or_null(places), (int)split);
  return true;
}
