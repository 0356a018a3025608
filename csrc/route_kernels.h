// Launches the kernels of csrc/kernels/route.cuh. Included by csrc/cuda.cpp.
#pragma once

constexpr int64_t MOST_EXPERTS = 64;
constexpr int64_t EXPERTS_AT_ONCE = 8;  // as in csrc/kernels/route.cuh

static bool routes(const Tensor &x, const Tensor &w, const Tensor &b) {
  const auto is_ready = [&](const Tensor &p) {
    return p.is_cuda() && p.scalar_type() == at::kFloat && p.is_contiguous();
  };
  return any_module(x) && is_ready(w) && is_ready(b) && packs(x) && packs(w) &&
         x.size(1) % 8 == 0 && w.size(0) <= MOST_EXPERTS;
}
static void route(const Tensor &x, const Tensor &w, const Tensor &b, const Tensor &temperature,
                  bool normalizes, double eps, const Tensor &logits, const Tensor &probs,
                  const Tensor &rstd) {
  const int64_t rows = x.size(0), experts = w.size(0);
  // a few rows are computed by more threads each, and soon after the kernel in front
  const bool is_few = rows < 8 * MULTIPROCESSORS;
  const int64_t width = x.size(1);
  const int64_t of_row = !is_few ? 1 : width >= 1536 ? 8 : width >= 512 ? 4 : 1;
  const int64_t of_block = 8 / of_row;
  const auto launch = [&](auto run) {
    run(any_module(x), Route, x, ceil_div(rows, of_block), 256, (int)(4 * of_block * experts),
        x.data_ptr(), ld(x), w.data_ptr(), b.data_ptr(), temperature.data_ptr(), (int)normalizes,
        (float)eps, logits.data_ptr(), probs.data_ptr(), rstd.data_ptr(), (int)width,
        (int)experts, rows, (int)of_row);
  };
  if (is_few)
    launch([](auto... args) { run_early(args...); });
  else
    launch([](auto... args) { run(args...); });
}
static Tensor route_backward(const Tensor &x, const Tensor &rstd, const Tensor &probs,
                             const Tensor &dlogits, const Tensor &dprobs,
                             const Tensor &temperature) {
  const int64_t rows = x.size(0), width = x.size(1), experts = probs.size(1);
  const int64_t column_blocks = ceil_div(width, 128 * per_pack(x));
  const int64_t tiles = ceil_div(experts, EXPERTS_AT_ONCE);
  // enough blocks for all multiprocessors
  const int64_t wanted = ceil_div(4 * MULTIPROCESSORS, column_blocks * tiles);
  const int64_t rows_of_chunk = 32 * std::max<int64_t>(1, ceil_div(rows, 32 * wanted));
  const int64_t chunks = ceil_div(rows, rows_of_chunk);
  const Tensor partial = at::empty({chunks, ceil_div(experts * (width + 1), 4) * 4},
                                   x.options().dtype(at::kFloat));
  run(any_module(x), RouteBackward, x, chunks * column_blocks * tiles, 128, 0, x.data_ptr(), ld(x),
      rstd.data_ptr(), probs.data_ptr(), at_or_null(dlogits), at_or_null(dprobs),
      temperature.data_ptr(), partial.data_ptr(), ld(partial), (int)width, (int)experts, rows,
      (int)rows_of_chunk, (int)column_blocks, (int)tiles);
  return partial.sum(0);
}
