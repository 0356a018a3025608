// Matrix products by cuBLASLt. For each shape, the algorithms that it proposes are timed once, and
// the fastest is used. The interface (cublasLt.h of CUDA 13) is declared here as far as it is used,
// so that no CUDA library is needed to build.
#pragma once
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>

#include "kernels.h"

namespace lt {
typedef int Status;
typedef void *Handle;
typedef void *Layout;
typedef void *Desc;
typedef void *Preference;
struct Algo {
  uint64_t data[8];
};
struct Result {
  Algo algo;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};
enum { OpN = 0, OpT = 1 };
enum { Real32 = 0, BFloat16 = 14 };
enum { Compute32 = 68 };
enum {
  AttrTransA = 3, AttrTransB = 4, AttrEpilogue = 7, AttrBias = 8, AttrAux = 11, AttrAuxLd = 12
};
enum { EpilogueDefault = 1, EpilogueBias = 4, EpilogueGeluAuxBias = 164, EpilogueDGelu = 192 };
enum { PrefWorkspace = 1, PrefAlignA = 5, PrefAlignB = 6, PrefAlignC = 7, PrefAlignD = 8 };

struct Api {
  Status (*create)(Handle *);
  Status (*desc_create)(Desc *, int compute, int scale);
  Status (*desc_set)(Desc, int, const void *, size_t);
  Status (*layout_create)(Layout *, int type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*pref_create)(Preference *);
  Status (*pref_destroy)(Preference);
  Status (*pref_set)(Preference, int, const void *, size_t);
  Status (*heuristic)(Handle, Desc, Layout, Layout, Layout, Layout, Preference, int, Result *,
                      int *);
  Status (*matmul)(Handle, Desc, const void *, const void *, Layout, const void *, Layout,
                   const void *, const void *, Layout, void *, Layout, const Algo *, void *, size_t,
                   cudaStream_t);
  bool found = true;
  Api() {
    get(create, "cublasLtCreate");
    get(desc_create, "cublasLtMatmulDescCreate");
    get(desc_set, "cublasLtMatmulDescSetAttribute");
    get(layout_create, "cublasLtMatrixLayoutCreate");
    get(pref_create, "cublasLtMatmulPreferenceCreate");
    get(pref_destroy, "cublasLtMatmulPreferenceDestroy");
    get(pref_set, "cublasLtMatmulPreferenceSetAttribute");
    get(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    get(matmul, "cublasLtMatmul");
  }
  template <class F> void get(F &f, const char *name) {
    f = (F)dlsym(RTLD_DEFAULT, name);
    found = found && f;
  }
};

// The descriptors and the algorithm of a shape.
struct Product {
  Desc desc;
  Layout a, b, out;
  Algo algo;
  bool exists;  // whether there is such an algorithm
};
typedef std::array<int64_t, 16> Key;
constexpr size_t WORKSPACE = 64 << 20;
constexpr int CANDIDATES = 12;

struct State {
  Api api;
  std::map<int, std::pair<Handle, at::Tensor>> devices;  // handle and workspace
  std::map<Key, Product> products;
  std::mutex mutex;
};
inline State &state() {
  static State *state = new State();  // never destroyed, since CUDA may be unloaded before
  return *state;
}

inline int64_t alignment(const void *p) {
  const auto bits = (uint64_t)p;
  return std::min<int64_t>(256, (int64_t)(bits & -bits));
}

struct Operands {
  const void *a, *b;
  void *out;
  const void *bias;
  void *aux;
};

inline Status launch(State &s, Handle handle, const at::Tensor &workspace, const Product &p,
                     const Algo &algo, const Operands &at, cudaStream_t stream) {
  const float alpha = 1, beta = 0;
  return s.api.matmul(handle, p.desc, &alpha, at.b, p.b, at.a, p.a, &beta, at.out, p.out, at.out,
                      p.out, &algo, workspace.data_ptr(), WORKSPACE, stream);
}

// The index of the fastest candidate, by two rounds of three runs each after one run to warm up; -1
// if none runs.
inline int fastest(State &s, Handle handle, const at::Tensor &workspace, const Product &p,
                   const Result *candidates, int n, const Operands &at, cudaStream_t stream) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  int best = -1;
  float best_ms = 1e30f;
  for (int k = 0; k < n; ++k) {
    if (launch(s, handle, workspace, p, candidates[k].algo, at, stream)) continue;
    float ms = 1e30f;
    for (int round = 0; round < 2; ++round) {
      cudaEventRecord(begin, stream);
      for (int i = 0; i < 3; ++i) launch(s, handle, workspace, p, candidates[k].algo, at, stream);
      cudaEventRecord(end, stream);
      cudaEventSynchronize(end);
      float of_round = 1e30f;
      if (cudaEventElapsedTime(&of_round, begin, end) == cudaSuccess) ms = std::min(ms, of_round);
    }
    if (ms < best_ms) best_ms = ms, best = k;
  }
  cudaGetLastError();
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best;
}

// cuBLASLt takes matrices by columns, so it computes out^T = b^T a^T, with b as its first operand.
inline bool gemm(const at::Tensor &out, const at::Tensor &a, bool ta, const at::Tensor &b, bool tb,
                 Epilogue epilogue, const at::Tensor &bias, const at::Tensor &aux) {
  State &s = state();
  const bool wide = out.scalar_type() == at::kFloat;
  if (!s.api.found || a.scalar_type() != at::kBFloat16 || b.scalar_type() != at::kBFloat16 ||
      !(wide || out.scalar_type() == at::kBFloat16))
    return false;
  const int64_t m = out.size(0), n = out.size(1), k = ta ? a.size(0) : a.size(1);
  TORCH_CHECK((ta ? a.size(1) : a.size(0)) == m && (tb ? b.size(1) : b.size(0)) == k &&
                  (tb ? b.size(0) : b.size(1)) == n,
              "gemm: ", a.sizes(), " x ", b.sizes(), " -> ", out.sizes());
  TORCH_CHECK(a.stride(1) == 1 && b.stride(1) == 1 && out.stride(1) == 1,
              "gemm: columns must be contiguous");
  if (m == 0 || n == 0 || k == 0) return false;
  std::lock_guard<std::mutex> lock(s.mutex);
  c10::cuda::CUDAGuard guard(out.device());
  auto &device = s.devices[out.device().index()];
  const auto stream = c10::cuda::getCurrentCUDAStream(out.device().index()).stream();
  if (!device.first) {
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
      return false;
    // this may throw, so it comes before anything is kept
    const at::Tensor workspace = at::empty({(int64_t)WORKSPACE}, out.options().dtype(at::kByte));
    if (s.api.create(&device.first)) return false;
    device.second = workspace;
  }
  const Operands at{a.data_ptr(), b.data_ptr(), out.data_ptr(),
                    bias.defined() ? bias.data_ptr() : nullptr,
                    aux.defined() ? aux.data_ptr() : nullptr};
  const int64_t ld_aux = aux.defined() ? aux.stride(0) : 0;
  const int64_t aligned = std::min(std::min(alignment(at.a), alignment(at.b)), alignment(at.out));
  const Key key{m, n, k, a.stride(0), b.stride(0), out.stride(0), ta, tb, (int64_t)epilogue,
                ld_aux, wide, aligned, at.bias != nullptr, out.device().index(),
                at.aux ? alignment(at.aux) : 0, 0};
  auto found = s.products.find(key);
  auto point = [&](const Product &p) {
    if (at.bias) s.api.desc_set(p.desc, AttrBias, &at.bias, sizeof at.bias);
    if (at.aux) s.api.desc_set(p.desc, AttrAux, &at.aux, sizeof at.aux);
  };
  if (found == s.products.end()) {
    Product p{};
    if (s.api.desc_create(&p.desc, Compute32, Real32)) return false;
    const int op_b = tb ? OpT : OpN, op_a = ta ? OpT : OpN;
    const int epilogues[] = {EpilogueDefault, EpilogueBias, EpilogueGeluAuxBias, EpilogueDGelu};
    s.api.desc_set(p.desc, AttrTransA, &op_b, sizeof op_b);
    s.api.desc_set(p.desc, AttrTransB, &op_a, sizeof op_a);
    s.api.desc_set(p.desc, AttrEpilogue, &epilogues[(int)epilogue], sizeof(int));
    if (at.aux) s.api.desc_set(p.desc, AttrAuxLd, &ld_aux, sizeof ld_aux);
    s.api.layout_create(&p.b, BFloat16, tb ? k : n, tb ? n : k, b.stride(0));
    s.api.layout_create(&p.a, BFloat16, ta ? m : k, ta ? k : m, a.stride(0));
    s.api.layout_create(&p.out, wide ? Real32 : BFloat16, n, m, out.stride(0));
    point(p);
    Preference preference;
    if (s.api.pref_create(&preference)) return false;
    const size_t workspace = WORKSPACE;
    const uint32_t bytes = aligned;
    s.api.pref_set(preference, PrefWorkspace, &workspace, sizeof workspace);
    for (int which : {PrefAlignA, PrefAlignB, PrefAlignC, PrefAlignD})
      s.api.pref_set(preference, which, &bytes, sizeof bytes);
    Result results[CANDIDATES];
    int n_results = 0;
    const auto status = s.api.heuristic(device.first, p.desc, p.b, p.a, p.out, p.out, preference,
                                        CANDIDATES, results, &n_results);
    s.api.pref_destroy(preference);
    int best = status || !n_results ? -1 : 0;
    const bool captures =
        c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    if (best == 0 && n_results > 1 && !captures)
      best = fastest(s, device.first, device.second, p, results, n_results, at, stream);
    p.exists = best >= 0;
    if (p.exists) p.algo = results[best].algo;
    found = s.products.emplace(key, p).first;
  }
  if (!found->second.exists) return false;
  point(found->second);
  const auto status =
      launch(s, device.first, device.second, found->second, found->second.algo, at, stream);
  found->second.exists = status == 0;
  return found->second.exists;
}
}  // namespace lt
