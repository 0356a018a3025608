// LayerNorm and RMSNorm of a sum, and their backward pass. A row of WIDTH elements, which is d, is
// computed by as many warps as leave each of their threads few enough elements for its registers.

constexpr int WARPS_OF_ROW = WIDTH > 3072 ? 4 : WIDTH > 1536 ? 2 : 1;
template <class T>
constexpr int PER_THREAD = (WIDTH / Pack<T>::N + 32 * WARPS_OF_ROW - 1) / (32 * WARPS_OF_ROW);

// The row of this thread, and its place among the threads of the row.
template <class T> struct RowPlace {
  i64 row;
  int place;
  bool is_inside;
  __device__ __forceinline__ explicit RowPlace(i64 rows) {
    const int warp = threadIdx.x / 32;
    place = warp % WARPS_OF_ROW * 32 + threadIdx.x % 32;
    row = (i64)blockIdx.x * (blockDim.x / 32 / WARPS_OF_ROW) + warp / WARPS_OF_ROW;
    is_inside = row < rows;
  }
  // The first column of this thread's k-th pack, or WIDTH if it has none.
  __device__ __forceinline__ int column(int k) const {
    const int c = (k * 32 * WARPS_OF_ROW + place) * Pack<T>::N;
    return is_inside && c < WIDTH ? c : WIDTH;
  }
};
// The sum over the threads of a row. All threads of the block take part.
static __device__ __forceinline__ float row_sum(float x) {
  x = warp_sum(x);
  if (WARPS_OF_ROW == 1) return x;
  __shared__ float of_warps[32];
  const int warp = threadIdx.x / 32, first = warp - warp % WARPS_OF_ROW;
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[warp] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int k = 0; k < WARPS_OF_ROW; ++k) x += of_warps[first + k];
  return x;
}

// sum = x + y (or x, if y is null), written to `sum` if that is not null. a = LayerNorm(sum) with
// weight w and bias b or, if b is null, RMSNorm(sum) with weight w.
template <class T>
static __device__ void add_norm(const T *x, i64 ldx, const T *y, i64 ldy, const T *w, const T *b,
                                float eps, T *sum, T *a, i64 lda, float *mean, float *rstd,
                                i64 rows) {
  constexpr int N = Pack<T>::N, OWN = PER_THREAD<T>;
  const RowPlace<T> at(rows);
  const i64 row = at.row;
  float v[OWN][N];
  float total = 0;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int c = at.column(k);
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
  const float mu = b ? row_sum(total) / WIDTH : 0.f;
  float squares = 0;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (at.column(k) >= WIDTH) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += (v[k][i] - mu) * (v[k][i] - mu);
  }
  const float rs = rsqrtf(row_sum(squares) / WIDTH + eps);
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int c = at.column(k);
    if (c >= WIDTH) continue;
    float ws[N], bs[N] = {};
    Pack<T>::load(w + c, ws);
    if (b) Pack<T>::load(b + c, bs);
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = (v[k][i] - mu) * rs * ws[i] + bs[i];
    Pack<T>::store(a + row * lda + c, v[k]);
  }
  if (at.place == 0 && at.is_inside) {
    if (b) mean[row] = mu;
    rstd[row] = rs;
  }
}

// dx = the gradient of LayerNorm at x, or of RMSNorm if `mean` is null, for the output's gradient
// da, plus `residual` if it is not null.
template <class T>
static __device__ void norm_backward(const T *da, i64 ldda, const T *x, const float *mean,
                                     const float *rstd, const T *w, const T *residual, i64 ldr,
                                     T *dx, i64 lddx, i64 rows) {
  constexpr int N = Pack<T>::N, OWN = PER_THREAD<T>;
  const RowPlace<T> at(rows);
  const i64 row = at.row;
  const float mu = mean && at.is_inside ? mean[row] : 0.f, rs = at.is_inside ? rstd[row] : 0.f;
  float g[OWN][N], h[OWN][N];
  float sum_g = 0, sum_gh = 0;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int c = at.column(k);
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
  const float c1 = mean ? row_sum(sum_g) / WIDTH : 0.f, c2 = row_sum(sum_gh) / WIDTH;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int c = at.column(k);
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
