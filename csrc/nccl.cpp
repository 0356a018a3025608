// Processes that add up tensors on their GPUs by NCCL's C API, whose few declarations are repeated
// here. The library is the one that libtorch's CUDA part was linked with, found at run time.
// Declared to Rust in src/ffi/nccl.rs.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <vector>

#include "error.h"

using at::Tensor;

typedef struct ncclComm *Comm;
struct UniqueId {
  char bytes[128];
};
enum { Success = 0, InProgress = 7 };
enum { Sum = 0 };

static int nccl_type(const Tensor &tensor) {
  switch (tensor.scalar_type()) {
    case at::kByte: return 1;
    case at::kLong: return 4;
    case at::kHalf: return 6;
    case at::kFloat: return 7;
    case at::kDouble: return 8;
    case at::kBFloat16: return 9;
    default: TORCH_CHECK(false, "NCCL has no type for ", tensor.scalar_type());
  }
}

static struct Api {
  int (*version)(int *);
  int (*unique_id)(UniqueId *);
  int (*init)(Comm *, int size, UniqueId, int rank);
  int (*all_reduce)(const void *, void *, size_t, int type, int op, Comm, cudaStream_t);
  int (*broadcast)(const void *, void *, size_t, int type, int root, Comm, cudaStream_t);
  int (*group_start)();
  int (*group_end)();
  int (*async_error)(Comm, int *);
  int (*abort)(Comm);
  int (*destroy)(Comm);
  const char *(*error_string)(int);
  const char *(*last_error)(Comm);
  bool is_open = false;

  template <typename F>
  void find(void *library, F &function, const char *name) {
    function = (F)dlsym(library, name);
    TORCH_CHECK(function, "NCCL has no function ", name);
  }
  void open() {
    if (is_open) return;
    void *library = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) library = dlopen("libnccl.so.2", RTLD_LAZY);
    if (!library) library = RTLD_DEFAULT;  // linked into libtorch itself
    find(library, version, "ncclGetVersion");
    find(library, unique_id, "ncclGetUniqueId");
    find(library, init, "ncclCommInitRank");
    find(library, all_reduce, "ncclAllReduce");
    find(library, broadcast, "ncclBroadcast");
    find(library, group_start, "ncclGroupStart");
    find(library, group_end, "ncclGroupEnd");
    find(library, async_error, "ncclCommGetAsyncError");
    find(library, abort, "ncclCommAbort");
    find(library, destroy, "ncclCommDestroy");
    find(library, error_string, "ncclGetErrorString");
    last_error = (const char *(*)(Comm))dlsym(library, "ncclGetLastError");
    is_open = true;
  }
  void check(int status, const char *what) {
    if (status == Success || status == InProgress) return;
    const char *detail = last_error ? last_error(nullptr) : nullptr;
    TORCH_CHECK(false, what, ": ", error_string(status), detail && *detail ? ": " : "",
                detail ? detail : "");
  }
} api;

struct Nccl {
  c10::DeviceIndex device;
  // operations run here, at a high priority, so that they get units of a busy GPU as these get free
  c10::cuda::CUDAStream stream;
  cudaEvent_t event = nullptr;
  std::vector<Tensor> in_use;  // by operations that the current stream does not wait for yet
  Comm comm = nullptr;
  std::atomic<bool> is_aborted{false};
  explicit Nccl(c10::DeviceIndex device)
      : device(device), stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device)) {
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  ~Nccl() { cudaEventDestroy(event); }
  // Makes `later` wait for what `earlier` has queued.
  void order(c10::cuda::CUDAStream earlier, c10::cuda::CUDAStream later) {
    C10_CUDA_CHECK(cudaEventRecord(event, earlier));
    C10_CUDA_CHECK(cudaStreamWaitEvent(later, event));
  }
};

// Runs `each` on all tensors as one operation, on the group's stream.
template <typename F>
static void grouped(Nccl *nccl, Tensor *const *tensors, size_t n, F each) {
  TORCH_CHECK(!nccl->is_aborted, "the group of processes has ended");
  c10::cuda::CUDAGuard guard(nccl->device);
  nccl->order(c10::cuda::getCurrentCUDAStream(nccl->device), nccl->stream);
  for (size_t i = 0; i < n; ++i) nccl->in_use.push_back(*tensors[i]);
  const cudaStream_t stream = nccl->stream.stream();
  api.check(api.group_start(), "ncclGroupStart");
  int status = Success;
  for (size_t i = 0; i < n && status == Success; ++i) status = each(*tensors[i], stream);
  const int ended = api.group_end();
  api.check(status, "NCCL");
  api.check(ended, "NCCL");
}

#pragma GCC visibility push(default)
extern "C" {
// NCCL's version as a number, such as 22703 for 2.27.3.
int dylora_nccl_version() {
  TRY(-1, {
    api.open();
    int version = 0;
    api.check(api.version(&version), "ncclGetVersion");
    return version;
  })
}
// Writes the 128 bytes by which the processes of a new group know each other.
int dylora_nccl_unique_id(char *out) {
  TRY(-1, {
    api.open();
    UniqueId id;
    api.check(api.unique_id(&id), "ncclGetUniqueId");
    memcpy(out, id.bytes, sizeof id.bytes);
    return 0;
  })
}
// Meets the other processes of a group, and waits until all are there.
Nccl *dylora_nccl_new(int device, const char *id, int dist_rank, int size) {
  TRY(nullptr, {
    api.open();
    c10::cuda::CUDAGuard guard((c10::DeviceIndex)device);
    UniqueId unique;
    memcpy(unique.bytes, id, sizeof unique.bytes);
    auto nccl = std::make_unique<Nccl>((c10::DeviceIndex)device);
    api.check(api.init(&nccl->comm, size, unique, dist_rank), "ncclCommInitRank");
    return nccl.release();
  })
}
// Replaces contiguous tensors by their sums over all processes. Returns once this is queued. The
// current stream does not wait for it before `dylora_nccl_join`.
int dylora_nccl_all_reduce(Nccl *nccl, Tensor *const *tensors, size_t n) {
  TRY(-1, {
    grouped(nccl, tensors, n, [&](const Tensor &t, cudaStream_t stream) {
      return api.all_reduce(t.data_ptr(), t.data_ptr(), t.numel(), nccl_type(t), Sum, nccl->comm,
                            stream);
    });
    return 0;
  })
}
// Replaces contiguous tensors by those of process 0, in the same way.
int dylora_nccl_broadcast(Nccl *nccl, Tensor *const *tensors, size_t n) {
  TRY(-1, {
    grouped(nccl, tensors, n, [&](const Tensor &t, cudaStream_t stream) {
      return api.broadcast(t.data_ptr(), t.data_ptr(), t.numel(), nccl_type(t), 0, nccl->comm,
                           stream);
    });
    return 0;
  })
}
// Makes what the current stream queues from now on wait for all operations so far.
int dylora_nccl_join(Nccl *nccl) {
  TRY(-1, {
    c10::cuda::CUDAGuard guard(nccl->device);
    nccl->order(nccl->stream, c10::cuda::getCurrentCUDAStream(nccl->device));
    nccl->in_use.clear();
    return 0;
  })
}
// Fails if NCCL has found since that a connection is broken.
int dylora_nccl_check(Nccl *nccl) {
  TRY(-1, {
    if (nccl->is_aborted) return 0;
    int status = Success;
    api.check(api.async_error(nccl->comm, &status), "ncclCommGetAsyncError");
    api.check(status, "NCCL");
    return 0;
  })
}
// Ends all operations, those on the device too, so that a host that waits for them goes on. Any
// thread may call it.
int dylora_nccl_abort(Nccl *nccl) {
  TRY(-1, {
    if (!nccl->is_aborted.exchange(true)) api.check(api.abort(nccl->comm), "ncclCommAbort");
    return 0;
  })
}
int dylora_nccl_free(Nccl *nccl) {
  TRY(-1, {
    std::unique_ptr<Nccl> owned(nccl);
    if (!nccl->is_aborted.exchange(true)) api.check(api.destroy(nccl->comm), "ncclCommDestroy");
    return 0;
  })
}
}
#pragma GCC visibility pop
