// The outputs of linear layers for many texts, in bf16, where v B^T is a product of tensor cores.

constexpr int MANY_ROWS = 64;     // of a block
constexpr int MANY_COLUMNS = 32;  // of a half of a block, which is four warps of 16 rows each
constexpr int MANY_RANKS = 128;   // that are multiplied at a time

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
  if (count <= 0 || y.updates.ranks == 0) return {first, count, 0, 0};
  const int begin = y.updates.ranks_of(first).x, end = y.updates.ranks_of(first + count - 1).y;
  return {first, count, begin / Pack<bf16>::N * Pack<bf16>::N, end};
}

// The factors of eight neighbouring ranks, v / u. The ranks mostly belong to one expert.
struct ManyFactors {
  const int *expert_of;
  int first;
  bool are_alike;
  float scaling[8];
  // Those of the ranks from `rank` on.
  __device__ __forceinline__ void load(const Updates<bf16> &updates, int rank) {
    expert_of = updates.expert_of + rank;
    const bool is_inside = rank < updates.ranks;  // of which there are whole packs
    first = is_inside ? expert_of[0] : 0;
    are_alike = true;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scaling[i] = is_inside ? updates.scaling[rank + i] : 0.f;
      if (is_inside) are_alike = are_alike && expert_of[i] == first;
    }
  }
  // A row's routing weight of the first rank's expert.
  __device__ __forceinline__ float of_first(const Updates<bf16> &updates, int row) const {
    return updates.g ? updates.g[(i64)row * updates.experts + first] : 1.f;
  }
  // The row's pack of v for that of u.
  __device__ __forceinline__ uint4 weigh(const Updates<bf16> &updates, uint4 u, int row,
                                         float of_first) const {
    float x[8];
    Pack<bf16>::load((const bf16 *)&u, x);
    if (updates.g && !are_alike) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[i] *= scaling[i] * updates.g[(i64)row * updates.experts + expert_of[i]];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= scaling[i] * of_first;
    }
    uint4 v;
    Pack<bf16>::store((bf16 *)&v, x);
    return v;
  }
};

// B^T of 32 columns and a chunk of ranks, as `mma` takes it. Lane 4 g + t has columns 4 g to 4 g + 3
// of ranks 16 s + 4 t to 16 s + 4 t + 3 for each s.
struct ManyB {
  uint2 rows[MANY_RANKS / 16][4];
  __device__ __forceinline__ void load(const Updates<bf16> &updates, const ManyPart &part, int from,
                                       int g, int t) {
#pragma unroll
    for (int s = 0; s < MANY_RANKS / 16; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = from + 16 * s + 4 * t + i;
        rows[s][i] = four_or_zeros(updates.b + r * updates.ldb + part.first + 4 * g,
                                   r < part.end && 4 * g < part.count);
      }
  }
  // The two factors of column 4 g + j.
  __device__ __forceinline__ uint2 column(int s, int j) const {
    const uint2 *p = rows[s];
    auto pair = [=](uint2 x, uint2 y) {
      const u32 low = j < 2 ? x.x : x.y, high = j < 2 ? y.x : y.y;
      return j % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
    };
    return make_uint2(pair(p[0], p[1]), pair(p[2], p[3]));
  }
};

// out = product + v B^T + bias, or with an `activation` that of it. A block computes MANY_ROWS rows,
// and 2 MANY_COLUMNS columns of `out`, or MANY_COLUMNS of a gated activation, in which case its first
// half computes the gate and the other one what is multiplied with it.
static __device__ void finish_many(const Unfinished<bf16> &y, bf16 *out, i64 ldo, int activation,
                                   int rows) {
  constexpr int LD = MANY_RANKS + 16;  // without conflicts of banks
  __shared__ uint4 of_many[2 * MANY_ROWS * LD / 8];
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
  const int g = lane / 4, t = lane % 4;
  const ManyPart part = part_of(half), other = part_of(1 - half);
  const int longest = max(part.end - part.begin, other.end - other.begin);

  // a thread weighs a pack of each eighth row of u; rows behind the last one repeat it
  const int in_half = threadIdx.x % 128, pack = in_half % 16 * 8;
  bf16 *const of_half = (bf16 *)of_many + half * MANY_ROWS * LD;
  ManyFactors factors;
  ManyB b;
  factors.load(updates, part.begin + pack);
  b.load(updates, part, part.begin, g, t);
  wait_for_inputs();

  float sums[4][4] = {};
  for (int done = 0; done < longest; done += MANY_RANKS) {
    const int from = part.begin + done;
    if (done > 0) {
      factors.load(updates, from + pack);
      b.load(updates, part, from, g, t);
      __syncthreads();
    }
#pragma unroll 1
    for (int first = 0; first < 8; first += 4) {
      uint4 u[4];
      float weights[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = min(first_row + in_half / 16 + 8 * (first + k), rows - 1);
        u[k] = late_pack(y.product + (i64)at * y.ld + y.out + from + pack, from + pack < part.end);
        weights[k] = factors.of_first(updates, at);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int own = in_half / 16 + 8 * (first + k);
        *(uint4 *)(of_half + own * LD + pack) =
            factors.weigh(updates, u[k], min(first_row + own, rows - 1), weights[k]);
      }
    }
    __syncthreads();
    const bf16 *const of_warp = of_half + (warp % 4 * 16 + g) * LD + 4 * t;
#pragma unroll
    for (int s = 0; s < MANY_RANKS / 16; ++s) {
      if (from + 16 * s >= part.end) break;
      const uint2 low = *(const uint2 *)(of_warp + 16 * s);
      const uint2 high = *(const uint2 *)(of_warp + 8 * LD + 16 * s);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint2 of_b = b.column(s, j);
        mma(sums[j], low.x, high.x, low.y, high.y, of_b.x, of_b.y);
      }
    }
  }

  // the packs that this lane finishes: eight columns of two rows
  const int own_row = first_row + warp % 4 * 16 + g, own_column = part.first + 8 * t;
  const bool owns[2] = {8 * t < part.count && own_row < rows,
                        8 * t < part.count && own_row + 8 < rows};
  uint4 product[2];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    product[k] = late_pack(y.product + (i64)(own_row + 8 * k) * y.ld + own_column, owns[k]);
  float z[2][8];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float bias[8] = {};
    Pack<bf16>::load((const bf16 *)&product[k], z[k]);
    if (y.bias && owns[k]) Pack<bf16>::load(y.bias + own_column, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) z[k][i] += bias[i] + sums[i % 4][2 * k + i / 4];
  }
  if (is_gated) {
    __syncthreads();
    float *const ups = (float *)of_many + warp % 4 * 32 + lane;
#pragma unroll
    for (int i = 0; half && i < 16; ++i) ups[128 * i] = z[i / 8][i % 8];
    __syncthreads();
    if (half) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float gate = z[i / 8][i % 8];
      z[i / 8][i % 8] = gate / (1.f + __expf(-gate)) * ups[128 * i];
    }
  } else if (activation >= 0) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      z[i / 8][i % 8] = gelu_of(z[i / 8][i % 8], activation == TANH_GELU);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k)
    if (owns[k]) Pack<bf16>::store(out + (i64)(own_row + 8 * k) * ldo + own_column, z[k]);
}
