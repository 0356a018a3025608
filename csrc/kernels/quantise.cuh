// The rows of a matrix in e4m3, each with a scale (csrc/quantised.h).

// The codes of four neighbours, the first one in the lowest byte. A number beyond 448 becomes 448.
static __device__ __forceinline__ u32 four_codes(const float *x) {
  u32 out = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(out)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
#endif
  return out;
}

// A block computes a row. Each thread keeps up to PACKS packs of 8 numbers in registers. In longer
// rows, it reads the other packs again for their codes.
static __device__ void quantise(const bf16 *x, i64 ldx, u32 *codes, float *scales, int columns) {
  constexpr int PACKS = 4;
  const int stride = blockDim.x * 8, first = threadIdx.x * 8;
  const bf16 *row = x + (i64)blockIdx.x * ldx;
  float kept[PACKS][8], largest = 0;
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int c = first + k * stride;
    if (c >= columns) continue;
    Pack<bf16>::load(row + c, kept[k]);
#pragma unroll
    for (int n = 0; n < 8; ++n) largest = fmaxf(largest, fabsf(kept[k][n]));
  }
  for (int c = first + PACKS * stride; c < columns; c += stride) {
    float now[8];
    Pack<bf16>::load(row + c, now);
#pragma unroll
    for (int n = 0; n < 8; ++n) largest = fmaxf(largest, fabsf(now[n]));
  }
  __shared__ float of_warps[32];
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = warp_max(threadIdx.x % 32 < blockDim.x / 32 ? of_warps[threadIdx.x % 32] : 0.f);
  const float factor = largest >= 1e-30f ? __fdiv_rn(448.f, largest) : 1.f;
  if (threadIdx.x == 0) scales[blockIdx.x] = largest >= 1e-30f ? __fdiv_rn(largest, 448.f) : 1.f;
  u32 *of_row = codes + (i64)blockIdx.x * columns / 4;
  auto write = [&](int c, float *now) {
#pragma unroll
    for (int n = 0; n < 8; ++n) now[n] *= factor;
    *(uint2 *)(of_row + c / 4) = make_uint2(four_codes(now), four_codes(now + 4));
  };
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
    if (first + k * stride < columns) write(first + k * stride, kept[k]);
  for (int c = first + PACKS * stride; c < columns; c += stride) {
    float now[8];
    Pack<bf16>::load(row + c, now);
    write(c, now);
  }
}
