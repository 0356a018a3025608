// Cross entropy of rows of logits.

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

// The sum or the largest of a number over the blocks of a cluster, which all hold it in all of
// their threads. `slot` is in shared memory.
static __device__ __forceinline__ float cluster_reduce(float x, float *slot, bool is_max,
                                                       int split) {
  if (split == 1) return x;
  if (threadIdx.x == 0) *slot = x;
  cluster_wait();
  const u32 own = (u32)__cvta_generic_to_shared(slot);
  for (int k = 0; k < split; ++k) {
    const float other = of_block(own, k);
    x = k == 0 ? other : is_max ? fmaxf(x, other) : x + other;
  }
  // no block ends or writes again before all have read
  cluster_wait();
  return x;
}

// One block, or a cluster of `split` blocks with a part of the vocabulary each, computes a
// position:
//   losses = logsumexp(z) - z_label
//   smoothed = logsumexp(z) - (1 - s) z_label - s mean(z)
// Both are 0 where the label is negative. With `scale`, logits become the gradient of scale *
// smoothed, and columns from `vocabulary` to `padded` become 0. With `keeps`, a block's
// part stays in shared memory between the two passes over it.
template <class T>
static __device__ __forceinline__ void cross_entropy(T *logits, i64 ld, const i64 *labels,
                                                     int vocabulary, int padded, float smoothing,
                                                     const float *scale, float *losses,
                                                     float *smoothed, int keeps, int split) {
  constexpr int N = Pack<T>::N;
  extern __shared__ uint4 kept[];
  __shared__ float scratch[32], slot;
  const i64 row = blockIdx.x / split;
  const int part = (int)(blockIdx.x % split);
  T *z = logits + row * ld;
  const i64 label = labels[row];
  // the packs of this block
  const int per_block = (padded / N + split - 1) / split;
  const int first = part * per_block, end = min(first + per_block, padded / N);
  if (label < 0) {
    if (part == 0 && threadIdx.x == 0) losses[row] = 0, smoothed[row] = 0;
    const float zero[N] = {};
    if (scale)
      for (int p = first + threadIdx.x; p < end; p += blockDim.x) Pack<T>::store(z + p * N, zero);
    return;
  }
  const float at_label = wide(z[label]);
  // each thread's largest logit, and the sum of its exponentials relative to that logit
  float top = -INFINITY, sum = 0, total = 0;
#pragma unroll 2
  for (int p = first + threadIdx.x; p < end; p += blockDim.x) {
    const uint4 bits = *(const uint4 *)(z + p * N);
    if (keeps) kept[p - first] = bits;
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
  const float of_all = cluster_reduce(block_reduce(top, scratch, true), &slot, true, split);
  sum = block_reduce(top == -INFINITY ? 0.f : sum * power_of_2((top - of_all) * LOG2_E), scratch,
                     false);
  sum = cluster_reduce(sum, &slot, false, split);
  const float lse = logf(sum) + of_all;
  if (smoothing > 0)
    total = cluster_reduce(block_reduce(total, scratch, false), &slot, false, split);
  if (part == 0 && threadIdx.x == 0) {
    losses[row] = lse - at_label;
    smoothed[row] = lse - (1.f - smoothing) * at_label - smoothing * (total / vocabulary);
  }
  if (!scale) return;
  const float s = *scale, even = s * smoothing / vocabulary, shift = lse * LOG2_E;
#pragma unroll 2
  for (int p = first + threadIdx.x; p < end; p += blockDim.x) {
    const uint4 bits = keeps ? kept[p - first] : *(const uint4 *)(z + p * N);
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
