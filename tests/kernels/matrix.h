// Matrices in bf16, and how far numbers are from float64. It is included behind the kernels.
#pragma once

// A matrix in bf16 whose rows are a few elements longer than its columns.
struct Matrix {
  int rows, columns;
  i64 ld;
  std::vector<bf16> numbers;
  Matrix(int rows, int columns, int more = 8)
      : rows(rows), columns(columns), ld(columns + more), numbers(rows * ld + 8) {}
  bf16 *first() { return (bf16 *)(((size_t)numbers.data() + 15) / 16 * 16); }
  double operator()(int row, int column) { return wide(first()[row * ld + column]); }
  void randomise(std::mt19937 &random) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows * ld; ++i) put(first() + i, normal(random));
  }
};

// The largest difference as a share of the largest number.
struct Distance {
  double worst = 0, largest = 0;
  void add(double expected, double found) {
    const double distance = fabs(expected - found);
    worst = distance <= worst ? worst : std::isnan(distance) ? INFINITY : distance;
    largest = max(largest, fabs(expected));
  }
  double share() const { return worst / largest; }
};
