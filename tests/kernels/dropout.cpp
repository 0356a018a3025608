// Runs the kernels of csrc/kernels/dropout.cuh on the CPU and compares them with float64.
// scripts/check_kernels.py writes the kernels to the file KERNELS, in words that a C++ compiler
// knows.
#include "cuda.h"

#include KERNELS
#include "matrix.h"

typedef std::vector<double> Numbers;

// A linear layer: the number of A's rows, and of its columns in the rank space.
struct Member {
  int filled, ranks;
};
struct Case {
  int rows, columns, splits;
  std::vector<Member> members;
};

bool is_kept(const std::vector<unsigned> &bits, i64 element) {
  return ((const unsigned char *)bits.data())[element / 8] >> element % 8 & 1;
}

// The known answer of Philox-4x32-10 for the counter and the key 0 (Random123's kat_vectors).
bool knows_philox() {
  const uint4 drawn = philox(0, 0, 0, 0);
  return drawn.x == 0x6627e8d5 && drawn.y == 0xe169c58d && drawn.z == 0xbc57ac4c &&
         drawn.w == 0x9b00dbd8;
}

int main() {
  const float scale = 65536.f / 40000;
  const std::vector<Case> cases = {{70, 160, 2, {{16, 16}, {5, 8}, {20, 24}}},
                                   {32, 128, 1, {{4, 8}}},
                                   {300, 96, 2, {{16, 16}, {16, 16}, {16, 16}}},
                                   {129, 64, 1, {{33, 40}}}};
  bool is_wrong = !knows_philox();
  printf("Philox: %s\n", is_wrong ? "WRONG" : "as known");
  for (const Case &c : cases) {
    std::mt19937 random(3);
    int ranks = 0;
    for (const Member &m : c.members) ranks += m.ranks;
    Matrix x(c.rows, c.columns), u(c.rows, ranks), du(c.rows, ranks), a_t(c.columns, ranks),
        dx(c.rows, c.columns), du_t(ranks, (c.rows + 15) / 16 * 16, 0);
    for (Matrix *matrix : {&x, &u, &du, &a_t, &dx}) matrix->randomise(random);
    for (int r = 0; r < ranks; ++r)
      for (int row = 0; row < c.rows; ++row)
        du_t.first()[r * du_t.ld + row] = du.first()[row * du.ld + r];
    Matrix before = dx;
    std::vector<float> da((size_t)c.splits * ranks * c.columns, NAN);
    std::vector<std::vector<unsigned>> bits;
    std::vector<Matrix> as;
    std::vector<Tiles> groups;
    std::vector<int> member_of;  // the rank space's columns
    for (size_t k = 0, first = 0; k < c.members.size(); first += c.members[k++].ranks) {
      const Member &m = c.members[k];
      const i64 seed = 77 + (i64)k * 123456789012345, words = c.rows * c.columns / 32;
      bits.emplace_back(words);
      launch((words + 255) / 256, 256, 1, 64,
             [&] { drop_bits(&seed, bits.back().data(), 40000, words); });
      as.emplace_back(m.filled, c.columns, 0);
      for (int r = 0; r < m.filled; ++r)
        for (int i = 0; i < c.columns; ++i)
          as.back().first()[r * as.back().ld + i] = a_t.first()[i * a_t.ld + first + r];
      for (int r = m.filled; r < m.ranks; ++r)  // what rounding adds
        for (int i = 0; i < c.columns; ++i) put(&a_t.first()[i * a_t.ld + first + r], 0);
      member_of.insert(member_of.end(), m.ranks, (int)k);
    }
    // as csrc/dropout_kernels.h divides them
    for (size_t k = 0, first = 0; k < c.members.size(); first += c.members[k++].ranks)
      for (int from = 0; from < c.members[k].ranks; from += 16) {
        if (groups.empty() || groups.back().count == MOST_TILES) groups.push_back({});
        Tiles &tiles = groups.back();
        const int at = tiles.count++;
        tiles.bits[at] = (const unsigned char *)bits[k].data();
        tiles.a[at] = as[k].first() + from * as[k].ld;
        tiles.filled[at] = max(0, min(16, c.members[k].filled - from));
        tiles.first[at] = (int)first + from, tiles.ranks[at] = min(16, c.members[k].ranks - from);
      }
    for (const Tiles &tiles : groups) {
      launch((c.rows + 31) / 32, 256, 1, 1 << 15, [&] {
        drop_down(x.first(), x.ld, tiles, scale, u.first(), u.ld, c.rows, c.columns);
      });
      launch((c.rows + 127) / 128 * c.splits, 256, 1, 64, [&] {
        drop_up(du.first(), du.ld, a_t.first(), a_t.ld, tiles, scale, dx.first(), dx.ld, c.rows,
                c.columns, c.splits);
      });
      const auto grad = tiles.count == 1 ? drop_grad<1>
                        : tiles.count == 2 ? drop_grad<2>
                                           : drop_grad<3>;
      launch((c.columns + 63) / 64 * c.splits, 256, 1, 1 << 15, [&] {
        grad(x.first(), x.ld, du_t.first(), du_t.ld, tiles, scale, da.data(), ranks, c.rows,
             c.columns, c.splits);
      });
    }
    Distance of_u, of_dx, of_da, of_copy;
    Matrix copy = x, sum = x;  // x through the first mask, and added to x
    const unsigned char *first = (const unsigned char *)bits[0].data();
    const i64 packs = c.rows * c.columns / 8;
    for (Matrix *out : {&copy, &sum})
      launch((packs + 255) / 256, 256, 1, 64, [&] {
        drop_apply(x.first(), x.ld, first, scale, out->first(), out->ld, out == &sum, c.columns,
                   packs);
      });
    for (int row = 0; row < c.rows; ++row)
      for (int i = 0; i < c.columns; ++i) {
        const bool is_in = is_kept(bits[0], (i64)row * c.columns + i);
        of_copy.add(is_in ? scale * x(row, i) : 0, copy(row, i));
        of_copy.add(x(row, i) + (is_in ? scale * x(row, i) : 0), sum(row, i));
      }
    i64 kept = 0;
    for (int r = 0; r < ranks; ++r) {
      const auto &mask = bits[member_of[r]];
      Numbers grads(c.columns);
      for (int row = 0; row < c.rows; ++row) {
        double sum = 0;
        for (int i = 0; i < c.columns; ++i) {
          if (!is_kept(mask, (i64)row * c.columns + i)) continue;
          ++kept, sum += scale * x(row, i) * a_t(i, r), grads[i] += scale * du(row, r) * x(row, i);
        }
        of_u.add(sum, u(row, r));
      }
      for (int i = 0; i < c.columns; ++i) {
        double found = 0;
        for (int split = 0; split < c.splits; ++split)
          found += da[((size_t)split * ranks + r) * c.columns + i];
        of_da.add(grads[i], found);
      }
    }
    for (int row = 0; row < c.rows; ++row)
      for (int i = 0; i < c.columns; ++i) {
        double sum = before(row, i);
        for (int r = 0; r < ranks; ++r)
          if (is_kept(bits[member_of[r]], (i64)row * c.columns + i))
            sum += scale * du(row, r) * a_t(i, r);
        of_dx.add(sum, dx(row, i));
      }
    const double share = (double)kept / ((double)ranks * c.rows * c.columns);
    // u is rounded to bf16, and dx after each group; a share has a standard deviation of
    // 0.49 / sqrt(elements)
    const double rounding = 1. / 256;
    const bool differs = !(of_u.share() <= rounding && of_dx.share() <= rounding * groups.size() &&
                           of_da.share() < 1e-6 && of_copy.share() <= rounding &&
                           fabs(share - 40000. / 65536) < 3. / sqrt(1. * c.rows * c.columns));
    printf("dropout of %d x %d, layers: %zu: u %.1e, dx %.1e, dA %.1e, kept %.4f%s\n", c.rows,
           c.columns, c.members.size(), of_u.share(), of_dx.share(), of_da.share(), share,
           differs ? ": WRONG" : "");
    is_wrong |= differs;
  }
  return is_wrong;
}
