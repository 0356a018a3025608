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
  // v, [rows, ranks], and behind each number a mark that tells whether this product wrote it
  uint2 *v;
  const u32 *turn;  // the number of layers whose attention was computed
  int index;        // of the product among those of a layer; there are 4
  int segments;     // of columns of A^T
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

// The sum over `count` warps.
static __device__ __forceinline__ float sum_of_parts(const float *parts, int stride, int count) {
  float total = 0;
#pragma unroll 8
  for (int k = 0; k < count; ++k) total += parts[k * stride];
  return total;
}

// Writes a number of v and its mark at once, so that nobody sees one without the other.
static __device__ __forceinline__ void put_marked(uint2 *to, float x, u32 mark) {
  __stcg((u64 *)to, (u64)mark << 32 | __float_as_uint(x));
}
// Begins to copy two numbers and their marks to shared memory, past the L1 cache.
static __device__ __forceinline__ void copy_marked(uint2 *to, const uint2 *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
#else
  *(uint4 *)to = __ldcg((const uint4 *)from);
#endif
}
// The same for one number that is not marked.
static __device__ __forceinline__ void copy_number(float *to, const float *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
#else
  *to = *from;
#endif
}
// Waits for the copies that this thread has begun.
static __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Numbers between the rows of what threads read at once, for few conflicts of banks.
#define THIN_PADDING 16
#define ATTN_OUT 1  // the index of the layer behind attention, as in csrc/product.h

// The part of v that a block needs: ranks [first, end), whose number is a multiple of 8. It comes
// to shared memory while the block multiplies with W.
template <class T, class Factor> struct ThinV {
  const ThinExperts<T> &experts;
  int rows, first, end;
  Factor *v;      // [rows, end - first], with THIN_PADDING
  uint2 *marked;  // [rows, end - first]
  u32 turn;       // as in `experts`
  bool asked, done;
  // of this product; it differs from those of the products before
  __device__ __forceinline__ u32 mark() const { return (turn << 2 | experts.index) + 1; }
  __device__ __forceinline__ int ranks() const { return end - first; }
  // v as what a matrix is multiplied with
  __device__ __forceinline__ ThinRows<Factor> factors() const {
    return {v, ranks() + THIN_PADDING, first, rows};
  }
  // Calls `f` with the row and the first rank, from `first` on, of each pair that this thread
  // copies. A power of two of neighbouring threads share a row.
  template <class F> __device__ __forceinline__ void for_pairs(F f) {
    const int pairs = ranks() / 2, shift = min(5, 32 - __clz(max(pairs, 1) - 1));
#pragma unroll 1
    for (int m = threadIdx.x >> shift; m < rows; m += blockDim.x >> shift)
#pragma unroll 1
      for (int i = threadIdx.x & (1 << shift) - 1; i < pairs; i += 1 << shift) f(m, 2 * i);
  }
  // Sees whether v had been written when it was copied; if not, copies it again.
  __device__ __forceinline__ void look() {
    if (done) return;
    if (asked) {
      wait_for_copies();
      done = true;
      for_pairs([&](int m, int r) {
        const uint2 *const pair = marked + m * ranks() + r;
        done = done && pair[0].y == mark() && pair[1].y == mark();
      });
      if (done) return;
    }
    for_pairs([&](int m, int r) {
      copy_marked(marked + m * ranks() + r, experts.v + m * experts.updates.ranks + first + r);
    });
    asked = true;
  }
  // Waits for v. All threads of the block take part.
  __device__ __forceinline__ void make() {
    while (!done) look();
    for_pairs([&](int m, int r) {
      for (int i = 0; i < 2; ++i)
        put(v + m * (ranks() + THIN_PADDING) + r + i,
            __uint_as_float(marked[m * ranks() + r + i].x));
    });
    __syncthreads();
  }
};

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
    return split == 1 ? 30 : max(5, 32 - __clz((count + split - 1) / split - 1));
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
    return sum_of_parts(terms + place(i), 1 << shift, split);
  }
};

// Calls `f` with the index, in [rows, width], and the row and the column of each output that this
// thread finishes.
template <class Part, class F>
static __device__ __forceinline__ void for_outputs(const Part &part, const ThinOutputs &outputs,
                                                   F f) {
  const int width = part.width();
  for (int i = outputs.first(); i < outputs.end(); i += blockDim.x) {
    const int column = part.segment * width + i % width;
    if (column < part.columns) f(i, i / width, column);
  }
}

// out = x w + v B^T, where `part` and `b` are the block's parts of w and B^T, the first packs of w
// are in `packs`, and x begins with the column part.begin. The blocks of a cluster have some rows
// of w and B^T each. If `scales`, [2, rows, width], is not null, the part is one of A^T, and its
// product times both of these factors becomes v.
template <class T, class Sums>
static __device__ __forceinline__ void
thin_product(const ThinPart<T, Sums> &part, const ThinPart<T, Sums> &b,
             uint4 (&packs)[THIN_UNROLL], ThinV<T, typename Sums::Factor> &v, const ThinRows<T> &x,
             const ThinExperts<T> &experts, const float *scales, const ThinOutputs &outputs,
             T *out, i64 ldo, float *parts) {
  constexpr int ROWS = Sums::ROWS;
  typedef typename Sums::Factor Factor;
  const bool has_experts = experts.updates.ranks > 0 && !scales;
  const int width = part.width(), at_once = part.at_once(), warps = blockDim.x / 32;
  Sums sums;
  typename Sums::template Factors<T> factors(part, x, part.begin);
#pragma unroll 1
  for (int from = part.begin; from < part.end; from += at_once) {
    uint4 now[THIN_UNROLL];
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) now[i] = packs[i];
    auto load_next = [&] {
      if (from + at_once < part.end) {
        part.load(from + at_once, packs);
        factors = typename Sums::template Factors<T>(part, x, from + at_once);
      } else if (has_experts) {
        b.load(b.begin, packs);
        v.look();
      }
    };
    if (Sums::LOADS_AHEAD) load_next();
    sums.add(part, from, factors, now);
    if (!Sums::LOADS_AHEAD) load_next();
  }
  if (has_experts) {
    v.make();
    for (int from = b.begin; from < b.end; from += at_once) {
      if (from > b.begin) b.load(from, packs);
      const typename Sums::template Factors<Factor> of_v(b, v.factors(), from);
      sums.add(b, from, of_v, packs);
    }
  }
  sums.write(part, parts);
  __syncthreads();
  auto total_of = [&](int i) {
    return sum_of_parts(parts + Sums::place(i), ROWS * width, warps);
  };
  if (outputs.split > 1) outputs.exchange(total_of);
  if (scales) wait_for_copies();
  for_outputs(part, outputs, [&](int i, int m, int column) {
    const float total = outputs.split > 1 ? outputs.sum(i) : total_of(i);
    if (scales)
      put_marked(experts.v + m * part.columns + column,
                 total * (scales[i] * scales[outputs.count + i]), v.mark());
    else
      put(out + m * ldo + column, total);
  });
}

// The same for the input that `input` describes, which has at most Sums::ROWS rows. The first
// clusters multiply with A^T. A block needs at most `ranks` ranks of v.
template <class T, class Sums>
static __device__ __forceinline__ void thin_products(const ThinInput<T> &input, const T *w, i64 ldw,
                                                     const ThinExperts<T> &experts, T *out, i64 ldo,
                                                     int rows, int in, int columns, int given_lanes,
                                                     int split, int ranks) {
  typedef typename Sums::Factor Factor;
  extern __shared__ uint4 of_product[];
  __shared__ u64 inbox;
  const Updates<T> &updates = experts.updates;
  const int lanes = Sums::lanes(given_lanes), rank = blockIdx.x % split;
  const int segment = (int)blockIdx.x / split - experts.segments;
  ThinPart<T, Sums> part{w, ldw, 0, 0, columns, segment, lanes};
  if (segment < 0)
    part = {experts.a, ldw, 0, 0, updates.ranks, segment + experts.segments, Sums::lanes_of_a()};
  // whole packs
  const int per_block = ((in + split - 1) / split + Pack<T>::N - 1) / Pack<T>::N * Pack<T>::N;
  part.begin = min(in, rank * per_block), part.end = min(in, part.begin + per_block);
  uint4 packs[THIN_UNROLL];
  part.load(part.begin, packs);
  const int most_columns = max(Sums::lanes_of_a(), lanes) * Pack<T>::N;
  const int of_parts = blockDim.x / 32 * Sums::ROWS * most_columns;
  float *const terms = (float *)of_product, *scales = nullptr, *routing = nullptr;
  float *const parts = terms + ThinOutputs::terms_of(rows * most_columns, split);
  const ThinOutputs outputs(rows * part.width(), split, terms, &inbox);
  outputs.open();
  // what is copied of v is not needed any more when the product is summed
  Factor *const of_v = (Factor *)(parts + max(of_parts, 2 * rows * ranks));
  ThinPart<T, Sums> b = part;
  ThinV<T, Factor> v{experts, rows, 0, 0, of_v, (uint2 *)parts, 0, false, false};
  if (segment < 0) {
    scales = (float *)of_v, routing = scales + rows * part.width();
    for_outputs(part, outputs, [&](int i, int m, int column) {
      scales[i] = updates.scaling[column];
      // where the routing weight is
      routing[i] = updates.g ? __int_as_float(m * updates.experts + updates.expert_of[column]) : 1;
    });
  } else if (updates.ranks) {
    const int last = min(columns, (part.segment + 1) * part.width()) - Pack<T>::N;
    const int begin = updates.ranks_of(part.segment * part.width()).x;
    const int end = updates.ranks_of(last).y;
    const int per_part = ((end - begin + split - 1) / split + 7) / 8 * 8;
    v.first = min(end, begin + rank * per_part), v.end = min(end, v.first + per_part);
    // B^T is 0 in the rows of the other layers whose columns the segment has
    b.w = updates.b, b.ld = updates.ldb, b.begin = v.first, b.end = v.end;
    b.prefetch_all();
  }
  // attention raises the turn, and may still run in front of one of the layers
  const bool reads_early = experts.index != ATTN_OUT;
  if (updates.ranks && reads_early) v.turn = __ldcg(experts.turn);
  wait_for_inputs();
  // the router may be the kernel in front
  if (routing && updates.g)
    for_outputs(part, outputs, [&](int i, int, int) {
      copy_number(routing + i, updates.g + __float_as_int(routing[i]));
    });
  if (updates.ranks && !reads_early) v.turn = __ldcg(experts.turn);
  ThinRows<T> x{input.x + part.begin, input.ldx, part.begin, rows};
  if (Sums::MAKES_INPUT && input.kind) {
    const int of_row = max(ranks + THIN_PADDING, 2 * most_columns);
    T *const made = (T *)((float *)of_v + rows * of_row);
    x.x = made, x.ld = part.end - part.begin + THIN_PADDING;
    make_input<T, Sums::ROWS>(input, rows, in, part.begin, part.end, made, (int)x.ld);
  }
  thin_product<T, Sums>(part, b, packs, v, x, experts, scales, outputs, out, ldo, parts);
}
