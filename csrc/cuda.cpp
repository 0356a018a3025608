// What needs CUDA itself: graphs, dylora's own kernels, and matrix products with chosen algorithms.
// This is a shared object of its own, embedded in the binary and loaded after libtorch's CUDA part,
// so that the same binary runs without CUDA. Declared to Rust in src/ffi/cuda.rs.
#include <ATen/ATen.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cuda.h>

#include <limits>
#include <memory>
#include <string>

#include "error.h"
#include "gemm.h"
#include "kernels.h"

using at::Tensor;

// A graph, the stream on which it is captured, and its memory, which it may share with other
// graphs.
struct Graph {
  at::cuda::CUDAGraph graph;
  c10::DeviceIndex device;
  c10::cuda::CUDAStream side, previous;
  c10::MempoolId_t memory;
  explicit Graph(c10::DeviceIndex device)
      : device(device), side(c10::cuda::getStreamFromPool(false, device)),
        previous(c10::cuda::getCurrentCUDAStream(device)), memory(at::cuda::graph_pool_handle()) {}
  void enter() {
    previous = c10::cuda::getCurrentCUDAStream(device);
    c10::cuda::device_synchronize();
    c10::cuda::setCurrentCUDAStream(side);
  }
  void leave() { c10::cuda::setCurrentCUDAStream(previous); }
  // Undoes what a failed capture leaves behind: a generator that counts for a graph, and allocators
  // that take memory from the graph's pool. Errors are ignored: an allocator reports one if it no
  // longer does so.
  void give_up() {
    leave();
    auto attempt = [](auto clear) {
      try {
        clear();
      } catch (...) {
      }
    };
    attempt([&] {
      at::Generator current = at::globalContext().defaultGenerator(at::Device(at::kCUDA, device));
      current.graphsafe_set_state(before);
    });
    attempt([&] {
      c10::cuda::CUDACachingAllocator::endAllocateToPool(device, memory);
      c10::cuda::CUDACachingAllocator::releasePool(device, memory);
    });
    attempt([&] {
      at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(memory);
      at::getHostAllocator(at::kCUDA)->release_pool(memory);
    });
    before = at::Generator();
    cudaGetLastError();
  }
  at::Generator before;  // the generator's state when the capture began
};

// ---- dylora's own kernels: csrc/kernels, compiled at run time.

// The driver and NVRTC, from the library through which libtorch itself reaches them.
struct Compiler {
  CUresult (*module_load)(CUmodule *, const void *);
  CUresult (*get_function)(CUfunction *, CUmodule, const char *);
  CUresult (*set_attribute)(CUfunction, CUfunction_attribute, int);
  CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                     unsigned, CUstream, void **, void **);
  CUresult (*launch_with)(const CUlaunchConfig *, CUfunction, void **, void **);
  CUresult (*device_attribute)(int *, CUdevice_attribute, CUdevice);
  int (*version)(int *, int *);
  int (*create)(void **, const char *, const char *, int, const char *const *, const char *const *);
  int (*compile)(void *, int, const char *const *);
  int (*log_size)(void *, size_t *);
  int (*log)(void *, char *);
  int (*cubin_size)(void *, size_t *);
  int (*cubin)(void *, char *);
  int (*destroy)(void **);
  void open(const char *library) {
    void *handle = dlopen(library, RTLD_NOW);
    TORCH_CHECK(handle, dlerror());
    get(handle, module_load, "cuModuleLoadData");
    get(handle, get_function, "cuModuleGetFunction");
    get(handle, set_attribute, "cuFuncSetAttribute");
    get(handle, launch, "cuLaunchKernel");
    get(handle, launch_with, "cuLaunchKernelEx");
    get(handle, device_attribute, "cuDeviceGetAttribute");
    get(handle, version, "nvrtcVersion");
    get(handle, create, "nvrtcCreateProgram");
    get(handle, compile, "nvrtcCompileProgram");
    get(handle, log_size, "nvrtcGetProgramLogSize");
    get(handle, log, "nvrtcGetProgramLog");
    get(handle, cubin_size, "nvrtcGetCUBINSize");
    get(handle, cubin, "nvrtcGetCUBIN");
    get(handle, destroy, "nvrtcDestroyProgram");
  }
  template <class F> void get(void *handle, F &f, const char *name) {
    f = (F)dlsym(handle, name);
    TORCH_CHECK(f, "no `", name, "`: ", dlerror());
  }
};
static Compiler compiler;

// Lets blocks of a kernel have so many bytes of dynamic shared memory; returns false if the driver
// refuses.
static bool allows_shared(CUfunction f, int64_t bytes) {
  return !compiler.set_attribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)bytes);
}

enum Name {
  AddNorm, NormBackward, Weigh, WeighBackward, AddMasked, Refresh, Gelu, GeluBackward, SwiGlu,
  SwiGluBackward,
  Rotate, RotateBackward, CrossEntropy, StepChoice, Route, RouteBackward,
  // of csrc/kernels/dropout.cuh and csrc/kernels/quantise.cuh, in bf16 only
  DropBits, DropApply, DropDown, DropUp, DropGrad1, DropGrad2, DropGrad3, Quantise,
  // of csrc/kernels/step
  StepEmbed, StepNorm, StepFinish, StepAttention, ThinProduct, ThinProductOfOne, ThinProductOfTwo,
  FinishMany, ThinProductOf16,  // in bf16 only
  NAMES
};
static const char *const names[NAMES] = {
    "add_norm", "norm_backward", "weigh", "weigh_backward", "add_masked", "refresh", "gelu",
    "gelu_backward", "swiglu", "swiglu_backward", "rotate", "rotate_backward", "cross_entropy",
    "step_choice", "route", "route_backward", "drop_bits", "drop_apply", "drop_down", "drop_up",
    "drop_grad_1", "drop_grad_2", "drop_grad_3", "quantise", "step_embed", "step_norm",
    "step_finish", "step_attention", "thin_product", "thin_product_of_one", "thin_product_of_two",
    "finish_many", "thin_product_of_16"};
// The kernels for one width on one device, in bf16 and f32.
struct KernelModule {
  CUfunction functions[2][NAMES];
  int shared_memory;  // the most that a block of cross_entropy can have, bytes
};
static std::map<std::pair<int, int64_t>, KernelModule> modules;
static std::map<int, KernelModule> latest;  // for kernels that do not depend on the width
static std::map<int, KernelModule> latest_step;  // the same for those of csrc/kernels/step

static int dtype_index(at::ScalarType kind) {
  return kind == at::kBFloat16 ? 0 : kind == at::kFloat ? 1 : -1;
}
static const KernelModule *module_of(const Tensor &x, int64_t width) {
  if (!x.is_cuda() || dtype_index(x.scalar_type()) < 0) return nullptr;
  auto found = modules.find({x.device().index(), width});
  return found == modules.end() ? nullptr : &found->second;
}
static const KernelModule *any_module(const Tensor &x,
                                      const std::map<int, KernelModule> &modules = latest) {
  if (!x.is_cuda() || dtype_index(x.scalar_type()) < 0) return nullptr;
  auto found = modules.find(x.device().index());
  return found == modules.end() ? nullptr : &found->second;
}

template <class... Args>
static void run(const KernelModule *module, Name name, const Tensor &like, int64_t blocks,
                int threads, int shared, Args... args) {
  if (blocks == 0) return;
  void *pointers[] = {(void *)&args...};
  auto f = module->functions[dtype_index(like.scalar_type())][name];
  c10::cuda::CUDAGuard guard(like.device());
  auto stream = c10::cuda::getCurrentCUDAStream(like.device().index()).stream();
  auto status =
      compiler.launch(f, (unsigned)blocks, 1, 1, threads, 1, 1, shared, stream, pointers, nullptr);
  TORCH_CHECK(status == 0, "kernel `", names[name], "` failed with CUDA error ", (int)status);
}
// The same with launch attributes.
template <class... Args>
static void launch_with(const KernelModule *module, Name name, const Tensor &like, int64_t blocks,
                        int threads, int64_t shared,
                        CUlaunchAttribute *attributes, int num_attributes, Args... args) {
  void *pointers[] = {(void *)&args...};
  c10::cuda::CUDAGuard guard(like.device());
  CUlaunchConfig config{};
  config.gridDimX = (unsigned)blocks, config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = (unsigned)threads, config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = (unsigned)shared;
  config.hStream = c10::cuda::getCurrentCUDAStream(like.device().index()).stream();
  config.attrs = attributes, config.numAttrs = num_attributes;
  const auto f = module->functions[dtype_index(like.scalar_type())][name];
  const auto status = compiler.launch_with(&config, f, pointers, nullptr);
  TORCH_CHECK(status == 0, "kernel `", names[name], "` failed with CUDA error ", (int)status);
}
static CUlaunchAttribute in_clusters(int64_t cluster) {
  CUlaunchAttribute size{};
  size.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  size.value.clusterDim.x = (unsigned)cluster;
  size.value.clusterDim.y = size.value.clusterDim.z = 1;
  return size;
}
// The same in clusters of blocks, which may read each other's shared memory.
template <class... Args>
static void run_cluster(const KernelModule *module, Name name, const Tensor &like, int64_t blocks,
                        int threads, int64_t shared, int64_t cluster, Args... args) {
  if (cluster == 1) return run(module, name, like, blocks, threads, (int)shared, args...);
  if (blocks == 0) return;
  CUlaunchAttribute size = in_clusters(cluster);
  launch_with(module, name, like, blocks, threads, shared, &size, 1, args...);
}
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static void *at_or_null(const Tensor &x) { return x.defined() ? x.data_ptr() : nullptr; }
static int64_t ld(const Tensor &x) { return x.defined() ? x.stride(0) : 0; }
// Whether rows have contiguous columns and begin and end at multiples of 16 bytes.
static bool packs(const Tensor &x) {
  if (!x.defined()) return true;
  const auto size = x.element_size();
  return x.stride(1) == 1 && x.stride(0) * size % 16 == 0 && (uint64_t)x.data_ptr() % 16 == 0 &&
         x.size(1) * size % 16 == 0;
}

// A number of the current device.
static int attribute(CUdevice_attribute name) {
  int value = 0;
  compiler.device_attribute(&value, name, c10::cuda::current_device());
  return value;
}
static int capability() {
  static const int of_first = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                              attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  return of_first;
}
static int64_t multiprocessors() {
  static const int of_first = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  return of_first;
}
static bool apply_to(at::ScalarType kind, int64_t width) {
  const int device = c10::cuda::current_device();
  return dtype_index(kind) >= 0 && modules.count({device, width});
}
#include "block_kernels.h"
#include "step_kernels.h"
#include "route_kernels.h"
#include "dropout_kernels.h"

static const Kernels table{
    capability, apply_to, add_norm, norm_backward, weigh, weigh_backward, refresh, add_masked,
    draws_masks, draw_mask, drop_apply, drop_down, drop_up, drop_grad, quantise, gelu,
    gelu_backward, swiglu, swiglu_backward, rotate, rotate_backward, cross_entropy, lt::gemm,
    step_embed, step_norm, step_finish, step_attention, thin_product, step_choice, routes, route,
    route_backward};

#pragma GCC visibility push(default)
extern "C" {
char *dylora_cuda_take_error() { return take_error(); }

// Opens what compiles and launches kernels. `library` is the path of libtorch's libcaffe2_nvrtc.so.
int dylora_cuda_open_compiler(const char *library) {
  TRY(-1, {
    compiler.open(library);
    return 0;
  })
}
// What identifies compiled code: compute capability and NVRTC's version, as [major, minor, major,
// minor].
int dylora_cuda_target(int device, int *out) {
  TRY(-1, {
    TORCH_CHECK(
        !compiler.device_attribute(out, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device));
    TORCH_CHECK(
        !compiler.device_attribute(out + 1, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device));
    TORCH_CHECK(!compiler.version(out + 2, out + 3));
    return 0;
  })
}
// The machine code of `source`, which the caller frees with dylora_cuda_free.
char *dylora_cuda_compile(const char *source, const char *const *options, int n, size_t *size) {
  TRY(nullptr, {
    void *program = nullptr;
    TORCH_CHECK(!compiler.create(&program, source, "kernels.cu", 0, nullptr, nullptr),
                "NVRTC does not start");
    std::unique_ptr<void *, void (*)(void **)> guard(&program,
                                                     [](void **p) { compiler.destroy(p); });
    if (compiler.compile(program, n, options)) {
      size_t length = 0;
      compiler.log_size(program, &length);
      std::string log(length, 0);
      compiler.log(program, &log[0]);
      TORCH_CHECK(false, "NVRTC: ", log);
    }
    TORCH_CHECK(!compiler.cubin_size(program, size) && *size > 0, "NVRTC made no code");
    auto code = (char *)malloc(*size);
    compiler.cubin(program, code);
    return code;
  })
}
void dylora_cuda_free(void *p) { free(p); }
// Loads machine code for activations of `width` on `device`: that of csrc/kernels or, after it,
// that of csrc/kernels/step.
int dylora_cuda_load_kernels(const char *code, int device, int64_t width, int of_steps) {
  TRY(-1, {
    c10::cuda::CUDAGuard guard((c10::DeviceIndex)device);
    c10::cuda::device_synchronize();  // makes the device's context
    CUmodule loaded;
    auto status = compiler.module_load(&loaded, code);
    TORCH_CHECK(status == 0, "the driver refuses the kernels: CUDA error ", (int)status);
    KernelModule module{};
    if (of_steps) {
      auto found = modules.find({device, width});
      TORCH_CHECK(found != modules.end(), "the kernels of steps come after the others");
      module = found->second;
    }
    for (int kind = 0; kind < 2; ++kind)
      for (int i = of_steps ? StepEmbed : 0; i < (of_steps ? NAMES : StepEmbed); ++i) {
        if (kind == 1 && ((i >= DropBits && i <= Quantise) || i >= FinishMany)) continue;
        const auto name = std::string(names[i]) + (kind == 0 ? "_bf16" : "_f32");
        TORCH_CHECK(!compiler.get_function(&module.functions[kind][i], loaded, name.c_str()),
                    "no kernel ", name);
      }
    if (of_steps) {
      CUfunction &finish_many = module.functions[0][FinishMany];
      if (!allows_shared(finish_many, SHARED_OF_MANY)) finish_many = nullptr;
      for (auto &functions : module.functions)
        for (const Name name : {ThinProduct, ThinProductOfOne, ThinProductOfTwo, ThinProductOf16})
          TORCH_CHECK(!functions[name] || allows_shared(functions[name], shared_of_thin(module)),
                      "the driver refuses the shared memory of ", names[name]);
      modules[{device, width}] = latest_step[device] = module;
      return 0;
    }
    compiler.device_attribute(&module.shared_memory,
                              CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device);
    module.shared_memory -= 1024;  // for the kernel's static shared memory
    for (auto &functions : module.functions)
      if (!allows_shared(functions[CrossEntropy], module.shared_memory)) module.shared_memory = 0;
    modules[{device, width}] = module;
    latest[device] = module;
    return 0;
  })
}
const Kernels *dylora_cuda_kernels() { return &table; }

// An empty graph on a device.
Graph *dylora_cuda_graph_new(int device) {
  TRY(nullptr, {
    c10::cuda::CUDAGuard guard((c10::DeviceIndex)device);
    return new Graph((c10::DeviceIndex)device);
  })
}
// Whatever runs between enter and leave runs on the graph's stream, so that a warm-up creates
// handles and workspaces there.
int dylora_cuda_graph_enter(Graph *g) {
  TRY(-1, {
    c10::cuda::CUDAGuard guard(g->device);
    g->enter();
    return 0;
  })
}
int dylora_cuda_graph_leave(Graph *g) {
  TRY(-1, {
    g->leave();
    g->side.synchronize();
    return 0;
  })
}
// With `memory_of`, the graph shares the memory of that graph. The two must never run at the same
// time, and what one leaves in the memory is lost once the other runs.
int dylora_cuda_graph_begin(Graph *g, Graph *memory_of) {
  TRY(-1, {
    c10::cuda::CUDAGuard guard(g->device);
    // the allocator keeps blocks by stream, so the stream is shared too
    if (memory_of) g->side = memory_of->side, g->memory = memory_of->memory;
    g->before = at::globalContext().defaultGenerator(at::Device(at::kCUDA, g->device)).clone();
    g->enter();
    try {
      g->graph.capture_begin(g->memory, cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      g->give_up();
      throw;
    }
    return 0;
  })
}
int dylora_cuda_graph_end(Graph *g) {
  TRY(-1, {
    c10::cuda::CUDAGuard guard(g->device);
    try {
      g->graph.capture_end();
    } catch (...) {
      g->give_up();
      throw;
    }
    g->before = at::Generator();
    g->leave();
    return 0;
  })
}
int dylora_cuda_graph_replay(Graph *g) {
  TRY(-1, {
    c10::cuda::CUDAGuard guard(g->device);
    g->graph.replay();
    return 0;
  })
}
void dylora_cuda_graph_free(Graph *g) { delete g; }

// A copy of numbers on its way to the host. What the stream gets afterwards need not be waited for.
// `source` keeps the memory that is copied from being used for other things.
struct Fetch {
  Tensor source, numbers;
  c10::cuda::CUDAEvent arrived;
};
// If it is `aside`, the copy runs in another stream, and later work in the current one does not
// wait for it. Until the copy has arrived, nothing may overwrite those of its numbers that will be
// used. So they must not lie in a graph's memory, which its replays use for other things as well.
Fetch *dylora_cuda_fetch(const Tensor *numbers, int aside) {
  TRY(nullptr, {
    const auto device = numbers->device();
    c10::cuda::CUDAGuard guard(device);
    const auto pinned = numbers->options().device(at::kCPU).pinned_memory(true);
    auto fetch = std::make_unique<Fetch>();
    fetch->source = *numbers, fetch->numbers = at::empty(numbers->sizes(), pinned);
    auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    if (aside) {
      fetch->arrived.record(stream);
      stream = c10::cuda::getStreamFromPool(false, device.index());
      fetch->arrived.block(stream);
    }
    c10::cuda::CUDAStreamGuard of_copy(stream);
    fetch->numbers.copy_(*numbers, true);
    fetch->arrived.record(stream);
    return fetch.release();
  })
}
// Waits for the numbers and frees the copy. The caller owns the tensor.
Tensor *dylora_cuda_fetched(Fetch *fetch) {
  std::unique_ptr<Fetch> owned(fetch);
  TRY(nullptr, {
    owned->arrived.synchronize();
    return new Tensor(owned->numbers);
  })
}

// A place in a device's queue. CUDA keeps the time when the device passes it.
cudaEvent_t dylora_cuda_mark(int device) {
  TRY(nullptr, {
    c10::cuda::CUDAGuard guard(device);
    cudaEvent_t mark = nullptr;
    auto status = cudaEventCreate(&mark);
    if (status == cudaSuccess) {
      status = cudaEventRecord(mark, c10::cuda::getCurrentCUDAStream(device).stream());
      if (status != cudaSuccess) cudaEventDestroy(mark);
    }
    TORCH_CHECK(status == cudaSuccess, "CUDA error: ", cudaGetErrorString(status));
    return mark;
  })
}
// The seconds between two marks that the device has passed; NaN with an error if it has not.
double dylora_cuda_mark_secs(cudaEvent_t from, cudaEvent_t to) {
  TRY(std::numeric_limits<double>::quiet_NaN(), {
    float milliseconds = 0;
    const auto status = cudaEventElapsedTime(&milliseconds, from, to);
    TORCH_CHECK(status == cudaSuccess, "CUDA error: ", cudaGetErrorString(status));
    return milliseconds / 1e3;
  })
}
void dylora_cuda_mark_free(cudaEvent_t mark) { cudaEventDestroy(mark); }
}
#pragma GCC visibility pop
