// The activations of feed-forward networks, and their backward passes.

static __device__ __forceinline__ float tanh_of(float x) {
  const float e = __expf(-2.f * fabsf(x));
  return copysignf((1.f - e) / (1.f + e), x);
}
#define ROOT_2_OVER_PI 0.7978845608028654f

// out = gelu(z) in its tanh form. `columns` is a multiple of the elements of a pack.
template <class T>
static __device__ void gelu(const T *z, i64 ldz, T *out, i64 ldo, int columns, i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(columns, packs);
  if (!at.is_inside) return;
  const i64 row = at.row;
  const int c = at.column;
  float x[N];
  Pack<T>::load(z + row * ldz + c, x);
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] = 0.5f * x[i] * (1.f + tanh_of(ROOT_2_OVER_PI * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
  Pack<T>::store(out + row * ldo + c, x);
}
// dz = dout gelu'(z)
template <class T>
static __device__ void gelu_backward(const T *z, i64 ldz, const T *dout, i64 ldo, T *dz, i64 lddz,
                                     int columns, i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(columns, packs);
  if (!at.is_inside) return;
  const i64 row = at.row;
  const int c = at.column;
  float x[N], d[N];
  Pack<T>::load(z + row * ldz + c, x);
  Pack<T>::load(dout + row * ldo + c, d);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float h = tanh_of(ROOT_2_OVER_PI * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    const float slope = ROOT_2_OVER_PI * (1.f + 3.f * 0.044715f * x[i] * x[i]);
    d[i] *= 0.5f * (1.f + h) + 0.5f * x[i] * (1.f - h * h) * slope;
  }
  Pack<T>::store(dz + row * lddz + c, d);
}

// out = silu(gate) * up for z = [gate | up]. `columns` is the width of `out`, a multiple of the
// elements of a pack.
template <class T>
static __device__ void swiglu(const T *z, i64 ldz, T *out, i64 ldo, int columns, i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(columns, packs);
  if (!at.is_inside) return;
  const T *gate = z + at.row * ldz + at.column;
  float g[N], u[N];
  Pack<T>::load(gate, g);
  Pack<T>::load(gate + columns, u);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] *= g[i] / (1.f + __expf(-g[i]));
  Pack<T>::store(out + at.row * ldo + at.column, u);
}
// dz = the gradient of z for the output's gradient; again = the output
template <class T>
static __device__ void swiglu_backward(const T *z, i64 ldz, const T *dout, i64 ldo, T *dz, i64 lddz,
                                       T *again, i64 lda, int columns, i64 packs) {
  constexpr int N = Pack<T>::N;
  const Place<T> at(columns, packs);
  if (!at.is_inside) return;
  const T *gate = z + at.row * ldz + at.column;
  T *dgate = dz + at.row * lddz + at.column;
  float g[N], u[N], d[N], h[N];
  Pack<T>::load(gate, g);
  Pack<T>::load(gate + columns, u);
  Pack<T>::load(dout + at.row * ldo + at.column, d);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float sigmoid = 1.f / (1.f + __expf(-g[i])), silu = g[i] * sigmoid;
    h[i] = silu * u[i];
    g[i] = d[i] * u[i] * (sigmoid + silu * (1.f - sigmoid));
    d[i] *= silu;
  }
  Pack<T>::store(dgate, g);
  Pack<T>::store(dgate + columns, d);
  Pack<T>::store(again + at.row * lda + at.column, h);
}
