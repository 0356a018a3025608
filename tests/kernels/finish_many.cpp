// Runs the kernel of csrc/kernels/step/many.cuh on the CPU and compares it with float64.
// scripts/check_kernels.py writes the kernels to the file KERNELS, in words that a C++ compiler
// knows.
#include "cuda.h"

#include KERNELS
#include "matrix.h"

constexpr int NONE = -1;
struct Case {
  int rows;
  std::vector<int> outs, ranks;  // of each linear layer
  int activation = NONE, ranks_of_expert = 8;
  bool has_bias = false, has_weights = true;
};

double activated(int activation, double x) {
  if (activation == TANH_GELU)
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
  return activation == GELU ? 0.5 * x * (1 + erf(x / sqrt(2.0))) : x;
}

// The largest difference from float64, as a share of the largest number.
double distance_of(const Case &c) {
  constexpr int EXPERTS = 5;
  std::mt19937 random(7);
  int out = 0, ranks = 0;
  for (int o : c.outs) out += o;
  for (int r : c.ranks) ranks += r;
  const int padded = (ranks + 7) / 8 * 8;
  Matrix product(c.rows, out + padded), bias(1, out), b(padded, out);
  for (Matrix *matrix : {&product, &bias, &b}) matrix->randomise(random);
  std::vector<float> g(c.rows * EXPERTS);
  std::vector<float4> of_scaling(padded / 4 + 1);
  float *const scaling = (float *)of_scaling.data();
  std::vector<int4> of_experts(padded / 4 + 1);
  int *const expert_of = (int *)of_experts.data();
  for (float &weight : g) weight = (float)random() / (float)random.max();
  for (int r = 0; r < padded; ++r) {
    scaling[r] = r < ranks ? 1 + 0.01f * r : 0;
    expert_of[r] = r / c.ranks_of_expert % EXPERTS;
  }
  Unfinished<bf16> y{product.first(), product.ld, c.has_bias ? bias.first() : nullptr, {}, out};
  Updates<bf16> &updates = y.updates;
  updates.b = b.first(), updates.ldb = b.ld;
  updates.g = c.has_weights ? g.data() : nullptr, updates.experts = EXPERTS;
  updates.expert_of = expert_of, updates.scaling = scaling;
  updates.ranks = padded, updates.members = (int)c.outs.size();
  for (size_t m = 0; m < c.outs.size(); ++m) {
    updates.first_out[m + 1] = updates.first_out[m] + c.outs[m];
    updates.first_rank[m + 1] = updates.first_rank[m] + c.ranks[m];
    // the ranks of another layer, and those that rounding adds
    for (int r = 0; r < padded; ++r)
      for (int i = updates.first_out[m]; i < updates.first_out[m + 1]; ++i)
        if (r < updates.first_rank[m] || r >= updates.first_rank[m + 1])
          put(b.first() + r * b.ld + i, 0);
  }

  const bool is_gated = c.activation == SWIGLU;
  const int columns = is_gated ? out / 2 : out;
  const int tiles = (columns + (is_gated ? 31 : 63)) / (is_gated ? 32 : 64);
  Matrix found(c.rows, columns);
  for (bf16 *p = found.first(); p < found.numbers.data() + found.numbers.size(); ++p)
    p->bits = 0x7fc0;  // no number
  launch(tiles * ((c.rows + 63) / 64), 256, 1, 2 * sizeof(ManyShared),
         [&] { finish_many(y, found.first(), found.ld, c.activation, c.rows); });

  Distance distance;
  for (int row = 0; row < c.rows; ++row) {
    std::vector<double> z(out);
    for (int i = 0; i < out; ++i) {
      z[i] = product(row, i) + (c.has_bias ? bias(0, i) : 0);
      for (int r = 0; r < padded; ++r) {
        const double weight = c.has_weights ? g[row * EXPERTS + expert_of[r]] : 1;
        z[i] += product(row, out + r) * weight * scaling[r] * b(r, i);
      }
    }
    for (int i = 0; i < columns; ++i) {
      const double expected = is_gated ? z[i] / (1 + exp(-z[i])) * z[columns + i]
                                       : activated(c.activation, z[i]);
      distance.add(expected, found(row, i));
    }
    for (int i = columns; i < found.ld && row + 1 < c.rows; ++i)
      if (found.first()[row * found.ld + i].bits != 0x7fc0) return INFINITY;
  }
  return distance.share();
}

int main() {
  const std::vector<Case> cases = {
      {70, {96, 32, 32}, {128, 40, 24}},
      {5, {64}, {16}},
      {64, {72}, {300}, NONE, 16, true, false},
      {17, {40, 24}, {12, 4}, NONE, 4},
      {130, {64, 64}, {0, 24}},
      {64, {64, 64}, {128, 128}, SWIGLU, 16},
      {9, {104, 104}, {136, 12}, SWIGLU, 4, true},
      {33, {136}, {24}, TANH_GELU, 8, true},
      {16, {128}, {64}, GELU, 16, true, false},
  };
  bool is_wrong = false;
  for (const Case &c : cases) {
    // v and the output are rounded to bf16
    const double found = distance_of(c);
    const bool differs = !(found < 6e-3);
    printf("%d rows, layers: %zu, activation %d: %.1e%s\n", c.rows, c.outs.size(), c.activation,
           found, differs ? ": WRONG" : "");
    is_wrong |= differs;
  }
  return is_wrong;
}
