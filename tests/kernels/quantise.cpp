// Runs the kernel of csrc/kernels/quantise.cuh on the CPU and compares its codes with those that
// are nearest in float64. scripts/check_kernels.py writes the kernel to the file KERNELS, in words
// that a C++ compiler knows.
#include "cuda.h"

float __fdiv_rn(float x, float y) { return x / y; }

// The number of a code of e4m3: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no
// infinities.
double number_of(unsigned code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double size =
      exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
  return code & 128 ? -size : size;
}
// What `cvt.rn.satfinite.e4m3x2.f32` does: the nearest number, or of two the one with an even
// mantissa.
unsigned code_of(float x) {
  unsigned best = 0;
  for (unsigned code = 0; code < 127; ++code) {  // 127 is NaN
    const double now = fabs(number_of(code) - fabs(x)), old = fabs(number_of(best) - fabs(x));
    if (now < old || (now == old && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 128 : 0);
}
unsigned four_codes(const float *x) {
  return code_of(x[0]) | code_of(x[1]) << 8 | code_of(x[2]) << 16 | code_of(x[3]) << 24;
}

#include KERNELS

int main() {
  bool is_wrong = number_of(code_of(1e9f)) != 448 || number_of(code_of(0.0019f)) != ldexp(1, -9);
  for (auto [rows, columns, threads] : {std::array{5, 64, 32}, {3, 576, 32}, {2, 4096, 128},
                                        {2, 6144, 64}, {1, 1040, 32}}) {
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    const i64 ld = columns + 8;
    std::vector<bf16> held(rows * ld + 8);
    bf16 *x = (bf16 *)(((size_t)held.data() + 15) / 16 * 16);
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < ld; ++i)
        put(x + row * ld + i, row == 1 ? 0 : normal(random) * ldexpf(1, 9 * row));
    std::vector<unsigned> codes(rows * columns / 4 + 2);
    std::vector<float> scales(rows, NAN);
    unsigned *aligned = (unsigned *)(((size_t)codes.data() + 7) / 8 * 8);
    launch(rows, threads, 1, 64, [&] { quantise(x, ld, aligned, scales.data(), columns); });
    int wrong = 0;
    for (int row = 0; row < rows; ++row) {
      double largest = 0;
      for (int i = 0; i < columns; ++i) largest = fmax(largest, fabs(wide(x[row * ld + i])));
      const float factor = largest > 0 ? 448 / (float)largest : 1;
      wrong += scales[row] != (largest > 0 ? (float)largest / 448 : 1.f);
      const unsigned char *of_row = (unsigned char *)aligned + row * columns;
      for (int i = 0; i < columns; ++i)
        wrong += of_row[i] != code_of(wide(x[row * ld + i]) * factor);
    }
    printf("%d x %d by %d threads: %d wrong\n", rows, columns, threads, wrong);
    is_wrong = is_wrong || wrong;
  }
  return is_wrong;
}
