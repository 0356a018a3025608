// The outputs of linear layers for many texts, in bf16, where v B^T is a product of tensor cores.
// Each block runs this code once, and to load it takes time, so it is kept short.

constexpr int MANY_ROWS = 64;     // of a block
constexpr int MANY_COLUMNS = 32;  // of a half of a block, which is four warps of 16 rows each
constexpr int MANY_RANKS = 128;   // that are multiplied at a time

// What a half of a block has in shared memory. The rows are long enough for few conflicts of banks.
struct ManyShared {
  bf16 v[MANY_ROWS][MANY_RANKS + 16];
  bf16 b[MANY_RANKS][MANY_COLUMNS + 8];
};

// A pack that the kernel in front of this one wrote. `__ldg` might be moved in front of the wait.
static __device__ __forceinline__ uint4 late_pack(const bf16 *p, bool is_inside) {
  return is_inside ? *(const uint4 *)p : make_uint4(0, 0, 0, 0);
}

// The columns of y that a half of a block finishes, and the ranks that they need, which begin at a
// whole pack. There may be none of them.
struct ManyPart {
  int first, count, begin, end;
};
static __device__ __forceinline__ ManyPart many_part(const Unfinished<bf16> &y, int first,
                                                     int count) {
  if (count <= 0) return {first, count, 0, 0};
  const int begin = y.updates.ranks_of(first).x, end = y.updates.ranks_of(first + count - 1).y;
  return {first, count, begin / Pack<bf16>::N * Pack<bf16>::N, end};
}

// Eight neighbouring ranks, and their factors v / u in eight rows, 8 apart. The ranks mostly belong
// to one expert, whose routing weights are loaded ahead.
struct ManyFactors {
  int first_rank;
  int4 experts[2];
  float scaling[8], of_first[8];
  __device__ __forceinline__ bool are_alike() const {
    const int4 x = experts[0], y = experts[1];
    return x.x == x.y && x.x == x.z && x.x == x.w && x.x == y.x && x.x == y.y && x.x == y.z &&
           x.x == y.w;
  }
  __device__ __forceinline__ void load(const Updates<bf16> &updates, int rank, int row, int rows) {
    // there are whole packs of ranks
    first_rank = min(rank, updates.ranks - 8);
    experts[0] = *(const int4 *)(updates.expert_of + first_rank);
    experts[1] = *(const int4 *)(updates.expert_of + first_rank + 4);
    Pack<float>::load(updates.scaling + first_rank, scaling);
    Pack<float>::load(updates.scaling + first_rank + 4, scaling + 4);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      of_first[k] = 1;
      if (updates.g && row + 8 * k < rows)
        of_first[k] = updates.g[(i64)(row + 8 * k) * updates.experts + experts[0].x];
    }
  }
};
// The pack of v for that of u where the ranks belong to several experts.
static __device__ __noinline__ uint4 weigh_each(const Updates<bf16> &updates, uint4 u, i64 row,
                                                int first_rank) {
  float x[8];
  Pack<bf16>::load((const bf16 *)&u, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= updates.weight(row, first_rank + i);
  Pack<bf16>::store((bf16 *)&u, x);
  return u;
}

// Two neighbours in a column, of which `x` and `y` are the rows: each four columns.
static __device__ __forceinline__ u32 many_pair(uint2 x, uint2 y, int column) {
  const u32 low = column < 2 ? x.x : x.y, high = column < 2 ? y.x : y.y;
  return column % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
}

// out = product + v B^T + bias, or with an `activation` that of it. A block computes MANY_ROWS rows
// and 2 MANY_COLUMNS columns of `out`. Of a gated activation it computes MANY_COLUMNS columns: its
// first half computes the gate, and the other one what is multiplied with it.
static __device__ void finish_many(const Unfinished<bf16> &y, bf16 *out, i64 ldo, int activation,
                                   int rows) {
  extern __shared__ uint4 of_many[];
  const Updates<bf16> &updates = y.updates;
  const bool is_gated = activation == SWIGLU;
  const int columns = is_gated ? y.out / 2 : y.out;
  const int per_block = is_gated ? MANY_COLUMNS : 2 * MANY_COLUMNS;
  const int tiles = (columns + per_block - 1) / per_block;
  const int column = blockIdx.x % tiles * per_block, first_row = blockIdx.x / tiles * MANY_ROWS;
  auto part_of = [&](int half) {
    const int at = is_gated ? column : column + half * MANY_COLUMNS;
    const int count = min(MANY_COLUMNS, columns - at);
    return many_part(y, is_gated ? half * columns + at : at, count);
  };
  const int warp = threadIdx.x / 32, half = warp / 4, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4, in_half = threadIdx.x % 128;
  const ManyPart part = part_of(half), other = part_of(1 - half);
  const int longest = max(part.end - part.begin, other.end - other.begin);
  ManyShared &shared = ((ManyShared *)of_many)[half];

  // a thread weighs a pack in each eighth row of u
  const int pack = in_half % 16 * 8, row = first_row + in_half / 16;
  // and finishes eight columns of two rows
  const int own_row = first_row + warp % 4 * 16 + g, own_column = part.first + 8 * t;
  float sums[4][4] = {};
  uint4 product[2];
#pragma unroll 1
  for (int done = 0; done == 0 || done < longest; done += MANY_RANKS) {
    const int from = part.begin + done;
    const bool has_pack = from + pack < part.end;
    ManyFactors factors;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = in_half / 4 + 32 * i, c = in_half % 4 * 8;
      copy_16(&shared.b[r][c], updates.b + (from + r) * updates.ldb + part.first + c,
              from + r < part.end && c < part.count);
    }
    factors.load(updates, from + pack, row, rows);
    if (done == 0) {
      wait_for_inputs();
#pragma unroll
      for (int k = 0; k < 2; ++k)
        product[k] = late_pack(y.product + (i64)(own_row + 8 * k) * y.ld + own_column,
                               8 * t < part.count && own_row + 8 * k < rows);
    }
    uint4 u[8];
#pragma unroll
    for (int k = 0; k < 8; ++k)
      u[k] = late_pack(y.product + (i64)(row + 8 * k) * y.ld + y.out + from + pack,
                       row + 8 * k < rows && has_pack);
    const bool are_alike = !updates.g || factors.are_alike();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (row + 8 * k >= rows) break;
      float x[8];
      Pack<bf16>::load((const bf16 *)&u[k], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= factors.scaling[i] * factors.of_first[k];
      uint4 *const v = (uint4 *)&shared.v[in_half / 16 + 8 * k][pack];
      if (are_alike)
        Pack<bf16>::store((bf16 *)v, x);
      else
        *v = weigh_each(updates, u[k], row + 8 * k, factors.first_rank);
    }
    wait_for_copies();
    __syncthreads();
    const int end = first_row + warp % 4 * 16 < rows ? min(MANY_RANKS, part.end - from) : 0;
#pragma unroll 2
    for (int r = 0; r < end; r += 16) {
      const uint2 low = *(const uint2 *)&shared.v[warp % 4 * 16 + g][r + 4 * t];
      const uint2 high = *(const uint2 *)&shared.v[warp % 4 * 16 + g + 8][r + 4 * t];
      uint2 b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = *(const uint2 *)&shared.b[r + 4 * t + i][4 * g];
      // column 4 n + j of B^T is column n of the j-th product, so that a lane gets a whole pack
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mma(sums[j], low.x, high.x, low.y, high.y, many_pair(b[0], b[1], j),
            many_pair(b[2], b[3], j));
    }
    __syncthreads();
  }

  float z[2][8], bias[8] = {};
  if (y.bias && 8 * t < part.count) Pack<bf16>::load(y.bias + own_column, bias);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    Pack<bf16>::load((const bf16 *)&product[k], z[k]);
#pragma unroll
    for (int i = 0; i < 8; ++i) z[k][i] += bias[i] + sums[i % 4][2 * k + i / 4];
  }
  if (is_gated) {
    float *const ups = (float *)of_many + warp % 4 * 32 + lane;
#pragma unroll
    for (int i = 0; half && i < 16; ++i) ups[128 * i] = z[i / 8][i % 8];
    __syncthreads();
    if (half) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float gate = z[i / 8][i % 8];
      z[i / 8][i % 8] = __fdividef(gate, 1.f + __expf(-gate)) * ups[128 * i];
    }
  } else if (activation >= 0) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      z[i / 8][i % 8] = gelu_of(z[i / 8][i % 8], activation == TANH_GELU);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k)
    if (8 * t < part.count && own_row + 8 * k < rows)
      Pack<bf16>::store(out + (i64)(own_row + 8 * k) * ldo + own_column, z[k]);
}
