// Products with few rows.

// What a thin product multiplies.
template <class T> struct ThinInput {
  int kind;  // 0: x; 1: norm(x + y), where x + y is written to `sum`; 2: the activation of y
  const T *x;
  i64 ldx;
  Unfinished<T> y;
  const T *norm_w, *norm_b;
  float eps;
  T *sum;
  int activation;
};

// A pack of y's finished values, added to `out`.
template <class T>
static __device__ __forceinline__ void finish_pack(const Unfinished<T> &y, i64 row, int c,
                                                   float *out) {
  constexpr int N = Pack<T>::N;
  // no branch, so that the loads of several packs are under way at once
  const T *product = y.product + row * y.ld + c;
  float x[N], bias[N];
  Pack<T>::load(product, x);
  Pack<T>::load(y.bias ? y.bias + c : product, bias);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] += x[i] + (y.bias ? bias[i] : 0.f);
  if (y.ranks == 0) return;
  const int2 rows = y.ranks_of(c);
#pragma unroll 4
  for (int r = rows.x; r < rows.y; ++r) {
    const float g = y.g ? y.g[row * y.experts + y.expert_of[r]] : 1.f;
    const float v = wide(y.product[row * y.ld + y.out + r]) * g * y.scaling[r];
    Pack<T>::load(y.b + r * y.ldb + c, x);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = fmaf(v, x[i], out[i]);
  }
}

// Writes a pack of the activation of y to `out`, [rows, in].
template <class T>
static __device__ __forceinline__ void activate_pack(const ThinInput<T> &input, int m, int c,
                                                     int in, T *out) {
  constexpr int N = Pack<T>::N;
  float z[N] = {};
  finish_pack(input.y, m, c, z);
  if (input.activation == SWIGLU) {
    float up[N] = {};
    finish_pack(input.y, m, in + c, up);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = z[i] / (1.f + __expf(-z[i])) * up[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = gelu_of(z[i], input.activation == TANH_GELU);
  }
  Pack<T>::store(out + m * in + c, z);
}

// The sum over neighbouring warps. With more than one, all threads of the block take part.
template <int WARPS> static __device__ __forceinline__ float sum_of_warps(float x) {
  x = warp_sum(x);
  if constexpr (WARPS > 1) {
    __shared__ float of_warps[16];
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) x += of_warps[threadIdx.x / 32 / WARPS * WARPS + k];
  }
  return x;
}

// Writes the input of a thin product, [rows, in], to shared memory. Every block does so, since that
// takes less time than another kernel.
template <class T>
static __device__ __forceinline__ void make_input(const ThinInput<T> &input, int rows, int in,
                                                  T *out) {
  // a row that is wide is normed by more warps
  constexpr int N = Pack<T>::N, WARPS = WIDTH > 1024 ? 4 : 1, THREADS = 32 * WARPS;
  constexpr int PACKS = (WIDTH / N + THREADS - 1) / THREADS;
  const int m = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
  if (input.kind == 2) {
    const int per_row = in / N;
    for (int t = threadIdx.x; t < rows * per_row; t += blockDim.x)
      activate_pack(input, t / per_row, t % per_row * N, in, out);
  } else if (WARPS > 1 || m < rows) {
    float x[PACKS][N] = {};
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int c = (k * THREADS + thread) * N;
      if (m >= rows || c >= WIDTH) continue;
      float added[N] = {};
      finish_pack(input.y, m, c, added);
      Pack<T>::load(input.x + m * input.ldx + c, x[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) x[k][i] = rounded_sum<T>(x[k][i], added[i]);
    }
    if (blockIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < PACKS; ++k) {
        const int c = (k * THREADS + thread) * N;
        if (m < rows && c < WIDTH) Pack<T>::store(input.sum + m * WIDTH + c, x[k]);
      }
    }
    normalise<T, PACKS>(x, m < rows ? thread : WIDTH, THREADS, input.norm_w, input.norm_b,
                        input.eps, [](float of_thread) { return sum_of_warps<WARPS>(of_thread); });
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int c = (k * THREADS + thread) * N;
      if (m < rows && c < WIDTH) Pack<T>::store(out + m * in + c, x[k]);
    }
  }
  __syncthreads();
}

#define THIN_UNROLL 4
#define THIN_WARPS 16

// A thread's packs of the rows [begin, end) of a matrix w with `columns` columns. `lanes` threads
// read a segment of a row, and `segment` says which.
template <class T> struct ThinWeight {
  const T *w;
  i64 ld;
  int begin, end, columns, lanes, segment;
  uint4 next[THIN_UNROLL];
  __device__ __forceinline__ int groups() const { return blockDim.x / lanes; }
  __device__ __forceinline__ int row(int from, int i) const {
    return begin + from + threadIdx.x / lanes + i * groups();
  }
  __device__ __forceinline__ int column() const {
    return (segment * lanes + threadIdx.x % lanes) * Pack<T>::N;
  }
  __device__ __forceinline__ void load(int from) {
    const int c = column();
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) {
      const int k = row(from, i);
      next[i] = make_uint4(0, 0, 0, 0);
      if (c < columns && k < end) next[i] = __ldg((const uint4 *)(w + k * ld + c));
    }
  }
};

// The sum of `own` over the blocks of a cluster, which hold it at the same place of shared memory.
static __device__ __forceinline__ float cluster_sum(const float *own, int split) {
  const u32 place = (u32)__cvta_generic_to_shared(own);
  float sum = 0;
  for (int k = 0; k < split; ++k) sum += of_block(place, k);
  return sum;
}

// out = x w for at most ROWS rows of x; the first packs of w have been asked for. A block has one
// segment of columns or, if LARGE, further ones, and the `split` blocks of a cluster have a part of
// the rows of w each.
template <class T, int ROWS, bool LARGE>
static __device__ __forceinline__ void thin_product(const T *x, i64 ldx, int rows,
                                                    ThinWeight<T> &weight, T *out, i64 ldo,
                                                    float *parts, int segments, int stride,
                                                    int split) {
  constexpr int N = Pack<T>::N;
  const int lanes = weight.lanes, lane = threadIdx.x % lanes;
  const int length = weight.end - weight.begin, at_once = weight.groups() * THIN_UNROLL;
  const int width = lanes * N, of_warp = ROWS * width;
  float *const sums = parts + THIN_WARPS * of_warp;  // of this block, [rows, width]
  while (weight.segment < segments) {
    const int first = weight.segment * width;
    float sum[ROWS][N] = {};
    for (int from = 0; from < length; from += at_once) {
      uint4 now[THIN_UNROLL];
#pragma unroll
      for (int i = 0; i < THIN_UNROLL; ++i) now[i] = weight.next[i];
      if (from + at_once < length) {
        weight.load(from + at_once);
      } else if (LARGE) {
        weight.segment += stride;
        if (weight.segment < segments) weight.load(0);
      }
#pragma unroll
      for (int i = 0; i < THIN_UNROLL; ++i) {
        const int k = weight.row(from, i);
        float of_weight[N];
        Pack<T>::load((const T *)&now[i], of_weight);
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
          const float factor = m < rows && k < weight.end ? wide(x[m * ldx + k]) : 0.f;
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
    if (threadIdx.x % 32 < lanes)
#pragma unroll
      for (int m = 0; m < ROWS; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
          parts[threadIdx.x / 32 * of_warp + m * width + lane * N + n] = sum[m][n];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < THIN_WARPS; ++warp) total += parts[warp * of_warp + i];
      const int m = i / width, column = first + i % width;
      if (LARGE && split > 1)
        sums[i] = total;
      else if (column < weight.columns)
        put(out + m * ldo + column, total);
    }
    if (!LARGE) return;
    if (split > 1) {
      cluster_wait();
      if (blockIdx.x % split == 0)
        for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
          const int m = i / width, column = first + i % width;
          const float total = cluster_sum(sums + i, split);
          if (column < weight.columns) put(out + m * ldo + column, total);
        }
      // no block ends or writes again before all have been read
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
}

template <class T, bool LARGE>
static __device__ __forceinline__ void thin_products(const ThinInput<T> &input, const T *w, i64 ldw,
                                                     T *out, i64 ldo, int rows, int in, int columns,
                                                     int lanes, int split) {
  extern __shared__ uint4 of_product[];
  __shared__ float parts[(THIN_WARPS + 1) * 4 * 4 * Pack<T>::N];
  if (!LARGE) split = 1;
  const int per_block = (in + split - 1) / split, begin = blockIdx.x % split * per_block;
  const int segments = (columns + lanes * Pack<T>::N - 1) / (lanes * Pack<T>::N);
  const int stride = gridDim.x / split;
  ThinWeight<T> weight{w, ldw, begin, min(in, begin + per_block), columns, lanes,
                       (int)blockIdx.x / split};
  weight.load(0);
  wait_for_inputs();
  const T *x = input.x;
  i64 ldx = input.ldx;
  if (input.kind) {
    make_input(input, rows, in, (T *)of_product);
    x = (const T *)of_product, ldx = in;
  }
  if (rows == 1)
    thin_product<T, 1, LARGE>(x, ldx, rows, weight, out, ldo, parts, segments, stride, split);
  else if (rows == 2)
    thin_product<T, 2, LARGE>(x, ldx, rows, weight, out, ldo, parts, segments, stride, split);
  else
    thin_product<T, 4, LARGE>(x, ldx, rows, weight, out, ldo, parts, segments, stride, split);
}
