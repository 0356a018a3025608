// Launches the kernels of csrc/kernels/dropout.cuh. Included by csrc/cuda.cpp.
#pragma once

// As in csrc/kernels/dropout.cuh.
constexpr int MOST_TILES = 3;
struct Tiles {
  const void *bits[MOST_TILES], *a[MOST_TILES];
  int filled[MOST_TILES], first[MOST_TILES], ranks[MOST_TILES];
  int count;
};

// The tiles of up to 16 columns of the members' rank spaces, up to MOST_TILES in a group. `as` has
// A of each member; it is empty if the kernel does not read it.
static std::vector<Tiles> tiles_of(const std::vector<DroppedMember> &members,
                                   const std::vector<Tensor> &as) {
  std::vector<Tiles> groups;
  for (size_t k = 0; k < members.size(); ++k) {
    const auto &m = members[k];
    for (int64_t first = 0; first < m.num_ranks; first += 16) {
      if (groups.empty() || groups.back().count == MOST_TILES) groups.emplace_back();
      Tiles &tiles = groups.back();
      const int at = tiles.count++;
      tiles.bits[at] = m.bits.data_ptr();
      tiles.first[at] = (int)(m.first_rank + first);
      tiles.ranks[at] = (int)std::min<int64_t>(16, m.num_ranks - first);
      if (as.empty()) continue;
      tiles.filled[at] = (int)std::clamp<int64_t>(as[k].size(0) - first, 0, 16);
      // beyond its rows, A is not read
      tiles.a[at] = (const char *)as[k].data_ptr() + first * ld(as[k]) * as[k].element_size();
    }
  }
  return groups;
}

// `x`, whose rows begin at multiples of 16 bytes; a copy if necessary.
static Tensor packing(const Tensor &x) {
  return packs(x) ? x : x.clone(at::MemoryFormat::Contiguous);
}

static bool draws_masks(const Tensor &x) {
  return any_module(x) && x.scalar_type() == at::kBFloat16 && x.size(-1) % 32 == 0 &&
         capability() >= 80;
}
static Tensor draw_mask(const Tensor &seed, int64_t rows, int64_t columns, int64_t keep) {
  const Tensor bits = at::empty({rows, columns / 8}, seed.options().dtype(at::kByte));
  const int64_t words = rows * columns / 32;
  const auto module = latest.find(seed.device().index());
  const auto like = at::empty({0}, seed.options().dtype(at::kBFloat16));
  run(&module->second, DropBits, like, ceil_div(words, 256), 256, 0, seed.data_ptr(),
      bits.data_ptr(), (int)keep, words);
  return bits;
}
static void drop_apply(const Tensor &y, const Tensor &bits, double scale, const Tensor &out,
                       bool adds) {
  const Tensor read = packing(y);
  TORCH_CHECK(packs(out), "the rows do not begin at multiples of 16 bytes");
  const int64_t n = y.numel() / 8;
  run(any_module(y), DropApply, y, ceil_div(n, 256), 256, 0, read.data_ptr(), ld(read),
      bits.data_ptr(), (float)scale, out.data_ptr(), ld(out), (int)adds, (int)y.size(1), n);
}
static void drop_down(const Tensor &x, const std::vector<DroppedMember> &members, double scale,
                      const Tensor &u) {
  const Tensor read = packing(x);
  std::vector<Tensor> as;
  for (const auto &m : members) as.push_back(m.a.to(x.scalar_type()).contiguous());
  for (const Tiles &tiles : tiles_of(members, as))
    run(any_module(x), DropDown, x, ceil_div(x.size(0), 32), 256, 0, read.data_ptr(), ld(read),
        tiles, (float)scale, u.data_ptr(), ld(u), (int)x.size(0), (int)x.size(1));
}
static void drop_up(const Tensor &du, const Tensor &a_t, const std::vector<DroppedMember> &members,
                    double scale, const Tensor &dx) {
  if (dx.size(0) == 0) return;
  const Tensor read = packing(du), a = packing(a_t);
  const int64_t blocks = ceil_div(dx.size(0), 128), chunks = dx.size(1) / 32;
  // enough blocks for all multiprocessors, of several chunks each
  const int64_t splits =
      std::clamp<int64_t>(ceil_div(6 * multiprocessors(), blocks), 1, ceil_div(chunks, 4));
  for (const Tiles &tiles : tiles_of(members, {}))
    run(any_module(dx), DropUp, dx, blocks * splits, 256, 0, read.data_ptr(), ld(read),
        a.data_ptr(), ld(a), tiles, (float)scale, dx.data_ptr(), ld(dx), (int)dx.size(0),
        (int)dx.size(1), (int)splits);
}
static Tensor drop_grad(const Tensor &x, const Tensor &du,
                        const std::vector<DroppedMember> &members, double scale) {
  const Tensor read = packing(x);
  const int64_t rows = x.size(0), width = x.size(1), ranks = du.size(1);
  if (rows == 0) return at::zeros({ranks, width}, x.options().dtype(at::kFloat));
  const Tensor du_t = at::constant_pad_nd(du.t(), {0, ceil_div(rows, 16) * 16 - rows}).contiguous();
  const int64_t blocks = ceil_div(width, 64);
  const int64_t splits =
      std::clamp<int64_t>(ceil_div(2 * multiprocessors(), blocks), 1, ceil_div(rows, 256));
  const Tensor out = at::empty({splits, ranks, width}, x.options().dtype(at::kFloat));
  for (const Tiles &tiles : tiles_of(members, {}))
    run(any_module(x), (Name)(DropGrad1 + tiles.count - 1), x, blocks * splits, 256, 0,
        read.data_ptr(), ld(read), du_t.data_ptr(), ld(du_t), tiles, (float)scale, out.data_ptr(),
        (int)ranks, (int)rows, (int)width, (int)splits);
  return splits == 1 ? out[0] : out.sum(0);
}
