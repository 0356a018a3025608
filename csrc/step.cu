// The kernels of a step of generation, in which each text gets one new position. They are compiled
// together with csrc/kernels.cu, whose conventions hold here too. csrc/step.cpp says how they make
// a block.
//
// A kernel starts while the one before it still runs (programmatic dependent launch). It first asks
// for the weights that no earlier kernel writes, and then waits for the kernel before it.

static __device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The output of a linear layer that is not finished: y = product + bias + v B^T. The product's
// columns behind `out` are u = x A^T, and v is u times the scaling of its column and the routing
// weight of the column's expert. `b` is B^T, [ranks, out]. The host fills the same struct in
// csrc/step_kernels.h.
template <class T> struct Unfinished {
  const T *product;
  i64 ld;
  const T *bias;
  const T *b;
  i64 ldb;
  const float *g;
  const int *expert_of;
  const float *scaling;
  int experts, ranks, out;
};

// Writes v of a row, [ranks], to shared memory.
template <class T>
static __device__ __forceinline__ void weigh_row(const Unfinished<T> &y, i64 row, float *v) {
  for (int r = threadIdx.x; r < y.ranks; r += blockDim.x) {
    const float g = y.g ? y.g[row * y.experts + y.expert_of[r]] : 1.f;
    v[r] = wide(y.product[row * y.ld + y.out + r]) * g * y.scaling[r];
  }
  __syncthreads();
}

// The finished values of some packs of a row, in `values`, [packs * N]. `column` gives a pack's
// first column. All threads take part; `values` has room for max(blockDim.x, packs) packs.
template <class T, class Column>
static __device__ __forceinline__ void finish(const Unfinished<T> &y, i64 row, int packs,
                                              Column column, const float *v, float *values) {
  constexpr int N = Pack<T>::N;
  // each group of threads sums a part of the ranks
  const int groups = y.ranks ? max(1, min((int)blockDim.x / packs, y.ranks)) : 1;
  for (int t = threadIdx.x; t < packs * groups; t += blockDim.x) {
    const int pack = t % packs, group = t / packs, c = column(pack);
    float sum[N] = {};
    if (group == 0) {
      float bias[N];
      Pack<T>::load(y.product + row * y.ld + c, sum);
      Pack<T>::load(y.bias + c, bias);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += bias[i];
    }
#pragma unroll 8
    for (int r = group; r < y.ranks; r += groups) {
      float b[N];
      Pack<T>::load(y.b + r * y.ldb + c, b);
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

// sum = x + y, where y may have no product and is then 0, and a = LayerNorm(sum) with weight w and
// bias b. One block computes a row.
template <class T>
static __device__ void step_norm(const T *x, i64 ldx, const Unfinished<T> &y, const T *w,
                                 const T *b, float eps, T *sum, T *a) {
  extern __shared__ float of_norm[];
  __shared__ float scratch[32];
  float *values = of_norm, *v = of_norm + max((int)blockDim.x * Pack<T>::N, WIDTH);
  wait_for_inputs();
  const i64 row = blockIdx.x;
  if (y.product) {
    weigh_row(y, row, v);
    finish(y, row, WIDTH / Pack<T>::N, [](int pack) { return pack * Pack<T>::N; }, v, values);
  }
  float total = 0;
  for (int c = threadIdx.x; c < WIDTH; c += blockDim.x) {
    T kept;
    put(&kept, wide(x[row * ldx + c]) + (y.product ? values[c] : 0.f));
    sum[row * WIDTH + c] = kept;
    values[c] = wide(kept);  // rounded as in `sum`
    total += values[c];
  }
  const float mu = block_reduce(total, scratch, false) / WIDTH;
  float squares = 0;
  for (int c = threadIdx.x; c < WIDTH; c += blockDim.x)
    squares += (values[c] - mu) * (values[c] - mu);
  const float rs = rsqrtf(block_reduce(squares, scratch, false) / WIDTH + eps);
  for (int c = threadIdx.x; c < WIDTH; c += blockDim.x)
    put(a + row * WIDTH + c, (values[c] - mu) * rs * wide(w[c]) + wide(b[c]));
}

// out = gelu(y). A block computes 32 packs of a row.
template <class T>
static __device__ void step_gelu(const Unfinished<T> &y, T *out, int tanh_form) {
  constexpr int N = Pack<T>::N;
  extern __shared__ float of_gelu[];
  float *values = of_gelu, *v = of_gelu + blockDim.x * N;
  wait_for_inputs();
  const int all = y.out / N, chunks = (all + 31) / 32;
  const i64 row = blockIdx.x / chunks;
  const int first = blockIdx.x % chunks * 32, packs = min(32, all - first);
  weigh_row(y, row, v);
  finish(y, row, packs, [=](int pack) { return (first + pack) * N; }, v, values);
  for (int i = threadIdx.x; i < packs * N; i += blockDim.x) {
    const float z = values[i];
    const float h = tanh_form ? tanh_of(ROOT_2_OVER_PI * (z + 0.044715f * z * z * z))
                              : erff(0.7071067811865476f * z);
    put(out + row * y.out + first * N + i, 0.5f * z * (1.f + h));
  }
}

// One running softmax over positions: its largest score, the sum of weights relative to it, and the
// weighted sum of values.
template <int N> struct Attended {
  float top = -INFINITY, sum = 0, value[N] = {};
  __device__ __forceinline__ void raise(float score) {
    if (score <= top) return;
    const float factor = power_of_2(top - score);
    sum *= factor;
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] *= factor;
    top = score;
  }
  // `score` is at most `top`
  __device__ __forceinline__ void add(float score, const float *v) {
    const float weight = power_of_2(score - top);
    sum += weight;
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = fmaf(weight, v[i], value[i]);
  }
};

struct StepCache {
  void *keys, *values;  // [rows, capacity + 1, heads, head size]
  i64 row_stride;       // elements from one row to the next
  const i64 *places;    // where each row's new position goes in the flattened rows
  const i64 *positions; // index of each row's new position in its text
  int heads, window;    // window 0 means that there is none
  float scale;
};

// Attention of each row's new position to itself and to the positions of the cache, to which its
// key and value are added. `y` is [q | k | v]. A block computes one part of a row's and head's
// positions; the last of them to end combines the parts. LANES threads hold a head's vector.
template <class T, int LANES>
static __device__ void step_attention(const Unfinished<T> &y, const StepCache &cache, int splits,
                                      float *partial, int *arrived, T *out) {
  constexpr int N = Pack<T>::N, SIZE = LANES * N, UNROLL = 4;
  extern __shared__ float of_attention[];
  __shared__ bool is_last;
  const int groups = blockDim.x / LANES, lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  float *values = of_attention, *v = values + blockDim.x * N;
  float *tops = v + y.ranks, *sums = tops + groups;
  const int split = blockIdx.x % splits, head = blockIdx.x / splits % cache.heads;
  const i64 row = blockIdx.x / (splits * cache.heads);
  const i64 width = (i64)cache.heads * SIZE, at_head = (i64)head * SIZE;
  const i64 past = cache.positions[row];
  const bool owns = split == 0;
  wait_for_inputs();
  weigh_row(y, row, v);
  const int packs = owns ? 3 * LANES : LANES;
  finish(
      y, row, packs,
      [=](int pack) { return (int)(pack / LANES * width + at_head) + pack % LANES * N; }, v,
      values);
  float q[N], new_key[N] = {}, new_value[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    q[i] = values[lane * N + i] * (cache.scale * LOG2_E);
    if (owns) {
      // rounded as in the cache
      T kept;
      put(&kept, values[SIZE + lane * N + i]);
      new_key[i] = wide(kept);
      put(&kept, values[2 * SIZE + lane * N + i]);
      new_value[i] = wide(kept);
    }
  }
  if (owns && group == 0) {
    const i64 place = cache.places[row] * width + at_head + lane * N;
    Pack<T>::store((T *)cache.keys + place, new_key);
    Pack<T>::store((T *)cache.values + place, new_value);
  }
  const i64 first = cache.window && past >= cache.window ? past - cache.window + 1 : 0;
  const i64 chunk = (past - first + splits - 1) / splits;
  const i64 begin = first + split * chunk, end = min(past, begin + chunk);
  const T *keys = (const T *)cache.keys + row * cache.row_stride + at_head + lane * N;
  const T *old_values = (const T *)cache.values + row * cache.row_stride + at_head + lane * N;
  Attended<N> all;
  for (i64 from = begin; from < end; from += groups * UNROLL) {
    uint4 k[UNROLL], w[UNROLL];
    float score[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const i64 j = from + group + i * groups;
      k[i] = w[i] = make_uint4(0, 0, 0, 0);
      if (j < end) {
        k[i] = *(const uint4 *)(keys + j * width);
        w[i] = *(const uint4 *)(old_values + j * width);
      }
    }
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      float x[N];
      Pack<T>::load((const T *)&k[i], x);
      float dot = 0;
#pragma unroll
      for (int c = 0; c < N; ++c) dot = fmaf(q[c], x[c], dot);
#pragma unroll
      for (int o = LANES / 2; o > 0; o >>= 1) dot += __shfl_xor_sync(~0u, dot, o);
      score[i] = from + group + i * groups < end ? dot : -INFINITY;
      top = fmaxf(top, score[i]);
    }
    if (top == -INFINITY) continue;
    all.raise(top);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      float x[N];
      Pack<T>::load((const T *)&w[i], x);
      all.add(score[i], x);
    }
  }
  if (owns) {
    float dot = 0;
#pragma unroll
    for (int c = 0; c < N; ++c) dot = fmaf(q[c], new_key[c], dot);
#pragma unroll
    for (int o = LANES / 2; o > 0; o >>= 1) dot += __shfl_xor_sync(~0u, dot, o);
    if (group == 0) {
      all.raise(dot);
      all.add(dot, new_value);
    }
  }
  // the groups of the block
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[group * SIZE + lane * N + i] = all.value[i];
  if (lane == 0) tops[group] = all.top, sums[group] = all.sum;
  __syncthreads();
  float top = -INFINITY, sum = 0, value = 0;
  if (threadIdx.x < SIZE) {
    for (int i = 0; i < groups; ++i) top = fmaxf(top, tops[i]);
    for (int i = 0; i < groups && top > -INFINITY; ++i) {
      const float factor = power_of_2(tops[i] - top);
      sum += factor * sums[i];
      value += factor * values[i * SIZE + threadIdx.x];
    }
  }
  T *to = out + row * width + at_head;
  if (splits == 1) {
    if (threadIdx.x < SIZE) put(to + threadIdx.x, value / sum);
    return;
  }
  // the parts of the row and head
  const i64 pair = row * cache.heads + head;
  float *own = partial + (pair * splits + split) * (SIZE + 2);
  if (threadIdx.x < SIZE) own[2 + threadIdx.x] = value;
  if (threadIdx.x == 0) own[0] = top, own[1] = sum;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(arrived + pair, 1) == splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x < SIZE) {
    const float *parts = partial + pair * splits * (SIZE + 2);
    top = -INFINITY, sum = value = 0;
    for (int i = 0; i < splits; ++i) top = fmaxf(top, __ldcg(parts + i * (SIZE + 2)));
    for (int i = 0; i < splits; ++i) {
      const float *part = parts + i * (SIZE + 2);
      const float factor = power_of_2(__ldcg(part) - top);
      sum += factor * __ldcg(part + 1);
      value += factor * __ldcg(part + 2 + threadIdx.x);
    }
    put(to + threadIdx.x, value / sum);
  }
  if (threadIdx.x == 0) arrived[pair] = 0;
}

// out = x w for at most ROWS rows of x; `lanes` threads read a segment of a row of w.
template <class T, int ROWS>
static __device__ __forceinline__ void thin_product(const T *x, i64 ldx, const T *w, i64 ldw,
                                                    T *out, i64 ldo, int rows, int in, int columns,
                                                    int lanes) {
  constexpr int N = Pack<T>::N, UNROLL = 4, WARPS = 16;
  __shared__ float parts[WARPS][ROWS * 4 * N];
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const int first = blockIdx.x * lanes * N, c = first + lane * N;
  const bool is_inside = c < columns;
  uint4 next[UNROLL];
  auto load = [&](int from) {
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const int k = from + group + i * groups;
      next[i] = make_uint4(0, 0, 0, 0);
      if (is_inside && k < in) next[i] = __ldg((const uint4 *)(w + k * ldw + c));
    }
  };
  load(0);
  wait_for_inputs();
  float sum[ROWS][N] = {};
  for (int from = 0; from < in; from += groups * UNROLL) {
    uint4 now[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) now[i] = next[i];
    if (from + groups * UNROLL < in) load(from + groups * UNROLL);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const int k = from + group + i * groups;
      float weight[N];
      Pack<T>::load((const T *)&now[i], weight);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const float factor = m < rows && k < in ? wide(x[m * ldx + k]) : 0.f;
#pragma unroll
        for (int n = 0; n < N; ++n) sum[m][n] = fmaf(factor, weight[n], sum[m][n]);
      }
    }
  }
  for (int o = 16; o >= lanes; o >>= 1)
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) sum[m][n] += __shfl_xor_sync(~0u, sum[m][n], o);
  const int width = lanes * N;
  if (threadIdx.x % 32 < lanes)
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) parts[threadIdx.x / 32][m * width + lane * N + n] = sum[m][n];
  __syncthreads();
  for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
    const int m = i / width, column = first + i % width;
    if (column >= columns) continue;
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += parts[warp][m * width + i % width];
    put(out + m * ldo + column, total);
  }
}

// For each row of logits: the first of the largest ones, and the logarithm of its probability.
// `choice` is [2, rows]. One block computes a row.
template <class T>
static __device__ void step_choice(const T *logits, i64 ld, int vocabulary, int packs,
                                   double *choice) {
  constexpr int N = Pack<T>::N;
  __shared__ float scratch[32];
  __shared__ int of_block[32];
  wait_for_inputs();
  const i64 row = blockIdx.x;
  const T *z = logits + row * ld;
  float top = -INFINITY, sum = 0;
  int best = vocabulary;
#pragma unroll 4
  for (int p = threadIdx.x; p < packs; p += blockDim.x) {
    float x[N];
    Pack<T>::load(z + p * N, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (p * N + i >= vocabulary) continue;
      if (x[i] > top) {
        sum *= power_of_2((top - x[i]) * LOG2_E);
        top = x[i], best = p * N + i;
      }
      sum += power_of_2((x[i] - top) * LOG2_E);
    }
  }
  const float of_all = block_reduce(top, scratch, true);
  const float total = block_reduce(
      top == -INFINITY ? 0.f : sum * power_of_2((top - of_all) * LOG2_E), scratch, false);
  if (top != of_all) best = vocabulary;
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) best = min(best, __shfl_xor_sync(~0u, best, o));
  if (threadIdx.x % 32 == 0) of_block[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 0; i < blockDim.x / 32; ++i) best = min(best, of_block[i]);
  choice[row] = best < vocabulary ? best : 0;  // no logit is a number
  choice[gridDim.x + row] = -logf(total);
}

#define STEP_KERNELS(T, NAME)                                                                      \
  extern "C" __global__ void step_norm_##NAME(const T *x, i64 ldx, Unfinished<T> y, const T *w,    \
                                              const T *b, float eps, T *sum, T *a) {               \
    step_norm<T>(x, ldx, y, w, b, eps, sum, a);                                                    \
  }                                                                                                \
  extern "C" __global__ void step_gelu_##NAME(Unfinished<T> y, T *out, int tanh_form) {            \
    step_gelu<T>(y, out, tanh_form);                                                               \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) step_attention_##NAME(                         \
      Unfinished<T> y, StepCache cache, int lanes, int splits, float *partial, int *arrived,       \
      T *out) {                                                                                    \
    if (lanes == 4) step_attention<T, 4>(y, cache, splits, partial, arrived, out);                 \
    if (lanes == 8) step_attention<T, 8>(y, cache, splits, partial, arrived, out);                 \
    if (lanes == 16) step_attention<T, 16>(y, cache, splits, partial, arrived, out);               \
    if (lanes == 32) step_attention<T, 32>(y, cache, splits, partial, arrived, out);               \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(512)                                                \
      thin_product_##NAME(const T *x, i64 ldx, const T *w, i64 ldw, T *out, i64 ldo, int rows,     \
                          int in, int columns, int lanes) {                                        \
    if (rows == 1)                                                                                 \
      thin_product<T, 1>(x, ldx, w, ldw, out, ldo, rows, in, columns, lanes);                      \
    else if (rows == 2)                                                                            \
      thin_product<T, 2>(x, ldx, w, ldw, out, ldo, rows, in, columns, lanes);                      \
    else                                                                                           \
      thin_product<T, 4>(x, ldx, w, ldw, out, ldo, rows, in, columns, lanes);                      \
  }                                                                                                \
  extern "C" __global__ void step_choice_##NAME(const T *logits, i64 ld, int vocabulary,           \
                                                int packs, double *choice) {                       \
    step_choice<T>(logits, ld, vocabulary, packs, choice);                                         \
  }
STEP_KERNELS(bf16, bf16)
STEP_KERNELS(float, f32)
