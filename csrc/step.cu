// The kernels of a step of generation, in which each text gets one new position. They are compiled
// behind csrc/kernels.cu, whose conventions hold here too, with STEP defined. csrc/step.cpp says
// how they make a block.
//
// A kernel starts while the one before it still runs (programmatic dependent launch). Before it
// waits for that one, it may read what was written before that one started: weights, earlier keys
// and values, positions, and routing weights. Whatever the kernel directly in front writes must be
// read behind the wait.

// Brings what lies at an address into the L2 cache.
static __device__ __forceinline__ void prefetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
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

// What v is a multiple of, [ranks], written to shared memory. The routing weights were computed
// before the kernel in front of this one, so a kernel need not have waited for that one.
template <class T>
static __device__ __forceinline__ void weights_of_row(const Unfinished<T> &y, i64 row, float *v) {
  for (int r = threadIdx.x; r < y.ranks; r += blockDim.x)
    v[r] = y.scaling[r] * (y.g ? y.g[row * y.experts + y.expert_of[r]] : 1.f);
}
// Makes v of these.
template <class T>
static __device__ __forceinline__ void weigh_row(const Unfinished<T> &y, i64 row, float *v) {
  for (int r = threadIdx.x; r < y.ranks; r += blockDim.x)
    v[r] *= wide(y.product[row * y.ld + y.out + r]);
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
      float bias[N] = {};
      Pack<T>::load(y.product + row * y.ld + c, sum);
      if (y.bias) Pack<T>::load(y.bias + c, bias);
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

// LayerNorm over the WIDTH values that `threads` threads of a row hold in packs, with weight w and
// bias b; `reduce` adds a number over these threads. The results replace the values.
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
  const float mu = reduce(total) / WIDTH;
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
    float scale[N], shift[N];
    Pack<T>::load(w + c, scale);
    Pack<T>::load(b + c, shift);
#pragma unroll
    for (int i = 0; i < N; ++i) x[k][i] = (x[k][i] - mu) * rs * scale[i] + shift[i];
  }
}

// x + y, rounded as in the residual stream
template <class T> static __device__ __forceinline__ float rounded_sum(float x, float y) {
  T kept;
  put(&kept, x + y);
  return wide(kept);
}

// sum = x + y, where y may have no product and is then 0, and a = LayerNorm(sum) with weight w and
// bias b. One block computes a row; its first 128 threads hold the row.
template <class T>
static __device__ void step_norm(const T *x, i64 ldx, const Unfinished<T> &y, const T *w,
                                 const T *b, float eps, T *sum, T *a) {
  constexpr int N = Pack<T>::N, THREADS = 128, PACKS = (WIDTH / N + THREADS - 1) / THREADS;
  extern __shared__ float of_norm[];
  __shared__ float scratch[32];
  float *values = of_norm, *v = of_norm + max((int)blockDim.x * N, WIDTH);
  const i64 row = blockIdx.x;
  weights_of_row(y, row, v);
  wait_for_inputs();
  if (y.ranks) {
    weigh_row(y, row, v);
    finish(y, row, WIDTH / N, [](int pack) { return pack * N; }, v, values);
  }
  float total[PACKS][N] = {};
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int c = (k * THREADS + threadIdx.x) * N;
    if (threadIdx.x >= THREADS || c >= WIDTH) continue;
    float added[N] = {}, bias[N] = {};
    Pack<T>::load(x + row * ldx + c, total[k]);
    if (y.ranks) {
#pragma unroll
      for (int i = 0; i < N; ++i) added[i] = values[c + i];
    } else if (y.product) {
      Pack<T>::load(y.product + row * y.ld + c, added);
      Pack<T>::load(y.bias + c, bias);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) total[k][i] = rounded_sum<T>(total[k][i], added[i] + bias[i]);
    Pack<T>::store(sum + row * WIDTH + c, total[k]);
  }
  normalise<T, PACKS>(total, threadIdx.x < THREADS ? threadIdx.x : WIDTH, THREADS, w, b, eps,
                      [&](float of_thread) { return block_reduce(of_thread, scratch, false); });
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int c = (k * THREADS + threadIdx.x) * N;
    if (threadIdx.x < THREADS && c < WIDTH) Pack<T>::store(a + row * WIDTH + c, total[k]);
  }
}

static __device__ __forceinline__ float gelu_of(float z, int tanh_form) {
  const float h = tanh_form ? tanh_of(ROOT_2_OVER_PI * (z + 0.044715f * z * z * z))
                            : erff(0.7071067811865476f * z);
  return 0.5f * z * (1.f + h);
}

// out = y, or gelu(y) in one of its forms. A block computes 32 packs of a row.
template <class T>
static __device__ void step_finish(const Unfinished<T> &y, T *out, int is_gelu, int tanh_form) {
  constexpr int N = Pack<T>::N;
  extern __shared__ float of_gelu[];
  float *values = of_gelu, *v = of_gelu + blockDim.x * N;
  const int all = y.out / N, chunks = (all + 31) / 32;
  const i64 row = blockIdx.x / chunks;
  const int first = blockIdx.x % chunks * 32, packs = min(32, all - first);
  weights_of_row(y, row, v);
  wait_for_inputs();
  weigh_row(y, row, v);
  finish(y, row, packs, [=](int pack) { return (first + pack) * N; }, v, values);
  for (int i = threadIdx.x; i < packs * N; i += blockDim.x)
    put(out + row * y.out + first * N + i, is_gelu ? gelu_of(values[i], tanh_form) : values[i]);
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
  // Adds the positions of the thread `distance` away, which adds those of this one.
  __device__ __forceinline__ void merge(int distance) {
    const float other = __shfl_xor_sync(~0u, top, distance), higher = fmaxf(top, other);
    const float own = top > -INFINITY ? power_of_2(top - higher) : 0.f;
    const float theirs = other > -INFINITY ? power_of_2(other - higher) : 0.f;
    sum = own * sum + theirs * __shfl_xor_sync(~0u, sum, distance);
#pragma unroll
    for (int i = 0; i < N; ++i)
      value[i] = own * value[i] + theirs * __shfl_xor_sync(~0u, value[i], distance);
    top = higher;
  }
};

struct StepCache {
  void *keys, *values;  // [rows, heads, capacity + 1, head size]
  i64 row_stride;       // elements from one row to the next
  i64 head_stride;      // elements from one head to the next
  const i64 *places;    // where each row's new position goes in its row
  const i64 *positions; // index of each row's new position in its text
  int heads, window;    // window 0 means that there is none
  float scale;
};

#define MAX_SPLITS 16

// Attention of each row's new position to itself and to the positions of the cache, to which its
// key and value are added. `y` is [q | k | v]. A block computes one part of a row's and head's
// positions; the last of them to end combines the parts. LANES threads hold a head's vector.
template <class T, int LANES>
static __device__ void step_attention(const Unfinished<T> &y, const StepCache &cache, int splits,
                                      float *partial, int *arrived, T *out) {
  constexpr int N = Pack<T>::N, SIZE = LANES * N, UNROLL = 4, WARPS = 8, GROUPS = 256 / LANES;
  extern __shared__ float of_attention[];
  __shared__ float tops[MAX_SPLITS], sums[MAX_SPLITS];
  __shared__ bool is_last;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  float *values = of_attention, *v = values + 256 * N;
  const int split = blockIdx.x % splits, head = blockIdx.x / splits % cache.heads;
  const i64 row = blockIdx.x / (splits * cache.heads);
  const i64 width = (i64)cache.heads * SIZE, at_head = (i64)head * SIZE;
  const i64 past = cache.positions[row];
  const i64 first = cache.window && past >= cache.window ? past - cache.window + 1 : 0;
  const i64 chunk = (past - first + splits - 1) / splits;
  const i64 begin = first + split * chunk, end = min(past, begin + chunk);
  const i64 in_cache = row * cache.row_stride + head * cache.head_stride + lane * N;
  T *keys = (T *)cache.keys + in_cache, *old_values = (T *)cache.values + in_cache;
  uint4 next_k[UNROLL], next_v[UNROLL];
  auto load = [&](i64 from) {
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const i64 j = from + group + i * GROUPS;
      next_k[i] = next_v[i] = make_uint4(0, 0, 0, 0);
      if (j < end) {
        next_k[i] = *(const uint4 *)(keys + j * SIZE);
        next_v[i] = *(const uint4 *)(old_values + j * SIZE);
      }
    }
  };
  // earlier steps wrote these
  load(begin);
  const bool owns = split == 0;
  const int packs = owns ? 3 * LANES : LANES;
  auto column = [=](int pack) { return (int)(pack / LANES * width + at_head) + pack % LANES * N; };
  weights_of_row(y, row, v);
  for (int t = threadIdx.x; t < packs * y.ranks; t += blockDim.x)
    prefetch(y.b + t / packs * y.ldb + column(t % packs));
  wait_for_inputs();
  weigh_row(y, row, v);
  finish(y, row, packs, column, v, values);
  float q[N], new_key[N] = {}, new_value[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    q[i] = values[lane * N + i] * (cache.scale * LOG2_E);
    if (owns) {
      // rounded as in the cache
      new_key[i] = rounded_sum<T>(values[SIZE + lane * N + i], 0.f);
      new_value[i] = rounded_sum<T>(values[2 * SIZE + lane * N + i], 0.f);
    }
  }
  if (owns && group == 0) {
    Pack<T>::store(keys + cache.places[row] * SIZE, new_key);
    Pack<T>::store(old_values + cache.places[row] * SIZE, new_value);
  }
  auto score_of = [&](const float *key) {
    float dot = 0;
#pragma unroll
    for (int c = 0; c < N; ++c) dot = fmaf(q[c], key[c], dot);
#pragma unroll
    for (int o = LANES / 2; o > 0; o >>= 1) dot += __shfl_xor_sync(~0u, dot, o);
    return dot;
  };
  Attended<N> all;
  for (i64 from = begin; from < end; from += GROUPS * UNROLL) {
    uint4 k[UNROLL], w[UNROLL];
    float score[UNROLL], top = -INFINITY;
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) k[i] = next_k[i], w[i] = next_v[i];
    if (from + GROUPS * UNROLL < end) load(from + GROUPS * UNROLL);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      float x[N];
      Pack<T>::load((const T *)&k[i], x);
      const float dot = score_of(x);
      score[i] = from + group + i * GROUPS < end ? dot : -INFINITY;
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
    const float dot = score_of(new_key);
    if (group == 0) {
      all.raise(dot);
      all.add(dot, new_value);
    }
  }
  // the groups of a warp, and then the warps of the block
#pragma unroll
  for (int distance = LANES; distance < 32; distance <<= 1) all.merge(distance);
  __syncthreads();
  if (threadIdx.x % 32 < LANES) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < N; ++i) values[warp * SIZE + lane * N + i] = all.value[i];
    if (lane == 0) tops[warp] = all.top, sums[warp] = all.sum;
  }
  __syncthreads();
  auto combine = [&](int parts, const float *of_parts, i64 stride, float &top, float &sum,
                     float &value) {
    for (int i = 0; i < parts; ++i) top = fmaxf(top, tops[i]);
#pragma unroll 8
    for (int i = 0; i < parts; ++i) {
      const float factor = tops[i] > -INFINITY ? power_of_2(tops[i] - top) : 0.f;
      sum += factor * sums[i];
      value += factor * __ldcg(of_parts + i * stride);
    }
  };
  float top = -INFINITY, sum = 0, value = 0;
  if (threadIdx.x < SIZE) {
#pragma unroll
    for (int i = 0; i < WARPS; ++i) top = fmaxf(top, tops[i]);
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
      const float factor = tops[i] > -INFINITY ? power_of_2(tops[i] - top) : 0.f;
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
  float *parts = partial + pair * splits * (SIZE + 2), *own = parts + split * (SIZE + 2);
  if (threadIdx.x < SIZE) own[2 + threadIdx.x] = value;
  if (threadIdx.x == 0) own[0] = top, own[1] = sum;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(arrived + pair, 1) == splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x < splits) {
    tops[threadIdx.x] = __ldcg(parts + threadIdx.x * (SIZE + 2));
    sums[threadIdx.x] = __ldcg(parts + threadIdx.x * (SIZE + 2) + 1);
  }
  if (threadIdx.x == 0) arrived[pair] = 0;
  __syncthreads();
  if (threadIdx.x < SIZE) {
    top = -INFINITY, sum = value = 0;
    combine(splits, parts + 2 + threadIdx.x, SIZE + 2, top, sum, value);
    put(to + threadIdx.x, value / sum);
  }
}

// What a thin product multiplies.
template <class T> struct ThinInput {
  int kind;  // 0: x; 1: LayerNorm(x + y), where x + y is written to `sum`; 2: gelu(y)
  const T *x;
  i64 ldx;
  Unfinished<T> y;
  const T *norm_w, *norm_b;
  float eps;
  T *sum;
  int tanh_form;
};

// A pack of y's finished values, added to `out`.
template <class T>
static __device__ __forceinline__ void finish_pack(const Unfinished<T> &y, i64 row, int c,
                                                   float *out) {
  constexpr int N = Pack<T>::N;
  float x[N], bias[N];
  Pack<T>::load(y.product + row * y.ld + c, x);
  Pack<T>::load(y.bias + c, bias);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] += x[i] + bias[i];
#pragma unroll 4
  for (int r = 0; r < y.ranks; ++r) {
    const float g = y.g ? y.g[row * y.experts + y.expert_of[r]] : 1.f;
    const float v = wide(y.product[row * y.ld + y.out + r]) * g * y.scaling[r];
    Pack<T>::load(y.b + r * y.ldb + c, x);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = fmaf(v, x[i], out[i]);
  }
}

// Writes the input of a thin product, [rows, in], to shared memory. Every block does so, since that
// takes less time than another kernel.
template <class T>
static __device__ __forceinline__ void make_input(const ThinInput<T> &input, int rows, int in,
                                                  T *out) {
  constexpr int N = Pack<T>::N, PACKS = (WIDTH / N + 31) / 32;
  if (input.kind == 2) {
    const int per_row = in / N;
    for (int t = threadIdx.x; t < rows * per_row; t += blockDim.x) {
      const int m = t / per_row, c = t % per_row * N;
      float z[N] = {};
      finish_pack(input.y, m, c, z);
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = gelu_of(z[i], input.tanh_form);
      Pack<T>::store(out + m * in + c, z);
    }
  } else if (threadIdx.x / 32 < rows) {
    const int m = threadIdx.x / 32, lane = threadIdx.x % 32;
    float x[PACKS][N] = {};
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int c = (k * 32 + lane) * N;
      if (c >= WIDTH) continue;
      float added[N] = {};
      finish_pack(input.y, m, c, added);
      Pack<T>::load(input.x + m * input.ldx + c, x[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) x[k][i] = rounded_sum<T>(x[k][i], added[i]);
      if (blockIdx.x == 0) Pack<T>::store(input.sum + m * WIDTH + c, x[k]);
    }
    normalise<T, PACKS>(x, lane, 32, input.norm_w, input.norm_b, input.eps,
                        [](float of_thread) { return warp_sum(of_thread); });
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int c = (k * 32 + lane) * N;
      if (c < WIDTH) Pack<T>::store(out + m * in + c, x[k]);
    }
  }
  __syncthreads();
}

#define THIN_UNROLL 4
#define THIN_WARPS 16

// A thread's packs of a matrix w, [in, columns], of which `lanes` threads read a segment of a row.
template <class T> struct ThinWeight {
  const T *w;
  i64 ld;
  int in, columns, lanes;
  uint4 next[THIN_UNROLL];
  __device__ __forceinline__ int groups() const { return blockDim.x / lanes; }
  __device__ __forceinline__ int row(int from, int i) const {
    return from + threadIdx.x / lanes + i * groups();
  }
  __device__ __forceinline__ int column() const {
    return (blockIdx.x * lanes + threadIdx.x % lanes) * Pack<T>::N;
  }
  __device__ __forceinline__ void load(int from) {
    const int c = column();
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) {
      const int k = row(from, i);
      next[i] = make_uint4(0, 0, 0, 0);
      if (c < columns && k < in) next[i] = __ldg((const uint4 *)(w + k * ld + c));
    }
  }
};

// out = x w for at most ROWS rows of x; the first packs of w have been asked for.
template <class T, int ROWS>
static __device__ __forceinline__ void thin_product(const T *x, i64 ldx, int rows,
                                                    ThinWeight<T> &weight, T *out, i64 ldo,
                                                    float *parts) {
  constexpr int N = Pack<T>::N;
  const int lanes = weight.lanes, lane = threadIdx.x % lanes, in = weight.in;
  const int first = blockIdx.x * lanes * N, at_once = weight.groups() * THIN_UNROLL;
  float sum[ROWS][N] = {};
  for (int from = 0; from < in; from += at_once) {
    uint4 now[THIN_UNROLL];
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) now[i] = weight.next[i];
    if (from + at_once < in) weight.load(from + at_once);
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) {
      const int k = weight.row(from, i);
      float of_weight[N];
      Pack<T>::load((const T *)&now[i], of_weight);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const float factor = m < rows && k < in ? wide(x[m * ldx + k]) : 0.f;
#pragma unroll
        for (int n = 0; n < N; ++n) sum[m][n] = fmaf(factor, of_weight[n], sum[m][n]);
      }
    }
  }
  for (int o = 16; o >= lanes; o >>= 1)
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) sum[m][n] += __shfl_xor_sync(~0u, sum[m][n], o);
  const int width = lanes * N, of_warp = ROWS * width;
  if (threadIdx.x % 32 < lanes)
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
        parts[threadIdx.x / 32 * of_warp + m * width + lane * N + n] = sum[m][n];
  __syncthreads();
  for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
    const int m = i / width, column = first + i % width;
    if (column >= weight.columns) continue;
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < THIN_WARPS; ++warp)
      total += parts[warp * of_warp + m * width + i % width];
    put(out + m * ldo + column, total);
  }
}

template <class T>
static __device__ __forceinline__ void thin_products(const ThinInput<T> &input, const T *w, i64 ldw,
                                                     T *out, i64 ldo, int rows, int in, int columns,
                                                     int lanes) {
  extern __shared__ uint4 of_product[];
  __shared__ float parts[THIN_WARPS * 4 * 4 * Pack<T>::N];
  ThinWeight<T> weight{w, ldw, in, columns, lanes};
  weight.load(0);
  wait_for_inputs();
  const T *x = input.x;
  i64 ldx = input.ldx;
  if (input.kind) {
    make_input(input, rows, in, (T *)of_product);
    x = (const T *)of_product, ldx = in;
  }
  if (rows == 1)
    thin_product<T, 1>(x, ldx, rows, weight, out, ldo, parts);
  else if (rows == 2)
    thin_product<T, 2>(x, ldx, rows, weight, out, ldo, parts);
  else
    thin_product<T, 4>(x, ldx, rows, weight, out, ldo, parts);
}

#define STEP_KERNELS(T, NAME)                                                                      \
  extern "C" __global__ void __launch_bounds__(1024) step_norm_##NAME(                             \
      const T *x, i64 ldx, Unfinished<T> y, const T *w, const T *b, float eps, T *sum, T *a) {     \
    step_norm<T>(x, ldx, y, w, b, eps, sum, a);                                                    \
  }                                                                                                \
  extern "C" __global__ void step_finish_##NAME(Unfinished<T> y, T *out, int is_gelu,              \
                                                int tanh_form) {                                   \
    step_finish<T>(y, out, is_gelu, tanh_form);                                                    \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 2) step_attention_##NAME(                      \
      Unfinished<T> y, StepCache cache, int lanes, int splits, float *partial, int *arrived,       \
      T *out) {                                                                                    \
    if (lanes == 4) step_attention<T, 4>(y, cache, splits, partial, arrived, out);                 \
    if (lanes == 8) step_attention<T, 8>(y, cache, splits, partial, arrived, out);                 \
    if (lanes == 16) step_attention<T, 16>(y, cache, splits, partial, arrived, out);               \
    if (lanes == 32) step_attention<T, 32>(y, cache, splits, partial, arrived, out);               \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(512) thin_product_##NAME(                           \
      ThinInput<T> input, const T *w, i64 ldw, T *out, i64 ldo, int rows, int in, int columns,     \
      int lanes) {                                                                                 \
    thin_products<T>(input, w, ldw, out, ldo, rows, in, columns, lanes);                           \
  }
STEP_KERNELS(bf16, bf16)
STEP_KERNELS(float, f32)
