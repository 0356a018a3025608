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
// bias. The first blocks compute v: each the products of a chunk of x with some columns of A^T, and
// these times the scaling and the routing weights. The others sum them behind their part of x W,
// and add v B^T to it.
template <class T> struct ThinExperts {
  const T *a;  // A^T, [in, ranks]; its rows are as far apart as those of the weight
  Updates<T> updates;
  // the part of v of each chunk, [chunks, rows, ranks], and behind each number a mark that tells
  // whether this product wrote it
  uint2 *sums;
  const u32 *turn;  // the number of layers whose attention was computed
  int index;        // of the product among those of a layer; there are 4
  int chunks, writers;
  int blocks;  // the first that multiplies with the weight
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

// Writes columns [begin, end) of the input of a thin product to shared memory. Every block does so
// for the columns that it needs, since that takes less time than another kernel.
template <class T, int ROWS>
static __device__ __forceinline__ void make_input(const ThinInput<T> &input, int rows, int in,
                                                  int begin, int end, T *out) {
  // a row that is wide is normed by more warps
  constexpr int N = Pack<T>::N, WARPS = WIDTH <= 1024 ? (ROWS == 1 ? 4 : 1) : ROWS == 1 ? 8 : 4;
  constexpr int THREADS = 32 * WARPS, PACKS = (WIDTH / N + THREADS - 1) / THREADS;
  const int thread = threadIdx.x % THREADS, length = end - begin;
  if (input.kind == 2) {
    const int per_row = length / N;
    for (int t = threadIdx.x; t < rows * per_row; t += blockDim.x)
      activate_pack(input, t / per_row, begin + t % per_row * N, in,
                    out + t / per_row * length + t % per_row * N);
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
          Pack<T>::store(out + m * length + c - begin, x[k]);
      }
    }
  }
  __syncthreads();
}

#define THIN_UNROLL 4

// What a block of a thin product multiplies with: rows [begin, end) of a matrix, and a segment of
// its columns, which `lanes` threads read, 16 bytes each. The others read it in other rows.
template <class T> struct ThinPart {
  const T *w;
  i64 ld;
  int begin, end, columns, segment, lanes;
  __device__ __forceinline__ int lane() const { return threadIdx.x % lanes; }
  __device__ __forceinline__ int group() const { return threadIdx.x / lanes; }
  // rows that the block reads at once
  __device__ __forceinline__ int groups() const { return blockDim.x / lanes; }
  __device__ __forceinline__ int width() const { return lanes * Pack<T>::N; }
  __device__ __forceinline__ int column() const {
    return segment * width() + lane() * Pack<T>::N;
  }
  // Asks for a thread's packs of the rows behind `from`.
  __device__ __forceinline__ void load(int from, uint4 (&packs)[THIN_UNROLL]) const {
    const int c = column();
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) {
      const int k = from + group() + i * groups();
      packs[i] = make_uint4(0, 0, 0, 0);
      if (c < columns && k < end) packs[i] = __ldg((const uint4 *)(w + k * ld + c));
    }
  }
  // Brings the part into the L2 cache.
  __device__ __forceinline__ void prefetch_all() const {
    const int c = column();
    if (lane() % 2 || c >= columns) return;
    for (int k = begin + group(); k < end; k += groups()) prefetch(w + k * ld + c);
  }
};

// Adds to `sum` the packs of the rows behind `from` times the factors of these rows. `factors` is
// that of row `first` and of the first row of the input.
template <class T, int ROWS, class X>
static __device__ __forceinline__ void add_packs(const ThinPart<T> &part, int from,
                                                 const uint4 (&packs)[THIN_UNROLL],
                                                 const X *factors, int first, i64 stride, int rows,
                                                 float (&sum)[ROWS][Pack<T>::N]) {
  constexpr int N = Pack<T>::N;
#pragma unroll
  for (int i = 0; i < THIN_UNROLL; ++i) {
    const int k = from + part.group() + i * part.groups();
    if (from + i * part.groups() >= part.end) break;
    float of_weight[N];
    Pack<T>::load((const T *)&packs[i], of_weight);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      const float f = m < rows && k < part.end ? wide(factors[m * stride + k - first]) : 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) sum[m][n] = fmaf(f, of_weight[n], sum[m][n]);
    }
  }
}
// Writes the sums of each warp to `parts`, [warps, ROWS, width].
template <class T, int ROWS>
static __device__ __forceinline__ void sum_groups(float (&sum)[ROWS][Pack<T>::N],
                                                  const ThinPart<T> &part, float *parts) {
  constexpr int N = Pack<T>::N;
  for (int o = 16; o >= part.lanes; o >>= 1)
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) sum[m][n] += __shfl_xor_sync(~0u, sum[m][n], o);
  if (threadIdx.x % 32 < part.lanes)
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
        parts[(threadIdx.x / 32 * ROWS + m) * part.width() + part.lane() * N + n] = sum[m][n];
  __syncthreads();
}
// The sum over `count` warps.
static __device__ __forceinline__ float sum_of_parts(const float *parts, int stride, int count) {
  float total = 0;
#pragma unroll 8
  for (int k = 0; k < count; ++k) total += parts[k * stride];
  return total;
}

// The sum of `own` over the blocks of a cluster, which hold it at the same place of shared memory.
static __device__ __forceinline__ float cluster_sum(const float *own, int split) {
  const u32 place = (u32)__cvta_generic_to_shared(own);
  float sum = 0;
  for (int k = 0; k < split; ++k) sum += of_block(place, k);
  return sum;
}

// Writes a sum and its mark at once, so that nobody sees one without the other.
static __device__ __forceinline__ void put_sum(uint2 *to, float sum, u32 mark) {
  __stcg((unsigned long long *)to, (unsigned long long)mark << 32 | __float_as_uint(sum));
}
// Begins to copy two sums and their marks to shared memory, past the L1 cache.
static __device__ __forceinline__ void copy_sums(uint2 *to, const uint2 *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
#else
  *(uint4 *)to = __ldcg((const uint4 *)from);
#endif
}
// Waits for the copies that this thread has begun.
static __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The part of v that a block needs: ranks [first, end), whose number is a multiple of 4. The sums
// come to shared memory while the block multiplies with W.
template <class T> struct ThinV {
  const ThinExperts<T> &experts;
  int rows, first, end;
  float *v;     // [rows, end - first]
  uint2 *sums;  // [chunks, rows, end - first]
  u32 mark;     // of this product
  bool asked, done;
  __device__ __forceinline__ int ranks() const { return end - first; }
  // Calls `f` with the places, in `sums` and in experts.sums, of each pair that this thread copies.
  template <class F> __device__ __forceinline__ void for_pairs(F f) {
    const int pairs = ranks() / 2;
    for (int t = threadIdx.x; t < experts.chunks * rows * pairs; t += blockDim.x)
      f(t * 2, t / pairs * experts.updates.ranks + first + t % pairs * 2);
  }
  // Sees whether the sums had been written when they were copied; if not, copies them again.
  __device__ __forceinline__ void look() {
    if (done) return;
    if (asked) {
      wait_for_copies();
      done = true;
      for_pairs([&](int at, int) {
        done = done && sums[at].y == mark && sums[at + 1].y == mark;
      });
      if (done) return;
    }
    for_pairs([&](int at, int from) { copy_sums(sums + at, experts.sums + from); });
    asked = true;
  }
  // Waits for the sums and makes v of them. All threads of the block take part.
  __device__ __forceinline__ void make() {
    while (!done) look();
    __syncthreads();
    const int all = rows * ranks();
    for (int i = threadIdx.x; i < all; i += blockDim.x) {
      float sum = 0;
#pragma unroll 8
      for (int k = 0; k < experts.chunks; ++k) sum += __uint_as_float(sums[k * all + i].x);
      v[i] = sum;
    }
    __syncthreads();
  }
};

// out = x w + v B^T for at most ROWS rows of x, where `part` and `b` are the block's parts of w and
// B^T, the first packs of w are in `packs`, and x begins with the column part.begin. The `split`
// blocks of a cluster have some rows of w and B^T each, and this is block `rank` of them. With a
// `chunk`, the part is one of A^T, and its product becomes that chunk's part of v.
template <class T, int ROWS>
static __device__ __forceinline__ void thin_product(const ThinPart<T> &part, const ThinPart<T> &b,
                                                    uint4 (&packs)[THIN_UNROLL], ThinV<T> &v,
                                                    const T *x, i64 ldx, int rows,
                                                    const ThinExperts<T> &experts, int chunk,
                                                    T *out, i64 ldo, int split, int rank,
                                                    float *parts) {
  constexpr int N = Pack<T>::N;
  const bool writes_v = chunk >= 0, has_experts = experts.updates.ranks > 0 && !writes_v;
  const int width = part.width(), at_once = part.groups() * THIN_UNROLL, warps = blockDim.x / 32;
  // loaded here, since it is needed only at the end
  float weight = 1;
  if (writes_v && threadIdx.x < rows * width) {
    const int column = part.segment * width + threadIdx.x % width;
    if (column < part.columns) weight = experts.updates.weight(threadIdx.x / width, column);
  }
  float sum[ROWS][N] = {};
  for (int from = part.begin; from < part.end; from += at_once) {
    uint4 now[THIN_UNROLL];
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) now[i] = packs[i];
    if (from + at_once < part.end)
      part.load(from + at_once, packs);
    else if (has_experts)
      b.load(b.begin, packs);
    if (has_experts && from > part.begin) v.look();
    add_packs<T, ROWS>(part, from, now, x, part.begin, ldx, rows, sum);
  }
  if (has_experts) {
    v.make();
    for (int from = b.begin; from < b.end; from += at_once) {
      if (from > b.begin) b.load(from, packs);
      add_packs<T, ROWS>(b, from, packs, v.v, v.first, v.ranks(), rows, sum);
    }
  }
  sum_groups<T, ROWS>(sum, part, parts);
  float *const sums = parts + warps * ROWS * width;  // of this block, [rows, width]
  for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
    const float total = sum_of_parts(parts + i, ROWS * width, warps);
    const int m = i / width, column = part.segment * width + i % width;
    if (writes_v) {
      // one pass, since a segment of A^T is short
      if (column < part.columns)
        put_sum(experts.sums + (chunk * rows + m) * part.columns + column, total * weight,
                v.mark);
    } else if (split > 1) {
      sums[i] = total;
    } else if (column < part.columns) {
      put(out + m * ldo + column, total);
    }
  }
  if (split > 1 && !writes_v) {
    cluster_wait();
    if (rank == 0)
      for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
        const int m = i / width, column = part.segment * width + i % width;
        const float total = cluster_sum(sums + i, split);
        if (column < part.columns) put(out + m * ldo + column, total);
      }
    // no block ends before all have been read
    cluster_wait();
  }
}

// The same for the input that `input` describes, which has at most ROWS rows. The blocks in front
// of experts.blocks multiply with A^T. A block needs at most `ranks` ranks of v. Two rows have code
// of their own, since they are frequent.
template <class T, int ROWS>
static __device__ __forceinline__ void thin_products(const ThinInput<T> &input, const T *w, i64 ldw,
                                                     const ThinExperts<T> &experts, T *out, i64 ldo,
                                                     int rows, int in, int columns, int lanes,
                                                     int split, int ranks) {
  extern __shared__ uint4 of_product[];
  const int index = (int)blockIdx.x - experts.blocks;
  ThinPart<T> part{w, ldw, 0, 0, columns, index / split, lanes};
  int chunk = -1, rank = index % split, per_block = (in + split - 1) / split;
  if (index < 0) {
    if (blockIdx.x >= experts.writers) return;
    const int segments = experts.writers / experts.chunks;
    part = {experts.a, ldw, 0, 0, experts.updates.ranks, (int)blockIdx.x % segments, 4};
    chunk = rank = blockIdx.x / segments, per_block = (in + experts.chunks - 1) / experts.chunks;
  }
  // whole packs
  per_block = (per_block + Pack<T>::N - 1) / Pack<T>::N * Pack<T>::N;
  part.begin = min(in, rank * per_block), part.end = min(in, part.begin + per_block);
  uint4 packs[THIN_UNROLL];
  part.load(part.begin, packs);
  float *const parts = (float *)of_product;
  float *const of_v = parts + (blockDim.x / 32 + 1) * ROWS * max(4, lanes) * Pack<T>::N;
  ThinPart<T> b = part;
  ThinV<T> v{experts, rows, 0, 0, of_v, (uint2 *)(of_v + rows * ranks), 0, false, false};
  if (experts.updates.ranks && chunk < 0) {
    const Updates<T> &updates = experts.updates;
    const int last = min(columns, (part.segment + 1) * part.width()) - Pack<T>::N;
    const int2 own = updates.ranks_of(part.column());
    const int begin = updates.ranks_of(part.segment * part.width()).x;
    const int end = updates.ranks_of(last).y;
    const int per_part = ((end - begin + split - 1) / split + 3) / 4 * 4;
    v.first = min(end, begin + rank * per_part), v.end = min(end, v.first + per_part);
    b.w = updates.b, b.ld = updates.ldb;
    b.begin = max(v.first, own.x), b.end = min(v.end, own.y);
    b.prefetch_all();
  }
  wait_for_inputs();
  // differs from those of the products before, and is not 0 as at first
  if (experts.updates.ranks) v.mark = (__ldcg(experts.turn) << 2 | experts.index) + 1;
  const T *x = input.x + part.begin;
  i64 ldx = input.ldx;
  if (input.kind) {
    T *const made = (T *)(of_v + (1 + 2 * experts.chunks) * rows * ranks);
    make_input<T, ROWS>(input, rows, in, part.begin, part.end, made);
    x = made, ldx = part.end - part.begin;
  }
  if (ROWS == 4 && rows == 2)
    thin_product<T, 2>(part, b, packs, v, x, ldx, rows, experts, chunk, out, ldo, split, rank,
                       parts);
  else
    thin_product<T, ROWS>(part, b, packs, v, x, ldx, rows, experts, chunk, out, ldo, split, rank,
                          parts);
}
