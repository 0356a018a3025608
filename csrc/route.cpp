// A router of one linear layer by two kernels, one for each direction. It is defined by
// Router::forward (src/model/routing/router.rs). Declared to Rust in src/ffi/route.rs.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "error.h"
#include "kernels.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {
// The scores and their softmax, [M, e] each.
struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext *ctx, const Tensor &x, const Tensor &w,
                               const Tensor &b, const Tensor &temperature, bool normalizes,
                               double eps) {
    const auto options = x.options().dtype(at::kFloat);
    const Tensor logits = at::empty({x.size(0), w.size(0)}, options);
    const Tensor probs = at::empty_like(logits), rstd = at::empty({x.size(0)}, options);
    kernels()->route(x, w, b, temperature, normalizes, eps, logits, probs, rstd);
    ctx->save_for_backward({x, w, temperature, probs, rstd});
    ctx->saved_data["normalizes"] = normalizes;
    ctx->set_materialize_grads(false);
    return {logits, probs};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1], &temperature = saved[2], &probs = saved[3];
    const Tensor rstd = saved[4];
    variable_list result(6);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    for (auto &grad : grads)
      if (grad.defined()) grad = grad.contiguous();
    const int64_t e = w.size(0), d = w.size(1);
    const Tensor sums =
        kernels()->route_backward(x, rstd, probs, grads[0], grads[1], temperature);
    result[1] = sums.narrow(0, 0, e * d).view({e, d}), result[2] = sums.narrow(0, e * d, e);
    if (ctx->needs_input_grad(0)) {
      Tensor dz = grads[0];
      if (grads[1].defined()) {
        const Tensor of_row = (probs * grads[1]).sum(-1, true);
        const Tensor of_softmax = probs * (grads[1] - of_row) / temperature.to(at::kFloat);
        dz = dz.defined() ? dz + of_softmax : of_softmax;
      }
      Tensor dx = dz.mm(w);
      if (ctx->saved_data["normalizes"].toBool()) {
        const Tensor scale = rstd.unsqueeze(-1), h = x.to(at::kFloat) * scale;
        dx = (dx - h * (dx * h).mean(-1, true)) * scale;
      }
      result[0] = dx.to(x.scalar_type());
    }
    return result;
  }
};
}  // namespace

extern "C" {
// out = [scores, softmax of scores / temperature], f32 [M, e] each, of x, [M, d], by the f32
// parameters w, [e, d], and b, [e]; `temperature` is 0-dim, f64. Returns 1 if no kernel applies.
int dylora_route(const Tensor *x, const Tensor *w, const Tensor *b, const Tensor *temperature,
                 int normalizes, double eps, Tensor **out) {
  TRY(-1, {
    if (!kernels() || !kernels()->routes(*x, *w, *b)) return 1;
    const auto results = Route::apply(*x, *w, *b, *temperature, normalizes != 0, eps);
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}
}
