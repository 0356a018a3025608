// A C ABI over the parts of libtorch 2.11.0 that tch does not reach. Declared to Rust in
// src/ffi/mod.rs.
//
// A function that fails returns -1 or nullptr and leaves a message for dylora_take_error. Tensors
// are borrowed by pointer; the caller owns a returned tensor.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/version.h>

#include <mutex>
#include <vector>

#include "error.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

static std::vector<Tensor> list(Tensor *const *tensors, size_t n) {
  std::vector<Tensor> v;
  v.reserve(n);
  for (size_t i = 0; i < n; ++i) v.push_back(*tensors[i]);
  return v;
}

static at::Generator generator(int device) {
  return at::globalContext().defaultGenerator(device < 0 ? at::Device(at::kCPU)
                                                         : at::Device(at::kCUDA, device));
}

// Gradient checkpointing (arXiv:1604.06174): the forward pass runs the segment without a graph. The
// backward pass runs it again with a graph and differentiates that.
extern "C" {
// Computes the segment's output from its activations; nullptr after an error.
typedef Tensor *(*segment_run)(void *data, Tensor *const *activations, size_t n);
typedef void (*segment_drop)(void *data);
}
struct Segment : torch::CustomClassHolder {
  segment_run run;
  segment_drop drop;
  void *data;
  Segment(segment_run run, segment_drop drop, void *data) : run(run), drop(drop), data(data) {}
  ~Segment() override { drop(data); }
  Tensor operator()(const std::vector<Tensor> &activations) const {
    std::vector<Tensor *> pointers;
    for (auto &t : activations) pointers.push_back(const_cast<Tensor *>(&t));
    Tensor *out = run(data, pointers.data(), pointers.size());
    TORCH_CHECK(out, "a checkpointed segment failed");
    Tensor result = *out;
    delete out;
    return result;
  }
};
struct Checkpoint : torch::autograd::Function<Checkpoint> {
  // inputs: the activations, then the parameters that the segment uses without receiving them.
  // Autograd sees the tensors of a TensorList, but not those of a std::vector.
  static Tensor forward(AutogradContext *ctx, c10::intrusive_ptr<Segment> segment,
                        int64_t num_activations, at::TensorList inputs) {
    ctx->saved_data["segment"] = c10::IValue::make_capsule(segment);
    ctx->saved_data["num_activations"] = num_activations;
    ctx->save_for_backward(inputs.vec());
    return (*segment)({inputs.begin(), inputs.begin() + num_activations});
  }
  static variable_list backward(AutogradContext *ctx, variable_list grad_outputs) {
    auto segment =
        c10::static_intrusive_pointer_cast<Segment>(ctx->saved_data["segment"].toCapsule());
    const size_t num_activations = ctx->saved_data["num_activations"].toInt();
    auto saved = ctx->get_saved_variables();
    std::vector<Tensor> activations, wanted;
    std::vector<size_t> wanted_at;
    for (size_t i = 0; i < saved.size(); ++i) {
      Tensor t = saved[i];
      const bool needs_grad = t.requires_grad();
      if (i < num_activations) {
        t = t.detach().set_requires_grad(needs_grad);
        activations.push_back(t);
      }
      if (needs_grad) {
        wanted.push_back(t);
        wanted_at.push_back(i);
      }
    }
    Tensor out;
    {
      at::AutoGradMode graph(true);
      out = (*segment)(activations);
    }
    auto grads =
        torch::autograd::grad({out}, wanted, {grad_outputs[0]}, /*retain_graph=*/std::nullopt,
                              /*create_graph=*/false, /*allow_unused=*/true);
    variable_list result(2 + saved.size());  // undefined for `segment` and `num_activations`
    for (size_t i = 0; i < wanted.size(); ++i) result[2 + wanted_at[i]] = grads[i];
    return result;
  }
};

// With `dispatch`, gathers rows [n, d] of tokens into rows [n k, d] of assignments. Otherwise it
// sums the rows of assignments by token. Each is the other's gradient, and neither adds numbers in
// an order that varies, as index_add does. tokens [n k]: the token of each assignment's row;
// inverse [n, k]: the rows of each token's assignments.
struct Permutation : torch::autograd::Function<Permutation> {
  static Tensor rows_of(const Tensor &rows, const Tensor &tokens, const Tensor &inverse,
                        bool dispatch) {
    if (dispatch) return rows.index_select(0, tokens);
    auto sorted = rows.index_select(0, inverse.flatten());
    return inverse.size(1) == 1
               ? sorted
               : sorted.view({inverse.size(0), inverse.size(1), rows.size(1)}).sum(1);
  }
  static Tensor forward(AutogradContext *ctx, const Tensor &rows, const Tensor &tokens,
                        const Tensor &inverse, bool dispatch) {
    ctx->save_for_backward({tokens, inverse});
    ctx->saved_data["dispatch"] = dispatch;
    return rows_of(rows, tokens, inverse, dispatch);
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    return {
        rows_of(grads[0], saved[0], saved[1], !ctx->saved_data["dispatch"].toBool()), {}, {}, {}};
  }
};

extern "C" {
char *dylora_take_error() { return take_error(); }

const char *dylora_torch_version() { return TORCH_VERSION; }

// The path of libtorch_cpu.so, found through a function that it defines.
int dylora_libtorch_path(char *out, size_t capacity) {
  Dl_info info;
  if (!dladdr((void *)&at::globalContext, &info) || !info.dli_fname ||
      strlen(info.dli_fname) >= capacity)
    return -1;
  strcpy(out, info.dli_fname);
  return 0;
}

// The gradients of sum_i <outputs_i, weights_i> with respect to m inputs, into `grads`; nullptr for
// an input on which the outputs do not depend. The graph is freed.
int dylora_differentiate(Tensor *const *outputs, Tensor *const *weights, size_t n,
                         Tensor *const *inputs, size_t m, Tensor **grads) {
  TRY(-1, {
    const auto of_inputs =
        torch::autograd::grad(list(outputs, n), list(inputs, m), list(weights, n),
                              /*retain_graph=*/false, /*create_graph=*/false,
                              /*allow_unused=*/true);
    for (size_t i = 0; i < m; ++i)
      grads[i] = of_inputs[i].defined() ? new Tensor(of_inputs[i]) : nullptr;
    return 0;
  })
}

// One AdamW update of n tensors. `step`, `lr` and `found_inf` are 0-dim tensors on the same device.
// `step`, f32, is the number of this update, from 1. `lr` is f64 on the CPU and f32 on CUDA.
// `found_inf`, f32, is 1 if nothing is to be updated.
int dylora_adamw(Tensor *const *params, Tensor *const *grads, Tensor *const *exp_avgs,
                 Tensor *const *exp_avg_sqs, size_t n, Tensor *step, Tensor *lr, Tensor *found_inf,
                 double beta1, double beta2, double weight_decay, double eps) {
  TRY(-1, {
    at::NoGradGuard no_grad;
    auto p = list(params, n), g = list(grads, n), m = list(exp_avgs, n), v = list(exp_avg_sqs, n);
    std::vector<Tensor> steps(n, *step);
    at::_fused_adamw_(p, g, m, v, /*max_exp_avg_sqs=*/{}, steps, *lr, beta1, beta2, weight_decay,
                      eps, /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, *found_inf);
    return 0;
  })
}

// The 2-norm of all gradients together, a 0-dim tensor. If it exceeds a max_norm above 0, the
// gradients are scaled to max_norm (torch.nn.utils.clip_grad_norm_). The host does not wait.
Tensor *dylora_clip_grad_norm(Tensor *const *grads, size_t n, double max_norm) {
  TRY(nullptr, {
    at::NoGradGuard no_grad;
    auto g = list(grads, n);
    auto total = at::stack(at::_foreach_norm(g, 2)).norm(2);
    if (max_norm > 0) at::_foreach_mul_(g, (max_norm / (total + 1e-6)).clamp_max(1.0));
    return new Tensor(total);
  })
}

// device: -1 is the CPU, i is CUDA device i
Tensor *dylora_rng_state(int device) {
  TRY(nullptr, {
    auto g = generator(device);
    std::lock_guard<std::mutex> lock(g.mutex());
    return new Tensor(g.get_state());
  })
}
int dylora_set_rng_state(int device, Tensor *state) {
  TRY(-1, {
    auto g = generator(device);
    std::lock_guard<std::mutex> lock(g.mutex());
    g.set_state(*state);
    return 0;
  })
}

// The bytes that libtorch's allocator has given out on a CUDA device: [now, peak]
int dylora_memory_stats(int device, int64_t *out) {
  TRY(-1, {
    auto stats = at::accelerator::getDeviceStats(device);
    out[0] = stats.allocated_bytes[0].current;
    out[1] = stats.allocated_bytes[0].peak;
    return 0;
  })
}
// The free and the total bytes of a device, whoever uses them.
int dylora_device_memory(int device, int64_t *out) {
  TRY(-1, {
    auto [free, total] = at::accelerator::getMemoryInfo(device);
    out[0] = free;
    out[1] = total;
    return 0;
  })
}
// Gives back what the allocator holds unused, then restarts the peak at what is allocated now.
int dylora_reset_peak_memory(int device) {
  TRY(-1, {
    at::accelerator::emptyCache();
    at::accelerator::resetPeakStats(device);
    return 0;
  })
}

// The name of a CUDA device in the driver; -1 without a driver. CUDA's headers are not available
// here, but the driver's C API is stable.
int dylora_cuda_name(int device, char *out, int capacity) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!driver) return -1;
  auto init = (int (*)(unsigned))dlsym(driver, "cuInit");
  auto get = (int (*)(int *, int))dlsym(driver, "cuDeviceGet");
  auto name = (int (*)(char *, int, int))dlsym(driver, "cuDeviceGetName");
  int handle;
  const bool known =
      init && get && name && !init(0) && !get(&handle, device) && !name(out, capacity, handle);
  return known ? 0 : -1;
}

int dylora_empty_cache() {
  TRY(-1, {
    at::accelerator::emptyCache();
    return 0;
  })
}
// Makes a CUDA device the current one of this thread.
int dylora_use_device(int device) {
  TRY(-1, {
    at::accelerator::setDeviceIndex(device);
    return 0;
  })
}
// A copy in pinned memory, which a GPU can read by itself.
Tensor *dylora_pinned(Tensor *t) {
  TRY(nullptr, { return new Tensor(t->pin_memory()); })
}
int dylora_synchronize(int device) {
  TRY(-1, {
    at::accelerator::synchronizeDevice(device);
    return 0;
  })
}

Tensor *dylora_checkpoint(segment_run run, segment_drop drop, void *data, size_t num_activations,
                          Tensor *const *inputs, size_t n) {
  TRY(nullptr, {
    c10::intrusive_ptr<Segment> segment;
    try {
      segment = c10::make_intrusive<Segment>(run, drop, data);  // owns `data` from here on
    } catch (...) {
      drop(data);
      throw;
    }
    auto tensors = list(inputs, n);
    return new Tensor(
        Checkpoint::apply(segment, (int64_t)num_activations, at::TensorList(tensors)));
  })
}

// `rows` is 2-dim; `tokens` and `inverse` are int64 on the same device
Tensor *dylora_permute(Tensor *rows, Tensor *tokens, Tensor *inverse, int dispatch) {
  TRY(nullptr, { return new Tensor(Permutation::apply(*rows, *tokens, *inverse, dispatch != 0)); })
}
}
