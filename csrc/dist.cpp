// Processes that compute together: c10d's TCPStore, over which they meet, and its Gloo backend,
// which adds up their tensors on the CPU. Declared to Rust in src/ffi/dist.rs.
//
// A function that fails returns -1 or nullptr and leaves a message for dylora_take_error.
#define USE_C10D_GLOO 1
#include <ATen/ATen.h>
#include <c10/util/Logging.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <string>
#include <vector>

#include "error.h"

using at::Tensor;
using std::chrono::milliseconds;

struct Store {
  c10::intrusive_ptr<c10d::Store> c10d;
};
struct Group {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo;
};
struct Pending {
  c10::intrusive_ptr<c10d::Work> work;
};

extern "C" {
// Keeps libtorch's own log to what ends the process. Its other messages come back as errors.
void dylora_hide_warnings() { FLAGS_caffe2_log_level = 3; }

// Connects to the store at `host`. With `is_server`, this process holds the store.
Store *dylora_store_new(const char *host, int port, int is_server, int64_t timeout_ms) {
  TRY(nullptr, {
    c10d::TCPStoreOptions options;
    options.port = (uint16_t)port;
    options.isServer = is_server != 0;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    return new Store{c10::make_intrusive<c10d::TCPStore>(host, options)};
  })
}
int dylora_store_set(Store *store, const char *key, const uint8_t *bytes, size_t n) {
  TRY(-1, {
    store->c10d->set(key, std::vector<uint8_t>(bytes, bytes + n));
    return 0;
  })
}
// The bytes of a key, which the caller frees. Waits until the key is set, for the store's timeout
// at most.
uint8_t *dylora_store_get(Store *store, const char *key, size_t *n) {
  TRY(nullptr, {
    const auto value = store->c10d->get(key);
    auto bytes = (uint8_t *)malloc(value.size() + 1);
    memcpy(bytes, value.data(), value.size());
    *n = value.size();
    return bytes;
  })
}
// 1 if the key is set and 0 if not.
int dylora_store_has(Store *store, const char *key) {
  TRY(-1, { return store->c10d->check({key}) ? 1 : 0; })
}
// Sets a key unless it is set already.
int dylora_store_set_once(Store *store, const char *key, const uint8_t *bytes, size_t n) {
  TRY(-1, {
    store->c10d->compareSet(key, {}, std::vector<uint8_t>(bytes, bytes + n));
    return 0;
  })
}
int dylora_store_delete(Store *store, const char *key) {
  TRY(-1, {
    store->c10d->deleteKey(key);
    return 0;
  })
}
void dylora_store_free(Store *store) { delete store; }

// A group of `size` processes that meet under `prefix` in the store. `address` is the address of
// this machine, or the name of its network interface, over which the others reach it.
Group *dylora_gloo_new(Store *store, const char *prefix, int dist_rank, int size,
                       const char *address, int is_interface, int64_t timeout_ms) {
  TRY(nullptr, {
    using Gloo = c10d::ProcessGroupGloo;
    auto options = Gloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(is_interface ? Gloo::createDeviceForInterface(address)
                                            : Gloo::createDeviceForHostname(address));
    auto own = c10::make_intrusive<c10d::PrefixStore>(prefix, store->c10d);
    return new Group{c10::make_intrusive<Gloo>(own, dist_rank, size, options)};
  })
}
// Begins to replace a tensor on the CPU by its sum over all processes.
Pending *dylora_gloo_all_reduce(Group *group, Tensor *tensor) {
  TRY(nullptr, {
    at::NoGradGuard no_grad;
    std::vector<Tensor> tensors{*tensor};
    return new Pending{group->gloo->allreduce(tensors)};
  })
}
// Begins to replace a tensor on the CPU by that of process 0.
Pending *dylora_gloo_broadcast(Group *group, Tensor *tensor) {
  TRY(nullptr, {
    at::NoGradGuard no_grad;
    std::vector<Tensor> tensors{*tensor};
    return new Pending{group->gloo->broadcast(tensors)};
  })
}
// 1 if the work is done, and 0 if it is not after `wait_ms`.
int dylora_pending_wait(Pending *pending, int64_t wait_ms) {
  TRY(-1, {
    try {
      pending->work->wait(milliseconds(wait_ms));
      return 1;
    } catch (...) {
      if (!pending->work->isCompleted()) return 0;
    }
    // the work may have ended well just after the time was over; this throws only if it has failed
    pending->work->wait();
    return 1;
  })
}
void dylora_pending_free(Pending *pending) { delete pending; }
// Waits for work that is not done, so a group whose processes have failed must not be freed.
void dylora_gloo_free(Group *group) { delete group; }
}
