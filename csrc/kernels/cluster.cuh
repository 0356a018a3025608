// How the blocks of a cluster exchange numbers.
//
// Either they wait at a barrier of the cluster and read from each other. Or a block sends a number
// to the shared memory of the one that needs it, which waits until all that it needs has arrived.
// This takes less time, since a barrier also waits for all that the threads have written.

// The number at the address `own` of shared memory in block `k` of the cluster.
static __device__ __forceinline__ float of_block(u32 own, int k) {
  float x = 0;
#if __CUDA_ARCH__ >= 900
  u32 place;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(own), "r"(k));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(place));
#endif
  return x;
}
// Waits for all threads of the cluster.
static __device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Makes `inbox` ready for `bytes` from blocks of the cluster. All threads take part, and call
// `wait_for_inboxes` before they send anything.
static __device__ __forceinline__ void open_inbox(u64 *inbox, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    const u32 place = (u32)__cvta_generic_to_shared(inbox);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                 "fence.mbarrier_init.release.cluster;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(place),
                 "r"(bytes)
                 : "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
// Waits until all blocks of the cluster have opened their inboxes.
static __device__ __forceinline__ void wait_for_inboxes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}
// Sends a number to block `k` of the cluster, to the same place of its shared memory.
static __device__ __forceinline__ void send(float *to, u64 *inbox, float x, int k) {
#if __CUDA_ARCH__ >= 900
  const u32 own = (u32)__cvta_generic_to_shared(to);
  const u32 own_inbox = (u32)__cvta_generic_to_shared(inbox);
  asm volatile("{\n"
               ".reg .b32 place, at;\n"
               "mapa.shared::cluster.u32 place, %0, %3;\n"
               "mapa.shared::cluster.u32 at, %1, %3;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %2, [at];\n"
               "}" ::"r"(own),
               "r"(own_inbox), "r"(__float_as_uint(x)), "r"(k)
               : "memory");
#endif
}
// Waits for all that comes to an inbox.
static __device__ __forceinline__ void wait_for_sent(u64 *inbox) {
#if __CUDA_ARCH__ >= 900
  const u32 place = (u32)__cvta_generic_to_shared(inbox);
  u32 is_complete = 0;
  while (!is_complete)
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(is_complete)
                 : "r"(place)
                 : "memory");
#endif
}
