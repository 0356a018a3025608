// What CUDA offers to a kernel, on the CPU: each thread of the GPU becomes a thread of the CPU.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
#define __noinline__
#undef INFINITY
#define INFINITY __builtin_inff()

struct Index {
  unsigned x;
};
thread_local Index threadIdx, blockIdx, blockDim, gridDim;

struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
int2 make_int2(int x, int y) { return {x, y}; }
uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
int __float_as_int(float x) { return (int)__float_as_uint(x); }
float __expf(float x) { return expf(x); }
float __fdividef(float x, float y) { return x / y; }
float rsqrtf(float x) { return 1 / sqrtf(x); }
int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long both = (unsigned long long)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i)
    out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T, class U> void __stcg(T *p, U value) { *p = value; }

// A barrier that some threads pass together.
struct Barrier {
  pthread_barrier_t inner;
  explicit Barrier(int threads) { pthread_barrier_init(&inner, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&inner); }
  void wait() { pthread_barrier_wait(&inner); }
};
struct Block {
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<float> exchanged;  // by the threads of a warp
  std::vector<std::array<unsigned, 6>> factors;  // of a product of a warp's threads
  float of_warps[32];
  std::atomic<int> missing;  // bytes of an inbox
  char *dynamic;  // shared memory
  Block(int threads, size_t bytes) : all(threads), exchanged(threads), factors(threads) {
    for (int warp = 0; warp < threads / 32; ++warp) warps.emplace_back(new Barrier(32));
    dynamic = (char *)aligned_alloc(64, (bytes + 63) / 64 * 64);
    memset(dynamic, 0xff, bytes);
  }
  ~Block() { free(dynamic); }
};
struct Cluster {
  Barrier all;
  std::vector<std::unique_ptr<Block>> blocks;
  explicit Cluster(int threads) : all(threads) {}
};
thread_local Block *block;
thread_local Cluster *cluster;

void __syncthreads() { block->all.wait(); }
void __syncwarp() { block->warps[threadIdx.x / 32]->wait(); }
float __shfl_xor_sync(unsigned, float x, int distance) {
  Barrier &warp = *block->warps[threadIdx.x / 32];
  block->exchanged[threadIdx.x] = x;
  warp.wait();
  const float other = block->exchanged[threadIdx.x ^ distance];
  warp.wait();
  return other;
}
// The product `mma.m16n8k16` of a warp, as PTX defines it.
void mma(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  Barrier &warp = *block->warps[threadIdx.x / 32];
  const auto *factors = &block->factors[threadIdx.x / 32 * 32];
  block->factors[threadIdx.x] = {a0, a1, a2, a3, b0, b1};
  warp.wait();
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto number = [](unsigned pair, int half) {
    return __uint_as_float(half ? pair & 0xffff0000u : pair << 16);
  };
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned a = factors[4 * g + k % 8 / 2][i / 2 + 2 * (k / 8)];
      const unsigned b = factors[4 * column + k % 8 / 2][4 + k / 8];
      d[i] += number(a, k % 2) * number(b, k % 2);
    }
  }
  warp.wait();
}
// As in csrc/kernels/cluster.cuh. A block has one inbox.
void open_inbox(unsigned long long *, int bytes) {
  if (threadIdx.x == 0) block->missing = bytes;
}
void wait_for_inboxes() { cluster->all.wait(); }
void send(float *to, unsigned long long *, float x, int k) {
  Block &other = *cluster->blocks[k];
  *(float *)(other.dynamic + ((char *)to - block->dynamic)) = x;
  other.missing -= 4;
}
void wait_for_sent(unsigned long long *) {
  while (block->missing > 0) std::this_thread::yield();
}
void wait_for_inputs() {}

// Runs a function as each thread of each block, a cluster at a time.
void launch(int blocks, int block_threads, int of_cluster, size_t shared,
            const std::function<void()> &kernel) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 64 << 10);
  for (int first = 0; first < blocks; first += of_cluster) {
    Cluster all(block_threads * of_cluster);
    for (int k = 0; k < of_cluster; ++k) all.blocks.emplace_back(new Block(block_threads, shared));
    std::vector<std::function<void()>> bodies;
    for (int t = 0; t < block_threads * of_cluster; ++t)
      bodies.push_back([&, t] {
        const int k = t / block_threads;
        threadIdx.x = t % block_threads, blockIdx.x = first + k;
        blockDim.x = block_threads, gridDim.x = blocks;
        block = all.blocks[k].get(), cluster = &all;
        kernel();
      });
    std::vector<pthread_t> threads(bodies.size());
    auto run = [](void *body) -> void * {
      (*(std::function<void()> *)body)();
      return nullptr;
    };
    for (size_t t = 0; t < threads.size(); ++t)
      if (pthread_create(&threads[t], &attributes, run, &bodies[t])) {
        perror("no thread");
        exit(1);
      }
    for (auto thread : threads) pthread_join(thread, nullptr);
  }
}
