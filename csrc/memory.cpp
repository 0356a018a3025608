// Tensors over memory that Rust owns. Declared to Rust in src/ffi/memory.rs.
#include <ATen/ATen.h>

using at::Tensor;

extern "C" {
// A tensor over the memory of `view`, or nullptr after an error. drop(owner) is called once in
// either case, when nothing uses that memory any more.
Tensor *dylora_owned_view(Tensor *view, void (*drop)(void *), void *owner) {
  try {
    // libtorch owns `owner` from `context` on; nothing before it can throw
    return new Tensor(at::for_blob(view->data_ptr(), view->sizes())
                          .context(owner, drop)
                          .strides(view->strides())
                          .options(view->options())
                          .make_tensor());
  } catch (...) {
    return nullptr;
  }
}
}
