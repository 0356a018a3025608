// The kernels of a step of generation, in which each text gets one new position. They are compiled
// behind csrc/kernels, whose conventions hold here too, with STEP defined. csrc/step.cpp says
// how they make a block.
//
// A kernel starts while the one in front of it still runs (programmatic dependent launch). It lets
// the next one start only when it has waited for the one in front. So when a kernel starts, all
// have ended but the one in front, and before it waits, it may read whatever that one does not
// write: weights, earlier keys and values, positions, and mostly the turn. In front of a layer's
// first product, there may be the router's kernel, so products read routing weights behind the
// wait; kernels behind a product may read them earlier.
//
// There is one exception: a norm behind the router's kernel may run beside it, and lets the first
// product start as well (step_norm). It does not end before that kernel.

// Brings what lies at an address into the L2 cache.
static __device__ __forceinline__ void prefetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// The same for the weights of a norm, by a block.
template <class T> static __device__ __forceinline__ void prefetch_norm(const T *w, const T *b) {
  constexpr int LINE = 128 / sizeof(T);
  for (int c = threadIdx.x * LINE; c < WIDTH; c += blockDim.x * LINE) {
    prefetch(w + c);
    if (b) prefetch(b + c);
  }
}

// The logarithm of a power of 2. To divide by a number takes more time than to shift by it.
static __device__ __forceinline__ int log_2(int x) { return 31 - __clz(x); }

// Begins to copy 16 bytes to shared memory, past the L1 cache, or zeros.
static __device__ __forceinline__ void copy_16(void *to, const void *from, bool is_inside = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   (u32)__cvta_generic_to_shared(to)),
               "l"(from), "r"(is_inside ? 16 : 0)
               : "memory");
#else
  *(uint4 *)to = is_inside ? __ldcg((const uint4 *)from) : make_uint4(0, 0, 0, 0);
#endif
}
// The same for 4 bytes.
static __device__ __forceinline__ void copy_4(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
#else
  *(u32 *)to = *(const u32 *)from;
#endif
}
// Waits for the copies that this thread has begun.
static __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// What the experts of a linear layer add to its output: v B^T, where v is u = x A^T times the
// scaling of its column and the routing weight of the column's expert. `b` is B^T, [ranks, out], in
// which the rows [first_rank[m], first_rank[m + 1]) are those of the layer whose columns are
// [first_out[m], first_out[m + 1]), and are 0 elsewhere. The host fills the same struct in
// csrc/step_kernels.h.
template <class T> struct Updates {
  const T *b;
  i64 ldb;
  const float *g;
  const int *expert_of;
  const float *scaling;
  int experts, ranks; // there are no ranks if no experts add to the output
  int members, first_out[4], first_rank[4];
  // the rows of B^T that a column needs
  __device__ __forceinline__ int2 ranks_of(int column) const {
    int2 rows = make_int2(first_rank[0], first_rank[1]);
#pragma unroll
    for (int m = 1; m < 3; ++m)
      if (m < members && column >= first_out[m])
        rows = make_int2(first_rank[m], first_rank[m + 1]);
    return rows;
  }
  // v / u of a rank
  __device__ __forceinline__ float weight(i64 row, int r) const {
    return scaling[r] * (g ? g[row * experts + expert_of[r]] : 1.f);
  }
};
// The output of a linear layer that is not finished: y = product + bias + v B^T. If there are
// ranks, the product's columns behind `out` are u.
template <class T> struct Unfinished {
  const T *product;
  i64 ld;
  const T *bias;
  Updates<T> updates;
  int out;
};

// What v is a multiple of, [ranks], written to shared memory. The kernel in front of this one is
// that of y's product, and the routing weights were computed before it, so a kernel need not have
// waited for that one.
template <class T>
static __device__ __forceinline__ void weights_of_row(const Unfinished<T> &y, i64 row, float *v) {
  for (int r = threadIdx.x; r < y.updates.ranks; r += blockDim.x) v[r] = y.updates.weight(row, r);
}
// Makes v of these.
template <class T>
static __device__ __forceinline__ void weigh_row(const Unfinished<T> &y, i64 row, float *v) {
  for (int r = threadIdx.x; r < y.updates.ranks; r += blockDim.x)
    v[r] *= wide(y.product[row * y.ld + y.out + r]);
  __syncthreads();
}

// Brings the rows of B^T that some packs need into the L2 cache.
template <class T, class Column>
static __device__ __forceinline__ void prefetch_rows(const Unfinished<T> &y, int packs,
                                                     Column column) {
  const auto &updates = y.updates;
  if (updates.ranks == 0) return;
  for (int t = threadIdx.x; t < packs * updates.ranks; t += blockDim.x) {
    const int c = column(t % packs);
    const int2 rows = updates.ranks_of(c);
    if (rows.x + t / packs < rows.y) prefetch(updates.b + (rows.x + t / packs) * updates.ldb + c);
  }
}

// The finished values of some packs of a row, in `values`, [packs * N]. `column` gives a pack's
// first column. All threads take part; `values` has room for max(blockDim.x, packs) packs.
template <class T, class Column>
static __device__ __forceinline__ void finish(const Unfinished<T> &y, i64 row, int packs,
                                              Column column, const float *v, float *values) {
  constexpr int N = Pack<T>::N;
  // each group of threads sums a part of the ranks
  const int groups = y.updates.ranks ? max(1, min((int)blockDim.x / packs, y.updates.ranks)) : 1;
  for (int t = threadIdx.x; t < packs * groups; t += blockDim.x) {
    const int pack = t % packs, group = t / packs, c = column(pack);
    float sum[N] = {};
    if (group == 0) {
      float bias[N] = {};
      Pack<T>::load(y.product + row * y.ld + c, sum);
      if (y.bias) Pack<T>::load(y.bias + c, bias);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += bias[i];
    }
    const int2 rows = y.updates.ranks_of(c);
#pragma unroll 8
    for (int r = rows.x + group; r < rows.y; r += groups) {
      float b[N];
      Pack<T>::load(y.updates.b + r * y.updates.ldb + c, b);
      const float factor = v[r];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = fmaf(factor, b[i], sum[i]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) values[t * N + i] = sum[i];
  }
  __syncthreads();
  if (groups > 1) {
    for (int i = threadIdx.x; i < packs * N; i += blockDim.x) {
      float sum = values[i];
      for (int group = 1; group < groups; ++group) sum += values[group * packs * N + i];
      values[i] = sum;
    }
    __syncthreads();
  }
}

// LayerNorm over the WIDTH values that `threads` threads of a row hold in packs, with weight w and
// bias b, or RMSNorm if b is null; `reduce` adds a number over these threads. The results replace
// the values.
template <class T, int PACKS, class Reduce>
static __device__ __forceinline__ void normalise(float (&x)[PACKS][Pack<T>::N], int thread,
                                                 int threads, const T *w, const T *b, float eps,
                                                 Reduce reduce) {
  constexpr int N = Pack<T>::N;
  float total = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) total += x[k][i];
  const float mu = b ? reduce(total) / WIDTH : 0.f;
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    if ((k * threads + thread) * N >= WIDTH) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += (x[k][i] - mu) * (x[k][i] - mu);
  }
  const float rs = rsqrtf(reduce(squares) / WIDTH + eps);
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int c = (k * threads + thread) * N;
    if (c >= WIDTH) continue;
    // no branch, so that the loads of all packs are under way at once
    float scale[N], shift[N];
    Pack<T>::load(w + c, scale);
    Pack<T>::load((b ? b : w) + c, shift);
#pragma unroll
    for (int i = 0; i < N; ++i) x[k][i] = (x[k][i] - mu) * rs * scale[i] + (b ? shift[i] : 0.f);
  }
}

// x + y, rounded as in the residual stream
template <class T> static __device__ __forceinline__ float rounded_sum(float x, float y) {
  T kept;
  put(&kept, x + y);
  return wide(kept);
}

// out = tokens[ids] + positions[position_ids], where `positions` may be null. One block of 128
// threads computes a row.
template <class T>
static __device__ void step_embed(const T *tokens, i64 ldt, const i64 *ids, const T *positions,
                                  i64 ldp, const i64 *position_ids, T *out) {
  constexpr int N = Pack<T>::N;
  const i64 row = blockIdx.x;
  wait_for_inputs();
  const T *const token = tokens + ids[row] * ldt;
  const T *const position = positions ? positions + position_ids[row] * ldp : nullptr;
#pragma unroll 4
  for (int c = threadIdx.x * N; c < WIDTH; c += 128 * N) {
    float x[N], added[N] = {};
    Pack<T>::load(token + c, x);
    if (position) Pack<T>::load(position + c, added);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += added[i];
    Pack<T>::store(out + row * WIDTH + c, x);
  }
}

// sum = x + y, where y may have no product and is then 0, and has no ranks; and a = norm(sum) with
// weight w and bias b, which is null for RMSNorm. One block of 128 threads computes a row. If it
// runs `beside` the kernel in front, that one writes nothing that is read here, and x was complete
// when this one started.
template <class T>
static __device__ void step_norm(const T *x, i64 ldx, const Unfinished<T> &y, const T *w,
                                 const T *b, float eps, T *sum, T *a, int beside) {
  constexpr int N = Pack<T>::N, THREADS = 128, PACKS = (WIDTH / N + THREADS - 1) / THREADS;
  __shared__ float scratch[32];
  const i64 row = blockIdx.x;
  prefetch_norm(w, b);
  if (beside)
    start_next_kernel();
  else
    wait_for_inputs();
  float total[PACKS][N] = {};
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int c = (k * THREADS + threadIdx.x) * N;
    if (c >= WIDTH) continue;
    float added[N] = {}, bias[N] = {};
    Pack<T>::load(x + row * ldx + c, total[k]);
    if (y.product) {
      Pack<T>::load(y.product + row * y.ld + c, added);
      if (y.bias) Pack<T>::load(y.bias + c, bias);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) total[k][i] = rounded_sum<T>(total[k][i], added[i] + bias[i]);
    Pack<T>::store(sum + row * WIDTH + c, total[k]);
  }
  normalise<T, PACKS>(total, threadIdx.x, THREADS, w, b, eps,
                      [&](float of_thread) { return block_reduce(of_thread, scratch, false); });
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int c = (k * THREADS + threadIdx.x) * N;
    if (c < WIDTH) Pack<T>::store(a + row * WIDTH + c, total[k]);
  }
  if (beside) wait_for_kernel();
}

static __device__ __forceinline__ float gelu_of(float z, int tanh_form) {
  const float h = tanh_form ? tanh_of(ROOT_2_OVER_PI * (z + 0.044715f * z * z * z))
                            : erff(0.7071067811865476f * z);
  return 0.5f * z * (1.f + h);
}

// The activations, as in csrc/mlp.h.
enum { TANH_GELU, GELU, SWIGLU };

// out = y, or with an `activation` that of y. A block computes some packs of a row of `out`.
template <class T>
static __device__ void step_finish(const Unfinished<T> &y, T *out, int activation,
                                   int packs_of_block) {
  constexpr int N = Pack<T>::N;
  extern __shared__ float of_finish[];
  float *values = of_finish, *v = of_finish + blockDim.x * N;
  const bool is_gated = activation == SWIGLU;
  const int all = y.out / N / (is_gated ? 2 : 1);
  const int chunks = (all + packs_of_block - 1) / packs_of_block;
  const i64 row = blockIdx.x / chunks;
  const int first = blockIdx.x % chunks * packs_of_block, packs = min(packs_of_block, all - first);
  // the gate's packs, and then those of the other layer
  auto column = [=](int pack) { return (first + (pack < packs ? pack : all + pack - packs)) * N; };
  const int of_both = is_gated ? 2 * packs : packs;
  weights_of_row(y, row, v);
  prefetch_rows(y, of_both, column);
  wait_for_inputs();
  weigh_row(y, row, v);
  finish(y, row, of_both, column, v, values);
  for (int i = threadIdx.x; i < packs * N; i += blockDim.x) {
    float x = values[i];
    if (is_gated)
      x = x / (1.f + __expf(-x)) * values[packs * N + i];
    else if (activation >= 0)
      x = gelu_of(x, activation == TANH_GELU);
    put(out + row * all * N + first * N + i, x);
  }
}
