// Attention of a step of generation.

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
  void *keys, *values;  // [rows, key-value heads, capacity + 1, head size]
  i64 row_stride;       // elements from one row to the next
  i64 head_stride;      // elements from one head to the next
  const i64 *places;    // where each row's new position goes in its row
  const i64 *positions; // index of each row's new position in its text
  int heads, key_heads; // a key-value head serves heads / key_heads query heads
  int window;           // 0 means that there is none
  float scale;
  const void *q_norm, *k_norm; // RMSNorm of queries and keys, [head size]; null if there is none
  float eps;
  const float *frequencies; // of rotation, [head size / 2]; null if there is none
  float rope_factor;        // of cosines and sines
};

#define MAX_SPLITS 16

// Cosines and sines of the angles at a position, [size / 2] each, rounded as in a forward pass. It
// is not inlined: code that runs once is as slow as it is long, and GPT-2 does not need it.
template <class T>
static __device__ __noinline__ void angles_at(const float *frequencies, float factor, i64 position,
                                              int size, float *turns) {
  if (threadIdx.x >= size / 2) return;
  float sine, cosine;
  sincosf((float)position * frequencies[threadIdx.x], &sine, &cosine);
  turns[threadIdx.x] = rounded_sum<T>(cosine * factor, 0.f);
  turns[size / 2 + threadIdx.x] = rounded_sum<T>(sine * factor, 0.f);
}

// Norms and rotates a query head and, if `heads` is 2, the key head behind it, [size] each, from
// `values` to `out`. All threads of the block take part.
template <class T>
static __device__ __forceinline__ void prepare_heads(const StepCache &cache, const float *values,
                                                     const float *turns, int size, int heads,
                                                     float *out) {
  __shared__ float scales[2];
  const int half = size / 2;
  if (cache.q_norm) {
    const int head = threadIdx.x / 32;
    if (head < heads) {
      float squares = 0;
#pragma unroll 1
      for (int c = threadIdx.x % 32; c < size; c += 32)
        squares += values[head * size + c] * values[head * size + c];
      squares = warp_sum(squares);
      if (threadIdx.x % 32 == 0) scales[head] = rsqrtf(squares / size + cache.eps);
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int t = threadIdx.x; t < heads * size; t += blockDim.x) {
    const int head = t / size, c = t % size, partner = c < half ? c + half : c - half;
    float x = values[t], y = values[head * size + partner];
    if (cache.q_norm) {
      const T *w = (const T *)(head ? cache.k_norm : cache.q_norm);
      x *= scales[head] * wide(w[c]), y *= scales[head] * wide(w[partner]);
    }
    if (cache.frequencies)
      x = x * turns[c % half] + (c < half ? -y : y) * turns[half + c % half];
    out[t] = x;
  }
  __syncthreads();
}

// Attention of each row's new position to itself and to the positions of the cache, to which its
// key and value are added. `y` is [q | k | v], before norms and rotation. A block computes one part
// of a row's and head's positions. The first block of a cluster combines the parts, or if there is
// `partial`, the last block to end. LANES threads hold a head's vector. `turn` is raised by 1.
template <class T, int LANES>
static __device__ void step_attention(const Unfinished<T> &y, const StepCache &cache, int splits,
                                      float *partial, int *arrived, u32 *turn, T *out) {
  constexpr int N = Pack<T>::N, SIZE = LANES * N, UNROLL = 4, WARPS = 8, GROUPS = 256 / LANES;
  extern __shared__ float of_attention[];
  __shared__ float tops[MAX_SPLITS], sums[MAX_SPLITS];
  __shared__ bool is_last;
  __shared__ float turns[SIZE];
  __shared__ u64 inbox;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  // all parts, [splits, 2 + SIZE]: the largest score, the sum of weights, and the weighted values
  float *const parts = of_attention;
  float *values = parts + (splits > 1 ? splits * (SIZE + 2) : 0), *v = values + 256 * N;
  const int split = blockIdx.x % splits, head = blockIdx.x / splits % cache.heads;
  const i64 row = blockIdx.x / (splits * cache.heads);
  const int group_size = cache.heads / cache.key_heads, key_head = head / group_size;
  const i64 width = (i64)cache.heads * SIZE, at_head = (i64)head * SIZE;
  const i64 past = cache.positions[row];
  const i64 first = cache.window && past >= cache.window ? past - cache.window + 1 : 0;
  const i64 chunk = (past - first + splits - 1) / splits;
  const i64 begin = first + split * chunk, end = min(past, begin + chunk);
  const i64 in_cache = row * cache.row_stride + key_head * cache.head_stride + lane * N;
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
  if (splits > 1 && !partial) open_inbox(&inbox, split == 0 ? 4 * splits * (SIZE + 2) : 0);
  if (cache.frequencies) angles_at<T>(cache.frequencies, cache.rope_factor, past, SIZE, turns);
  // earlier steps wrote these
  load(begin);
  const bool owns = split == 0;
  const int packs = owns ? 3 * LANES : LANES;
  auto column = [=](int pack) {
    const int part = pack / LANES, of_part = pack % LANES * N;
    if (part == 0) return (int)at_head + of_part;
    return (int)width + ((part - 1) * cache.key_heads + key_head) * SIZE + of_part;
  };
  weights_of_row(y, row, v);
  prefetch_rows(y, packs, column);
  wait_for_inputs();
  if (blockIdx.x == 0 && threadIdx.x == 0) *turn += 1;
  weigh_row(y, row, v);
  finish(y, row, packs, column, v, values);
  float q[N], new_key[N] = {}, new_value[N] = {};
  const float *heads = values;
  if (cache.frequencies || cache.q_norm) {
    float *prepared = values + 3 * SIZE;
    prepare_heads<T>(cache, values, turns, SIZE, owns ? 2 : 1, prepared);
    heads = prepared;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    q[i] = heads[lane * N + i] * (cache.scale * LOG2_E);
    if (owns) {
      // rounded as in the cache
      new_key[i] = rounded_sum<T>(heads[SIZE + lane * N + i], 0.f);
      new_value[i] = rounded_sum<T>(values[2 * SIZE + lane * N + i], 0.f);
    }
  }
  if (owns && group == 0 && head % group_size == 0) {
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
  auto combine = [&](int count, const float *of_parts, i64 stride, float &top, float &sum,
                     float &value) {
    for (int i = 0; i < count; ++i) top = fmaxf(top, tops[i]);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float factor = tops[i] > -INFINITY ? power_of_2(tops[i] - top) : 0.f;
      sum += factor * sums[i];
      value += factor * of_parts[i * stride];
    }
  };
  float top = -INFINITY, sum = 0, value = 0;
  if (threadIdx.x < SIZE) combine(WARPS, values + threadIdx.x, SIZE, top, sum, value);
  T *to = out + row * width + at_head;
  if (splits == 1) {
    if (threadIdx.x < SIZE) put(to + threadIdx.x, value / sum);
    return;
  }
  if (!partial) {
    wait_for_inboxes();
    float *const own = parts + split * (SIZE + 2);
    if (threadIdx.x < SIZE) send(own + 2 + threadIdx.x, &inbox, value, 0);
    if (threadIdx.x == 0) send(own, &inbox, top, 0), send(own + 1, &inbox, sum, 0);
    if (split > 0) return;
    wait_for_sent(&inbox);
  } else {
    const i64 pair = row * cache.heads + head;
    float *const of_pair = partial + pair * splits * (SIZE + 2);
    float *const own = of_pair + split * (SIZE + 2);
    if (threadIdx.x < SIZE) own[2 + threadIdx.x] = value;
    if (threadIdx.x == 0) own[0] = top, own[1] = sum;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrived + pair, 1) == splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) arrived[pair] = 0;
    for (int i = threadIdx.x; i < splits * (SIZE + 2); i += blockDim.x)
      parts[i] = __ldcg(of_pair + i);
  }
  __syncthreads();
  if (threadIdx.x < splits) {
    tops[threadIdx.x] = parts[threadIdx.x * (SIZE + 2)];
    sums[threadIdx.x] = parts[threadIdx.x * (SIZE + 2) + 1];
  }
  __syncthreads();
  if (threadIdx.x < SIZE) {
    top = -INFINITY, sum = value = 0;
    combine(splits, parts + 2 + threadIdx.x, SIZE + 2, top, sum, value);
    put(to + threadIdx.x, value / sum);
  }
}
