// Runs the kernels of csrc/kernels/step/thin.cuh on the CPU and compares them with float64.
// scripts/check_kernels.py writes the kernels to the file KERNELS, in words that a C++ compiler
// knows.
#include "cuda.h"

#include KERNELS

// ---- The comparison.

template <class T> struct Matrix {
  std::vector<T> numbers;
  T *first;
  i64 ld;
  Matrix(int rows, int columns) : numbers((size_t)rows * columns + 64), ld(columns) {
    first = (T *)(((size_t)numbers.data() + 63) / 64 * 64);
  }
  void randomise(std::mt19937 &random, float scale) {
    std::normal_distribution<float> normal;
    for (T *p = first; p < numbers.data() + numbers.size(); ++p) put(p, scale * normal(random));
  }
  double operator()(int row, int column) const { return wide(first[row * ld + column]); }
};

enum Kind { PLAIN, NORMED, ACTIVATED };

// What csrc/step_kernels.h decides.
struct Shape {
  int threads, lanes, split;
};
struct Case {
  Kind kind;
  int rows, in;
  std::vector<int> outs, ranks;  // of each linear layer
  Shape shape;
  int activation = SWIGLU;
  bool has_bias_of_norm = false, has_weights = true;
  int index = 0;
};

// The largest difference from float64, as a share of the largest number.
template <class T, class Sums> double distance(const Case &c) {
  constexpr int N = Pack<T>::N, EXPERTS = 3;
  std::mt19937 random(5);
  int columns = 0, ranks = 0;
  for (int out : c.outs) columns += out;
  for (int r : c.ranks) ranks += r;
  const int of_y = c.kind == ACTIVATED && c.activation == SWIGLU ? 2 * c.in : c.in;
  Matrix<T> packed(c.in + ranks, columns + ranks), x(c.rows, c.in), y(c.rows, of_y + 8);
  Matrix<T> bias(1, of_y), norm_w(1, c.in), norm_b(1, c.in), sum(c.rows, c.in);
  Matrix<T> out(c.rows, columns);
  packed.randomise(random, 0.05f);
  for (auto *matrix : {&x, &y, &bias, &norm_w, &norm_b}) matrix->randomise(random, 1);
  std::vector<float> g(c.rows * EXPERTS), scaling(ranks);
  std::vector<int> expert_of(ranks);
  for (float &weight : g) weight = (float)random() / (float)random.max();
  for (int r = 0; r < ranks; ++r)
    scaling[r] = r % 7 == 6 ? 0.f : 1 + 0.1f * r, expert_of[r] = random() % EXPERTS;

  ThinInput<T> input{};
  input.kind = c.kind, input.x = x.first, input.ldx = x.ld;
  input.y.product = y.first, input.y.ld = y.ld, input.y.bias = bias.first, input.y.out = of_y;
  input.norm_w = norm_w.first, input.norm_b = c.has_bias_of_norm ? norm_b.first : nullptr;
  input.eps = 1e-5f, input.sum = sum.first, input.activation = c.activation;
  const auto [threads, given_lanes, split] = c.shape;
  blockDim.x = threads;
  const int lanes = Sums::lanes(given_lanes), lanes_of_a = Sums::lanes_of_a();
  ThinExperts<T> experts{};
  experts.v_terms = 1;
  // as an earlier product left them
  const u32 turn = 9;
  const uint2 earlier{__float_as_uint(1e9f), (turn - 1) << 2 | c.index + 1};
  std::vector<uint2> marked(2 * c.rows * ranks, earlier);
  int ranks_of_block = 0;
  if (ranks > 0) {
    Updates<T> &updates = experts.updates;
    experts.a = packed.first + columns;
    updates.b = packed.first + c.in * packed.ld, updates.ldb = packed.ld;
    updates.g = c.has_weights ? g.data() : nullptr, updates.experts = EXPERTS;
    updates.expert_of = expert_of.data(), updates.scaling = scaling.data();
    updates.ranks = ranks, updates.members = (int)c.outs.size();
    for (size_t m = 0; m < c.outs.size(); ++m) {
      const bool is_apart = updates.first_out[m] % (lanes * N) == 0;
      ranks_of_block = max(ranks_of_block, is_apart ? c.ranks[m] : ranks);
      updates.first_out[m + 1] = updates.first_out[m] + c.outs[m];
      updates.first_rank[m + 1] = updates.first_rank[m] + c.ranks[m];
      // the ranks of other layers
      for (int r = 0; r < ranks; ++r)
        for (int i = updates.first_out[m]; i < updates.first_out[m + 1]; ++i)
          if (r < updates.first_rank[m] || r >= updates.first_rank[m + 1])
            put(packed.first + (c.in + r) * packed.ld + i, 0);
    }
    ranks_of_block = ((ranks_of_block + split - 1) / split + 7) / 8 * 8;
    experts.v = marked.data(), experts.turn = &turn, experts.index = c.index;
    experts.segments = (ranks + lanes_of_a * N - 1) / (lanes_of_a * N);
    const bool halves = Sums::MAY_HALVE && c.in >= 2 * split * threads / lanes_of_a * 4;
    experts.v_terms = halves ? 2 : 1;
  }
  const int longest = ((c.in + split - 1) / split + N - 1) / N * N;
  const int of_segment = max(lanes_of_a, lanes) * N;
  const size_t of_parts = threads / 32 * Sums::ROWS * of_segment;
  const size_t terms = ThinOutputs::terms_of(c.rows * of_segment, split);
  const size_t of_input = c.kind == PLAIN ? 0 : c.rows * (longest + THIN_PADDING) * sizeof(T);
  const size_t of_b = ranks_of_block * lanes * N * sizeof(T);
  const int segments = (columns + lanes * N - 1) / (lanes * N);
  const size_t of_numbers = c.rows * max(2 * of_segment, ranks_of_block);
  const size_t shared = 4 * (terms + of_parts + of_numbers) + of_b + of_input;
  launch((experts.segments * experts.v_terms + segments) * split, threads, split, shared, [&] {
    thin_products<T, Sums>(input, packed.first, packed.ld, experts, out.first, out.ld, c.rows, c.in,
                           columns, given_lanes, split);
  });

  double worst = 0, largest = 0;
  for (int m = 0; m < c.rows; ++m) {
    std::vector<double> a(c.in), v(ranks);
    double mean = 0, square = 0;
    for (int k = 0; k < c.in; ++k) {
      if (c.kind == PLAIN) a[k] = x(m, k);
      if (c.kind == ACTIVATED) {
        const double z = y(m, k) + bias(0, k);
        a[k] = c.activation == SWIGLU ? z / (1 + exp(-z)) * (y(m, c.in + k) + bias(0, c.in + k))
                                      : 0.5 * z * (1 + erf(z / sqrt(2.0)));
      }
      if (c.kind == NORMED) {
        T kept;
        put(&kept, (float)(x(m, k) + y(m, k) + bias(0, k)));
        a[k] = wide(kept), mean += c.has_bias_of_norm ? a[k] / c.in : 0;
        if (fabs(sum(m, k) - a[k]) > 0.01 * (1 + fabs(a[k]))) return INFINITY;
      }
    }
    if (c.kind == NORMED) {
      for (double z : a) square += (z - mean) * (z - mean) / c.in;
      for (int k = 0; k < c.in; ++k)
        a[k] = (a[k] - mean) / sqrt(square + 1e-5) * norm_w(0, k) +
               (c.has_bias_of_norm ? norm_b(0, k) : 0);
    }
    for (int r = 0; r < ranks; ++r) {
      for (int k = 0; k < c.in; ++k) v[r] += a[k] * packed(k, columns + r);
      v[r] *= scaling[r] * (c.has_weights ? g[m * EXPERTS + expert_of[r]] : 1);
    }
    int column = 0, first_rank = 0;
    for (size_t member = 0; member < c.outs.size(); ++member) {
      for (int i = 0; i < c.outs[member]; ++i, ++column) {
        double expected = 0;
        for (int k = 0; k < c.in; ++k) expected += a[k] * packed(k, column);
        for (int r = first_rank; r < first_rank + c.ranks[member]; ++r)
          expected += v[r] * packed(c.in + r, column);
        const double distance = fabs(expected - out(m, column));
        worst = distance <= worst ? worst : std::isnan(distance) ? INFINITY : distance;
        largest = max(largest, fabs(expected));
      }
      first_rank += c.ranks[member];
    }
  }
  return worst / largest;
}

// The sums that can compute a case, and the largest distance of their dtype:
// that of the output's rounding, and in bf16 of the input's as well.
struct Form {
  const char *name;
  double distance, most;
};
std::vector<Form> forms(const Case &c) {
  std::vector<Form> all;
  if (c.rows == 1) {
    all.push_back({"f32", distance<float, CoreSums<float, 1>>(c), 3e-6});
    all.push_back({"bf16", distance<bf16, CoreSums<bf16, 1>>(c), 1.5e-2});
  } else if (c.rows == 2) {
    all.push_back({"f32", distance<float, CoreSums<float, 2>>(c), 3e-6});
    all.push_back({"bf16", distance<bf16, CoreSums<bf16, 2>>(c), 1.5e-2});
  } else if (c.rows <= 4) {
    all.push_back({"f32", distance<float, CoreSums<float, 4>>(c), 3e-6});
  }
  if (c.rows > 1 && c.rows <= 8 && c.kind == PLAIN && c.shape.threads == 256)
    all.push_back({"bf16 by tensor cores", distance<bf16, TensorSums<8>>(c), 1.5e-2});
  if (c.rows > 8)
    all.push_back({"bf16 by tensor cores", distance<bf16, TensorSums<16>>(c), 1.5e-2});
  return all;
}

int main() {
  const Shape eight{256, 8, 8}, four{256, 8, 4}, two{256, 8, 2}, wide_rows{256, 16, 4};
  const Shape small{512, 4, 1}, smallest{512, 2, 1}, alone{256, 8, 1};
  std::vector<Case> cases = {
      {PLAIN, 1, 2048, {64, 32, 32}, {40, 24, 16}, eight},
      {PLAIN, 1, 2048, {64, 64}, {16, 0}, two},
      {PLAIN, 1, 2048, {64}, {0}, two},
      {NORMED, 1, 2048, {64, 32}, {40, 24}, four},
      {NORMED, 1, 2048, {96, 96}, {128, 64}, two, SWIGLU, true, true, 2},
      {ACTIVATED, 1, 4096, {96}, {24}, four, SWIGLU, false, true, 3},
      {ACTIVATED, 1, 4104, {64}, {24}, four, GELU, false, false, 3},
      {ACTIVATED, 1, 576, {72}, {24}, small, GELU},
  };
  for (int rows : {2, 4}) {
    cases.push_back({NORMED, rows, 2048, {64, 32}, {40, 24}, wide_rows});
    cases.push_back({ACTIVATED, rows, 4096, {128}, {48}, wide_rows, SWIGLU, false, true, 3});
    cases.push_back({PLAIN, rows, 576, {96, 48}, {24, 8}, smallest, SWIGLU, false, true, 1});
  }
  for (int rows : {2, 3, 8, 11, 16}) {
    cases.push_back({PLAIN, rows, 2048, {64, 32, 32}, {40, 24, 16}, eight});
    cases.push_back({PLAIN, rows, 576, {96, 48}, {24, 8}, alone, SWIGLU, false, false, 1});
    cases.push_back({PLAIN, rows, 1032, {200}, {0}, two});
  }
  bool is_wrong = false;
  for (const Case &c : cases)
    for (const auto &[name, distance, most] : forms(c)) {
      const bool differs = !(distance < most);
      printf("input %d of %d x %d, layers: %zu, %s: %.1e%s\n", c.kind, c.rows, c.in,
             c.outs.size(), name, distance, differs ? ": WRONG" : "");
      is_wrong |= differs;
    }
  return is_wrong;
}
