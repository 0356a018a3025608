// The elementwise and row-wise kernels of the fused block and loss. NVRTC compiles them at run time
// for the GPU at hand. Each kernel is defined by its twin in libtorch operations, in
// csrc/block.cpp, its headers or csrc/head_loss.cpp.
//
// A matrix argument is a pointer and the number of elements from one row to the next. Its columns
// are contiguous and its rows aligned to 16 bytes. Everything is computed in f32. `bf16` and `f32`
// name the dtype of activations.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct bf16 {
  u16 bits;
};
static __device__ __forceinline__ float wide(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
static __device__ __forceinline__ float wide(float x) { return x; }
static __device__ __forceinline__ u32 pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  u32 l = __float_as_uint(low), h = __float_as_uint(high);
  l = (l + 0x7fff + ((l >> 16) & 1)) >> 16;
  h = (h + 0x7fff + ((h >> 16) & 1)) & 0xffff0000;
  return l | h;
#endif
}
static __device__ __forceinline__ void put(bf16 *p, float x) { p->bits = (u16)pair(x, 0.f); }
static __device__ __forceinline__ void put(float *p, float x) { *p = x; }

// 16 bytes of a row.
template <class T> struct Pack;
template <> struct Pack<bf16> {
  static constexpr int N = 8;
  static __device__ __forceinline__ void load(const bf16 *p, float *x) {
    const uint4 v = *(const uint4 *)p;
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(w[i] << 16);
      x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
    }
  }
  static __device__ __forceinline__ void store(bf16 *p, const float *x) {
    *(uint4 *)p =
        make_uint4(pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7]));
  }
};
template <> struct Pack<float> {
  static constexpr int N = 4;
  static __device__ __forceinline__ void load(const float *p, float *x) {
    const float4 v = *(const float4 *)p;
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
  static __device__ __forceinline__ void store(float *p, const float *x) {
    *(float4 *)p = make_float4(x[0], x[1], x[2], x[3]);
  }
};

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}

// The pack of this thread in a matrix with `columns` columns and `packs` packs.
template <class T> struct Place {
  i64 row;
  int column;
  bool is_inside;
  __device__ __forceinline__ Place(int columns, i64 packs) {
    const i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int per_row = columns / Pack<T>::N;
    row = t / per_row;
    column = (int)(t - row * per_row) * Pack<T>::N;
    is_inside = t < packs;
  }
};
