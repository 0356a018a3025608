// The kernels by name, in both dtypes. With STEP, csrc/kernels/step lists its own instead.

#define KERNELS(T, NAME)                                                                           \
  extern "C" __global__ void add_norm_##NAME(const T *x, i64 ldx, const T *y, i64 ldy, const T *w, \
                                             const T *b, float eps, T *sum, T *a, i64 lda,         \
                                             float *mean, float *rstd, i64 rows) {                 \
    add_norm<T>(x, ldx, y, ldy, w, b, eps, sum, a, lda, mean, rstd, rows);                         \
  }                                                                                                \
  extern "C" __global__ void norm_backward_##NAME(                                                 \
      const T *da, i64 ldda, const T *x, const float *mean, const float *rstd, const T *w,         \
      const T *residual, i64 ldr, T *dx, i64 lddx, i64 rows) {                                     \
    norm_backward<T>(da, ldda, x, mean, rstd, w, residual, ldr, dx, lddx, rows);                   \
  }                                                                                                \
  extern "C" __global__ void weigh_##NAME(const T *u, i64 ldu, const float *g, int experts,        \
                                          const int *expert_of, const float *scaling, T *v,        \
                                          i64 ldv, int columns, i64 total, int aligned) {          \
    if (aligned)                                                                                   \
      weigh<T, Pack<T>::N>(u, ldu, g, experts, expert_of, scaling, v, ldv, columns, total);        \
    else                                                                                           \
      weigh<T, 1>(u, ldu, g, experts, expert_of, scaling, v, ldv, columns, total);                 \
  }                                                                                                \
  extern "C" __global__ void weigh_backward_##NAME(                                                \
      const T *dv, i64 lddv, const T *u, i64 ldu, const float *g, int experts,                     \
      const int *expert_of, const float *scaling, const int2 *runs, int num_runs, T *du, i64 lddu, \
      float *dg, int adds, int columns, i64 rows, int aligned) {                                   \
    if (aligned)                                                                                   \
      weigh_backward<T, Pack<T>::N>(dv, lddv, u, ldu, g, experts, expert_of, scaling, runs,        \
                                    num_runs, du, lddu, dg, adds, columns, rows);                  \
    else                                                                                           \
      weigh_backward<T, 1>(dv, lddv, u, ldu, g, experts, expert_of, scaling, runs, num_runs, du,   \
                           lddu, dg, adds, columns, rows);                                         \
  }                                                                                                \
  extern "C" __global__ void add_masked_##NAME(T *x, i64 ldx, const T *y, i64 ldy,                 \
                                               const unsigned char *mask, float scale,             \
                                               int columns, i64 packs) {                           \
    add_masked<T>(x, ldx, y, ldy, mask, scale, columns, packs);                                    \
  }                                                                                                \
  extern "C" __global__ void refresh_##NAME(AllRefreshed all) { refresh<T>(all); }                 \
  extern "C" __global__ void gelu_##NAME(const T *z, i64 ldz, T *out, i64 ldo, int columns,        \
                                         i64 packs) {                                              \
    gelu<T>(z, ldz, out, ldo, columns, packs);                                                     \
  }                                                                                                \
  extern "C" __global__ void gelu_backward_##NAME(const T *z, i64 ldz, const T *dout, i64 ldo,     \
                                                  T *dz, i64 lddz, int columns, i64 packs) {       \
    gelu_backward<T>(z, ldz, dout, ldo, dz, lddz, columns, packs);                                 \
  }                                                                                                \
  extern "C" __global__ void swiglu_##NAME(const T *z, i64 ldz, T *out, i64 ldo, int columns,      \
                                           i64 packs) {                                            \
    swiglu<T>(z, ldz, out, ldo, columns, packs);                                                   \
  }                                                                                                \
  extern "C" __global__ void swiglu_backward_##NAME(const T *z, i64 ldz, const T *dout, i64 ldo,   \
                                                    T *dz, i64 lddz, T *again, i64 lda,            \
                                                    int columns, i64 packs) {                      \
    swiglu_backward<T>(z, ldz, dout, ldo, dz, lddz, again, lda, columns, packs);                   \
  }                                                                                                \
  extern "C" __global__ void rotate_##NAME(const T *in, i64 ldi, T *out, i64 ldo, const T *q_norm, \
                                           const T *k_norm, float eps, const T *cosines,           \
                                           const T *sines, int queries, int keys, int lanes,       \
                                           i64 total) {                                            \
    rotate<T>(in, ldi, out, ldo, q_norm, k_norm, eps, cosines, sines, queries, keys, lanes, total);\
  }                                                                                                \
  extern "C" __global__ void rotate_backward_##NAME(                                               \
      const T *dq, const T *dk, const T *dv, const T *raw, i64 ldr, T *out, i64 ldo,               \
      const T *q_norm, const T *k_norm, float eps, const T *cosines, const T *sines, int queries,  \
      int keys, int lanes, i64 total) {                                                            \
    rotate_backward<T>(dq, dk, dv, raw, ldr, out, ldo, q_norm, k_norm, eps, cosines, sines,        \
                       queries, keys, lanes, total);                                               \
  }                                                                                                \
  extern "C" __global__ void route_##NAME(                                                         \
      const T *x, i64 ldx, const float *w, const float *b, const double *temperature,              \
      int normalizes, float eps, float *logits, float *probs, float *rstd, int width, int experts, \
      i64 rows, int of_row) {                                                                      \
    route<T>(x, ldx, w, b, temperature, normalizes, eps, logits, probs, rstd, width, experts,      \
             rows, of_row);                                                                        \
  }                                                                                                \
  extern "C" __global__ void route_backward_##NAME(                                                \
      const T *x, i64 ldx, const float *rstd, const float *probs, const float *dlogits,            \
      const float *dprobs, const double *temperature, float *partial, i64 ldp, int width,          \
      int experts, i64 rows, int rows_of_chunk, int column_blocks, int tiles) {                    \
    route_backward<T>(x, ldx, rstd, probs, dlogits, dprobs, temperature, partial, ldp, width,      \
                      experts, rows, rows_of_chunk, column_blocks, tiles);                         \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(512, 2) cross_entropy_##NAME(                       \
      T *logits, i64 ld, const i64 *labels, int vocabulary, int padded, float smoothing,           \
      const float *scale, float *losses, float *smoothed, int keeps, int split) {                  \
    cross_entropy<T>(logits, ld, labels, vocabulary, padded, smoothing, scale, losses, smoothed,   \
                     keeps, split);                                                                \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(1024) step_choice_##NAME(                           \
      const T *logits, i64 ld, int vocabulary, int packs, double *choice, i64 *ids, i64 *positions,\
      i64 *places, int split) {                                                                    \
    step_choice<T>(logits, ld, vocabulary, packs, choice, ids, positions, places, split);          \
  }
// Kernels that exist in bf16 only.
#define DROP_GRAD(N)                                                                               \
  extern "C" __global__ void __launch_bounds__(256) drop_grad_##N##_bf16(                          \
      const bf16 *x, i64 ldx, const bf16 *du_t, i64 ldd, const __grid_constant__ Tiles tiles,      \
      float scale, float *out, int ranks, int rows, int columns, int splits) {                     \
    drop_grad<N>(x, ldx, du_t, ldd, tiles, scale, out, ranks, rows, columns, splits);              \
  }
#ifndef STEP
KERNELS(bf16, bf16)
KERNELS(float, f32)
extern "C" __global__ void drop_bits_bf16(const i64 *seed, u32 *bits, int keep, i64 words) {
  drop_bits(seed, bits, keep, words);
}
extern "C" __global__ void drop_apply_bf16(const bf16 *y, i64 ldy, const unsigned char *bits,
                                           float scale, bf16 *out, i64 ldo, int adds, int columns,
                                           i64 packs) {
  drop_apply(y, ldy, bits, scale, out, ldo, adds, columns, packs);
}
extern "C" __global__ void __launch_bounds__(256)
    drop_down_bf16(const bf16 *x, i64 ldx, const __grid_constant__ Tiles tiles, float scale,
                   bf16 *u, i64 ldu, int rows, int columns) {
  drop_down(x, ldx, tiles, scale, u, ldu, rows, columns);
}
extern "C" __global__ void __launch_bounds__(256)
    drop_up_bf16(const bf16 *du, i64 lddu, const bf16 *a_t, i64 lda,
                 const __grid_constant__ Tiles tiles, float scale, bf16 *dx, i64 lddx, int rows,
                 int columns, int splits) {
  drop_up(du, lddu, a_t, lda, tiles, scale, dx, lddx, rows, columns, splits);
}
extern "C" __global__ void quantise_bf16(const bf16 *x, i64 ldx, u32 *codes, float *scales,
                                         int columns) {
  quantise(x, ldx, codes, scales, columns);
}
DROP_GRAD(1)
DROP_GRAD(2)
DROP_GRAD(3)
#endif
