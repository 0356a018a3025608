// What happens to queries and keys between their product and attention (csrc/rope.h).

// The work of a thread on the heads of queries, keys and values [q + 2k heads] of a token: 16 bytes
// of each half of a head. `lanes` threads, a power of 2, share a head.
template <class T> struct HeadPlace {
  i64 row;
  int head, lane, first;  // `first` is the column of the first half's elements in the row
  bool is_inside, is_query, is_key;
  __device__ __forceinline__ HeadPlace(int queries, int keys, int lanes, i64 total) {
    const i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int heads = queries + 2 * keys;
    const i64 unit = t / lanes;
    lane = (int)(t - unit * lanes);
    row = unit / heads;
    head = (int)(unit - row * heads);
    first = head * 2 * lanes * Pack<T>::N + lane * Pack<T>::N;
    is_inside = t < total;
    is_query = head < queries;
    is_key = !is_query && head < queries + keys;
  }
};
// The sum over the threads of a head. All threads of the warp take part.
static __device__ __forceinline__ float head_sum(float x, int lanes) {
  for (int o = lanes / 2; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// What attention reads, from `in`: queries and keys with RMSNorm of each head (if q_norm is not
// null) and rotated by each token's angles (if `cosines` is not null), values as they are. `out`
// may be `in`.
template <class T>
static __device__ void rotate(const T *in, i64 ldi, T *out, i64 ldo, const T *q_norm,
                              const T *k_norm, float eps, const T *cosines, const T *sines,
                              int queries, int keys, int lanes, i64 total) {
  constexpr int N = Pack<T>::N;
  const HeadPlace<T> at(queries, keys, lanes, total);
  const int half = lanes * N;
  const bool changes = at.is_inside && (at.is_query || at.is_key);
  float x[N] = {}, y[N] = {};
  if (at.is_inside) {
    Pack<T>::load(in + at.row * ldi + at.first, x);
    Pack<T>::load(in + at.row * ldi + at.first + half, y);
  }
  if (q_norm) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += x[i] * x[i] + y[i] * y[i];
    const float rs = rsqrtf(head_sum(squares, lanes) / (2 * half) + eps);
    if (changes) {
      const T *w = (at.is_query ? q_norm : k_norm) + at.lane * N;
      float v[N], u[N];
      Pack<T>::load(w, v);
      Pack<T>::load(w + half, u);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= rs * v[i], y[i] *= rs * u[i];
    }
  }
  if (changes && cosines) {
    float c[N], s[N];
    Pack<T>::load(cosines + at.row * 2 * half + at.lane * N, c);
    Pack<T>::load(sines + at.row * 2 * half + at.lane * N, s);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float turned = x[i] * c[i] - y[i] * s[i];
      y[i] = y[i] * c[i] + x[i] * s[i];
      x[i] = turned;
    }
  }
  if (!at.is_inside || (in == out && !changes)) return;
  Pack<T>::store(out + at.row * ldo + at.first, x);
  Pack<T>::store(out + at.row * ldo + at.first + half, y);
}

// The gradient of `raw`, the input of `rotate`, as [q | k | v] of each token, from dq, dk and dv,
// which lie as [b, t, n, h] in memory. `raw` is read for norms only.
template <class T>
static __device__ void rotate_backward(const T *dq, const T *dk, const T *dv, const T *raw, i64 ldr,
                                       T *out, i64 ldo, const T *q_norm, const T *k_norm, float eps,
                                       const T *cosines, const T *sines, int queries, int keys,
                                       int lanes, i64 total) {
  constexpr int N = Pack<T>::N;
  const HeadPlace<T> at(queries, keys, lanes, total);
  const int half = lanes * N;
  const bool changes = at.is_inside && (at.is_query || at.is_key);
  float x[N] = {}, y[N] = {};
  if (at.is_inside) {
    const int of_group = at.is_query ? at.head : at.is_key ? at.head - queries
                                                           : at.head - queries - keys;
    const T *from = at.is_query ? dq : at.is_key ? dk : dv;
    from += (at.row * (at.is_query ? queries : keys) + of_group) * 2 * half + at.lane * N;
    Pack<T>::load(from, x);
    Pack<T>::load(from + half, y);
  }
  if (changes && cosines) {
    float c[N], s[N];
    Pack<T>::load(cosines + at.row * 2 * half + at.lane * N, c);
    Pack<T>::load(sines + at.row * 2 * half + at.lane * N, s);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float turned = x[i] * c[i] + y[i] * s[i];
      y[i] = y[i] * c[i] - x[i] * s[i];
      x[i] = turned;
    }
  }
  if (q_norm) {
    float a[N] = {}, b[N] = {};
    if (changes) {
      Pack<T>::load(raw + at.row * ldr + at.first, a);
      Pack<T>::load(raw + at.row * ldr + at.first + half, b);
    }
    float squares = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += a[i] * a[i] + b[i] * b[i];
    const float rs = rsqrtf(head_sum(squares, lanes) / (2 * half) + eps);
    float along = 0;
    if (changes) {
      const T *w = (at.is_query ? q_norm : k_norm) + at.lane * N;
      float v[N], u[N];
      Pack<T>::load(w, v);
      Pack<T>::load(w + half, u);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] *= v[i], y[i] *= u[i];
        a[i] *= rs, b[i] *= rs;
        along += x[i] * a[i] + y[i] * b[i];
      }
    }
    along = head_sum(along, lanes) / (2 * half);
    if (changes) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = (x[i] - a[i] * along) * rs;
        y[i] = (y[i] - b[i] * along) * rs;
      }
    }
  }
  if (!at.is_inside) return;
  Pack<T>::store(out + at.row * ldo + at.first, x);
  Pack<T>::store(out + at.row * ldo + at.first + half, y);
}
