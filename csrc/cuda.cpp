// What needs CUDA itself: graphs. A shared object of its own, embedded in the binary and loaded once libtorch's CUDA
// part is, so that the same binary runs without CUDA. Declared to Rust in src/ffi/cuda.rs.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "error.h"

// A graph and the stream that it was captured on.
struct Graph {
  at::cuda::CUDAGraph graph;
  c10::cuda::CUDAStream side, previous;
  Graph() : side(c10::cuda::getStreamFromPool()), previous(c10::cuda::getCurrentCUDAStream()) {}
  void enter() {
    previous = c10::cuda::getCurrentCUDAStream();
    c10::cuda::device_synchronize();
    c10::cuda::setCurrentCUDAStream(side);
  }
  void leave() {
    side.synchronize();
    c10::cuda::setCurrentCUDAStream(previous);
  }
};

#pragma GCC visibility push(default)
extern "C" {
char *dylora_cuda_take_error() { return take_error(); }

// An empty graph.
Graph *dylora_cuda_graph_new() {
  TRY(nullptr, { return new Graph(); })
}
// What runs between enter and leave runs on the graph's stream, so that a warm-up makes handles and workspaces there.
int dylora_cuda_graph_enter(Graph *g) {
  TRY(-1, {
    g->enter();
    return 0;
  })
}
int dylora_cuda_graph_leave(Graph *g) {
  TRY(-1, {
    g->leave();
    return 0;
  })
}
// With `memory_of`, the graph shares that one's memory: the two must never run at the same time, and what one leaves
// there is lost once the other runs.
int dylora_cuda_graph_begin(Graph *g, Graph *memory_of) {
  TRY(-1, {
    g->enter();
    auto pool = memory_of ? memory_of->graph.pool() : c10::MempoolId_t{0, 0};
    g->graph.capture_begin(pool, cudaStreamCaptureModeThreadLocal);
    return 0;
  })
}
int dylora_cuda_graph_end(Graph *g) {
  TRY(-1, {
    try {
      g->graph.capture_end();
    } catch (...) {
      c10::cuda::setCurrentCUDAStream(g->previous);
      throw;
    }
    c10::cuda::setCurrentCUDAStream(g->previous);
    return 0;
  })
}
int dylora_cuda_graph_replay(Graph *g) {
  TRY(-1, {
    g->graph.replay();
    return 0;
  })
}
void dylora_cuda_graph_free(Graph *g) { delete g; }
}
#pragma GCC visibility pop
