// What experts add to a product: routing weights, and the packed weight.

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
// `num_runs` runs [first, second).
template <class T>
static __device__ void weigh_backward(const T *dv, i64 lddv, const T *u, i64 ldu, const float *g,
                                      int experts, const int *expert_of, const float *scaling,
                                      const int2 *runs, int num_runs, T *du, i64 lddu,
                                      float *dg, int adds,
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

// Writes experts, A [r, i] and B^T [r, o] in f32, to their places in a packed weight [W A^T; B^T 0],
// whose rows have `ld` elements.
template <class T>
static __device__ void refresh(const float *a, const float *b, T *of_a, T *of_b, i64 ld, int in,
                               int out, int ranks) {
  const i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const i64 from_b = (i64)ranks * out, from_a = (i64)ranks * in;
  if (t < from_b) {
    const i64 r = t / out;
    put(of_b + r * ld + (t - r * out), b[t]);
  } else if (t < from_b + from_a) {
    const i64 row = (t - from_b) / ranks, r = (t - from_b) - row * ranks;
    put(of_a + row * ld + r, a[r * in + row]);
  }
}
