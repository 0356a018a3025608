// What the CUDA part (csrc/cuda.cpp) offers to the fused operations (csrc/block.cpp, csrc/head_loss.cpp): own kernels,
// and matrix products with chosen algorithms. Each function returns false, having done nothing, where it does not apply.
#pragma once
#include <ATen/ATen.h>

// How the routing weights of E experts become factors of the R columns of a module's rank space.
struct RankColumns {
  at::Tensor expert_of;  // each column's expert, int32 [R]
  at::Tensor scaling;    // each column's scaling, f32 [R]; 0 for a column that only fills up
  at::Tensor runs;       // each expert's columns: [first, second) and [third, fourth), int32 [e, 4]
  at::Tensor rows;       // the scaling where a column is the expert's, else 0, [e, R]
};

enum class Epilogue { None, Bias, GeluAuxBias, DGelu };

// Matrices are 2-dim with contiguous columns; optional tensors may be undefined.
struct Kernels {
  // Compute capability of the current device, times ten.
  int (*capability)();
  // Whether there are kernels for activations of this dtype and width.
  bool (*apply_to)(at::ScalarType kind, int64_t width);
  // sum = x + y, a = LayerNorm(sum); without y, sum is not written.
  bool (*add_norm)(const at::Tensor &x, const at::Tensor &y, const at::Tensor &w, const at::Tensor &b, double eps,
                   const at::Tensor &sum, const at::Tensor &a, const at::Tensor &mean, const at::Tensor &rstd);
  // dx = residual + gradient of LayerNorm at x for da
  bool (*norm_backward)(const at::Tensor &da, const at::Tensor &x, const at::Tensor &mean, const at::Tensor &rstd,
                        const at::Tensor &w, const at::Tensor &residual, const at::Tensor &dx);
  bool (*weigh)(const at::Tensor &u, const at::Tensor &g, const RankColumns &rank_columns, const at::Tensor &v);
  // dg is added to if `adds`, else set; undefined if not wanted
  bool (*weigh_backward)(const at::Tensor &dv, const at::Tensor &u, const at::Tensor &g, const RankColumns &rank_columns,
                         const at::Tensor &du, const at::Tensor &dg, bool adds);
  // The experts' parts of a packed weight [W A^T; B^T 0].
  bool (*refresh)(const at::Tensor &a, const at::Tensor &b, const at::Tensor &packed);
  bool (*gelu)(const at::Tensor &z, const at::Tensor &out);
  bool (*gelu_backward)(const at::Tensor &z, const at::Tensor &dout, const at::Tensor &dz);
  // [dq | dk | dv] from [b, h, t, c] each
  bool (*pack_qkv)(const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &out);
  // Logits become their gradient if `scale` is defined.
  bool (*cross_entropy)(const at::Tensor &logits, const at::Tensor &labels, int64_t vocabulary, double smoothing,
                        const at::Tensor &scale, const at::Tensor &losses, const at::Tensor &smoothed);
  // out = a b, each transposed if it says so; bf16, out bf16 or f32
  bool (*gemm)(const at::Tensor &out, const at::Tensor &a, bool ta, const at::Tensor &b, bool tb, Epilogue epilogue,
               const at::Tensor &bias, const at::Tensor &aux);
};

// The kernels of this process, or null.
const Kernels *kernels();
