//! The LoRA experts of one frozen linear layer (LoRA, arXiv:2106.09685, eq. 3, weighted per token):
//!
//! ```text
//! y = x W + b + sum_e g_e * s_e * drop(x) A_e^T B_e^T       s_e = alpha_e / r_e, or / sqrt(r_e)
//! ```
//!
//! Experts may differ in rank and scaling, and some may not target the layer. All A lie in one
//! stack, `[R, i]` with `R = sum_e r_e`, and all transposed B in another, `[R, o]`. So the layer
//! costs one pair of matrix products for any number of experts ([`LoraExperts::add`]). An expert is
//! a run of rows of both stacks.
//!
//! Two kinds of experts have more:
//!
//! - **PiSSA and OLoRA** start from components `A0`, `B0` of the base's own weight. PEFT subtracts
//!   them from the base, `W - s B0 A0`, which fits one adapter only. Here each expert subtracts its
//!   own: its update is `s (B A - B0 A0)`. For one expert this is the same, and for any number of
//!   experts and any weights it leaves the base unchanged. It costs twice the rank.
//! - **DoRA** (arXiv:2402.09353, eqs. 5 and 11) scales each output of the updated layer. With
//!   `c_e = m_e / |W + s B A|` (norm over inputs, without gradient), expert e alone gives
//!   `c_e * (x W + s x A^T B^T) + b`. With routing weights, the layer adds `g_e` times the
//!   difference between this and the base: `g_e ((c_e - 1) * x W + c_e * s x A^T B^T)`.
//!
//! Letters of shapes: `b` batch, `t` position, `n = b t`, `i` in, `o` out, `e` expert, `r` rank,
//! `R` sum of ranks, `R0` sum of the ranks of PiSSA and OLoRA experts, `m` experts with a
//! magnitude.

use tch::{Device, Kind, Tensor};

use super::delta::Delta;
use super::slots::{RankRows, Slot};

/// The experts of one target module.
#[derive(Debug)]
pub struct LoraExperts {
    /// Down-projections `[R, i]`; an expert's rows are PEFT's `lora_A.weight`.
    pub(crate) lora_a: Tensor,
    /// Up-projections `[R, o]`; an expert's rows are PEFT's `lora_B.weight`, transposed.
    pub(crate) lora_b: Tensor,
    pub(crate) dora: Option<Dora>,
    /// `A0`, `[R0, i]`, and `B0`, `[R0, o]`, of the PiSSA and OLoRA experts.
    pub(crate) initial: Option<(Tensor, Tensor)>,
    pub(crate) slots: Vec<Slot>,
    pub(super) row_factors: RowFactors,
}

/// What the DoRA experts of a module have besides A and B.
#[derive(Debug)]
pub(crate) struct Dora {
    /// Magnitudes `[m, o]`; an expert's row is PEFT's `lora_magnitude_vector`.
    pub magnitude: Tensor,
    /// Squared norm of the base's weight for each output, `[o]`.
    pub base_norm2: Tensor,
    /// Indices of the DoRA experts, `[m]`; `None` if every expert is one.
    pub experts: Option<Tensor>,
    /// 1 where a row of the rank space belongs to the expert, `[m, R + R0]`.
    pub members: Tensor,
    /// 1 where a row of the rank space belongs to no DoRA expert, `[R + R0, 1]`.
    pub others: Tensor,
    /// 1 where two rows belong to the same DoRA expert, `[R + R0, R + R0]`.
    pub same: Tensor,
    /// `s_e` of each row of the rank space, `[R + R0, 1]`.
    pub scalings: Tensor,
}

impl Dora {
    fn shallow_clone(&self) -> Self {
        Self {
            magnitude: self.magnitude.shallow_clone(),
            base_norm2: self.base_norm2.shallow_clone(),
            experts: self.experts.as_ref().map(Tensor::shallow_clone),
            members: self.members.shallow_clone(),
            others: self.others.shallow_clone(),
            same: self.same.shallow_clone(),
            scalings: self.scalings.shallow_clone(),
        }
    }
}

/// How routing weights `[n, e]` become factors of the rank space's rows, on the module's device.
#[derive(Debug)]
pub(super) struct RowFactors {
    /// `s_e`, or 0 if the expert does not target the module, `[e]`.
    pub scalings: Tensor,
    /// The scaling where a row of the rank space belongs to the expert, otherwise 0, `[e, R + R0]`.
    /// `None` if every expert targets the module with the same rank and none has initial rows.
    pub rows: Option<Tensor>,
}

impl RowFactors {
    fn shallow_clone(&self) -> Self {
        Self {
            scalings: self.scalings.shallow_clone(),
            rows: self.rows.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// One tensor of an expert in PEFT's layout, as a view without gradient.
#[derive(Debug)]
pub struct ExpertTensor {
    /// The expert.
    pub expert: usize,
    /// `lora_a` `[r, i]`, `lora_b` `[o, r]`, `magnitude` `[o]`, `initial_a` `[r, i]` or `initial_b`
    /// `[o, r]`.
    pub key: &'static str,
    /// The values.
    pub tensor: Tensor,
}

impl LoraExperts {
    /// How the routing weights of `num_experts` experts become factors of rows.
    pub(super) fn row_factors(
        slots: &[Slot],
        num_experts: usize,
        options: (Kind, Device),
    ) -> RowFactors {
        let even = slots.len() == num_experts
            && slots.iter().all(|slot| slot.rank == slots[0].rank && slot.initial.is_none());
        let mut scalings = vec![0.0; num_experts];
        for slot in slots {
            scalings[slot.expert] = slot.scaling;
        }
        let scalings = Tensor::from_slice(&scalings).to_kind(options.0).to_device(options.1);
        let rows = (!even).then(|| RankRows(slots).scalings(num_experts, options));
        RowFactors { scalings, rows }
    }

    /// Every tensor of every expert as a view, so that copying into it changes the expert.
    pub fn tensors(&self) -> Vec<ExpertTensor> {
        let mut tensors = vec![];
        for slot in &self.slots {
            let mut add = |key, tensor: Tensor| {
                tensors.push(ExpertTensor { expert: slot.expert, key, tensor });
            };
            let rows = |stack: &Tensor, start| stack.detach().narrow(0, start, slot.rank);
            add("lora_a", rows(&self.lora_a, slot.start));
            add("lora_b", rows(&self.lora_b, slot.start).tr());
            if let (Some(row), Some(dora)) = (slot.magnitude, &self.dora) {
                add("magnitude", dora.magnitude.detach().get(row));
            }
            if let (Some(start), Some((a, b))) = (slot.initial, &self.initial) {
                add("initial_a", rows(a, start));
                add("initial_b", rows(b, start).tr());
            }
        }
        tensors
    }

    /// One expert's tensor by its key, as [`LoraExperts::tensors`] names it.
    pub fn tensor(&self, expert: usize, key: &str) -> Option<Tensor> {
        let mut tensors = self.tensors().into_iter();
        tensors.find(|t| t.expert == expert && t.key == key).map(|t| t.tensor)
    }

    /// The update of a slot's expert before scaling.
    pub(super) fn delta(&self, slot: &Slot) -> Delta {
        let rows = |stack: &Tensor, start| stack.narrow(0, start, slot.rank);
        let start = slot.initial.zip(self.initial.as_ref());
        Delta {
            a: rows(&self.lora_a, slot.start),
            b: rows(&self.lora_b, slot.start),
            start: start.map(|(start, (a, b))| (rows(a, start), rows(b, start))),
        }
    }

    /// `s_e` of an expert, if it targets the module.
    pub fn scaling(&self, expert: usize) -> Option<f64> {
        self.slots.iter().find(|slot| slot.expert == expert).map(|slot| slot.scaling)
    }

    /// The leaves of the graph: the stacks and magnitudes, whether they are trained or not.
    pub(crate) fn leaves(&self) -> impl Iterator<Item = &Tensor> {
        let magnitude = self.dora.as_ref().map(|dora| &dora.magnitude);
        [&self.lora_a, &self.lora_b].into_iter().chain(magnitude)
    }

    /// Another handle to the same parameters.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let clone = |tensor: &Tensor| tensor.shallow_clone();
        Self {
            lora_a: self.lora_a.shallow_clone(),
            lora_b: self.lora_b.shallow_clone(),
            dora: self.dora.as_ref().map(Dora::shallow_clone),
            initial: self.initial.as_ref().map(|(a, b)| (clone(a), clone(b))),
            slots: self.slots.clone(),
            row_factors: self.row_factors.shallow_clone(),
        }
    }
}
