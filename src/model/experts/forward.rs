//! Applies the experts of a module to its input, all at once or one after the other.
//!
//! Letters of shapes: `b` batch, `t` position, `n = b t`, `i` in, `o` out, `e` expert, `R` sum of
//! ranks (with those of the initial components), `m` experts with a magnitude.

use tch::Tensor;

use super::dropout::LoraDropout;
use super::slots::Slot;
use super::stack::{Dora, LoraExperts, RowFactors};
use super::weights::RoutingWeights;
use crate::config::DropoutMasks;
use crate::model::decoder::linear::Linear;

impl LoraExperts {
    /// Adds the experts' updates for the layer's input `x`, `[b, t, i]`, to the frozen layer's
    /// output `y`, `[b, t, o]`. `dropout.masks` decides whether the experts are applied at once or
    /// one after the other. Under top-k routing, only the chosen experts are computed where that is
    /// faster.
    pub fn add(
        &self,
        y: Tensor,
        x: &Tensor,
        linear: &Linear,
        g: &RoutingWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        if let RoutingWeights::Chosen(weights, assignments) = g {
            if dropout.masks == DropoutMasks::Shared && self.skips(x, assignments) {
                return self.add_grouped(y, x, weights, assignments, dropout);
            }
            let g = RoutingWeights::PerToken(weights.shallow_clone());
            return self.add(y, x, linear, &g, dropout);
        }
        match (g, dropout.masks) {
            (RoutingWeights::Off, _) => y,
            // with these operations, a single expert equals plain LoRA to the bit
            (RoutingWeights::Ones, _) if self.slots.len() == 1 => {
                self.add_looped(y, x, linear, g, dropout)
            }
            (_, DropoutMasks::Shared) => self.add_stacked(y, x, linear, g, dropout),
            (_, DropoutMasks::PerExpert) => self.add_looped(y, x, linear, g, dropout),
        }
    }

    /// Applies all experts at once, by one pair of matrix products and one dropout mask. `g` is not
    /// `Off`.
    fn add_stacked(
        &self,
        y: Tensor,
        x: &Tensor,
        linear: &Linear,
        g: &RoutingWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        let kind = x.kind();
        let (b, t, i) = x.size3().expect("activations are [b, t, i]");
        let (n, o) = (b * t, self.lora_b.size()[1]);
        let y_no = y.view([n, o]);
        let x_ni = dropout.apply(x).view([n, i]);
        let (down, up) = self.factors();
        let dora = self.dora.as_ref().map(|dora| (dora, dora.factors(&down, &up, linear)));
        let up = match &dora {
            None => up,
            Some((dora, factors_mo)) => up * dora.factors_of_rows(factors_mo),
        };
        let z = self.weigh(x_ni.matmul(&down.to_kind(kind).tr()), g);
        let sum = y_no.addmm(&z, &up.to_kind(kind));
        let Some((dora, factors_mo)) = dora else { return sum.view([b, t, o]) };
        let base = match dropout.is_active() {
            true => x_ni.matmul(&linear.weight().to_kind(kind)),
            false => linear.without_bias(&y_no),
        };
        sum.addcmul(&base, &dora.weigh((factors_mo - 1.0).to_kind(kind), g)).view([b, t, o])
    }

    /// The stacked factors `A`, `[R, i]`, and `B^T`, `[R, o]`, of all updates before scaling.
    ///
    /// An expert that starts from the base's weight has the factors of the precise form of
    /// [`super::delta`]: its rows of the stacks hold `A` and `B - B0`, its initial rows `A - A0`
    /// and `B0`.
    pub(crate) fn factors(&self) -> (Tensor, Tensor) {
        let Some((_, initial_b)) = &self.initial else {
            return (self.lora_a.shallow_clone(), self.lora_b.shallow_clone());
        };
        let (mut down, mut up) = (vec![self.lora_a.shallow_clone()], vec![]);
        for slot in &self.slots {
            let delta = self.delta(slot);
            match delta.moved() {
                None => up.push(delta.b),
                Some((a, b)) => {
                    up.push(b);
                    down.push(a);
                }
            }
        }
        up.push(initial_b.shallow_clone());
        (Tensor::cat(&down, 0), Tensor::cat(&up, 0))
    }

    /// Multiplies the rank space `z`, `[n, R]`, by the scaling and the routing weight of each of
    /// its columns.
    fn weigh(&self, z: Tensor, g: &RoutingWeights) -> Tensor {
        let kind = z.kind();
        let (n, rows) = z.size2().expect("rank space is [n, R]");
        let RowFactors { scalings: s_e, rows: rows_er } = &self.row_factors;
        match (g, rows_er) {
            (RoutingWeights::Off | RoutingWeights::Chosen(..), _) => {
                unreachable!("nothing is added then, or it became weights per token")
            }
            (RoutingWeights::Ones, None) => {
                let e = s_e.size()[0];
                (z.view([n, e, -1]) * s_e.to_kind(kind).view([e, 1])).view([n, rows])
            }
            (RoutingWeights::PerToken(g_bte), None) => {
                let e = s_e.size()[0];
                let g = (g_bte.view([n, e, 1]) * s_e.view([e, 1])).to_kind(kind);
                (z.view([n, e, -1]) * g).view([n, rows])
            }
            (RoutingWeights::Ones, Some(rows_er)) => z * rows_er.sum_dim_intlist(0, false, kind),
            (RoutingWeights::PerToken(g_bte), Some(rows_er)) => {
                z * g_bte.view([n, -1]).matmul(rows_er).to_kind(kind)
            }
        }
    }

    /// Applies one expert after the other, each with its own dropout mask, exactly by the formulas
    /// of PEFT 0.21 (`Linear.forward` and `DoraLinearLayer.forward`). `g` is not `Off`.
    fn add_looped(
        &self,
        mut y: Tensor,
        x: &Tensor,
        linear: &Linear,
        g: &RoutingWeights,
        dropout: LoraDropout,
    ) -> Tensor {
        let kind = x.kind();
        let base = (self.dora.is_some() && !dropout.is_active()).then(|| linear.without_bias(&y));
        for slot in &self.slots {
            let x = dropout.apply(x);
            let part = |a: &Tensor, b: &Tensor| {
                x.matmul(&a.to_kind(kind).tr()).matmul(&b.to_kind(kind)) * slot.scaling
            };
            let delta = self.delta(slot);
            let mut update = match (delta.moved(), &delta.start) {
                (Some((a, b)), Some((_, b0))) => part(&delta.a, &b) + part(&a, b0),
                _ => part(&delta.a, &delta.b),
            };
            if let (Some(row), Some(dora)) = (slot.magnitude, &self.dora) {
                let norm_o = tch::no_grad(|| self.updated_weight_norm(slot, linear));
                let factor = dora.magnitude.get(row) / norm_o;
                let base = match &base {
                    Some(base) => base.shallow_clone(),
                    None => x.matmul(&linear.weight().to_kind(kind)),
                };
                // the factor is near 1, so 1 is subtracted before rounding to bf16
                update = base * (&factor - 1.0).to_kind(kind) + factor.to_kind(kind) * update;
            }
            y = match g {
                RoutingWeights::PerToken(g_bte) => {
                    y + update * g_bte.narrow(-1, slot.expert as i64, 1).to_kind(kind)
                }
                _ => y + update,
            };
        }
        y
    }

    /// `|W + s (B A - B0 A0)|` over inputs, `[o]`, from the full weight.
    fn updated_weight_norm(&self, slot: &Slot, linear: &Linear) -> Tensor {
        let kind = self.lora_a.kind();
        let (a, b) = self.delta(slot).plain();
        let weight_io = linear.weight().to_kind(kind) + a.tr().matmul(&(b * slot.scaling));
        weight_io.square().sum_dim_intlist(0, false, kind).sqrt()
    }
}

impl Dora {
    /// `c_e = m_e / |W + s B A|` of the DoRA experts, `[m, o]`, differentiable through `m_e` only
    /// (arXiv:2402.09353, section 4.3).
    ///
    /// With `U = s B^T`, the squared norm is `|W|^2 + 2 sum_r (A W) U + sum_r U (A A^T U)`. It is
    /// computed for all experts at once, without forming an updated weight `[i, o]`.
    ///
    /// - `down`, `up`: `A`, `[R, i]`, and `B^T`, `[R, o]`, as [`LoraExperts::factors`] returns them
    fn factors(&self, down: &Tensor, up: &Tensor, linear: &Linear) -> Tensor {
        let kind = self.magnitude.kind();
        let norms = tch::no_grad(|| {
            let (down, up) = (down.detach(), up.detach() * &self.scalings);
            let cross = down.matmul(&linear.weight().detach().to_kind(kind)) * 2.0;
            // only products within one expert count
            let square = (down.matmul(&down.tr()) * &self.same).matmul(&up);
            let norm2 = &self.base_norm2 + self.members.matmul(&((cross + square) * up));
            norm2.clamp_min(f64::from(f32::MIN_POSITIVE)).sqrt()
        });
        &self.magnitude / norms
    }

    /// The factor of each row of the rank space, `[R, o]`, from the experts' factors `[m, o]`; 1
    /// for the rows of experts without DoRA.
    fn factors_of_rows(&self, factors_mo: &Tensor) -> Tensor {
        self.others.addmm(&self.members.tr(), factors_mo)
    }

    /// `sum_e g_e values_e` over the DoRA experts: `[n, o]`, or `[o]` if every weight is 1.
    fn weigh(&self, values_mo: Tensor, g: &RoutingWeights) -> Tensor {
        let kind = values_mo.kind();
        match g {
            RoutingWeights::PerToken(g_bte) => {
                let e = *g_bte.size().last().expect("routing weights are [b, t, e]");
                let g_ne = g_bte.view([-1, e]);
                let g_nm = match &self.experts {
                    None => g_ne,
                    Some(experts) => g_ne.index_select(1, experts),
                };
                g_nm.to_kind(kind).matmul(&values_mo)
            }
            _ => values_mo.sum_dim_intlist(0, false, kind),
        }
    }
}
