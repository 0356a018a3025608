// How the threads of a block multiply a part of a matrix with few rows of another one.
//
// A thread reads 16 bytes of each of four rows of the matrix at a time. The struct that keeps its
// sums says which these are, so that the threads can multiply what they read without exchanging it.

#define THIN_UNROLL 4

// What a block of a thin product multiplies with: rows [begin, end) of a matrix, and a segment of
// its columns, which `lanes` threads read. The others read it in other rows.
template <class T, class Sums> struct ThinPart {
  const T *w;
  i64 ld;
  int begin, end, columns, segment, lanes;
  // rows that the block reads at once
  __device__ __forceinline__ int at_once() const { return blockDim.x / lanes * THIN_UNROLL; }
  __device__ __forceinline__ int width() const { return lanes * Pack<T>::N; }
  __device__ __forceinline__ int column() const {
    return segment * width() + Sums::lane(lanes) * Pack<T>::N;
  }
  // Asks for a thread's packs of the rows behind `from`.
  __device__ __forceinline__ void load(int from, uint4 (&packs)[THIN_UNROLL]) const {
    const int c = column(), first = from + Sums::row(lanes, 0), step = Sums::row_step(lanes);
    const T *const p = w + first * ld + c;
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) {
      packs[i] = make_uint4(0, 0, 0, 0);
      if (c < columns && first + i * step < end)
        packs[i] = __ldg((const uint4 *)(p + i * step * ld));
    }
  }
  // Brings the part into the L2 cache.
  __device__ __forceinline__ void prefetch_all() const {
    const int c = column();
    if (Sums::lane(lanes) % 2 || c >= columns) return;
    for (int from = begin; from < end; from += at_once())
#pragma unroll
      for (int i = 0; i < THIN_UNROLL; ++i) {
        const int k = from + Sums::row(lanes, i);
        if (k < end) prefetch(w + k * ld + c);
      }
  }
};

// The rows that a matrix is multiplied with, from the column `first` on.
template <class X> struct ThinRows {
  const X *x;
  i64 ld;
  int first, count;
};

// Sums by CUDA cores, of at most MOST rows in any dtype.
template <class T, int MOST> struct CoreSums {
  // Whether the kernel computes norms and activations itself, and whether it loads the next packs
  // before it adds the last ones. With one row, the other threads of the multiprocessor have enough
  // packs under way meanwhile.
  static constexpr bool MAKES_INPUT = true, LOADS_AHEAD = MOST > 1;
  static constexpr int ROWS = MOST, N = Pack<T>::N;
  typedef float Factor;  // what v is made of
  typedef ThinPart<T, CoreSums> Part;
  float sums[ROWS][N] = {};

  static __device__ __forceinline__ int lanes(int lanes) { return lanes; }
  static __device__ __forceinline__ int lanes_of_a() { return blockDim.x == 512 ? 2 : 4; }
  static __device__ __forceinline__ int lane(int lanes) { return threadIdx.x % lanes; }
  static __device__ __forceinline__ int row_step(int lanes) { return blockDim.x / lanes; }
  static __device__ __forceinline__ int row(int lanes, int i) {
    return threadIdx.x / lanes + i * row_step(lanes);
  }
  // What the packs behind `from` are multiplied with. They are read when they are needed.
  template <class X> struct Factors {
    ThinRows<X> rows;
    __device__ __forceinline__ Factors(const Part &, const ThinRows<X> &rows, int) : rows(rows) {}
  };
  template <class X>
  __device__ __forceinline__ void add(const Part &part, int from, const Factors<X> &factors,
                                      const uint4 (&packs)[THIN_UNROLL]) {
    const auto [x, ld, first, count] = factors.rows;
    // no branch, so that all loads are under way at once
    float f[THIN_UNROLL][ROWS];
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) {
      const int k = from + row(part.lanes, i);
#pragma unroll
      for (int m = 0; m < ROWS; ++m)
        f[i][m] = m < count && k < part.end ? wide(x[m * ld + k - first]) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < THIN_UNROLL; ++i) {
      if (from + i * row_step(part.lanes) >= part.end) break;
      float of_weight[N];
      Pack<T>::load((const T *)&packs[i], of_weight);
#pragma unroll
      for (int m = 0; m < ROWS; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) sums[m][n] = fmaf(f[i][m], of_weight[n], sums[m][n]);
    }
  }
  // Writes the sums of each warp to `parts`, [warps, ROWS, width].
  __device__ __forceinline__ void write(const Part &part, float *parts) {
    for (int o = 16; o >= part.lanes; o >>= 1)
#pragma unroll
      for (int m = 0; m < ROWS; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) sums[m][n] += __shfl_xor_sync(~0u, sums[m][n], o);
    if (threadIdx.x % 32 < part.lanes)
#pragma unroll
      for (int m = 0; m < ROWS; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
          parts[(threadIdx.x / 32 * ROWS + m) * part.width() + lane(part.lanes) * N + n] =
              sums[m][n];
  }
  // Where the i-th number of [ROWS, width] is in `parts`.
  static __device__ __forceinline__ int place(int i) { return i; }
};

// Sums by tensor cores, of at most 8 rows in bf16. A warp multiplies with 16 rows and 64 columns of
// the matrix at a time. Transposed, they are the first factor of four products `mma`, in such an
// order that each thread has read what it has to give: columns 2 p and 2 p + 1 of its pack are two
// rows of the p-th product's factor, and the four rows of the matrix are four of its columns. So
// there are always 8 lanes.
struct TensorSums {
  static constexpr bool MAKES_INPUT = false, LOADS_AHEAD = false;
  static constexpr int ROWS = 8;
  typedef bf16 Factor;
  typedef ThinPart<bf16, TensorSums> Part;
  float sums[4][4] = {};

  static __device__ __forceinline__ int lanes(int) { return 8; }
  static __device__ __forceinline__ int lanes_of_a() { return 8; }
  static __device__ __forceinline__ int lane(int) { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int row_step(int) { return 1; }
  static __device__ __forceinline__ int row(int, int i) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 4 * 4 + i;
  }
  // What the packs behind `from` are multiplied with.
  template <class X> struct Factors {
    uint2 four;
    __device__ __forceinline__ Factors(const Part &part, const ThinRows<bf16> &rows, int from)
        : four(make_uint2(0, 0)) {
      const int k = from + row(0, 0), m = threadIdx.x % 32 / 4;
      if (k < part.end && m < rows.count)
        four = *(const uint2 *)(rows.x + m * rows.ld + k - rows.first);
    }
  };
  // The column'th numbers of two packs.
  static __device__ __forceinline__ u32 neighbours(const uint4 &x, const uint4 &y, int column) {
    return __byte_perm((&x.x)[column / 2], (&y.x)[column / 2], column % 2 ? 0x7632 : 0x5410);
  }
  __device__ __forceinline__ void add(const Part &, int, const Factors<bf16> &factors,
                                      const uint4 (&packs)[THIN_UNROLL]) {
#pragma unroll
    for (int p = 0; p < 4; ++p)
      mma(sums[p], neighbours(packs[0], packs[1], 2 * p), neighbours(packs[0], packs[1], 2 * p + 1),
          neighbours(packs[2], packs[3], 2 * p), neighbours(packs[2], packs[3], 2 * p + 1),
          factors.four.x, factors.four.y);
  }
  // Where the i-th number of [ROWS, 64] is in `parts`, so that threads write to different banks.
  static __device__ __forceinline__ int place(int i) {
    const int m = i / 64;
    return i ^ (m / 2 % 2 | m / 4 % 2 << 2) << 2;
  }
  // Writes the sums of each warp to `parts`, [warps, ROWS, width].
  __device__ __forceinline__ void write(const Part &, float *parts) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = threadIdx.x % 4 * 2 + i % 2, first = lane(0) * 8 + i / 2 * 4;
      const auto &x = sums[i / 2 * 2], &y = sums[i / 2 * 2 + 1];
      *(float4 *)&parts[threadIdx.x / 32 * ROWS * 64 + place(m * 64 + first)] =
          make_float4(x[i % 2], x[2 + i % 2], y[i % 2], y[2 + i % 2]);
    }
  }
};
