// How the threads of a block multiply a part of a matrix with few rows of another one.
//
// A thread reads 16 bytes of each of four rows of the matrix at a time. The struct that keeps its
// sums says which these are, so that the threads can multiply what they read without exchanging it.

#define THIN_UNROLL 4

// Writes a number of v (csrc/kernels/step/thin.cuh) and its mark at once, so that nobody sees one
// without the other.
static __device__ __forceinline__ void put_marked(uint2 *to, float x, u32 mark) {
  __stcg((u64 *)to, (u64)mark << 32 | __float_as_uint(x));
}
// Loads N numbers with their marks. A number and its mark are read at once.
template <int N>
static __device__ __forceinline__ void load_marked(const uint2 *p, u64 (&numbers)[N]) {
#if __CUDA_ARCH__ >= 700
  if constexpr (N == 1)
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(numbers[0]) : "l"(p) : "memory");
  else
#pragma unroll
    for (int i = 0; i < N; i += 2)
      asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                   : "=l"(numbers[i]), "=l"(numbers[i + 1])
                   : "l"(p + i)
                   : "memory");
#else
  for (int i = 0; i < N; ++i) numbers[i] = ((const volatile u64 *)p)[i];
#endif
}

// Waits for N numbers of v. Each has one term, or two that are `stride` apart and are added.
template <int N>
static __device__ __forceinline__ void sum_marked(const uint2 *p, int terms, int stride, u32 mark,
                                                  float (&sums)[N]) {
  u64 first[N], second[N];
  bool are_there;
  do {
#pragma unroll
    for (int i = 0; i < N; ++i) second[i] = (u64)mark << 32;
    load_marked(p, first);
    if (terms == 2) load_marked(p + stride, second);
    are_there = true;
#pragma unroll
    for (int i = 0; i < N; ++i)
      are_there = are_there && first[i] >> 32 == mark && second[i] >> 32 == mark;
  } while (!are_there);
#pragma unroll
  for (int i = 0; i < N; ++i)
    sums[i] = __uint_as_float((u32)first[i]) + __uint_as_float((u32)second[i]);
}

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
  // The rest is for a part that is copied to shared memory, [end - begin, width]. A thread reads
  // what it has copied: Sums::COPIED packs of the rows behind `from` at a time.
  __device__ __forceinline__ int copied_at_once() const {
    return blockDim.x / lanes * Sums::COPIED;
  }
  // Whether the warp reads any row behind `from`.
  __device__ __forceinline__ bool has_rows(int from) const {
    return from + Sums::first_row(lanes) < end;
  }
  __device__ __forceinline__ T *in_copy(T *copied, int k) const {
    return copied + (k - begin) * width() + Sums::lane(lanes) * Pack<T>::N;
  }
  // Begins to copy the part.
  __device__ __forceinline__ void copy(T *copied) const {
    const int c = column();
    for (int from = begin; has_rows(from); from += copied_at_once())
#pragma unroll
      for (int i = 0; i < Sums::COPIED; ++i) {
        const int k = from + Sums::row(lanes, i);
        if (k < end) copy_16(in_copy(copied, k), w + k * ld + min(c, columns - Pack<T>::N));
      }
  }
  __device__ __forceinline__ void load_copied(T *copied, int from,
                                              uint4 (&packs)[Sums::COPIED]) const {
#pragma unroll
    for (int i = 0; i < Sums::COPIED; ++i) {
      const int k = from + Sums::row(lanes, i);
      packs[i] = k < end ? *(const uint4 *)in_copy(copied, k) : make_uint4(0, 0, 0, 0);
    }
  }
};

// The rows that a matrix is multiplied with, from the column `first` on.
template <class T> struct ThinRows {
  const T *x;
  i64 ld;
  int first, count;
};

// Sums by CUDA cores, of at most MOST rows in any dtype.
template <class T, int MOST> struct CoreSums {
  // Whether the kernel computes norms and activations itself.
  static constexpr bool MAKES_INPUT = true;
  // Whether it loads the next packs before it adds the last ones. With one row, the other threads
  // of the multiprocessor have enough packs under way meanwhile.
  static constexpr bool LOADS_AHEAD = MOST > 1;
  // Whether the last packs are added behind the loop, which then need not ask whether there are
  // more.
  static constexpr bool ENDS_APART = true;
  // Whether v may have two terms (ThinExperts). With one row, that takes more time.
  static constexpr bool MAY_HALVE = MOST > 1;
  // COPIED is how many packs of copied rows a thread reads at a time (ThinPart).
  static constexpr int ROWS = MOST, COPIED = 1, N = Pack<T>::N;
  typedef ThinPart<T, CoreSums> Part;
  float sums[ROWS][N] = {};

  static __device__ __forceinline__ int lanes(int lanes) { return lanes; }
  static __device__ __forceinline__ int lanes_of_a() { return blockDim.x == 512 ? 2 : 4; }
  static __device__ __forceinline__ int lane(int lanes) { return threadIdx.x % lanes; }
  static __device__ __forceinline__ int row_step(int lanes) { return blockDim.x / lanes; }
  static __device__ __forceinline__ int row(int lanes, int i) {
    return threadIdx.x / lanes + i * row_step(lanes);
  }
  // the first one of a warp
  static __device__ __forceinline__ int first_row(int lanes) {
    return threadIdx.x / 32 * 32 / lanes;
  }
  // What the packs behind `from` are multiplied with. They are read when they are needed.
  template <class X> struct FactorsOf {
    ThinRows<X> rows;
    __device__ __forceinline__ FactorsOf(const Part &, const ThinRows<X> &rows, int) : rows(rows) {}
    __device__ __forceinline__ float of(const Part &part, int k, int m) const {
      return m < rows.count && k < part.end ? wide(rows.x[m * rows.ld + k - rows.first]) : 0.f;
    }
  };
  typedef FactorsOf<T> Factors;
  // v, [terms, rows, ld], for a block. A few warps wait for it and write it to `numbers` in shared
  // memory, which takes less time than if all warps asked for the same numbers. All threads take
  // part.
  struct Marked {
    ThinRows<float> rows;
    __device__ __forceinline__ Marked(const Part &b, const uint2 *v, int terms, int ld, int count,
                                      u32 mark, float *numbers)
        : rows{numbers, b.end - b.begin, b.begin, count} {
      const int of_row = blockDim.x / ROWS, m = threadIdx.x / of_row;
      for (int r = threadIdx.x % of_row; m < count && r < rows.ld; r += of_row) {
        float sum[1];
        sum_marked(v + m * ld + b.begin + r, MAY_HALVE ? terms : 1, count * ld, mark, sum);
        numbers[m * rows.ld + r] = sum[0];
      }
      __syncthreads();
    }
    __device__ __forceinline__ FactorsOf<float> factors(const Part &b, int from) const {
      return {b, rows, from};
    }
  };
  template <class F, int PACKS>
  __device__ __forceinline__ void add(const Part &part, int from, const F &factors,
                                      const uint4 (&packs)[PACKS]) {
    // no branch, so that all loads are under way at once
    float f[PACKS][ROWS];
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      const int k = from + row(part.lanes, i);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) f[i][m] = factors.of(part, k, m);
    }
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
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

// Sums by tensor cores, of at most MOST rows in bf16, where MOST is a multiple of 8. A warp
// multiplies with 16 rows and 64 columns of the matrix at a time. Transposed, they are the first
// factor of four products `mma` for every eight rows, in such an order that each thread has read
// what it has to give: columns 2 p and 2 p + 1 of its pack are two rows of the p-th product's
// factor, and the four rows of the matrix are four of its columns. So there are always 8 lanes.
template <int MOST> struct TensorSums {
  static constexpr bool MAKES_INPUT = false, LOADS_AHEAD = false, ENDS_APART = false;
  static constexpr bool MAY_HALVE = true;
  static constexpr int ROWS = MOST, COPIED = 4, EIGHTS = MOST / 8;
  typedef ThinPart<bf16, TensorSums> Part;
  float sums[EIGHTS][4][4] = {};

  static __device__ __forceinline__ int lanes(int) { return 8; }
  static __device__ __forceinline__ int lanes_of_a() { return 8; }
  static __device__ __forceinline__ int lane(int) { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int row_step(int) { return 1; }
  static __device__ __forceinline__ int row(int, int i) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 4 * 4 + i;
  }
  static __device__ __forceinline__ int first_row(int) { return threadIdx.x / 32 * 16; }
  // What the packs behind `from` are multiplied with.
  struct Factors {
    uint2 four[EIGHTS];
    Factors() = default;
    __device__ __forceinline__ Factors(const Part &part, const ThinRows<bf16> &rows, int from) {
      const int k = from + row(0, 0);
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e) {
        const int m = e * 8 + threadIdx.x % 32 / 4;
        four[e] = make_uint2(0, 0);
        if (k < part.end && m < rows.count)
          four[e] = *(const uint2 *)(rows.x + m * rows.ld + k - rows.first);
      }
    }
  };
  // v, [terms, rows, ld]. Each thread waits for what it multiplies with.
  struct Marked {
    const uint2 *v;
    int terms, ld, rows;
    u32 mark;
    __device__ __forceinline__ Marked(const Part &, const uint2 *v, int terms, int ld, int rows,
                                      u32 mark, float *)
        : v(v), terms(terms), ld(ld), rows(rows), mark(mark) {}
    __device__ __forceinline__ Factors factors(const Part &b, int from) const {
      const int k = from + row(0, 0);
      Factors factors;
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e) {
        const int m = e * 8 + threadIdx.x % 32 / 4;
        float x[4] = {};
        if (k < b.end && m < rows) sum_marked(v + m * ld + k, terms, rows * ld, mark, x);
        __syncwarp();
        factors.four[e] = make_uint2(pair(x[0], x[1]), pair(x[2], x[3]));
      }
      return factors;
    }
  };
  // The column'th numbers of two packs.
  static __device__ __forceinline__ u32 neighbours(const uint4 &x, const uint4 &y, int column) {
    return __byte_perm((&x.x)[column / 2], (&y.x)[column / 2], column % 2 ? 0x7632 : 0x5410);
  }
  __device__ __forceinline__ void add(const Part &, int, const Factors &factors,
                                      const uint4 (&packs)[THIN_UNROLL]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const u32 low[2] = {neighbours(packs[0], packs[1], 2 * p),
                          neighbours(packs[0], packs[1], 2 * p + 1)};
      const u32 high[2] = {neighbours(packs[2], packs[3], 2 * p),
                           neighbours(packs[2], packs[3], 2 * p + 1)};
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e)
        mma(sums[e][p], low[0], low[1], high[0], high[1], factors.four[e].x, factors.four[e].y);
    }
  }
  // Where the i-th number of [ROWS, 64] is in `parts`, so that threads write to different banks.
  static __device__ __forceinline__ int place(int i) {
    const int m = i / 64;
    return i ^ (m / 2 % 2 | m / 4 % 2 << 2) << 2;
  }
  // Writes the sums of each warp to `parts`, [warps, ROWS, width].
  __device__ __forceinline__ void write(const Part &, float *parts) {
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = e * 8 + threadIdx.x % 4 * 2 + i % 2, first = lane(0) * 8 + i / 2 * 4;
        const auto &x = sums[e][i / 2 * 2], &y = sums[e][i / 2 * 2 + 1];
        *(float4 *)&parts[threadIdx.x / 32 * ROWS * 64 + place(m * 64 + first)] =
            make_float4(x[i % 2], x[2 + i % 2], y[i % 2], y[2 + i % 2]);
      }
  }
};
