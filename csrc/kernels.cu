// The elementwise and row-wise kernels of the fused block and loss. NVRTC compiles them at run time
// for the GPU at hand. Each kernel is defined by its twin in libtorch operations, in
// csrc/block.cpp, its headers or csrc/head_loss.cpp.
//
// A matrix argument is a pointer and the number of elements from one row to the next. Its columns
// are contiguous and its rows aligned to 16 bytes. Everything is computed in f32. `bf16` and `f32`
// name the dtype of activations.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct bf16 {
  u16 bits;
};
static __device__ __forceinline__ float wide(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
static __device__ __forceinline__ float wide(float x) { return x; }
static __device__ __forceinline__ u32 pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  u32 l = __float_as_uint(low), h = __float_as_uint(high);
  l = (l + 0x7fff + ((l >> 16) & 1)) >> 16;
  h = (h + 0x7fff + ((h >> 16) & 1)) & 0xffff0000;
  return l | h;
#endif
}
static __device__ __forceinline__ void put(bf16 *p, float x) { p->bits = (u16)pair(x, 0.f); }
static __device__ __forceinline__ void put(float *p, float x) { *p = x; }

// 16 bytes of a row.
template <class T> struct Pack;
template <> struct Pack<bf16> {
  static constexpr int N = 8;
  static __device__ __forceinline__ void load(const bf16 *p, float *x) {
    const uint4 v = *(const uint4 *)p;
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(w[i] << 16);
      x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
    }
  }
  static __device__ __forceinline__ void store(bf16 *p, const float *x) {
    *(uint4 *)p =
        make_uint4(pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7]));
  }
};
template <> struct Pack<float> {
  static constexpr int N = 4;
  static __device__ __forceinline__ void load(const float *p, float *x) {
    const float4 v = *(const float4 *)p;
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
  static __device__ __forceinline__ void store(float *p, const float *x) {
    *(float4 *)p = make_float4(x[0], x[1], x[2], x[3]);
  }
};

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}

// sum = x + y (or x, if y is null), written to `sum` if that is not null. a = LayerNorm(sum) with
// weight w and bias b. One warp computes a row; WIDTH is d.
template <class T>
static __device__ void add_norm(const T *x, i64 ldx, const T *y, i64 ldy, const T *w, const T *b,
                                float eps, T *sum, T *a, i64 lda, float *mean, float *rstd,
                                i64 rows) {
  constexpr int N = Pack<T>::N, PER_LANE = (WIDTH / N + 31) / 32;
  const i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float v[PER_LANE][N];
  float total = 0;
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) {
    const int c = (k * 32 + lane) * N;
    if (c >= WIDTH) continue;
    Pack<T>::load(x + row * ldx + c, v[k]);
    if (y) {
      float u[N];
      T kept[N];
      Pack<T>::load(y + row * ldy + c, u);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        put(&kept[i], v[k][i] + u[i]);
        v[k][i] = wide(kept[i]);  // rounded as in `sum`
      }
    }
    if (sum) Pack<T>::store(sum + row * WIDTH + c, v[k]);
#pragma unroll
    for (int i = 0; i < N; ++i) total += v[k][i];
  }
  const float mu = warp_sum(total) / WIDTH;
  float squares = 0;
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) {
    if ((k * 32 + lane) * N >= WIDTH) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += (v[k][i] - mu) * (v[k][i] - mu);
  }
  const float rs = rsqrtf(warp_sum(squares) / WIDTH + eps);
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) {
    const int c = (k * 32 + lane) * N;
    if (c >= WIDTH) continue;
    float ws[N], bs[N];
    Pack<T>::load(w + c, ws);
    Pack<T>::load(b + c, bs);
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = (v[k][i] - mu) * rs * ws[i] + bs[i];
    Pack<T>::store(a + row * lda + c, v[k]);
  }
  if (lane == 0) mean[row] = mu, rstd[row] = rs;
}

// dx = the gradient of LayerNorm at x for the output's gradient da, plus `residual` if it is not
// null.
template <class T>
static __device__ void norm_backward(const T *da, i64 ldda, const T *x, const float *mean,
                                     const float *rstd, const T *w, const T *residual, i64 ldr,
                                     T *dx, i64 lddx, i64 rows) {
  constexpr int N = Pack<T>::N, PER_LANE = (WIDTH / N + 31) / 32;
  const i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const float mu = mean[row], rs = rstd[row];
  float g[PER_LANE][N], h[PER_LANE][N];
  float sum_g = 0, sum_gh = 0;
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) {
    const int c = (k * 32 + lane) * N;
    if (c >= WIDTH) continue;
    float ws[N];
    Pack<T>::load(da + row * ldda + c, g[k]);
    Pack<T>::load(x + row * WIDTH + c, h[k]);
    Pack<T>::load(w + c, ws);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g[k][i] *= ws[i];
      h[k][i] = (h[k][i] - mu) * rs;
      sum_g += g[k][i];
      sum_gh += g[k][i] * h[k][i];
    }
  }
  const float c1 = warp_sum(sum_g) / WIDTH, c2 = warp_sum(sum_gh) / WIDTH;
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) {
    const int c = (k * 32 + lane) * N;
    if (c >= WIDTH) continue;
    float r[N];
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] = 0;
    if (residual) Pack<T>::load(residual + row * ldr + c, r);
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] += (g[k][i] - c1 - h[k][i] * c2) * rs;
    Pack<T>::store(dx + row * lddx + c, r);
  }
}

// v = u times the scaling of its column and the routing weight of the column's expert (1 if g is
// null). A column without an expert has scaling 0.
template <class T>
static __device__ void weigh(const T *u, i64 ldu, const float *g, int experts, const int *expert_of,
                             const float *scaling, T *v, i64 ldv, int columns, i64 total) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const i64 row = i / columns;
  const int c = (int)(i - row * columns);
  const float factor = g ? g[row * experts + expert_of[c]] * scaling[c] : scaling[c];
  put(v + row * ldv + c, wide(u[row * ldu + c]) * factor);
}

// du = dv times the same factor. dg = the sum of dv u scaling over an expert's columns; it is added
// to dg if `adds`, and not computed if dg is null. One warp computes a row. An expert's columns are
// the runs [first, second) and [third, fourth) of `runs`.
template <class T>
static __device__ void weigh_backward(const T *dv, i64 lddv, const T *u, i64 ldu, const float *g,
                                      int experts, const int *expert_of, const float *scaling,
                                      const int4 *runs, T *du, i64 lddu, float *dg, int adds,
                                      int columns, i64 rows) {
  extern __shared__ float products[];
  const i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float *p = products + (threadIdx.x / 32) * columns;
  for (int c = lane; c < columns; c += 32) {
    const float d = wide(dv[row * lddv + c]) * scaling[c];
    put(du + row * lddu + c, g ? d * g[row * experts + expert_of[c]] : d);
    if (dg) p[c] = d * wide(u[row * ldu + c]);
  }
  if (!dg) return;
  __syncwarp();
  // 2^k lanes sum the columns of one expert, in an order that only the shape decides
  int group = 32;
  while (group > 1 && 32 / group < experts) group >>= 1;
  for (int first = 0; first < experts; first += 32 / group) {
    const int e = first + lane / group;
    float sum = 0;
    if (e < experts) {
      const int4 run = runs[e];
      for (int c = run.x + lane % group; c < run.y; c += group) sum += p[c];
      for (int c = run.z + lane % group; c < run.w; c += group) sum += p[c];
    }
    for (int o = group / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (e < experts && lane % group == 0) {
      float *out = dg + row * experts + e;
      *out = adds ? *out + sum : sum;
    }
  }
}

// Writes the experts' parts of a packed weight [W A^T; B^T 0], from A [r, i] and B^T [r, o] in f32,
// and leaves the rest.
template <class T>
static __device__ void refresh(const float *a, const float *b, T *packed, i64 ld, int in, int out,
                               int ranks) {
  const i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const i64 of_b = (i64)ranks * out, of_a = (i64)ranks * in;
  if (t < of_b) {
    const i64 r = t / out;
    put(packed + (in + r) * ld + (t - r * out), b[t]);
  } else if (t < of_b + of_a) {
    const i64 row = (t - of_b) / ranks, r = (t - of_b) - row * ranks;
    put(packed + row * ld + out + r, a[r * in + row]);
  }
}

static __device__ __forceinline__ float tanh_of(float x) {
  const float e = __expf(-2.f * fabsf(x));
  return copysignf((1.f - e) / (1.f + e), x);
}
#define ROOT_2_OVER_PI 0.7978845608028654f

// The pack of this thread in a matrix with `columns` columns and `packs` packs.
template <class T> struct Place {
  i64 row;
  int column;
  bool is_inside;
  __device__ __forceinline__ Place(int columns, i64 packs) {
    const i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int per_row = columns / Pack<T>::N;
    row = t / per_row;
    column = (int)(t - row * per_row) * Pack<T>::N;
    is_inside = t < packs;
  }
};

// out = gelu(z) in its tanh form. `columns` is a multiple of the elements of a pack.
template <class T>
static __device__ void gelu(const T *z, i64 ldz, T *out, i64 ldo, int columns, i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(columns, packs);
  if (!at.is_inside) return;
  const i64 row = at.row;
  const int c = at.column;
  float x[N];
  Pack<T>::load(z + row * ldz + c, x);
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] = 0.5f * x[i] * (1.f + tanh_of(ROOT_2_OVER_PI * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
  Pack<T>::store(out + row * ldo + c, x);
}
// dz = dout gelu'(z)
template <class T>
static __device__ void gelu_backward(const T *z, i64 ldz, const T *dout, i64 ldo, T *dz, i64 lddz,
                                     int columns, i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(columns, packs);
  if (!at.is_inside) return;
  const i64 row = at.row;
  const int c = at.column;
  float x[N], d[N];
  Pack<T>::load(z + row * ldz + c, x);
  Pack<T>::load(dout + row * ldo + c, d);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float h = tanh_of(ROOT_2_OVER_PI * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    const float slope = ROOT_2_OVER_PI * (1.f + 3.f * 0.044715f * x[i] * x[i]);
    d[i] *= 0.5f * (1.f + h) + 0.5f * x[i] * (1.f - h * h) * slope;
  }
  Pack<T>::store(dz + row * lddz + c, d);
}

// Writes [dq | dk | dv] of each token, from three tensors [b, t, h, c] in that memory order.
template <class T>
static __device__ void pack_qkv(const T *q, const T *k, const T *v, T *out, i64 ldo, int width,
                                i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(width, packs);
  if (!at.is_inside) return;
  const i64 row = at.row;
  const int c = at.column;
  float x[N];
  Pack<T>::load(q + row * width + c, x);
  Pack<T>::store(out + row * ldo + c, x);
  Pack<T>::load(k + row * width + c, x);
  Pack<T>::store(out + row * ldo + width + c, x);
  Pack<T>::load(v + row * width + c, x);
  Pack<T>::store(out + row * ldo + 2 * width + c, x);
}

static __device__ __forceinline__ float block_reduce(float x, float *scratch, bool is_max) {
  x = is_max ? warp_max(x) : warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = blockDim.x / 32;
  x = threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : (is_max ? -INFINITY : 0.f);
  return is_max ? warp_max(x) : warp_sum(x);
}
static __device__ __forceinline__ float power_of_2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
#define LOG2_E 1.4426950408889634f

// One block computes a position:
//   losses = logsumexp(z) - z_label
//   smoothed = logsumexp(z) - (1 - s) z_label - s mean(z)
// Both are 0 where the label is negative. With `scale`, logits become the gradient of scale *
// smoothed, and columns from `vocabulary` to `padded` become 0. With `keeps`, the row stays in
// shared memory between the two passes over it.
template <class T>
static __device__ __forceinline__ void cross_entropy(T *logits, i64 ld, const i64 *labels,
                                                     int vocabulary, int padded, float smoothing,
                                                     const float *scale, float *losses,
                                                     float *smoothed, int keeps) {
  constexpr int N = Pack<T>::N;
  extern __shared__ uint4 kept[];
  __shared__ float scratch[32];
  const i64 row = blockIdx.x;
  T *z = logits + row * ld;
  const i64 label = labels[row];
  const int packs = padded / N;
  if (label < 0) {
    if (threadIdx.x == 0) losses[row] = 0, smoothed[row] = 0;
    const float zero[N] = {};
    if (scale)
      for (int p = threadIdx.x; p < packs; p += blockDim.x) Pack<T>::store(z + p * N, zero);
    return;
  }
  const float at_label = wide(z[label]);
  // each thread's largest logit, and the sum of its exponentials relative to that logit
  float top = -INFINITY, sum = 0, total = 0;
#pragma unroll 2
  for (int p = threadIdx.x; p < packs; p += blockDim.x) {
    const uint4 bits = *(const uint4 *)(z + p * N);
    if (keeps) kept[p] = bits;
    if (p * N >= vocabulary) continue;
    float x[N];
    Pack<T>::load((const T *)&bits, x);
    if (p * N + N > vocabulary) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (p * N + i >= vocabulary) x[i] = -INFINITY;
    }
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) largest = fmaxf(largest, x[i]);
    if (largest > top) {
      sum *= power_of_2((top - largest) * LOG2_E);
      top = largest;
    }
    const float shift = top * LOG2_E;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += power_of_2(fmaf(x[i], LOG2_E, -shift));
    if (smoothing > 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) total += p * N + i < vocabulary ? x[i] : 0.f;
    }
  }
  const float of_all = block_reduce(top, scratch, true);
  sum = block_reduce(top == -INFINITY ? 0.f : sum * power_of_2((top - of_all) * LOG2_E), scratch,
                     false);
  const float lse = logf(sum) + of_all;
  if (smoothing > 0) total = block_reduce(total, scratch, false);
  if (threadIdx.x == 0) {
    losses[row] = lse - at_label;
    smoothed[row] = lse - (1.f - smoothing) * at_label - smoothing * (total / vocabulary);
  }
  if (!scale) return;
  const float s = *scale, even = s * smoothing / vocabulary, shift = lse * LOG2_E;
#pragma unroll 2
  for (int p = threadIdx.x; p < packs; p += blockDim.x) {
    const uint4 bits = keeps ? kept[p] : *(const uint4 *)(z + p * N);
    float x[N];
    Pack<T>::load((const T *)&bits, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fmaf(power_of_2(fmaf(x[i], LOG2_E, -shift)), s, -even);
    if (p == label / N || p * N + N > vocabulary) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (p * N + i == label) x[i] -= (1.f - smoothing) * s;
        if (p * N + i >= vocabulary) x[i] = 0;
      }
    }
    Pack<T>::store(z + p * N, x);
  }
}

// Waits for the kernel in front of this one, if this one was launched before its end.
static __device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// For each row of logits: the first of the largest ones, and the logarithm of its probability.
// `choice` is [2, rows]. One block computes a row. If `ids` is not null, the choice becomes the
// row's next token, and its position and place are raised by 1.
template <class T>
static __device__ void step_choice(const T *logits, i64 ld, int vocabulary, int packs,
                                   double *choice, i64 *ids, i64 *positions, i64 *places) {
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
  if (best >= vocabulary) best = 0;  // no logit is a number
  choice[row] = best;
  choice[gridDim.x + row] = -logf(total);
  if (ids) ids[row] = best, positions[row] += 1, places[row] += 1;
}

#define KERNELS(T, NAME)                                                                           \
  extern "C" __global__ void add_norm_##NAME(const T *x, i64 ldx, const T *y, i64 ldy, const T *w, \
                                             const T *b, float eps, T *sum, T *a, i64 lda,         \
                                             float *mean, float *rstd, i64 rows) {                 \
    add_norm<T>(x, ldx, y, ldy, w, b, eps, sum, a, lda, mean, rstd, rows);                         \
  }                                                                                                \
  extern "C" __global__ void norm_backward_##NAME(                                                 \
      const T *da, i64 ldda, const T *x, const float *mean, const float *rstd, const T *w,         \
      const T *residual, i64 ldr, T *dx, i64 lddx, i64 rows) {                                     \
    norm_backward<T>(da, ldda, x, mean, rstd, w, residual, ldr, dx, lddx, rows);                   \
  }                                                                                                \
  extern "C" __global__ void weigh_##NAME(const T *u, i64 ldu, const float *g, int experts,        \
                                          const int *expert_of, const float *scaling, T *v,        \
                                          i64 ldv, int columns, i64 total) {                       \
    weigh<T>(u, ldu, g, experts, expert_of, scaling, v, ldv, columns, total);                      \
  }                                                                                                \
  extern "C" __global__ void weigh_backward_##NAME(                                                \
      const T *dv, i64 lddv, const T *u, i64 ldu, const float *g, int experts,                     \
      const int *expert_of, const float *scaling, const int4 *runs, T *du, i64 lddu, float *dg,    \
      int adds, int columns, i64 rows) {                                                           \
    weigh_backward<T>(dv, lddv, u, ldu, g, experts, expert_of, scaling, runs, du, lddu, dg, adds,  \
                      columns, rows);                                                              \
  }                                                                                                \
  extern "C" __global__ void refresh_##NAME(const float *a, const float *b, T *packed, i64 ld,     \
                                            int in, int out, int ranks) {                          \
    refresh<T>(a, b, packed, ld, in, out, ranks);                                                  \
  }                                                                                                \
  extern "C" __global__ void gelu_##NAME(const T *z, i64 ldz, T *out, i64 ldo, int columns,        \
                                         i64 packs) {                                              \
    gelu<T>(z, ldz, out, ldo, columns, packs);                                                     \
  }                                                                                                \
  extern "C" __global__ void gelu_backward_##NAME(const T *z, i64 ldz, const T *dout, i64 ldo,     \
                                                  T *dz, i64 lddz, int columns, i64 packs) {       \
    gelu_backward<T>(z, ldz, dout, ldo, dz, lddz, columns, packs);                                 \
  }                                                                                                \
  extern "C" __global__ void pack_qkv_##NAME(const T *q, const T *k, const T *v, T *out, i64 ldo,  \
                                             int width, i64 packs) {                               \
    pack_qkv<T>(q, k, v, out, ldo, width, packs);                                                  \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(512, 2) cross_entropy_##NAME(                       \
      T *logits, i64 ld, const i64 *labels, int vocabulary, int padded, float smoothing,           \
      const float *scale, float *losses, float *smoothed, int keeps) {                             \
    cross_entropy<T>(logits, ld, labels, vocabulary, padded, smoothing, scale, losses, smoothed,   \
                     keeps);                                                                       \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(1024) step_choice_##NAME(                           \
      const T *logits, i64 ld, int vocabulary, int packs, double *choice, i64 *ids, i64 *positions,\
      i64 *places) {                                                                               \
    step_choice<T>(logits, ld, vocabulary, packs, choice, ids, positions, places);                 \
  }
#ifndef STEP
KERNELS(bf16, bf16)
KERNELS(float, f32)
#endif
