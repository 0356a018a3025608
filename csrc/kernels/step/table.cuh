// The kernels of a step of generation by name, in both dtypes.

#define STEP_KERNELS(T, NAME)                                                                      \
  extern "C" __global__ void __launch_bounds__(128) step_embed_##NAME(                             \
      const T *tokens, i64 ldt, const i64 *ids, const T *positions, i64 ldp,                       \
      const i64 *position_ids, T *out) {                                                           \
    step_embed<T>(tokens, ldt, ids, positions, ldp, position_ids, out);                            \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(128) step_norm_##NAME(                              \
      const T *x, i64 ldx, Unfinished<T> y, const T *w, const T *b, float eps, T *sum, T *a,       \
      int beside) {                                                                                \
    step_norm<T>(x, ldx, y, w, b, eps, sum, a, beside);                                            \
  }                                                                                                \
  extern "C" __global__ void step_finish_##NAME(Unfinished<T> y, T *out, int activation,           \
                                                int packs_of_block) {                              \
    step_finish<T>(y, out, activation, packs_of_block);                                            \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 2) step_attention_##NAME(                      \
      Unfinished<T> y, StepCache cache, int lanes, int splits, float *partial, int *arrived,       \
      u32 *turn, T *out) {                                                                         \
    if (lanes == 4) step_attention<T, 4>(y, cache, splits, partial, arrived, turn, out);           \
    if (lanes == 8) step_attention<T, 8>(y, cache, splits, partial, arrived, turn, out);           \
    if (lanes == 16) step_attention<T, 16>(y, cache, splits, partial, arrived, turn, out);         \
    if (lanes == 32) step_attention<T, 32>(y, cache, splits, partial, arrived, turn, out);         \
  }
STEP_KERNELS(bf16, bf16)
STEP_KERNELS(float, f32)
// A product of few rows, whose sums are those of the last argument.
#define THIN_PRODUCT(NAME, T, THREADS, BLOCKS, ...)                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                    \
      NAME(ThinInput<T> input, const T *w, i64 ldw, ThinExperts<T> experts, T *out, i64 ldo,       \
           int rows, int in, int columns, int lanes, int split) {                                  \
    thin_products<T, __VA_ARGS__>(input, w, ldw, experts, out, ldo, rows, in, columns, lanes,      \
                                  split);                                                          \
  }
THIN_PRODUCT(thin_product_of_one_bf16, bf16, 512, 2, CoreSums<bf16, 1>)
THIN_PRODUCT(thin_product_of_one_f32, float, 512, 2, CoreSums<float, 1>)
THIN_PRODUCT(thin_product_of_two_bf16, bf16, 512, 1, CoreSums<bf16, 2>)
THIN_PRODUCT(thin_product_of_two_f32, float, 512, 1, CoreSums<float, 2>)
THIN_PRODUCT(thin_product_f32, float, 512, 1, CoreSums<float, 4>)
THIN_PRODUCT(thin_product_bf16, bf16, 256, 4, TensorSums<8>)
THIN_PRODUCT(thin_product_of_16_bf16, bf16, 256, 3, TensorSums<16>)
// In bf16 only.
extern "C" __global__ void __launch_bounds__(256, 2)
    finish_many_bf16(const __grid_constant__ Unfinished<bf16> y, bf16 *out, i64 ldo,
                     int activation, int rows) {
  finish_many(y, out, ldo, activation, rows);
}
