// Cross entropy under a frozen head, one chunk of positions at a time. The gradient of the hidden
// states is computed from the same chunk. Declared to Rust in src/ffi/fused.rs.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "error.h"
#include "kernels.h"
#include "product.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using namespace fused;

namespace {
// The cross entropy of hidden [n, d] under the head [v', d], summed over positions and multiplied
// by `scale`. Only the first `vocabulary` rows of the head count, and no position with a label
// below 0. The second output is each position's loss without smoothing.
struct HeadLoss : torch::autograd::Function<HeadLoss> {
  static variable_list forward(AutogradContext *ctx, const Tensor &hidden, const Tensor &head,
                               const Tensor &labels, const Tensor &scale, int64_t vocabulary,
                               double smoothing, int64_t chunk) {
    const int64_t n = hidden.size(0);
    const auto wide = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const bool with_grad = hidden.requires_grad();
    const auto options = hidden.options().dtype(wide);
    Tensor losses = at::empty({n}, options), smoothed = at::empty({n}, options);
    Tensor dhidden = with_grad ? at::empty_like(hidden) : Tensor();
    const Tensor factor = scale.to(wide);
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t len = std::min(chunk, n - start);
      const Tensor h = hidden.detach().narrow(0, start, len), y = labels.narrow(0, start, len);
      Tensor of_losses = losses.narrow(0, start, len), of_smoothed = smoothed.narrow(0, start, len);
      Tensor logits = product(h, false, head, true);
      if (!(logits.is_cuda() && kernels() &&
            kernels()->cross_entropy(logits, y, vocabulary, smoothing,
                                     with_grad ? factor : Tensor(), of_losses, of_smoothed)))
        logits = plain(logits, y, vocabulary, smoothing, with_grad, factor, of_losses, of_smoothed);
      if (with_grad) product_into(dhidden.narrow(0, start, len), logits, false, head, false);
    }
    if (with_grad) ctx->save_for_backward({dhidden});
    ctx->mark_non_differentiable({losses});
    return {smoothed.sum() * factor, losses};
  }
  // The same in libtorch operations. Returns the gradient of the logits if `with_grad`.
  static Tensor plain(Tensor logits, const Tensor &labels, int64_t vocabulary, double smoothing,
                      bool with_grad, const Tensor &factor, Tensor &losses, Tensor &smoothed) {
    const auto kind = logits.scalar_type();
    Tensor z = logits.to(factor.scalar_type());
    if (vocabulary < z.size(1)) columns(z, vocabulary, z.size(1) - vocabulary).fill_(-INFINITY);
    const Tensor counts = labels.ge(0), at_ = labels.clamp_min(0).unsqueeze(-1);
    const Tensor lse = z.logsumexp(-1, true), at_label = z.gather(-1, at_);
    losses.copy_(at::where(counts, (lse - at_label).squeeze(-1), 0.0));
    Tensor loss = lse - at_label * (1 - smoothing);
    if (smoothing > 0) loss = loss - columns(z, 0, vocabulary).mean(-1, true) * smoothing;
    smoothed.copy_(at::where(counts, loss.squeeze(-1), 0.0));
    if (!with_grad) return logits;
    z.sub_(lse).exp_();
    if (smoothing > 0) columns(z, 0, vocabulary).sub_(smoothing / vocabulary);
    z.scatter_add_(-1, at_, at::full_like(lse, smoothing - 1));
    z.mul_(at::where(counts.unsqueeze(-1), factor, 0.0));
    return z.to(kind);
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    variable_list result(7);
    result[0] = saved[0] * grads[0].to(saved[0].scalar_type());
    return result;
  }
};
}  // namespace

extern "C" {
// out = [loss, token losses]
int dylora_head_loss(const Tensor *hidden, const Tensor *head, const Tensor *labels,
                     const Tensor *scale, int64_t vocabulary, double smoothing, int64_t chunk,
                     Tensor **out) {
  TRY(-1, {
    auto results = HeadLoss::apply(*hidden, *head, *labels, *scale, vocabulary, smoothing, chunk);
    out[0] = new Tensor(results[0]), out[1] = new Tensor(results[1]);
    return 0;
  })
}
}
