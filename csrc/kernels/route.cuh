// A router of one linear layer: its scores, their softmax, and the gradients of its parameters.

// The experts whose scores a thread adds up at once.
#define EXPERTS_AT_ONCE 8

// For each row of x, [rows, width]: logits = h W^T + b with h = x, or x / sqrt(mean(x^2) + eps) if
// `normalizes`; probs = softmax(logits / temperature); and rstd = h / x. `of_row` warps compute a
// row, of which a block has several, and there are as many warps as rows times `of_row`.
template <class T>
static __device__ void route(const T *x, i64 ldx, const float *w, const float *b,
                             const double *temperature, int normalizes, float eps, float *logits,
                             float *probs, float *rstd, int width, int experts, i64 rows,
                             int of_row) {
  constexpr int N = Pack<T>::N, TILE = EXPERTS_AT_ONCE;
  extern __shared__ float of_route[];  // the scores of the block's rows
  __shared__ float sums[8][TILE + 1];  // of each warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, local = warp / of_row;
  const i64 row = (i64)blockIdx.x * (8 / of_row) + local;
  const bool is_inside = row < rows;
  const int first = (warp % of_row * 32 + lane) * N, stride = 32 * of_row * N;
  float *const z = of_route + local * experts;
#if __CUDA_ARCH__ >= 900
  // with few rows, this kernel starts early, and the weights come to the L2 cache while it waits
  if (of_row > 1)
    for (int i = threadIdx.x * 32; i < experts * width; i += blockDim.x * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(w + i));
#endif
  wait_for_inputs();
  const float inverse = 1.f / (float)*temperature;
  float scale = 1;
  for (int e0 = 0; e0 < experts; e0 += TILE) {
    float sum[TILE + 1] = {};
    if (is_inside) {
      for (int c = first; c < width; c += stride) {
        // no branch, so that all loads are under way at once
        float v[N], u[TILE][N];
        Pack<T>::load(x + row * ldx + c, v);
#pragma unroll
        for (int e = 0; e < TILE; ++e)
#pragma unroll
          for (int i = 0; i < N; i += 4)
            Pack<float>::load(w + (i64)min(e0 + e, experts - 1) * width + c + i, u[e] + i);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[TILE] = fmaf(v[i], v[i], sum[TILE]);
#pragma unroll
        for (int e = 0; e < TILE; ++e)
#pragma unroll
          for (int i = 0; i < N; ++i) sum[e] = fmaf(v[i], u[e][i], sum[e]);
      }
    }
#pragma unroll
    for (int e = 0; e <= TILE; ++e) sum[e] = warp_sum(sum[e]);
    if (of_row > 1) {
      __syncthreads();
      if (lane == 0)
#pragma unroll
        for (int e = 0; e <= TILE; ++e) sums[warp][e] = sum[e];
      __syncthreads();
#pragma unroll
      for (int e = 0; e <= TILE; ++e) {
        sum[e] = 0;
        for (int k = 0; k < of_row; ++k) sum[e] += sums[local * of_row + k][e];
      }
    }
    if (normalizes) scale = rsqrtf(sum[TILE] / width + eps);
    if (warp % of_row == 0)
#pragma unroll
      for (int e = 0; e < TILE; ++e)
        if (lane == e && e0 + e < experts) z[e0 + e] = fmaf(sum[e], scale, b[e0 + e]);
  }
  __syncwarp();
  if (warp % of_row != 0 || !is_inside) return;
  float top = -INFINITY, total = 0;
  for (int e = lane; e < experts; e += 32) top = fmaxf(top, z[e]);
  // a temperature is positive
  top = warp_max(top) * inverse;
  for (int e = lane; e < experts; e += 32) total += expf(z[e] * inverse - top);
  total = warp_sum(total);
  for (int e = lane; e < experts; e += 32) {
    logits[row * experts + e] = z[e];
    probs[row * experts + e] = expf(z[e] * inverse - top) / total;
  }
  if (lane == 0) rstd[row] = scale;
}

// The sums over the rows of a chunk for the gradients of W and b, in a row of `partial`: those of
// W, [experts, width], and behind them those of b. Either gradient of the outputs may be null. A
// block computes 128 packs of columns for some experts.
template <class T>
static __device__ void route_backward(const T *x, i64 ldx, const float *rstd, const float *probs,
                                      const float *dlogits, const float *dprobs,
                                      const double *temperature, float *partial, i64 ldp, int width,
                                      int experts, i64 rows, int rows_of_chunk, int column_blocks,
                                      int tiles) {
  constexpr int N = Pack<T>::N, TILE = EXPERTS_AT_ONCE, ROWS = 32;
  __shared__ float plain[ROWS][TILE], scaled[ROWS][TILE], mean[ROWS];
  const int tile = blockIdx.x % tiles, column_block = blockIdx.x / tiles % column_blocks;
  const int e0 = tile * TILE, c = (column_block * (int)blockDim.x + (int)threadIdx.x) * N;
  const i64 chunk = blockIdx.x / tiles / column_blocks, begin = chunk * rows_of_chunk;
  const i64 end = begin + rows_of_chunk < rows ? begin + rows_of_chunk : rows;
  const float inverse = 1.f / (float)*temperature;
  float of_w[TILE][N] = {}, of_b = 0;
  for (i64 from = begin; from < end; from += ROWS) {
    const int count = end - from < ROWS ? (int)(end - from) : ROWS;
    __syncthreads();
    if (dprobs && threadIdx.x < count) {
      const i64 at = (from + threadIdx.x) * experts;
      float dot = 0;
      for (int e = 0; e < experts; ++e) dot = fmaf(probs[at + e], dprobs[at + e], dot);
      mean[threadIdx.x] = dot;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * TILE; i += blockDim.x) {
      const int r = i / TILE, e = e0 + i % TILE;
      const i64 at = (from + r) * experts + e;
      float dz = 0;
      if (r < count && e < experts) {
        if (dprobs) dz = probs[at] * (dprobs[at] - mean[r]) * inverse;
        if (dlogits) dz += dlogits[at];
      }
      plain[r][i % TILE] = dz;
      scaled[r][i % TILE] = r < count ? dz * rstd[from + r] : 0.f;
    }
    __syncthreads();
    if (c < width) {
#pragma unroll 4
      for (int r = 0; r < count; ++r) {
        float v[N];
        Pack<T>::load(x + (from + r) * ldx + c, v);
#pragma unroll
        for (int e = 0; e < TILE; ++e)
#pragma unroll
          for (int i = 0; i < N; ++i) of_w[e][i] = fmaf(scaled[r][e], v[i], of_w[e][i]);
      }
    }
    if (column_block == 0 && threadIdx.x < TILE)
      for (int r = 0; r < count; ++r) of_b += plain[r][threadIdx.x];
  }
  float *const out = partial + chunk * ldp;
  if (c < width)
#pragma unroll
    for (int e = 0; e < TILE; ++e) {
      if (e0 + e >= experts) break;
#pragma unroll
      for (int i = 0; i < N; i += 4)
        Pack<float>::store(out + (i64)(e0 + e) * width + c + i, of_w[e] + i);
    }
  if (column_block == 0 && threadIdx.x < TILE && e0 + (int)threadIdx.x < experts)
    out[(i64)experts * width + e0 + threadIdx.x] = of_b;
}
