//! Cross entropy over a large vocabulary, without holding all logits in memory at once.
//!
//! The loss and its gradient with respect to the hidden states are computed from the same chunk of
//! positions, so that at most `chunk_tokens x v` logits are in memory. For a position with hidden
//! state h, label y and label smoothing s (arXiv:1512.00567, section 7):
//!
//! ```text
//! z = h W^T,   loss = logsumexp(z) - (1 - s) z_y - s mean(z)
//! dloss/dz = softmax(z) - (1 - s) onehot(y) - s / v,   dloss/dh = dloss/dz W
//! ```
//!
//! Letters of shapes: `n` labelled positions, `c` positions of a chunk, `d` width, `v` vocabulary.

use tch::Tensor;

use super::decoder::precision::wide;

/// How the loss is computed.
#[derive(Debug)]
pub struct LossSettings {
    /// Number of positions in a chunk.
    pub chunk_tokens: i64,
    /// Share of the target's probability that is spread evenly over the vocabulary.
    pub label_smoothing: f64,
    /// Factor of the sum over positions, 0-dim: 1 / label tokens of the step.
    pub scale: Tensor,
    /// Whether gradients are needed.
    pub with_grad: bool,
}

/// The loss of a batch's labelled positions.
#[derive(Debug)]
pub struct ChunkedLoss {
    /// The scaled sum, 0-dim, differentiable with respect to the hidden states and the head.
    pub loss: Tensor,
    /// `-log p(label)` of each position, without smoothing and without gradient, `[n]`, nats.
    pub token_losses: Tensor,
}

/// The loss of `hidden`, `[n, d]`, against `labels`, `[n]`, under the head `[v, d]`. A position
/// with label -100 has loss 0 and no gradient.
///
/// Where gradients are needed, they are computed here and not in the backward pass.
pub fn chunked_cross_entropy(
    hidden: &Tensor,
    head: &Tensor,
    labels: &Tensor,
    settings: LossSettings,
) -> ChunkedLoss {
    let sums = tch::no_grad(|| chunk_sums(hidden, head, labels, &settings));
    let token_losses = Tensor::cat(&sums.token_losses, 0);
    let mut loss = &sums.loss * settings.scale.to_kind(sums.loss.kind());
    // adds x . dx and subtracts the same without graph: the loss stays the same to the bit, and its
    // gradient for x is dx
    let mut attach = |x: &Tensor, dx: &Tensor| {
        let product = (x.to_kind(dx.kind()) * dx).sum(loss.kind());
        loss = &loss + (&product - product.detach());
    };
    if settings.with_grad && hidden.requires_grad() {
        attach(hidden, &Tensor::cat(&sums.d_hidden, 0));
    }
    if let Some(d_head) = sums.d_head {
        attach(head, &d_head);
    }
    ChunkedLoss { loss, token_losses }
}

/// The sums over all chunks.
struct ChunkSums {
    loss: Tensor,
    token_losses: Vec<Tensor>,
    d_hidden: Vec<Tensor>,
    d_head: Option<Tensor>,
}

fn chunk_sums(
    hidden: &Tensor,
    head: &Tensor,
    labels: &Tensor,
    settings: &LossSettings,
) -> ChunkSums {
    let kind = hidden.kind();
    // bf16 logits are converted to f32 at once; f64 stays f64
    let wide = wide(kind);
    let scale = settings.scale.to_kind(wide);
    let head_compute = head.detach().to_kind(kind);
    let mut sums = ChunkSums {
        loss: Tensor::zeros([], (wide, hidden.device())),
        token_losses: vec![],
        d_hidden: vec![],
        d_head: (settings.with_grad && head.requires_grad())
            .then(|| head.zeros_like().to_kind(wide)),
    };
    let (n, v, smoothing) = (hidden.size()[0], head.size()[0], settings.label_smoothing);
    // without labels there is one empty chunk, whose sums are zero
    for start in (0..n.max(1)).step_by(settings.chunk_tokens as usize) {
        let len = settings.chunk_tokens.min(n - start);
        let h_cd = hidden.detach().narrow(0, start, len);
        let labels_c1 = labels.narrow(0, start, len).unsqueeze(-1);
        let counts_c1 = labels_c1.ge(0).to_kind(wide);
        let y_c1 = labels_c1.clamp_min(0);
        let logits_cv = h_cd.matmul(&head_compute.tr()).to_kind(wide);
        let lse_c1 = logits_cv.logsumexp(-1, true);
        let label_logits_c1 = logits_cv.gather(-1, &y_c1, false);
        sums.token_losses.push(((&lse_c1 - &label_logits_c1) * &counts_c1).squeeze_dim(-1));
        let mut loss_c1 = &lse_c1 - label_logits_c1 * (1.0 - smoothing);
        if smoothing > 0.0 {
            loss_c1 -= logits_cv.mean_dim(-1, true, wide) * smoothing;
        }
        sums.loss += (loss_c1 * &counts_c1).sum(wide);
        if !settings.with_grad {
            continue;
        }
        let mut d_logits_cv = (logits_cv - lse_c1).exp_();
        if smoothing > 0.0 {
            d_logits_cv -= smoothing / v as f64;
        }
        let on_label = Tensor::full([len, 1], smoothing - 1.0, (wide, hidden.device()));
        let d_logits_cv =
            (d_logits_cv.scatter_add_(-1, &y_c1, &on_label) * (counts_c1 * &scale)).to_kind(kind);
        sums.d_hidden.push(d_logits_cv.matmul(&head_compute));
        if let Some(d_head) = &mut sums.d_head {
            *d_head += d_logits_cv.tr().matmul(&h_cd).to_kind(wide);
        }
    }
    sums
}
