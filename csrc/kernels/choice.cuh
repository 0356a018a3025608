// The most probable token of rows of logits.

// Waits for the kernel in front of this one, if this one was launched before its end.
static __device__ __forceinline__ void wait_for_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start, if it was launched so that it may.
static __device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Both. csrc/kernels/step/finish.cuh relies on their order.
static __device__ __forceinline__ void wait_for_inputs() {
  wait_for_kernel();
  start_next_kernel();
}

// For each row of logits: the first of the largest ones, and the logarithm of its probability.
// `choice` is [2, rows]. A cluster of `split` blocks computes a row. If `ids` is not null, the
// choice becomes the row's next token, and `choice` is [2, 2, rows], where a row at an odd position
// writes to the second half. Then its position and place are raised by 1.
template <class T>
static __device__ void step_choice(const T *logits, i64 ld, int vocabulary, int packs,
                                   double *choice, i64 *ids, i64 *positions, i64 *places,
                                   int split) {
  constexpr int N = Pack<T>::N, MOST = 8;  // blocks, as MAX_CLUSTER in csrc/step_kernels.h
  __shared__ float scratch[32];
  __shared__ int of_block[32];
  // of each block: its largest logit, the sum relative to it, and its choice
  __shared__ float sent[3][MOST];
  __shared__ u64 inbox;
  const int part = blockIdx.x % split;
  const i64 row = blockIdx.x / split, rows = gridDim.x / split;
  if (split > 1) open_inbox(&inbox, part == 0 ? 4 * 3 * split : 0);
  wait_for_inputs();
  const T *z = logits + row * ld;
  float top = -INFINITY, sum = 0;
  int best = vocabulary;
#pragma unroll 4
  for (int p = part * blockDim.x + threadIdx.x; p < packs; p += split * blockDim.x) {
    float x[N];
    Pack<T>::load(z + p * N, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (p * N + i >= vocabulary) continue;
      if (x[i] > top) {
        sum *= power_of_2((top - x[i]) * LOG2_E);
        top = x[i], best = p * N + i;
      }
      sum += power_of_2((x[i] - top) * LOG2_E);
    }
  }
  float of_all = block_reduce(top, scratch, true);
  float total = block_reduce(
      top == -INFINITY ? 0.f : sum * power_of_2((top - of_all) * LOG2_E), scratch, false);
  if (top != of_all) best = vocabulary;
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) best = min(best, __shfl_xor_sync(~0u, best, o));
  if (threadIdx.x % 32 == 0) of_block[threadIdx.x / 32] = best;
  __syncthreads();
  if (split > 1) wait_for_inboxes();
  if (threadIdx.x > 0) return;
  for (int i = 0; i < blockDim.x / 32; ++i) best = min(best, of_block[i]);
  if (split > 1) {
    send(&sent[0][part], &inbox, of_all, 0);
    send(&sent[1][part], &inbox, total, 0);
    send(&sent[2][part], &inbox, __int_as_float(best), 0);
    if (part > 0) return;
    wait_for_sent(&inbox);
    for (int k = 0; k < split; ++k) of_all = fmaxf(of_all, sent[0][k]);
    total = 0, best = vocabulary;
    for (int k = 0; k < split; ++k) {
      if (sent[0][k] > -INFINITY) total += sent[1][k] * power_of_2((sent[0][k] - of_all) * LOG2_E);
      if (sent[0][k] == of_all) best = min(best, __float_as_int(sent[2][k]));
    }
  }
  if (best >= vocabulary) best = 0;  // no logit is a number
  if (ids) choice += positions[row] % 2 * 2 * rows;
  choice[row] = best;
  choice[rows + row] = -logf(total);
  if (ids) ids[row] = best, positions[row] += 1, places[row] += 1;
}
