//! The experts of a module under top-k routing, each computed only for the tokens that chose it:
//!
//! ```text
//! x [n, i] --gather by expert--> [n k, i] --A_e, g s_e, B_e of each expert's run--> [n k, o]
//!   --sum of each token's k rows--> + y [n, o]
//! ```
//!
//! If all experts are applied at once ([`LoraExperts::add`]), a token costs `R (i + o)`
//! multiplications, whatever its weights. Here a token costs `k r (i + o)` multiplications, and `k`
//! rows of `x` and of the update are copied. [`LoraExperts::skips`] decides which is cheaper. Both
//! give the same result, since the weights outside of the top k are zero.
//!
//! Letters of shapes: `b` batch, `t` position, `n = b t`, `k` chosen experts, `m = n k`
//! assignments, `i` in, `o` out, `e` expert, `r` rank, `R` sum of ranks.

use tch::{Device, Kind, Tensor};

use super::assignments::Assignments;
use super::dropout::LoraDropout;
use super::slots::RankRows;
use super::stack::LoraExperts;
use crate::ffi::Permutation;

/// The experts that a token did not choose are skipped on the CPU if at least this number of stack
/// rows is spared per token and chosen expert.
///
/// By `benches/experts.rs` in f32 with 512 tokens, on 2 threads of a shared x86-64 server, without
/// the measurements taken while others used it. The time relative to all experts at once is 1.0 to
/// 1.5 at 48 to 64 rows, 0.9 to 1.1 at 112, 0.90 to 0.96 at 128, 0.84 to 0.93 at 192, 0.4 to 0.5 at
/// 1000 and 0.25 at 8000.
const MIN_SPARED_ROWS_CPU: f64 = 128.0;
/// The same on CUDA, with `at::_grouped_mm`.
///
/// By `benches/experts.rs` in bf16 with 8192 tokens, on an H200. The relative time is 1.3 to 2.0 up
/// to 1920 rows, 0.98 to 1.0 at 1984, 0.86 to 0.92 at 4032 and 0.6 at 8000.
const MIN_SPARED_ROWS_CUDA: f64 = 3072.0;

/// How the matrix products of all experts are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// One pair of matrix products for each expert.
    Each,
    /// One pair of kernels for all experts, by `at::_grouped_mm`, which requires
    /// [`LoraExperts::can_group`].
    Grouped,
}

impl LoraExperts {
    /// Adds the updates of the chosen experts for the layer's input `x`, `[b, t, i]`, to the frozen
    /// layer's output `y`, `[b, t, o]`. Every expert must be plain ([`LoraExperts::is_plain`]).
    ///
    /// - `g`: the routing weights, `[b, t, e]`; those of experts that were not chosen are ignored
    /// - `dropout`: all experts share its mask
    pub fn add_grouped(
        &self,
        y: Tensor,
        x: &Tensor,
        g: &Tensor,
        assignments: &Assignments,
        dropout: LoraDropout,
    ) -> Tensor {
        let products =
            if self.can_group(x.kind(), x.device()) { Products::Grouped } else { Products::Each };
        self.add_grouped_by(products, y, x, g, assignments, dropout)
    }

    /// [`LoraExperts::add_grouped`] with the given way of computing the products.
    pub fn add_grouped_by(
        &self,
        products: Products,
        y: Tensor,
        x: &Tensor,
        g: &Tensor,
        assignments: &Assignments,
        dropout: LoraDropout,
    ) -> Tensor {
        assert!(
            self.is_plain(),
            "DoRA, PiSSA and OLoRA add more than the chosen experts' products"
        );
        let (b, t, i) = x.size3().expect("activations are [b, t, i]");
        let x_ni = dropout.apply(x).view([b * t, i]);
        let x_mi = assignments.permute(&x_ni, Permutation::Dispatch);
        let g_bte = g * &self.row_factors.scalings;
        let g_m = g_bte.view([-1]).index_select(0, &assignments.weights).to_kind(x.kind());
        let g_m1 = g_m.unsqueeze(-1);
        let update_mo = match products {
            Products::Each => self.products_of_each(&x_mi, &g_m1, assignments),
            Products::Grouped => self.grouped_products(&x_mi, &g_m1, assignments),
        };
        y + assignments.permute(&update_mo, Permutation::Combine).view([b, t, -1])
    }

    /// Whether [`LoraExperts::add_grouped`] is faster than all experts at once, for the input `x`.
    ///
    /// It spares a token the stack rows of the experts that it did not choose, `i + o`
    /// multiplications each. In return, it copies `i + o` numbers `k` times. So the mean number of
    /// spared rows divided by `k` decides, whatever the layer's shape.
    pub fn skips(&self, x: &Tensor, assignments: &Assignments) -> bool {
        let (n, k) = assignments.inverse.size2().expect("it is [n, k]");
        let rows_used = self.slots.iter().map(|slot| slot.rank * assignments.counts[slot.expert]);
        let spared =
            RankRows(&self.slots).num_stacked() as f64 - rows_used.sum::<i64>() as f64 / n as f64;
        self.is_spared_enough(spared, k, x.kind(), x.device())
    }

    /// Whether [`LoraExperts::skips`] is to be expected if each token chooses `k` of `num_experts`
    /// experts and every expert is chosen equally often.
    pub(crate) fn may_skip(&self, k: i64, num_experts: i64, kind: Kind, device: Device) -> bool {
        let spared =
            RankRows(&self.slots).num_stacked() as f64 * (1.0 - k as f64 / num_experts as f64);
        self.is_spared_enough(spared, k, kind, device)
    }

    fn is_spared_enough(&self, spared: f64, k: i64, kind: Kind, device: Device) -> bool {
        let least = match device {
            Device::Cpu => MIN_SPARED_ROWS_CPU,
            // with a pair of products for each expert, the time would go into kernel launches
            _ if !self.can_group(kind, device) => return false,
            _ => MIN_SPARED_ROWS_CUDA,
        };
        self.is_plain() && spared >= least * k as f64
    }

    /// Whether every expert is a product of A and B and nothing else, without DoRA, PiSSA or OLoRA.
    pub fn is_plain(&self) -> bool {
        self.dora.is_none() && self.initial.is_none()
    }

    /// Whether `at::_grouped_mm` has a kernel for inputs of `kind` on `device`. It needs bf16 on
    /// CUDA, every expert on the module with the same rank, and rows of a multiple of 16 bytes
    /// (`check_valid_strides_and_return_transposed` in `GroupedMMUtils.h` of libtorch 2.11).
    pub fn can_group(&self, kind: Kind, device: Device) -> bool {
        let widths = [self.lora_a.size()[1], self.lora_b.size()[1], self.slots[0].rank];
        self.row_factors.rows.is_none()
            && device.is_cuda()
            && kind == Kind::BFloat16
            && widths.iter().all(|width| width % 8 == 0)
    }

    /// `g_e s_e B_e A_e x` of each assignment, `[m, o]`, by one pair of products for each expert.
    fn products_of_each(&self, x_mi: &Tensor, g_m1: &Tensor, assignments: &Assignments) -> Tensor {
        let (kind, o) = (x_mi.kind(), self.lora_b.size()[1]);
        let ranks: Vec<i64> = self.slots.iter().map(|slot| slot.rank).collect();
        // one split, since the gradient of a slice for each expert would be as large as the whole
        // stack
        let a = self.lora_a.to_kind(kind).split_with_sizes(&ranks, 0);
        let b = self.lora_b.to_kind(kind).split_with_sizes(&ranks, 0);
        let x = x_mi.split_with_sizes(&assignments.counts, 0);
        let g = g_m1.split_with_sizes(&assignments.counts, 0);
        let update = |expert: usize| match self.slots.iter().position(|s| s.expert == expert) {
            Some(slot) => (x[expert].matmul(&a[slot].tr()) * &g[expert]).matmul(&b[slot]),
            // An expert without this module adds zeros. They keep the routing weights in the graph,
            // so that a backward pass finds them even if no other expert is chosen.
            None => g[expert].matmul(&x_mi.new_zeros([1, o], (kind, x_mi.device()))),
        };
        let chosen = (0..assignments.counts.len()).filter(|&e| assignments.counts[e] > 0);
        Tensor::cat(&chosen.map(update).collect::<Vec<_>>(), 0)
    }

    /// The same, `[m, o]`, by one kernel for all A and one for all B.
    fn grouped_products(&self, x_mi: &Tensor, g_m1: &Tensor, assignments: &Assignments) -> Tensor {
        let e = assignments.counts.len() as i64;
        let stack = |stack: &Tensor| {
            let stack = stack.to_kind(x_mi.kind()).view([e, -1, stack.size()[1]]);
            // Blackwell's kernel does not write the gradient of an expert without tokens
            // (pytorch/pytorch#172439). The mask sets it to 0.
            stack.masked_fill(&assignments.unchosen, 0.0)
        };
        let product = |rows: &Tensor, matrices: &Tensor| {
            rows.internal_grouped_mm(matrices, Some(&assignments.ends), None, None)
        };
        let z_mr = product(x_mi, &stack(&self.lora_a).transpose(1, 2)) * g_m1;
        product(&z_mr, &stack(&self.lora_b))
    }
}
