// Dropout of the experts' inputs, in bf16. A mask has one bit for each element of an input x,
// [rows, columns], which is set if the element is kept. Bit k of byte c is that of column 8 c + k.
// The columns are a multiple of 32. Each linear layer has a mask of its own.
//
// For few ranks, products apply the masks: they read x once for up to MOST_TILES tiles, which are
// up to 16 columns of a product's rank space, and no copy of x without its dropped elements is
// written.
//
// These products are those of `mma.m16n8k16`: of a warp's 32 lanes, lane 4 g + t has some elements
// of rows (or columns) g and g + 8. The order of the terms of a sum is free. So where a lane needs
// elements 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a row, it takes four neighbours instead, in both
// factors.

constexpr int MOST_TILES = 3;

// As in csrc/dropout_kernels.h.
struct Tiles {
  const unsigned char *bits[MOST_TILES];  // the mask of the tile's linear layer
  const bf16 *a[MOST_TILES];              // A from the tile's first row on; its rows are contiguous
  int filled[MOST_TILES];                 // the number of these rows; beyond them, A is 0
  int first[MOST_TILES];                  // the tile's first column in the product's rank space
  int ranks[MOST_TILES];                  // the number of its columns there: 8 or 16
  int count;
};

// Four random numbers by Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2,
// 3).
static __device__ __forceinline__ uint4 philox(u32 key_low, u32 key_high, u32 low, u32 high) {
  uint4 c = make_uint4(low, high, 0, 0);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 high_x = __umulhi(0xd2511f53u, c.x), low_x = 0xd2511f53u * c.x;
    const u32 high_z = __umulhi(0xcd9e8d57u, c.z), low_z = 0xcd9e8d57u * c.z;
    c = make_uint4(high_z ^ c.y ^ key_low, low_z, high_x ^ c.w ^ key_high, low_x);
    key_low += 0x9e3779b9u, key_high += 0xbb67ae85u;
  }
  return c;
}

// The mask of the elements whose 16 random bits are a number below `keep`. Eight elements have one
// counter of Philox, whose key is `seed`. A thread writes the bits of 32 elements.
static __device__ void drop_bits(const i64 *seed, u32 *bits, int keep, i64 words) {
  const i64 word = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const u32 key_low = (u32)*seed, key_high = (u32)((unsigned long long)*seed >> 32);
  u32 out = 0;
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    const unsigned long long counter = 4 * (unsigned long long)word + byte;
    const uint4 drawn = philox(key_low, key_high, (u32)counter, (u32)(counter >> 32));
    const u32 of_byte[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      out |= (u32)((int)(of_byte[k] & 0xffff) < keep) << (8 * byte + 2 * k);
      out |= (u32)((int)(of_byte[k] >> 16) < keep) << (8 * byte + 2 * k + 1);
    }
  }
  bits[word] = out;
}

// Two neighbours in bf16, of which those without a bit in the lowest two of `bits` become 0.
static __device__ __forceinline__ u32 kept_pair(u32 x, u32 bits) {
  bits &= 3;
  return x & (((bits | bits << 15) & 0x00010001u) * 0xffffu);
}
static __device__ __forceinline__ uint4 kept_pack(uint4 x, u32 bits) {
  return make_uint4(kept_pair(x.x, bits), kept_pair(x.y, bits >> 2), kept_pair(x.z, bits >> 4),
                    kept_pair(x.w, bits >> 6));
}

// out = scale (kept elements of y), or with `adds` added to it. `packs` is the number of
// groups of 8 elements.
static __device__ void drop_apply(const bf16 *y, i64 ldy, const unsigned char *bits, float scale,
                                  bf16 *out, i64 ldo, int adds, int columns, i64 packs) {
  const Place<bf16> at(columns, packs);
  if (!at.is_inside) return;
  const uint4 kept = kept_pack(__ldg((const uint4 *)(y + at.row * ldy + at.column)),
                               __ldg(bits + (at.row * columns + at.column) / 8));
  bf16 *place = out + at.row * ldo + at.column;
  float now[8], old[8] = {};
  Pack<bf16>::load((const bf16 *)&kept, now);
  if (adds) Pack<bf16>::load(place, old);
#pragma unroll
  for (int n = 0; n < 8; ++n) now[n] = old[n] + scale * now[n];
  Pack<bf16>::store(place, now);
}

static __device__ __forceinline__ uint4 pack_or_zeros(const bf16 *p, bool is_inside) {
  return is_inside ? __ldg((const uint4 *)p) : make_uint4(0, 0, 0, 0);
}
static __device__ __forceinline__ uint2 four_or_zeros(const bf16 *p, bool is_inside) {
  return is_inside ? __ldg((const uint2 *)p) : make_uint2(0, 0);
}
static __device__ __forceinline__ u32 bits_or_none(const unsigned char *p, bool is_inside) {
  return is_inside ? __ldg(p) : 0u;
}

// d += a b for a, [16, 16], with rows g and g + 8 in a lane, and b, [16, 8], with its column g; d
// has columns 2 t and 2 t + 1 of rows g and g + 8.
static __device__ __forceinline__ void mma(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                           u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// u = scale (kept elements of x) A^T, in the tiles' columns of u. A block has 32 rows and 8 warps,
// four of which share 16 rows and sum over a quarter of x's columns each.
static __device__ void drop_down(const bf16 *x, i64 ldx, const Tiles &tiles, float scale, bf16 *u,
                                 i64 ldu, int rows, int columns) {
  __shared__ float parts[4][32][16 * MOST_TILES + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int own = warp / 4 * 16 + g, row = blockIdx.x * 32 + own;
  const i64 of_mask = columns / 8;
  float sums[MOST_TILES][2][4] = {};
#pragma unroll 2
  for (int c = warp % 4 * 32 + 8 * t; c < columns; c += 128) {
    const uint4 low = pack_or_zeros(x + row * ldx + c, row < rows);
    const uint4 high = pack_or_zeros(x + (row + 8) * ldx + c, row + 8 < rows);
#pragma unroll
    for (int k = 0; k < MOST_TILES; ++k) {
      if (k >= tiles.count) break;
      const unsigned char *bits = tiles.bits[k] + row * of_mask + c / 8;
      const uint4 kept_low = kept_pack(low, bits_or_none(bits, row < rows));
      const uint4 kept_high = kept_pack(high, bits_or_none(bits + 8 * of_mask, row + 8 < rows));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int rank = 8 * j + g;
        const uint4 a = pack_or_zeros(tiles.a[k] + rank * (i64)columns + c, rank < tiles.filled[k]);
        mma(sums[k][j], kept_low.x, kept_high.x, kept_low.y, kept_high.y, a.x, a.y);
        mma(sums[k][j], kept_low.z, kept_high.z, kept_low.w, kept_high.w, a.z, a.w);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < MOST_TILES; ++k)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[warp % 4][own + i / 2 * 8][16 * k + 8 * j + 2 * t + i % 2] = sums[k][j][i];
  __syncthreads();
  for (int at = threadIdx.x; at < 32 * 16 * tiles.count; at += 256) {
    const int k = at / (32 * 16), r = at / 16 % 32, rank = at % 16, column = 16 * k + rank;
    if (rank >= tiles.ranks[k] || blockIdx.x * 32 + r >= rows) continue;
    const float sum =
        parts[0][r][column] + parts[1][r][column] + parts[2][r][column] + parts[3][r][column];
    put(u + (blockIdx.x * 32 + r) * ldu + tiles.first[k] + rank, scale * sum);
  }
}

// dx += scale (kept elements of du A), where `a_t` is A^T, [columns, ranks]. A warp has 16 rows of
// the 128 of its block, and the part of the columns that its block has, of `splits`.
static __device__ void drop_up(const bf16 *du, i64 lddu, const bf16 *a_t, i64 lda,
                               const Tiles &tiles, float scale, bf16 *dx, i64 lddx, int rows,
                               int columns, int splits) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = blockIdx.x / splits * 128 + threadIdx.x / 32 * 16 + g;
  const i64 of_mask = columns / 8;
  const int of_split = (columns / 32 + splits - 1) / splits * 32;
  const int from = blockIdx.x % splits * of_split, end = min(columns, from + of_split);
  uint2 low[MOST_TILES], high[MOST_TILES];
#pragma unroll
  for (int k = 0; k < MOST_TILES; ++k) {
    const bool is_inside = k < tiles.count && 4 * t < tiles.ranks[k];
    const bf16 *p = du + row * lddu + (is_inside ? tiles.first[k] + 4 * t : 0);
    low[k] = four_or_zeros(p, is_inside && row < rows);
    high[k] = four_or_zeros(p + 8 * lddu, is_inside && row + 8 < rows);
  }
  for (int c = from; c < end; c += 32) {
    // columns 8 t to 8 t + 7 of rows g and g + 8
    bf16 *const places[2] = {dx + row * lddx + c + 8 * t, dx + (row + 8) * lddx + c + 8 * t};
    // loaded early, since memory takes longer than the products
    uint4 old[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      old[i] = row + 8 * i < rows ? *(const uint4 *)places[i] : make_uint4(0, 0, 0, 0);
    float sums[2][8] = {};
#pragma unroll
    for (int k = 0; k < MOST_TILES; ++k) {
      if (k >= tiles.count) break;
      const unsigned char *of_row = tiles.bits[k] + row * of_mask + c / 8 + t;
      const u32 bits[2] = {bits_or_none(of_row, row < rows),
                           bits_or_none(of_row + 8 * of_mask, row + 8 < rows)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = c + g / 2 * 8 + 2 * j + g % 2;
        const uint2 a = four_or_zeros(a_t + column * lda + tiles.first[k] + 4 * t,
                                      4 * t < tiles.ranks[k]);
        float d[4] = {};
        mma(d, low[k].x, high[k].x, low[k].y, high[k].y, a.x, a.y);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (bits[i / 2] >> (2 * j + i % 2) & 1) sums[i / 2][2 * j + i % 2] += d[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + 8 * i >= rows) continue;
      float now[8];
      Pack<bf16>::load((const bf16 *)&old[i], now);
#pragma unroll
      for (int n = 0; n < 8; ++n) now[n] += scale * sums[i][n];
      Pack<bf16>::store(places[i], now);
    }
  }
}

// The low or the high halves of two words.
static __device__ __forceinline__ u32 halves(u32 first, u32 second, int of_high) {
  return of_high ? first >> 16 | (second & 0xffff0000u) : (first & 0xffff) | second << 16;
}

// scale du^T (kept elements of x) over the rows of a block, of `splits`, in `out`, [splits, ranks,
// columns]. `du_t` is du^T, whose rows are filled up with zeros to a multiple of 16. A block has 64
// columns, and each of its 8 warps every eighth group of 16 rows.
template <int N>
static __device__ void drop_grad(const bf16 *x, i64 ldx, const bf16 *du_t, i64 ldd,
                                 const Tiles &tiles, float scale, float *out, int ranks, int rows,
                                 int columns, int splits) {
  __shared__ float total[16 * N][65];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int split = blockIdx.x % splits;
  const int of_split = (rows + 128 * splits - 1) / (128 * splits) * 128;
  const int column = blockIdx.x / splits * 64, end = min(rows, (split + 1) * of_split);
  const bool has_columns = column + 8 * g < columns;
  const i64 of_mask = columns / 8;
  float sums[N][8][4] = {};
  uint4 next[4];
  const auto load = [&](int row) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      next[r] = pack_or_zeros(x + (row + 4 * t + r) * ldx + column + 8 * g,
                              has_columns && row + 4 * t + r < end);
  };
  int row = split * of_split + 16 * warp;
  load(row);
  for (; row < end; row += 128) {
    const uint4 now[4] = {next[0], next[1], next[2], next[3]};
    load(row + 128);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bf16 *of_du = du_t + (tiles.first[k] + g) * ldd + row + 4 * t;
      const uint2 low = four_or_zeros(of_du, true);
      const uint2 high = four_or_zeros(of_du + 8 * ldd, tiles.ranks[k] > 8);
      u32 kept[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const unsigned char *bits =
            tiles.bits[k] + (row + 4 * t + r) * of_mask + column / 8 + g;
        const uint4 of_row =
            kept_pack(now[r], bits_or_none(bits, has_columns && row + 4 * t + r < end));
        kept[r][0] = of_row.x, kept[r][1] = of_row.y, kept[r][2] = of_row.z, kept[r][3] = of_row.w;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j)
        mma(sums[k][j], low.x, high.x, low.y, high.y,
            halves(kept[0][j / 2], kept[1][j / 2], j % 2),
            halves(kept[2][j / 2], kept[3][j / 2], j % 2));
    }
  }
  // one warp after the other, so that the order of sums is always the same
  for (int turn = 0; turn < 8; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int k = 0; k < N; ++k)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float &sum = total[16 * k + g + i / 2 * 8][8 * (2 * t + i % 2) + j];
            sum = (turn > 0 ? sum : 0.f) + sums[k][j][i];
          }
    }
    __syncthreads();
  }
  for (int at = threadIdx.x; at < 64 * 16 * N; at += 256) {
    const int k = at / (64 * 16), rank = at / 64 % 16, c = column + at % 64;
    if (rank < tiles.ranks[k] && c < columns)
      out[((i64)split * ranks + tiles.first[k] + rank) * columns + c] =
          scale * total[16 * k + rank][at % 64];
  }
}
