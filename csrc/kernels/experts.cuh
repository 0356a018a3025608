// What experts add to a product: routing weights, and the packed weight.

// N neighbouring elements: a pack, or a single one where rows are not aligned.
template <class T, int N> static __device__ __forceinline__ void load(const T *p, float *x) {
  if constexpr (N == 1)
    x[0] = wide(*p);
  else
    Pack<T>::load(p, x);
}
template <class T, int N> static __device__ __forceinline__ void store(T *p, const float *x) {
  if constexpr (N == 1)
    put(p, x[0]);
  else
    Pack<T>::store(p, x);
}

// v = u times the scaling of its column and the routing weight of the column's expert (1 if g is
// null). A column without an expert has scaling 0. `total` counts groups of N elements.
template <class T, int N>
static __device__ void weigh(const T *u, i64 ldu, const float *g, int experts, const int *expert_of,
                             const float *scaling, T *v, i64 ldv, int columns, i64 total) {
  const i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= total) return;
  const int per_row = columns / N;
  const i64 row = t / per_row;
  const int c = (int)(t - row * per_row) * N;
  float x[N];
  load<T, N>(u + row * ldu + c, x);
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] *= g ? g[row * experts + expert_of[c + i]] * scaling[c + i] : scaling[c + i];
  store<T, N>(v + row * ldv + c, x);
}

// du = dv times the same factor. dg = the sum of dv u scaling over an expert's columns; it is added
// to dg if `adds`, and not computed if dg is null. One warp computes a row. An expert's columns are
// `num_runs` runs [first, second).
template <class T, int N>
static __device__ void weigh_backward(const T *dv, i64 lddv, const T *u, i64 ldu, const float *g,
                                      int experts, const int *expert_of, const float *scaling,
                                      const int2 *runs, int num_runs, T *du, i64 lddu, float *dg,
                                      int adds, int columns, i64 rows) {
  extern __shared__ float products[];
  const i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float *p = products + (threadIdx.x / 32) * columns;
  for (int c = lane * N; c < columns; c += 32 * N) {
    float d[N], x[N];
    load<T, N>(dv + row * lddv + c, d);
    if (dg) load<T, N>(u + row * ldu + c, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      d[i] *= scaling[c + i];
      if (dg) p[c + i] = d[i] * x[i];
      if (g) d[i] *= g[row * experts + expert_of[c + i]];
    }
    store<T, N>(du + row * lddu + c, d);
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
      for (int k = 0; k < num_runs; ++k) {
        const int2 run = runs[e * num_runs + k];
        for (int c = run.x + lane % group; c < run.y; c += group) sum += p[c];
      }
    }
    for (int o = group / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (e < experts && lane % group == 0) {
      float *out = dg + row * experts + e;
      *out = adds ? *out + sum : sum;
    }
  }
}

// x += y times `scale` where `mask` is set. `columns` is a multiple of the elements of a pack.
template <class T>
static __device__ void add_masked(T *x, i64 ldx, const T *y, i64 ldy, const unsigned char *mask,
                                  float scale, int columns, i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(columns, packs);
  if (!at.is_inside) return;
  T *to = x + at.row * ldx + at.column;
  const unsigned char *from = mask + at.row * columns + at.column;
  float sum[N], added[N];
  Pack<T>::load(to, sum);
  Pack<T>::load(y + at.row * ldy + at.column, added);
  u32 bits[N / 4];
#pragma unroll
  for (int i = 0; i < N / 4; ++i) bits[i] = *(const u32 *)(from + 4 * i);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (bits[i / 4] >> (i % 4 * 8) & 1) sum[i] = fmaf(added[i], scale, sum[i]);
  Pack<T>::store(to, sum);
}

// The experts of a linear layer, A [r, i] and B^T [r, o] in f32, and their places in a packed
// weight
// [W A^T; B^T 0], whose rows have `ld` elements. As in csrc/block_kernels.h.
struct Refreshed {
  const float *a, *b;
  void *of_a, *of_b;
  i64 ld;
  int in, out, ranks, first_block;
};
struct AllRefreshed {
  Refreshed layers[8];
  int count;
};
// Writes experts to their places. Each layer has the blocks of threads from its `first_block` on.
template <class T> static __device__ void refresh(const AllRefreshed &all) {
  int k = 0;
  while (k + 1 < all.count && all.layers[k + 1].first_block <= blockIdx.x) ++k;
  const Refreshed &layer = all.layers[k];
  const i64 t = (i64)(blockIdx.x - layer.first_block) * blockDim.x + threadIdx.x;
  const i64 from_b = (i64)layer.ranks * layer.out, from_a = (i64)layer.ranks * layer.in;
  if (t < from_b) {
    const i64 r = t / layer.out;
    put((T *)layer.of_b + r * layer.ld + (t - r * layer.out), layer.b[t]);
  } else if (t < from_b + from_a) {
    const i64 row = (t - from_b) / layer.ranks, r = (t - from_b) - row * layer.ranks;
    put((T *)layer.of_a + row * layer.ld + r, layer.a[r * layer.in + row]);
  }
}
