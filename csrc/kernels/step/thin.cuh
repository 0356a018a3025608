// Products with few rows.

// What a thin product multiplies.
template <class T> struct ThinInput {
  int kind;  // 0: x; 1: norm(x + y), where x + y is written to `sum`; 2: the activation of y
  const T *x;
  i64 ldx;
  Unfinished<T> y; // has no ranks
  const T *norm_w, *norm_b;
  float eps;
  T *sum;
  int activation;
};

// The experts of the layer whose weight is multiplied, for a product that is finished but for its
// bias. The first blocks compute v: the products of x with some columns of A^T, times the scaling
// and the routing weights. The others read v behind their part of x W, and add v B^T to it.
template <class T> struct ThinExperts {
  const T *a;  // A^T, [in, ranks]; its rows are as far apart as those of the weight
  Updates<T> updates;
  // v, [v_terms, rows, ranks], and behind each number a mark that tells whether this product wrote
  // it
  uint2 *v;
  const u32 *turn;  // the number of layers whose attention was computed
  int index;        // of the product among those of a layer; there are 4
  int segments;     // of columns of A^T
  int v_terms;      // of each number of v, 1 or 2; if 2, each half of the rows of A^T gives one
};

// A pack of y's finished values, added to `out`.
template <class T>
static __device__ __forceinline__ void finish_pack(const Unfinished<T> &y, i64 row, int c,
                                                   float *out) {
  constexpr int N = Pack<T>::N;
  // no branch, so that the loads of several packs are under way at once
  const T *product = y.product + row * y.ld + c;
  float x[N], bias[N];
  Pack<T>::load(product, x);
  Pack<T>::load(y.bias ? y.bias + c : product, bias);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] += x[i] + (y.bias ? bias[i] : 0.f);
}

// Writes a pack of the activation of y.
template <class T>
static __device__ __forceinline__ void activate_pack(const ThinInput<T> &input, int m, int c,
                                                     int in, T *out) {
  constexpr int N = Pack<T>::N;
  float z[N] = {};
  finish_pack(input.y, m, c, z);
  if (input.activation == SWIGLU) {
    float up[N] = {};
    finish_pack(input.y, m, in + c, up);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = z[i] / (1.f + __expf(-z[i])) * up[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = gelu_of(z[i], input.activation == TANH_GELU);
  }
  Pack<T>::store(out, z);
}

// The sum over neighbouring warps. With more than one, all threads of the block take part.
template <int WARPS> static __device__ __forceinline__ float sum_of_warps(float x) {
  x = warp_sum(x);
  if constexpr (WARPS > 1) {
    __shared__ float of_warps[16];
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) x += of_warps[threadIdx.x / 32 / WARPS * WARPS + k];
  }
  return x;
}

// Writes columns [begin, end) of the input of a thin product to shared memory, in rows that are
// `stride` apart. Every block does so for the columns that it needs, since with few rows that takes
// less time than another kernel.
template <class T, int ROWS>
static __device__ __forceinline__ void make_input(const ThinInput<T> &input, int rows, int in,
                                                  int begin, int end, T *out, int stride) {
  // a row that is wide is normed by more warps
  constexpr int N = Pack<T>::N, WARPS = WIDTH <= 1024 ? (ROWS == 1 ? 4 : 1) : ROWS == 1 ? 8 : 4;
  constexpr int THREADS = 32 * WARPS, PACKS = (WIDTH / N + THREADS - 1) / THREADS;
  const int thread = threadIdx.x % THREADS, length = end - begin;
  if (input.kind == 2) {
    const int per_row = length / N;
    for (int t = threadIdx.x; t < rows * per_row; t += blockDim.x)
      activate_pack(input, t / per_row, begin + t % per_row * N, in,
                    out + t / per_row * stride + t % per_row * N);
  } else {
    // as many rows at once as the block has threads for
    for (int first = 0; first < rows; first += blockDim.x / THREADS) {
      const int m = first + threadIdx.x / THREADS;
      if (WARPS == 1 && m >= rows) break;
      float x[PACKS][N] = {};
#pragma unroll
      for (int k = 0; k < PACKS; ++k) {
        const int c = (k * THREADS + thread) * N;
        if (m >= rows || c >= WIDTH) continue;
        float added[N] = {};
        finish_pack(input.y, m, c, added);
        Pack<T>::load(input.x + m * input.ldx + c, x[k]);
#pragma unroll
        for (int i = 0; i < N; ++i) x[k][i] = rounded_sum<T>(x[k][i], added[i]);
      }
      if (blockIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
          const int c = (k * THREADS + thread) * N;
          if (m < rows && c < WIDTH) Pack<T>::store(input.sum + m * WIDTH + c, x[k]);
        }
      }
      normalise<T, PACKS>(x, m < rows ? thread : WIDTH, THREADS, input.norm_w, input.norm_b,
                          input.eps,
                          [](float of_thread) { return sum_of_warps<WARPS>(of_thread); });
#pragma unroll
      for (int k = 0; k < PACKS; ++k) {
        const int c = (k * THREADS + thread) * N;
        if (m < rows && c >= begin && c < end)
          Pack<T>::store(out + m * stride + c - begin, x[k]);
      }
    }
  }
  __syncthreads();
}

// The sum of `count` numbers, a multiple of AT_ONCE, that are `stride` apart.
template <int AT_ONCE>
static __device__ __forceinline__ float sum_of_parts(const float *parts, int stride, int count) {
  float total = 0;
#pragma unroll 1
  for (int k = 0; k < count; k += AT_ONCE)
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) total += parts[(k + i) * stride];
  return total;
}

// Numbers between the rows of what threads read at once, for few conflicts of banks.
#define THIN_PADDING 16
#define ATTN_OUT 1  // the index of the layer behind attention, as in csrc/product.h

// How the blocks of a cluster share the outputs of a segment, [rows, width]. Each block finishes
// some of them, and all blocks send it their terms of these.
struct ThinOutputs {
  int count;
  int split;     // blocks, a power of two
  int shift;     // a block finishes 2^shift outputs
  float *terms;  // [split, 2^shift]
  u64 *inbox;
  __device__ __forceinline__ ThinOutputs(int count, int split, float *terms, u64 *inbox)
      : count(count), split(split), shift(shift_of(count, split)), terms(terms), inbox(inbox) {}
  static __device__ __forceinline__ int shift_of(int count, int split) {
    return split == 1 ? 30 : max(5, 32 - __clz((count + split - 1 >> log_2(split)) - 1));
  }
  // How many terms come to a block, if there are several.
  static __device__ __forceinline__ int terms_of(int count, int split) {
    return split == 1 ? 0 : split << shift_of(count, split);
  }
  // the block's place in the cluster
  __device__ __forceinline__ int rank() const { return blockIdx.x & split - 1; }
  __device__ __forceinline__ int end() const { return min(count, rank() + 1 << shift); }
  __device__ __forceinline__ int first() const { return (rank() << shift) + threadIdx.x; }
  __device__ __forceinline__ int place(int i) const { return i & (1 << shift) - 1; }
  __device__ __forceinline__ void open() const {
    if (split > 1) open_inbox(inbox, 4 * split * max(0, end() - (rank() << shift)));
  }
  // Sends the block's terms. If this thread finishes outputs, waits for all terms that come to the
  // block, which so does not end before they are there.
  template <class F> __device__ __forceinline__ void exchange(F term_of) const {
    wait_for_inboxes();
    for (int i = threadIdx.x; i < count; i += blockDim.x)
      send(terms + (rank() << shift) + place(i), inbox, term_of(i), i >> shift);
    if (first() < end()) wait_for_sent(inbox);
  }
  // Behind `exchange`: an output.
  __device__ __forceinline__ float sum(int i) const {
    return sum_of_parts<2>(terms + place(i), 1 << shift, split);
  }
};

// Calls `f` with the index, in [rows, width], and the row and the column of each output that this
// thread finishes.
template <class Part, class F>
static __device__ __forceinline__ void for_outputs(const Part &part, const ThinOutputs &outputs,
                                                   F f) {
  const int shift = log_2(part.width());
  for (int i = outputs.first(); i < outputs.end(); i += blockDim.x) {
    const int row = i >> shift, column = (part.segment << shift) + i - (row << shift);
    if (column < part.columns) f(i, row, column);
  }
}

// out = x w + v B^T, where `part` and `b` are the block's parts of w and B^T, the first packs of w
// are in `packs`, b is copied to `b_rows`, `numbers` has room for v, and x begins with the column
// part.begin. The blocks of a cluster have some rows of w and B^T each. If `scales`,
// [2, rows, width], is not null, the part is one of A^T, and its product times both of these
// factors becomes v, or a term of it, at `own_v`.
template <class T, class Sums>
static __device__ __forceinline__ void
thin_product(const ThinPart<T, Sums> &part, const ThinPart<T, Sums> &b, float *numbers, T *b_rows,
             uint4 (&packs)[THIN_UNROLL], const ThinRows<T> &x, const ThinExperts<T> &experts,
             u32 turn, const float *scales, uint2 *own_v, const ThinOutputs &outputs, T *out,
             i64 ldo, float *parts) {
  constexpr int ROWS = Sums::ROWS;
  const int width = part.width(), at_once = part.at_once(), warps = blockDim.x / 32;
  // of this product; it differs from those of the products before
  const u32 mark = (turn << 2 | experts.index) + 1;
  Sums sums;
  typename Sums::Factors factors(part, x, part.begin);
  int from = part.begin;
  const int end = Sums::ENDS_APART ? part.end - at_once : part.end;
#pragma unroll 1
  for (; from < end; from += at_once) {
    uint4 now[THIN_UNROLL];
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) now[i] = packs[i];
    const typename Sums::Factors of_now = factors;
    auto load_next = [&] {
      if (!Sums::ENDS_APART && from + at_once >= part.end) return;
      part.load(from + at_once, packs);
      factors = typename Sums::Factors(part, x, from + at_once);
    };
    if (Sums::LOADS_AHEAD) load_next();
    sums.add(part, from, of_now, now);
    if (!Sums::LOADS_AHEAD) load_next();
  }
  if (Sums::ENDS_APART) sums.add(part, from, factors, packs);
  if (experts.updates.ranks > 0 && !scales) {
    wait_for_copies();
    const typename Sums::Marked v(b, experts.v, experts.v_terms, experts.updates.ranks, x.count,
                                  mark, numbers);
    for (int k = b.begin; b.has_rows(k); k += b.copied_at_once()) {
      const auto of_v = v.factors(b, k);
      uint4 copied[Sums::COPIED];
      b.load_copied(b_rows, k, copied);
      sums.add(b, k, of_v, copied);
    }
  }
  sums.write(part, parts);
  __syncthreads();
  auto total_of = [&](int i) {
    return sum_of_parts<8>(parts + Sums::place(i), ROWS * width, warps);
  };
  if (outputs.split > 1) outputs.exchange(total_of);
  if (scales) wait_for_copies();
  for_outputs(part, outputs, [&](int i, int m, int column) {
    const float total = outputs.split > 1 ? outputs.sum(i) : total_of(i);
    if (scales)
      put_marked(own_v + m * part.columns + column,
                 total * (scales[i] * scales[outputs.count + i]), mark);
    else
      put(out + m * ldo + column, total);
  });
}

// The same for the input that `input` describes, which has at most Sums::ROWS rows. The first
// clusters multiply with A^T.
template <class T, class Sums>
static __device__ __forceinline__ void thin_products(const ThinInput<T> &input, const T *w, i64 ldw,
                                                     const ThinExperts<T> &experts, T *out, i64 ldo,
                                                     int rows, int in, int columns, int given_lanes,
                                                     int split) {
  extern __shared__ uint4 of_product[];
  __shared__ u64 inbox;
  const Updates<T> &updates = experts.updates;
  const int lanes = Sums::lanes(given_lanes), shift = log_2(split), rank = blockIdx.x & split - 1;
  const int halves = Sums::MAY_HALVE && experts.v_terms == 2;
  const int cluster = blockIdx.x >> shift, segment = cluster - (experts.segments << halves);
  ThinPart<T, Sums> part{w, ldw, 0, 0, columns, segment, lanes};
  // the block's place among the 2^rows_shift ones that share the rows
  int place = rank, rows_shift = shift;
  uint2 *own_v = experts.v;
  if (segment < 0) {
    const int half = cluster & halves;
    part = {experts.a, ldw, 0, 0, updates.ranks, cluster >> halves, Sums::lanes_of_a()};
    place += half << shift, rows_shift += halves;
    own_v += half * rows * updates.ranks;
  }
  // whole packs
  const int share = in + (1 << rows_shift) - 1 >> rows_shift;
  const int per_block = (share + Pack<T>::N - 1) / Pack<T>::N * Pack<T>::N;
  part.begin = min(in, place * per_block), part.end = min(in, part.begin + per_block);
  uint4 packs[THIN_UNROLL];
  part.load(part.begin, packs);
  const int most_columns = max(Sums::lanes_of_a(), lanes) * Pack<T>::N;
  const int of_parts = blockDim.x / 32 * Sums::ROWS * most_columns;
  float *const terms = (float *)of_product, *scales = nullptr, *routing = nullptr;
  float *const parts = terms + ThinOutputs::terms_of(rows * most_columns, split);
  const ThinOutputs outputs(rows * part.width(), split, terms, &inbox);
  outputs.open();
  T *const made = (T *)(parts + of_parts);
  // the weights of a part of A^T, or v and behind it the block's part of B^T
  float *const numbers = (float *)(made + (input.kind ? rows * (per_block + THIN_PADDING) : 0));
  T *b_rows = nullptr;
  ThinPart<T, Sums> b = part;
  if (segment < 0) {
    scales = numbers, routing = scales + rows * part.width();
    for_outputs(part, outputs, [&](int i, int m, int column) {
      scales[i] = updates.scaling[column];
      // where the routing weight is
      routing[i] = updates.g ? __int_as_float(m * updates.experts + updates.expert_of[column]) : 1;
    });
  } else if (updates.ranks) {
    const int last = min(columns, (part.segment + 1) * part.width()) - Pack<T>::N;
    const int begin = updates.ranks_of(part.segment * part.width()).x;
    const int end = updates.ranks_of(last).y;
    const int per_part = ((end - begin + split - 1 >> shift) + 7) / 8 * 8;
    // B^T is 0 in the rows of the other layers whose columns the segment has
    b.w = updates.b, b.ld = updates.ldb;
    b.begin = min(end, begin + rank * per_part), b.end = min(end, b.begin + per_part);
    b_rows = (T *)(numbers + rows * (b.end - b.begin));
    b.copy(b_rows);
  }
  // attention raises the turn, and may still run in front of one of the layers
  const bool reads_early = experts.index != ATTN_OUT;
  u32 turn = 0;
  if (updates.ranks && reads_early) turn = __ldcg(experts.turn);
  wait_for_inputs();
  // the router may be the kernel in front
  if (routing && updates.g)
    for_outputs(part, outputs, [&](int i, int, int) {
      copy_4(routing + i, updates.g + __float_as_int(routing[i]));
    });
  if (updates.ranks && !reads_early) turn = __ldcg(experts.turn);
  ThinRows<T> x{input.x + part.begin, input.ldx, part.begin, rows};
  if (Sums::MAKES_INPUT && input.kind) {
    x.x = made, x.ld = part.end - part.begin + THIN_PADDING;
    make_input<T, Sums::ROWS>(input, rows, in, part.begin, part.end, made, (int)x.ld);
  }
  thin_product<T, Sums>(part, b, numbers, b_rows, packs, x, experts, turn, scales, own_v, outputs,
                        out, ldo, parts);
}
